// SPDX-License-Identifier: Apache-2.0
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use super::*;
use crate::frames::decode_chunk;
use crate::index::{INDEX_FILE_MAX_BYTES, Index, decompress_index};
use crate::skeleton::rebuild;
use crate::tree::FileRun;

/// Bytes that compress somewhat, the same in every run.
fn sample(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963);
        b"0123456789abcdefghijklmnopqrstuv"[usize::try_from(state >> 59).unwrap()]
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// A layer with all kinds of sizes: small, grouped, large and split.
fn example_tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |path: &str, size: usize, kind, link: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_size(size as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        header.set_entry_type(kind);
        if link.is_empty() {
            let content = sample(size, size as u64);
            builder
                .append_data(&mut header, path, &content[..])
                .unwrap();
        } else {
            builder.append_link(&mut header, path, link).unwrap();
        }
    };
    add("usr/", 0, tar::EntryType::Directory, "");
    for (at, size) in [0, 1, 511, 512, 513, 70_000, 300_000, 1_500_000, 10]
        .iter()
        .enumerate()
    {
        add(&format!("usr/file{at}"), *size, tar::EntryType::Regular, "");
    }
    for at in 0..300 {
        add(
            &format!("usr/small{at}"),
            at * 7,
            tar::EntryType::Regular,
            "",
        );
    }
    add("usr/file7", 2000, tar::EntryType::Regular, "");
    add("usr/hard", 0, tar::EntryType::Link, "usr/file6");
    add("usr/soft", 0, tar::EntryType::Symlink, "file6");
    builder.into_inner().unwrap()
}

fn encode(tar: &[u8]) -> (Vec<u8>, Trailer) {
    encode_layer(tar, EncodeOptions::default()).unwrap()
}

