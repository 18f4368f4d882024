// SPDX-License-Identifier: Apache-2.0
//! Invariant: no manifest makes the parser of index artifacts panic; what parses is of the subject asked
//! about, keeps the limits, and is written as bytes that parse to the same.
//!
//! The subject asked about is sha256 of the five bytes `image`, which the seeds name.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::annotations::{INDEX_MAX_BYTES, REASON_MAX_BYTES};
use sluice_blockindex::artifact::{generation_of, Artifact, LAYERS_MAX};
use sluice_blockindex::digest::ManifestDigest;
use sluice_blockindex::windows::WINDOWS_MAX_BYTES;

fuzz_target!(|data: &[u8]| {
    let subject = ManifestDigest::of(b"image");
    let Ok(artifact) = Artifact::parse(data, subject) else {
        return;
    };
    assert_eq!(artifact.subject.digest, subject);
    assert!((1..=LAYERS_MAX).contains(&artifact.layers.len()));
    let blobs: BTreeSet<_> = artifact.layers.iter().map(|layer| layer.blob).collect();
    assert_eq!(blobs.len(), artifact.layers.len());
    for layer in &artifact.layers {
        match &layer.index {
            Ok(index) => {
                assert!((1..=INDEX_MAX_BYTES).contains(&index.bytes));
                assert!(index.windows.map_or(0, |pin| pin.bytes) <= WINDOWS_MAX_BYTES);
            }
            Err(reason) => assert!((1..=REASON_MAX_BYTES).contains(&reason.len())),
        }
        let found = artifact.layer(layer.blob, layer.blob_bytes, layer.diff_id);
        assert_eq!(found, Ok(Some(layer)));
    }
    let written = artifact.to_json().expect("what was parsed keeps the rules");
    assert_eq!(Artifact::parse(&written, subject).as_ref(), Ok(&artifact));
    assert_eq!(generation_of(&artifact.annotations()), Some(artifact.generation));
});
