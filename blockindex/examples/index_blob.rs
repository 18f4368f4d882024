// SPDX-License-Identifier: Apache-2.0
//! Indexes layer blobs as they are and prints what that costs, beside `gzip -dc` of the same blob:
//! `cargo run --release -p sluice-blockindex --example index_blob BLOB [CHUNK_KIB]`.
//!
//! Times are of the processor, the best of three runs, so a busy machine matters little.

use std::fs;
use std::process::{Command, Stdio};

use sluice_blockindex::chunkmap::ChunkMap;
use sluice_blockindex::chunkmap::{Chunk, Codec, RestartState};
use sluice_blockindex::frames::{decode_chunk_into, decode_restarted_into};
use sluice_blockindex::gzip::restart::RestartAt;
use sluice_blockindex::index::UncheckedIndex;
use sluice_blockindex::indexer::{BlobFormat, IndexOptions, index_blob};
use sluice_blockindex::windows::read_window;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments
        .next()
        .expect("usage: index_blob BLOB [CHUNK_KIB]");
    let kib: u32 = arguments
        .next()
        .map_or(1024, |kib| kib.parse().expect("a number"));
    let options = IndexOptions {
        chunk_max_bytes: kib * 1024,
        ..IndexOptions::default()
    };
    let blob = fs::read(&path).expect("read the blob");
    let run = || index_blob(&blob, options.clone()).expect("a sound blob");
    let (seconds, layer) = best(processor_seconds, run);
    let index = layer.index.expect("a lazy layer");
    let share = |bytes: usize| bytes as f64 / blob.len() as f64 * 100.0;
    println!("{path}: {:?}, {} bytes", layer.format, blob.len());
    println!("device            {} bytes", layer.device_bytes);
    println!(
        "index payload     {} bytes, {:.2} %",
        index.payload.len(),
        share(index.payload.len())
    );
    println!(
        "windows           {} bytes, {:.2} %",
        index.windows.len(),
        share(index.windows.len())
    );
    let mebibytes = layer.device_bytes as f64 / 1048576.0;
    println!(
        "indexing          {seconds:.2} s, {:.0} MiB/s of device",
        mebibytes / seconds
    );
    if layer.format == BlobFormat::Gzip {
        let (seconds, ()) = best(children_seconds, || {
            let status = Command::new("gzip")
                .arg("-dc")
                .arg(&path)
                .stdout(Stdio::null())
                .status();
            assert!(status.expect("gzip").success());
        });
        println!(
            "gzip -dc          {seconds:.2} s, {:.0} MiB/s of device",
            mebibytes / seconds
        );
    }
    let index_file = UncheckedIndex::parse_unmodified(index.file)
        .expect("sound")
        .validate()
        .expect("valid");
    let map = index_file.chunk_map();
    println!(
        "chunks            {}, {} restart points, {:?}",
        map.count(),
        map.restart_count(),
        map.access()
    );
    let (seconds, ()) = best(processor_seconds, || {
        let mut out = Vec::new();
        for chunk in map
            .chunks()
            .flatten()
            .filter(|it| it.codec.is_random_access())
        {
            read(map, &chunk, &blob, &index.windows, &mut out);
        }
    });
    println!(
        "reading each alone {seconds:.2} s, {:.0} MiB/s of device",
        mebibytes / seconds
    );
}

fn read(map: &ChunkMap, chunk: &Chunk, blob: &[u8], windows: &[u8], out: &mut Vec<u8>) {
    let at = |offset: u64| usize::try_from(offset).expect("in memory");
    let frame = &blob[at(chunk.blob.start())..at(chunk.blob.end())];
    if chunk.codec != Codec::Deflate {
        return decode_chunk_into(frame, chunk, out).expect("sound");
    }
    let state = map.restart(chunk).expect("validated").state;
    let kept = match state {
        RestartState::Block {
            window: Some(pin), ..
        } => {
            let payload = &windows[at(pin.extent.start())..at(pin.extent.end())];
            read_window(payload, &pin, map.algorithm()).expect("sound")
        }
        _ => Vec::new(),
    };
    let restart = match state {
        RestartState::Member => RestartAt::Member,
        RestartState::Block { bits, .. } => RestartAt::Block {
            bits,
            window: &kept,
        },
    };
    decode_restarted_into(frame, chunk, restart, out).expect("sound");
}

/// The least time of three runs.
fn best<T>(clock: fn() -> f64, run: impl Fn() -> T) -> (f64, T) {
    let timed = || {
        let before = clock();
        let result = run();
        (clock() - before, result)
    };
    let mut found = timed();
    for _ in 0..2 {
        let next = timed();
        if next.0 < found.0 {
            found = next;
        }
    }
    found
}

/// Processor time of this process, from `/proc/self/stat`: user and system, in ticks of 10 ms.
fn processor_seconds() -> f64 {
    ticks(13)
}

/// The same of children that ended.
fn children_seconds() -> f64 {
    ticks(15)
}

fn ticks(field: usize) -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("procfs");
    // The second field is a name in brackets, which may hold blanks.
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .expect("fields")
        .split_whitespace()
        .collect();
    let tick = |at: usize| fields[at - 2].parse::<f64>().expect("a number");
    (tick(field) + tick(field + 1)) / 100.0
}
