// SPDX-License-Identifier: Apache-2.0
//! Throughput of what runs over every byte of a layer, on chunks of 128 KiB: the two candidates for
//! the strong digest, crc32, zstd at several levels, and decoding with verification.
//!
//! The figures that led to decisions stand in `docs/decisions/`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sluice_blockindex::chunkmap::{ChunkMap, write_chunk_map};
use sluice_blockindex::digest::StrongAlgorithm;
use sluice_blockindex::frames::{DEFAULT_LEVEL, decode_chunk_into, encode_chunk};

/// A chunk of this very program: machine code and text, compressible as image layers are.
fn chunk(bytes: usize) -> Vec<u8> {
    let path = std::env::current_exe().expect("a running program has a path");
    let program = std::fs::read(path).expect("it can be read");
    let start = program.len() / 3;
    program[start..start + bytes].to_vec()
}

fn digests(criterion: &mut Criterion) {
    for bytes in [4 * 1024, 128 * 1024, 1024 * 1024] {
        let chunk = chunk(bytes);
        let mut group = criterion.benchmark_group(format!("digest/{}KiB", bytes / 1024));
        group.throughput(Throughput::Bytes(bytes as u64));
        for algorithm in [StrongAlgorithm::Blake3, StrongAlgorithm::Sha256] {
            group.bench_function(algorithm.to_string(), |bencher| {
                bencher.iter(|| algorithm.digest(black_box(&chunk)));
            });
        }
        group.bench_function("crc32", |bencher| {
            bencher.iter(|| crc32fast::hash(black_box(&chunk)));
        });
        group.finish();
    }
}

fn frames(criterion: &mut Criterion) {
    let content = chunk(128 * 1024);
    let mut group = criterion.benchmark_group("frame/128KiB");
    group.throughput(Throughput::Bytes(content.len() as u64));
    for level in [1, 3, 4, 5, 6, 7, 9] {
        let frame = |bytes| encode_chunk(0, bytes, level, StrongAlgorithm::Blake3);
        let ratio = frame(&content).expect("levels are valid").frame.len() * 100 / content.len();
        group.bench_function(format!("encode level {level} to {ratio} %"), |bencher| {
            bencher.iter(|| frame(black_box(&content)));
        });
    }
    let encoded = encode_chunk(0, &content, DEFAULT_LEVEL, StrongAlgorithm::Blake3);
    let encoded = encoded.expect("the default level is valid");
    let map = write_chunk_map(StrongAlgorithm::Blake3, &[encoded.record]).expect("one chunk");
    let map = ChunkMap::parse(map).expect("written just now");
    let expect = map.chunk(0).expect("there is one");
    let mut out = Vec::new();
    group.bench_function("decode and verify", |bencher| {
        bencher.iter(|| decode_chunk_into(black_box(&encoded.frame), &expect, &mut out));
    });
    group.finish();
}

criterion_group!(benches, digests, frames);
criterion_main!(benches);
