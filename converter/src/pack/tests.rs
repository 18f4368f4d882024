// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::os::unix::fs::FileExt;

fn tar(files: u32) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for n in 0..files {
        let mut header = tar::Header::new_gnu();
        let content: Vec<u8> = (0..n * 977)
            .map(|i| (i % 251 + n).to_le_bytes()[0])
            .collect();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, format!("dir/file{n}"), content.as_slice())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

struct Run {
    threads: usize,
    budget_bytes: u64,
    part_bytes: usize,
}

fn run(blob: &[u8], input: &Input, how: &Run) -> Result<Packed, PackError> {
    let (parts, body) = tokio::sync::mpsc::channel(blob.len() / how.part_bytes + 1);
    for part in blob.chunks(how.part_bytes) {
        parts.try_send(Ok(Bytes::copy_from_slice(part))).unwrap();
    }
    drop(parts);
    let pool = Pool::new(how.threads).unwrap();
    let budget = ByteBudget::new(how.budget_bytes);
    let spool = crate::spool::create(&std::env::temp_dir()).unwrap();
    pack(input, body, spool, &pool, &budget, &|_| {})
}

const PLENTY: Run = Run {
    threads: 2,
    budget_bytes: 1 << 26,
    part_bytes: 70_000,
};

fn input(blob: &[u8], tar: &[u8]) -> Input {
    Input {
        what: "test blob".into(),
        blob: BlobDigest::of(blob),
        blob_bytes: blob.len() as u64,
        diff_id: DiffId::of(tar),
        caps: Caps::default(),
        encode: EncodeOptions::default(),
        keep: None,
    }
}

fn bytes_of(packed: &Packed) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(packed.blob_bytes).unwrap()];
    packed.spool.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(BlobDigest::of(&bytes), packed.blob);
    bytes
}

#[test]
fn a_packed_layer_is_the_same_tar_whatever_the_threads() {
    let tar = tar(200);
    let blob = zstd::encode_all(tar.as_slice(), 1).unwrap();
    let input = input(&blob, &tar);
    let first = run(&blob, &input, &PLENTY).unwrap();
    assert_eq!(first.tar_bytes, tar.len() as u64);
    let bytes = bytes_of(&first);
    assert!(
        zstd::decode_all(bytes.as_slice()).unwrap() == tar,
        "any zstd decoder reads it"
    );
    let index = first.index.clone().expect("lazy");
    let (start, end) = (index.extent.start(), index.extent.end());
    let payload = &bytes[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()];
    assert_eq!(
        sluice_blockindex::digest::IndexDigest::of(payload),
        index.digest
    );
    for how in [
        Run {
            threads: 1,
            budget_bytes: 1,
            part_bytes: 1 << 20,
        },
        Run {
            threads: 7,
            budget_bytes: 300_000,
            part_bytes: 1000,
        },
    ] {
        let again = run(&blob, &input, &how).unwrap();
        assert_eq!((again.blob, again.index), (first.blob, first.index.clone()));
    }
}

#[test]
fn what_is_not_what_was_named_is_refused_with_its_cause() {
    let tar = tar(50);
    let blob = zstd::encode_all(tar.as_slice(), 1).unwrap();
    let good = input(&blob, &tar);
    let mut flipped = blob.clone();
    flipped[blob.len() / 2] ^= 1;
    let cut = &blob[..blob.len() - 100];
    let long = [&blob[..], &[0]].concat();
    for (name, bytes) in [("flipped", &flipped[..]), ("cut", cut), ("long", &long)] {
        let error = run(bytes, &good, &PLENTY).expect_err(name);
        assert!(
            matches!(error, PackError::Source(ImageError::Corrupt { .. })),
            "{name}: {error}"
        );
    }
    let other = Input {
        diff_id: DiffId::of(b"another tar"),
        ..good.clone()
    };
    assert!(matches!(
        run(&blob, &other, &PLENTY),
        Err(PackError::DiffId { .. })
    ));
    // Named by its own digest, but no zstd any more.
    let input = input(&flipped, &tar);
    assert!(matches!(
        run(&flipped, &input, &PLENTY),
        Err(PackError::Inflate { .. } | PackError::DiffId { .. })
    ));
    let caps = Caps {
        layer_bytes: tar.len() as u64 - 1,
        ratio: 1000,
    };
    let error = run(&blob, &Input { caps, ..good }, &PLENTY)
        .expect_err("too large")
        .to_string();
    assert!(error.contains("--max-layer-bytes"), "{error}");
}

