// SPDX-License-Identifier: Apache-2.0
//! A small layer for tests.

use sluice_blockindex::annotations::LayerAnnotations;
use sluice_blockindex::digest::{BlobDigest, ConfigDigest};
use sluice_blockindex::encode::{EncodeOptions, encode_layer};

/// Its tar.
pub fn tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(4);
    header.set_mode(0o644);
    builder
        .append_data(&mut header, "file", &b"text"[..])
        .unwrap();
    builder.into_inner().unwrap()
}

/// The index of a layer as a registry gives it, and what a manifest says of it.
pub fn layer() -> (Vec<u8>, LayerAnnotations) {
    let (blob, trailer) = encode_layer(&tar(), EncodeOptions::default()).unwrap();
    let pin = trailer.index.unwrap();
    let start = usize::try_from(pin.extent.start()).unwrap();
    let end = usize::try_from(pin.extent.end()).unwrap();
    let annotations = LayerAnnotations {
        index_extent: pin.extent,
        index_digest: pin.digest,
        blob: BlobDigest::of(&blob),
        blob_bytes: blob.len() as u64,
        diff_id: trailer.diff_id,
        config: ConfigDigest::of(b"config"),
        port: None,
        boot: Vec::new(),
    };
    (blob[start..end].to_vec(), annotations)
}
