// SPDX-License-Identifier: Apache-2.0
//! Invariant: no labels and no digests make their parsers panic; what parses is written back as the
//! very same labels; and an accepted index lies inside its blob and below the cap.
//!
//! The input is lines `name=value`; a number stands for one of our names.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::annotations::{
    LayerMark, BLOB, BLOB_SIZE, BOOT, CONFIG, DIFF, INDEX_DIGEST, INDEX_MAX_BYTES, INDEX_OFFSET,
    INDEX_SIZE, NOT_LAZY, PORT, REASON_MAX_BYTES,
};
use sluice_blockindex::digest::DiffId;

const NAMES: [&str; 12] = [
    INDEX_OFFSET,
    INDEX_SIZE,
    INDEX_DIGEST,
    BLOB,
    BLOB_SIZE,
    DIFF,
    CONFIG,
    PORT,
    NOT_LAZY,
    BOOT[0],
    BOOT[1],
    BOOT[2],
];

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    if let Ok(digest) = text.parse::<DiffId>() {
        assert_eq!(digest.to_string(), text);
    }
    let labels: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| {
            let known = name.parse::<usize>().ok().and_then(|at| NAMES.get(at).copied());
            (known.unwrap_or(name), value)
        })
        .collect();
    let Ok(mark) = LayerMark::parse(|name| labels.get(name).copied()) else {
        return;
    };
    let written = mark.to_map();
    let again = LayerMark::parse(|name| written.get(name).map(String::as_str));
    assert_eq!(again.as_ref(), Ok(&mark));
    match mark {
        LayerMark::Lazy(layer) => {
            assert!(layer.index_extent.end() <= layer.blob_bytes);
            assert!((1..=INDEX_MAX_BYTES).contains(&layer.index_extent.len()));
            for (name, value) in &written {
                assert_eq!(labels.get(name.as_str()), Some(&value.as_str()));
            }
        }
        LayerMark::NotLazy(reason) => assert!(reason.len() <= REASON_MAX_BYTES),
        LayerMark::Unmarked => assert!(written.is_empty()),
    }
});