fn index_of(blob: &[u8], trailer: &Trailer) -> Index<Vec<u8>> {
    let pin = trailer.index.clone().unwrap();
    let range = pin.extent.range();
    let payload = &blob[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
    assert_eq!(IndexDigest::of(payload), pin.digest);
    let file = decompress_index(payload, INDEX_FILE_MAX_BYTES).unwrap();
    assert_eq!(file.len() as u64, pin.file_bytes);
    UncheckedIndex::parse(file).unwrap().validate().unwrap()
}

fn of_blob(blob: &[u8], extent: Extent<BlobSpace>) -> &[u8] {
    &blob[usize::try_from(extent.start()).unwrap()..usize::try_from(extent.end()).unwrap()]
}

fn of_device(tar: &[u8], extent: Extent<DeviceSpace>) -> &[u8] {
    &tar[usize::try_from(extent.start()).unwrap()..usize::try_from(extent.end()).unwrap()]
}

#[test]
fn the_chunks_of_the_index_are_the_tar() {
    let tar = example_tar();
    let (blob, trailer) = encode(&tar);
    assert_eq!(trailer.blob_bytes, blob.len() as u64);
    assert_eq!(trailer.diff_id, DiffId::of(&tar));
    let index = index_of(&blob, &trailer);
    assert!(index.fits_blob(trailer.blob_bytes));
    assert_eq!(index.diff_id(), trailer.diff_id);
    let mut device = Vec::new();
    for chunk in index.chunk_map().chunks() {
        let chunk = chunk.unwrap();
        assert_eq!(chunk.device.start(), device.len() as u64);
        device.extend(decode_chunk(of_blob(&blob, chunk.blob), &chunk).unwrap());
    }
    assert_eq!(device, tar);
}

#[test]
fn files_have_digests_and_large_ones_begin_chunks() {
    let tar = example_tar();
    let (blob, trailer) = encode(&tar);
    let index = index_of(&blob, &trailer);
    let files = index.files().unwrap();
    // One per content in the tar, also the replaced one; empty files have none.
    assert_eq!(files.len(), 8 + 299 + 1);
    for file in files.contents() {
        let content = of_device(&tar, file.run);
        assert_eq!(file.digest, FileDigest::of(DEFAULT_ALGORITHM, content));
        if file.run.len() >= 64 * 1024 {
            let chunk = index.chunk_map().at(file.run.start()).unwrap();
            assert_eq!(chunk.device.start(), file.run.start());
        }
    }
    let tree = index.tree().unwrap();
    let usr = tree.lookup(tree.root(), b"usr").unwrap().unwrap();
    for (name, size) in [("file5", 70_000), ("file7", 2000), ("hard", 300_000)] {
        let nid = tree.lookup(usr, name.as_bytes()).unwrap().unwrap();
        let Some(FileRun {
            device: 1,
            start_block,
        }) = tree.run(nid).unwrap()
        else {
            panic!("{name} has no run on device 1");
        };
        let content = files.at_block(start_block).unwrap();
        assert_eq!(of_device(&tar, content.run), sample(size, size as u64));
    }
}

#[test]
fn the_skeleton_rebuilds_the_tar_byte_for_byte() {
    let tar = example_tar();
    let (blob, trailer) = encode(&tar);
    let index = index_of(&blob, &trailer);
    let pin = index.metadata().skeleton;
    let payload = of_blob(&blob, pin.extent);
    assert_eq!(DiffId::of(payload).as_bytes(), &pin.digest);
    assert!(
        payload.len() * 20 < tar.len(),
        "skeleton of {} bytes",
        payload.len()
    );
    let files = index.files().unwrap();
    let mut rebuilt = Vec::new();
    let provide = |request: crate::skeleton::ContentRequest, out: &mut dyn Write| {
        let content = files
            .content(usize::try_from(request.ordinal).unwrap())
            .unwrap();
        assert_eq!(content.run, request.run);
        out.write_all(of_device(&tar, content.run))
    };
    rebuild(payload, index.device_bytes(), provide, &mut rebuilt).unwrap();
    assert_eq!(rebuilt, tar);
}

#[test]
fn every_zstd_decoder_restores_the_tar() {
    for tar in [example_tar(), vec![0; 1024], vec![]] {
        let (blob, _) = encode(&tar);
        let mut streamed = Vec::new();
        zstd::stream::read::Decoder::new(&blob[..])
            .unwrap()
            .read_to_end(&mut streamed)
            .unwrap();
        assert_eq!(streamed, tar);
        assert_eq!(zstd_binary(&blob), tar);
    }
}

/// What `zstd -d` makes of a blob; the binary is part of every build environment of the project.
fn zstd_binary(blob: &[u8]) -> Vec<u8> {
    let mut child = Command::new("zstd")
        .args(["-d", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the zstd command is installed");
    let mut stdin = child.stdin.take().unwrap();
    let blob = blob.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&blob));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    output.stdout
}

#[test]
fn the_seek_table_lists_every_frame() {
    let tar = example_tar();
    let (blob, trailer) = encode(&tar);
    let entries = seektable::parse(&blob).unwrap();
    let chunks = usize::try_from(index_of(&blob, &trailer).chunk_map().count()).unwrap();
    assert_eq!(entries.len(), chunks + 2);
    let (mut at, mut device) = (0, 0);
    for entry in &entries {
        let frame = &blob[at..at + usize::try_from(entry.compressed_bytes).unwrap()];
        let content = zstd::decode_all(frame).unwrap();
        assert_eq!(
            content.len(),
            usize::try_from(entry.decompressed_bytes).unwrap()
        );
        assert_eq!(content, tar[device..device + content.len()]);
        at += frame.len();
        device += content.len();
    }
    assert_eq!(device, tar.len());
    assert_eq!(blob[at..at + 4], seektable::SEEK_TABLE_MAGIC.to_le_bytes());
    assert_eq!(
        blob.len() - at,
        usize::try_from(seektable::table_bytes(
            u32::try_from(entries.len()).unwrap()
        ))
        .unwrap()
    );
}

/// Encodes with pieces of `piece` bytes and jobs that run backwards on `threads` threads.
fn encode_in_pieces(tar: &[u8], piece: usize, threads: usize) -> Vec<u8> {
    let mut encoder = LayerEncoder::new(EncodeOptions::default()).unwrap();
    let mut jobs = Vec::new();
    for bytes in tar.chunks(piece) {
        encoder.push(bytes, &mut jobs).unwrap();
    }
    let plan = encoder.finish(&mut jobs).unwrap();
    let mut chunks: Vec<EncodedChunk> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let jobs = jobs.iter().rev().skip(worker).step_by(threads);
                scope.spawn(move || jobs.map(|job| job.run().unwrap()).collect::<Vec<_>>())
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap())
            .collect()
    });
    chunks.sort_by_key(|chunk| chunk.record.ordinal);
    let records: Vec<ChunkRecord> = chunks.iter().map(|chunk| chunk.record).collect();
    let mut blob: Vec<u8> = chunks.into_iter().flat_map(|chunk| chunk.frame).collect();
    blob.extend(plan.assemble(&records).unwrap().bytes);
    blob
}

#[test]
fn the_blob_depends_on_neither_pieces_nor_threads() {
    let tar = example_tar();
    let (blob, _) = encode(&tar);
    for (piece, threads) in [(1, 1), (511, 2), (4096, 5), (1_000_003, 3)] {
        assert!(
            encode_in_pieces(&tar, piece, threads) == blob,
            "{piece} bytes, {threads} threads"
        );
    }
}

