// SPDX-License-Identifier: Apache-2.0
//! What a start computes before a container can run: the check of an index that came, the merge of a chain's trees, and
//! the writing of the merged one. 100,000 files in ten layers.
//!
//! The figures stand in `docs/start.md`.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use sluice_blockindex::encode::{EncodeOptions, encode_layer};
use sluice_blockindex::erofs::{TreeReader, write_tree};
use sluice_blockindex::index::{INDEX_FILE_MAX_BYTES, UncheckedIndex, decompress_index};
use sluice_blockindex::merge::{MergeBase, merge, merged_devices};

/// Files of each layer, lowest first.
const LAYERS: [usize; 10] = [
    40_000, 20_000, 12_000, 8_000, 6_000, 5_000, 4_000, 3_000, 1_500, 500,
];
/// Files of one directory.
const DIRECTORY_FILES: usize = 24;

/// The index payload of a layer of `files` small files.
fn payload(layer: usize, files: usize) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for file in 0..files {
        let content = format!("{layer}-{file}");
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        let package = file / DIRECTORY_FILES;
        let path = format!("usr/lib/layer{layer}/package{package:05}/module_{file:05}.so");
        let appended = builder.append_data(&mut header, path, content.as_bytes());
        appended.expect("memory takes it");
    }
    let tar = builder.into_inner().expect("memory takes it");
    let (blob, trailer) = encode_layer(&tar, EncodeOptions::default()).expect("a tar");
    let range = trailer
        .index
        .expect("a layer that can be lazy")
        .extent
        .range();
    let place = |at: u64| usize::try_from(at).expect("it is in memory");
    blob[place(range.start)..place(range.end)].to_vec()
}

fn start(criterion: &mut Criterion) {
    let payloads: Vec<Vec<u8>> = LAYERS
        .into_iter()
        .enumerate()
        .map(|(layer, files)| payload(layer, files))
        .collect();
    let open = |payload: &Vec<u8>| {
        let file = decompress_index(payload, INDEX_FILE_MAX_BYTES).expect("written just now");
        let index = UncheckedIndex::parse(file).expect("written just now");
        index.validate().expect("written just now")
    };
    let mut group = criterion.benchmark_group("start");
    group.sample_size(20);
    group.bench_function("check the index of 5,000 files", |bencher| {
        bencher.iter(|| open(black_box(&payloads[5])));
    });
    let indexes: Vec<_> = payloads.iter().map(open).collect();
    let trees: Vec<TreeReader<'_>> = indexes
        .iter()
        .map(|index| index.tree().expect("validated"))
        .collect();
    group.bench_function("merge 100,000 files of 10 layers", |bencher| {
        bencher.iter(|| merge(black_box(&trees), MergeBase::Bottom));
    });
    let merged = merge(&trees, MergeBase::Bottom).expect("validated");
    let devices = merged_devices(&trees);
    group.bench_function("write their tree", |bencher| {
        bencher.iter(|| write_tree(black_box(&merged), &devices));
    });
    group.finish();
}

criterion_group!(benches, start);
criterion_main!(benches);