#[test]
fn a_source_that_fails_is_the_reported_cause() {
    let tar = tar(50);
    let (parts, body) = tokio::sync::mpsc::channel(2);
    parts
        .try_send(Ok(Bytes::copy_from_slice(&tar[..1000])))
        .unwrap();
    parts
        .try_send(Err(ImageError::failed("read", "x", "line broke")))
        .unwrap();
    let pool = Pool::new(1).unwrap();
    let spool = crate::spool::create(&std::env::temp_dir()).unwrap();
    let input = input(&tar, &tar);
    let error = pack(&input, body, spool, &pool, &ByteBudget::new(1000), &|_| {});
    assert_eq!(error.expect_err("broken").to_string(), "read x: line broke");
}

#[test]
fn one_layer_at_a_time_gathers_much() {
    use std::sync::mpsc::channel;
    use std::time::Duration;
    let tar = tar(200);
    let pack_beside = |large_bytes: u64, waits: bool| {
        let budget = ByteBudget::with_large_bytes(1 << 26, large_bytes);
        let (done, finished) = channel();
        std::thread::scope(|scope| {
            let another_layer = budget.claim_large();
            scope.spawn(|| {
                let (parts, body) = tokio::sync::mpsc::channel(1);
                parts.try_send(Ok(Bytes::copy_from_slice(&tar))).unwrap();
                drop(parts);
                let spool = crate::spool::create(&std::env::temp_dir()).unwrap();
                let pool = Pool::new(1).unwrap();
                let packed = pack(&input(&tar, &tar), body, spool, &pool, &budget, &|_| {});
                done.send(packed.map(|packed| packed.index.is_ok()))
                    .unwrap();
            });
            let patience = if waits { 300 } else { 60_000 };
            let early = finished.recv_timeout(Duration::from_millis(patience));
            drop(another_layer);
            let waited = early.is_err();
            let packed = early.or_else(|_| finished.recv()).unwrap();
            assert!(packed.unwrap(), "lazy");
            waited
        })
    };
    assert!(!pack_beside(1 << 20, false), "small: it does not wait");
    assert!(pack_beside(1 << 10, true), "large: it waits");
}

#[test]
fn a_full_disk_is_named() {
    let tar = tar(300);
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let (parts, body) = tokio::sync::mpsc::channel(1);
    parts.try_send(Ok(Bytes::copy_from_slice(&tar))).unwrap();
    drop(parts);
    let pool = Pool::new(1).unwrap();
    let input = input(&tar, &tar);
    let error = pack(
        &input,
        body,
        full,
        &pool,
        &ByteBudget::new(1 << 20),
        &|_| {},
    );
    let error = error.expect_err("full").to_string();
    assert!(error.contains("No space left"), "{error}");
}

#[test]
fn caps_name_the_option_that_sets_them() {
    let caps = Caps {
        layer_bytes: 10 << 30,
        ratio: 100,
    };
    assert_eq!(caps.for_blob(1), (RATIO_FREE_BYTES, "--max-ratio"));
    assert_eq!(caps.for_blob(100 << 20), (100 * (100 << 20), "--max-ratio"));
    assert_eq!(caps.for_blob(1 << 30), (10 << 30, "--max-layer-bytes"));
    assert_eq!(caps.for_blob(u64::MAX), (10 << 30, "--max-layer-bytes"));
}