#[test]
fn what_cannot_be_lazy_is_still_a_blob() {
    let mut sparse = tar::Header::new_gnu();
    sparse.set_path("sparse").unwrap();
    sparse.set_size(5);
    sparse.set_entry_type(tar::EntryType::GNUSparse);
    sparse.set_cksum();
    let mut tar = example_tar();
    tar.truncate(tar.len() - 1024);
    tar.extend_from_slice(sparse.as_bytes());
    tar.extend_from_slice(&sample(600_000, 1));
    for (tar, reason) in [
        (tar, "sparse: sparse file"),
        (sample(10_000, 2), "tar header at 0: wrong checksum"),
        (
            example_tar()[..2500].to_vec(),
            "tar ends at 2500, 60 bytes too early",
        ),
    ] {
        let (blob, trailer) = encode(&tar);
        assert_eq!(trailer.index, Err(reason.to_owned()));
        assert_eq!(zstd_binary(&blob), tar);
        assert_eq!(trailer.diff_id, DiffId::of(&tar));
        for (piece, threads) in [(77, 1), (100_000, 2)] {
            assert!(encode_in_pieces(&tar, piece, threads) == blob);
        }
    }
}

/// Encodes on this thread, after `change` has had its way with the limits.
fn encode_limited(
    tar: &[u8],
    piece: usize,
    change: impl Fn(&mut LayerEncoder),
    index_max_bytes: u64,
) -> (Vec<u8>, Trailer) {
    let mut encoder = LayerEncoder::new(EncodeOptions::default()).unwrap();
    change(&mut encoder);
    let (mut jobs, mut blob) = (Vec::new(), Vec::new());
    for bytes in tar.chunks(piece) {
        encoder.push(bytes, &mut jobs).unwrap();
    }
    let mut plan = encoder.finish(&mut jobs).unwrap();
    plan.index_max_bytes = index_max_bytes;
    let chunks: Vec<_> = jobs.iter().map(|job| job.run().unwrap()).collect();
    let records: Vec<_> = chunks.iter().map(|chunk| chunk.record).collect();
    blob.extend(chunks.into_iter().flat_map(|chunk| chunk.frame));
    let trailer = plan.assemble(&records).unwrap();
    blob.extend(&trailer.bytes);
    (blob, trailer)
}

#[test]
fn a_layer_beyond_a_limit_is_an_ordinary_blob_with_the_reason() {
    let tar = example_tar();
    let (_, lazy) = encode(&tar);
    let pin = lazy.index.unwrap();
    for (skeleton_max, index_max, reason) in [
        (u64::MAX, pin.extent.len(), None),
        (
            u64::MAX,
            pin.extent.len() - 1,
            Some("bytes, at most".to_owned()),
        ),
        (
            100,
            u64::MAX,
            Some("skeleton of more than 100 bytes".into()),
        ),
    ] {
        let change = |encoder: &mut LayerEncoder| encoder.gather.skeleton_max_bytes = skeleton_max;
        let (blob, trailer) = encode_limited(&tar, 100_000, change, index_max);
        assert_eq!(zstd_binary(&blob), tar);
        match (&trailer.index, reason) {
            (Ok(found), None) => assert_eq!(*found, pin),
            (Err(found), Some(reason)) => {
                assert!(found.contains(&reason), "{found}");
                let entries = seektable::parse(&blob).unwrap();
                assert!(entries.iter().all(|entry| entry.decompressed_bytes > 0));
                for piece in [77, 1 << 30] {
                    assert!(encode_limited(&tar, piece, change, index_max).0 == blob);
                }
            }
            (found, reason) => panic!("{found:?}, want {reason:?}"),
        }
    }
}

#[test]
fn what_only_a_lazy_layer_needs_is_freed_with_the_hope_for_it() {
    let mut tar = example_tar();
    let end = tar.len() - 1024;
    tar.splice(end.., sample(1024, 3));
    let mut encoder = LayerEncoder::new(EncodeOptions::default()).unwrap();
    let mut jobs = Vec::new();
    encoder.push(&tar[..end], &mut jobs).unwrap();
    assert!(encoder.gather.skeleton.is_some() && !encoder.gather.files.is_empty());
    assert!(encoder.held_bytes() > 312 * 320);
    encoder.push(&tar[end..], &mut jobs).unwrap();
    assert!(encoder.scanner.is_err());
    assert!(encoder.gather.skeleton.is_none() && encoder.gather.files.capacity() == 0);
    assert_eq!(encoder.held_bytes(), 0);
}

