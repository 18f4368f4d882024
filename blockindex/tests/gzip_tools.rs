// SPDX-License-Identifier: Apache-2.0
//! Blobs of the real tools: what `gzip`, `pigz` and `zstd` write is indexed, read back a chunk at a time
//! from its restart points, and is what was compressed; and the index is as small as promised.
//!
//! Needs these tools: `make setup` installs them.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use sluice_blockindex::chunkmap::{Access, Chunk, Codec, RestartState, WindowPin};
use sluice_blockindex::digest::{BlobDigest, DiffId};
use sluice_blockindex::extent::Extent;
use sluice_blockindex::frames::{decode_chunk_into, decode_restarted_into};
use sluice_blockindex::gzip::restart::RestartAt;
use sluice_blockindex::index::{Index, UncheckedIndex};
use sluice_blockindex::indexer::{BuiltIndex, IndexOptions, IndexedLayer, index_blob};
use sluice_blockindex::windows::read_window;

/// A tar of a large program (this one), its beginning several times, zeros, and noise.
fn sample() -> &'static [u8] {
    static SAMPLE: OnceLock<Vec<u8>> = OnceLock::new();
    SAMPLE.get_or_init(|| {
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let program = &program[..program.len().min(12 << 20)];
        let noise: Vec<u8> = (0u64..200_000)
            .flat_map(|at| {
                at.wrapping_mul(at)
                    .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                    .to_be_bytes()
            })
            .collect();
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |path: &str, content: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, content).unwrap();
        };
        add("program", program);
        add("zeros", &vec![0; 5 << 20]);
        for at in 0..200 {
            add(&format!("small/{at}"), &program[at * 1000..][..3000 + at]);
        }
        add("noise", &noise);
        builder.into_inner().unwrap()
    })
}

/// What a tool makes of these bytes.
fn run(tool: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let spawned = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = spawned.unwrap_or_else(|error| panic!("{tool}, of `make setup`: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{tool} {arguments:?}");
    output.stdout
}

fn slice<S>(bytes: &[u8], extent: Extent<S>) -> &[u8] {
    let at = |offset| usize::try_from(offset).unwrap();
    &bytes[at(extent.start())..at(extent.end())]
}

/// One chunk from nothing but its frame and its window.
fn read(index: &Index<Vec<u8>>, chunk: &Chunk, blob: &[u8], windows: &[u8]) -> Vec<u8> {
    let frame = slice(blob, chunk.blob);
    let mut out = Vec::new();
    if chunk.codec != Codec::Deflate {
        decode_chunk_into(frame, chunk, &mut out).unwrap();
        return out;
    }
    let map = index.chunk_map();
    let (bits, kept) = match map.restart(chunk).unwrap().state {
        RestartState::Member => {
            decode_restarted_into(frame, chunk, RestartAt::Member, &mut out).unwrap();
            return out;
        }
        RestartState::Block { bits, window } => (bits, window),
    };
    let read = |pin: WindowPin| read_window(slice(windows, pin.extent), &pin, map.algorithm());
    let window = kept.map_or(Vec::new(), |pin| read(pin).unwrap());
    let at = RestartAt::Block {
        bits,
        window: &window,
    };
    decode_restarted_into(frame, chunk, at, &mut out).unwrap();
    out
}

/// Indexes a blob and reads each of its chunks alone, the last one first.
fn check(blob: &[u8], tar: &[u8]) -> (IndexedLayer, BuiltIndex) {
    let layer = index_blob(blob, IndexOptions::default()).unwrap();
    assert_eq!(layer.diff_id, DiffId::of(tar));
    assert_eq!(layer.blob, BlobDigest::of(blob));
    let built = layer.index.clone().unwrap();
    let index = UncheckedIndex::parse_unmodified(built.file.clone())
        .unwrap()
        .validate()
        .unwrap();
    for ordinal in (0..index.chunk_map().count()).rev() {
        let chunk = index.chunk_map().chunk(ordinal).unwrap();
        if chunk.codec.is_random_access() {
            let bytes = read(&index, &chunk, blob, &built.windows);
            assert!(bytes == slice(tar, chunk.device), "{chunk:?}");
        }
    }
    (layer, built)
}

/// Index and windows, in thousandths of the blob.
fn per_mille(blob: &[u8], built: &BuiltIndex) -> usize {
    (built.payload.len() + built.windows.len()) * 1000 / blob.len()
}

#[test]
fn gzip_of_every_level() {
    for level in 1..=9 {
        let blob = run("gzip", &["-n", &format!("-{level}")], sample());
        let (layer, built) = check(&blob, sample());
        assert_eq!((layer.trailing_bytes, built.access), (0, Access::Random));
        let share = per_mille(&blob, &built);
        println!(
            "gzip -{level}: {} bytes, index {share} per mille",
            blob.len()
        );
        assert!(share < 30, "level {level}: {share} per mille");
    }
}

#[test]
fn gzip_with_rsyncable_flushes_and_members() {
    let tar = sample();
    let blob = run("gzip", &["-n", "--rsyncable"], tar);
    check(&blob, tar);
    let (first, second) = tar.split_at(tar.len() / 3);
    let two = [
        run("gzip", &["-9"], first),
        run("gzip", &["-1"], second),
        vec![0; 1000],
    ]
    .concat();
    let (layer, _) = check(&two, tar);
    assert_eq!(
        (layer.trailing_bytes, layer.trailing_garbage),
        (1000, false)
    );
    // The tool agrees that this is one.
    assert!(run("gzip", &["-dc"], &two) == tar);
}

#[test]
fn pigz_with_and_without_independent_blocks() {
    for arguments in [
        &["-p", "4"][..],
        &["-p", "4", "-i"],
        &["-1"],
        &["-0"],
        &["-9", "-b", "512"],
    ] {
        let blob = run("pigz", arguments, sample());
        let (_, built) = check(&blob, sample());
        let share = per_mille(&blob, &built);
        println!(
            "pigz {arguments:?}: {} bytes, index {share} per mille",
            blob.len()
        );
        assert!(share < 30, "{arguments:?}: {share} per mille");
        if arguments.contains(&"-i") {
            // Its blocks copy from no other, so there is no window to keep.
            assert!(built.windows.is_empty());
        }
    }
}

#[test]
fn zstd_of_one_frame_and_of_many() {
    let tar = sample();
    let one = run("zstd", &["-qc"], tar);
    let (_, built) = check(&one, tar);
    assert_eq!(built.access, Access::Prefix);
    assert!(per_mille(&one, &built) < 10);
    let many: Vec<u8> = tar
        .chunks(1_000_000)
        .flat_map(|part| run("zstd", &["-qc"], part))
        .collect();
    let (_, built) = check(&many, tar);
    assert_eq!(built.access, Access::Random);
    assert!(per_mille(&many, &built) < 10 && built.windows.is_empty());
}
