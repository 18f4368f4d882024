// SPDX-License-Identifier: Apache-2.0
//! TOCs of eStargz and zstd:chunked layers. Invariant: whatever a manifest pins and a blob holds, opening a TOC and
//! indexing the layer ends without a panic and within bounds; an index that comes out passes its own validation,
//! covers its device, names frames inside the blob only, and comes out the same again.
//!
//! The first byte says what the rest is: the JSON of a TOC, the end of a blob, or two annotations.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::digest::{BlobDigest, DiffId};
use sluice_blockindex::extent::Extent;
use sluice_blockindex::index::UncheckedIndex;
use sluice_blockindex::toc::{
    Toc, TocLayer, TocPin, ESTARGZ_DIGEST, ZSTD_CHUNKED_CHECKSUM, ZSTD_CHUNKED_POSITION,
};

const BLOB_BYTES: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    match kind % 4 {
        0 => json(rest, false),
        1 => json(rest, true),
        2 => end_of_blob(rest),
        _ => annotations(rest),
    }
});

fn json(json: &[u8], estargz: bool) {
    let (pin, bytes) = if estargz {
        (
            TocPin::Footer {
                json_digest: *BlobDigest::of(json).as_bytes(),
            },
            member(json),
        )
    } else {
        let bytes = zstd::bulk::compress(json, 1).unwrap();
        let pin = TocPin::Position {
            extent: Extent::from_length(BLOB_BYTES / 2, bytes.len() as u64).unwrap(),
            json_bytes: json.len() as u64,
            digest: *BlobDigest::of(&bytes).as_bytes(),
        };
        (pin, bytes)
    };
    let mut blob = vec![0; usize::try_from(BLOB_BYTES / 2).unwrap()];
    blob.extend_from_slice(&bytes);
    blob.extend_from_slice(&[
        0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0,
    ]);
    blob.extend_from_slice(format!("{:016x}STARGZ", BLOB_BYTES / 2).as_bytes());
    blob.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    let blob_bytes = blob.len() as u64;
    let place = pin.locate(&blob, blob_bytes).expect("written just now");
    let extent = place.extent;
    let toc = Toc::open(&pin, &place, &bytes).expect("written just now");
    let layer = TocLayer {
        blob: BlobDigest::of(b"blob"),
        blob_bytes,
        diff_id: DiffId::of(b"layer"),
        writer: "fuzz",
    };
    let Ok(built) = toc.index(&layer) else {
        return;
    };
    assert_eq!(toc.index(&layer).as_ref(), Ok(&built));
    let index = UncheckedIndex::parse_contents(built.file).unwrap();
    let index = index.validate().unwrap();
    assert!(index.fits_blob(blob_bytes));
    let mut at = 0;
    for chunk in index.chunk_map().chunks() {
        let chunk = chunk.unwrap();
        assert_eq!(chunk.device.start(), at);
        assert!(chunk.blob.end() <= extent.end());
        at = chunk.device.end();
    }
    assert_eq!(at, index.device_bytes());
}

/// The gzip member that an eStargz blob ends with.
fn member(json: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut header = [0u8; 512];
    header[..17].copy_from_slice(b"stargz.index.json");
    header[124..136].copy_from_slice(format!("{:011o}\0", json.len()).as_bytes());
    header[156] = b'0';
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&header).unwrap();
    encoder.write_all(json).unwrap();
    encoder.finish().unwrap()
}

fn end_of_blob(end: &[u8]) {
    let blob_bytes = end.len() as u64;
    let pin = TocPin::Footer {
        json_digest: [0; 32],
    };
    let Ok(place) = pin.locate(end, blob_bytes) else {
        return;
    };
    let extent = place.extent;
    assert!(extent.end() <= blob_bytes && !extent.is_empty());
    let start = usize::try_from(extent.start()).unwrap();
    let stop = usize::try_from(extent.end()).unwrap();
    let _ = Toc::open(&pin, &place, &end[start..stop]);
}

fn annotations(text: &[u8]) {
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let mut lines = text.lines();
    let (first, second, third) = (lines.next(), lines.next(), lines.next());
    let read = TocPin::of_annotations(|name| match name {
        ZSTD_CHUNKED_CHECKSUM => first,
        ZSTD_CHUNKED_POSITION => second,
        ESTARGZ_DIGEST => third,
        _ => None,
    });
    if let Ok(Some(pin)) = read {
        if let Ok(extent) = pin.first_read(BLOB_BYTES) {
            assert!(extent.end() <= BLOB_BYTES && !extent.is_empty());
        }
    }
}