#[test]
fn much_that_belongs_to_no_file_is_not_stored_twice() {
    let mut tar = example_tar();
    tar.extend(sample(17 << 20, 5));
    let (blob, trailer) = encode(&tar);
    let reason = trailer.index.expect_err("not lazy");
    assert!(reason.contains("bytes that belong to no file"), "{reason}");
    let plain = zstd::encode_all(&tar[..], 3).unwrap();
    assert!(blob.len() < plain.len() + plain.len() / 8);
}

#[test]
fn only_what_has_too_much_counts_as_too_large() {
    use crate::chunkmap::ChunkMapError;
    use crate::erofs::TreeError;
    let limit = TreeError::Limit {
        what: "inodes",
        actual: 2,
        limit: 1,
    };
    for (error, too_large) in [
        (IndexError::AboveCap { bytes: 2, cap: 1 }, true),
        (IndexError::TooLarge, true),
        (IndexError::ChunkMap(ChunkMapError::TooLarge), true),
        (IndexError::Tree(limit), true),
        (IndexError::Payload, false),
        (IndexError::Magic, false),
    ] {
        assert_eq!(error.is_too_large(), too_large, "{error}");
    }
}

#[test]
fn records_of_another_layer_are_refused() {
    let plan = |tar: &[u8]| {
        let mut encoder = LayerEncoder::new(EncodeOptions::default()).unwrap();
        let mut jobs = Vec::new();
        encoder.push(tar, &mut jobs).unwrap();
        let plan = encoder.finish(&mut jobs).unwrap();
        let records: Vec<_> = jobs.iter().map(|job| job.run().unwrap().record).collect();
        (plan, records)
    };
    let tar = example_tar();
    let (first, mut records) = plan(&tar);
    records.swap(0, 1);
    assert!(matches!(
        first.assemble(&records),
        Err(EncodeError::Records { .. })
    ));
    let (second, mut records) = plan(&tar);
    records.pop();
    assert!(matches!(
        second.assemble(&records),
        Err(EncodeError::Records { .. })
    ));
    let (third, mut records) = plan(&tar);
    records[0].device_bytes += 1;
    assert!(matches!(
        third.assemble(&records),
        Err(EncodeError::Records { .. })
    ));
}

/// A small tar with one of everything, byte for byte the same for ever.
fn golden_tar() -> Vec<u8> {
    use crate::tar::tests::write::{Spec, Style, tar};
    let mut specs = vec![
        Spec::new(b'5', "etc"),
        Spec::file("etc/file", "content\n"),
        Spec::link(b'1', "etc/hard", "etc/file"),
        Spec::link(b'2', "etc/soft", "../etc/file"),
        Spec::new(b'6', "pipe"),
        Spec::new(b'3', "null"),
        Spec::file(".wh.gone", ""),
        Spec::file("opaque/.wh..wh..opq", ""),
        Spec::file("implied/empty", ""),
        Spec::file("large", &"0123456789abcdef".repeat(20_000)),
    ];
    specs[5].device = (1, 3);
    specs[1].xattrs = vec![(b"user.key".to_vec(), b"value".to_vec())];
    specs[1].style = Style::Pax;
    specs[1].nanoseconds = 5;
    specs[9].mode = 0o4755;
    tar(&specs)
}

/// Golden: these digests may change only with a new version of the format, of the writer's rules, or
/// of zstd, and then with a line in the version history of `docs/formats/`.
#[test]
fn golden_blob() {
    let options = EncodeOptions {
        writer: "golden".into(),
        ..EncodeOptions::default()
    };
    let (blob, trailer) = encode_layer(&golden_tar(), options).unwrap();
    let pin = trailer.index.clone().unwrap();
    let index = index_of(&blob, &trailer);
    let mut dump = format!(
        "blob {} {}\ndiff {}\nindex {} of {} bytes {}\nskeleton {}\n",
        blob.len(),
        crate::digest::BlobDigest::of(&blob),
        trailer.diff_id,
        pin.extent,
        pin.file_bytes,
        pin.digest,
        index.metadata().skeleton.extent,
    );
    for chunk in index.chunk_map().chunks().flatten() {
        dump += &format!(
            "chunk {} {} crc32 {:08x} {}\n",
            chunk.device,
            chunk.blob,
            chunk.crc32.unwrap(),
            chunk.digest
        );
    }
    for file in index.files().unwrap().contents() {
        dump += &format!("file {} {}\n", file.run, file.digest);
    }
    dump += &crate::dump::dump(index.tree().unwrap()).unwrap();
    assert_eq!(dump, include_str!("golden.txt"));
}
