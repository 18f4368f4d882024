// SPDX-License-Identifier: Apache-2.0
//! Invariant: no blob makes the indexer panic or run away, and how it is cut makes no difference. What
//! it indexes is what another library decompresses, and every chunk that is read alone, from nothing but
//! its frame and its window, is the same. No frame with any state and any window makes the reader
//! panic or give anything but the chunk.
//!
//! The first byte chooses: the rest is a blob as it is, or a raw deflate stream to which the harness makes a
//! right header and trailer (or no mutation would get past the checksum), or a frame to be read with
//! the state that the bytes before it say.
#![no_main]

use std::io::Read;

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::chunkmap::{Chunk, ChunkMap, Codec, RestartState, WindowPin};
use sluice_blockindex::digest::{ChunkDigest, DiffId, StrongAlgorithm};
use sluice_blockindex::extent::Extent;
use sluice_blockindex::frames::{decode_chunk_into, decode_restarted_into, StreamDecoder};
use sluice_blockindex::gzip::restart::RestartAt;
use sluice_blockindex::gzip::LeadingBits;
use sluice_blockindex::index::UncheckedIndex;
use sluice_blockindex::indexer::{IndexOptions, IndexedLayer, IndexerError, LayerIndexer};
use sluice_blockindex::windows::read_window;

const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
/// The device may be so large; a bomb of 64 KiB could have 64 MiB.
const DEVICE_MAX_BYTES: u64 = 4 << 20;

fuzz_target!(|data: &[u8]| {
    let Some((&[mode, size, cut], rest)) = data.split_first_chunk::<3>() else {
        return;
    };
    let chunk_max_bytes = 512 * (u32::from(size) + 1);
    match mode % 3 {
        0 => check(rest, chunk_max_bytes, cut),
        1 => {
            if let Some((stream, content)) = whole_stream(rest) {
                let crc32 = crc32fast::hash(&content).to_le_bytes();
                let length = u32::try_from(content.len()).expect("bounded").to_le_bytes();
                let blob = [&HEADER[..], stream, &crc32, &length].concat();
                let layer = check(&blob, chunk_max_bytes, cut).expect("a sound blob");
                assert_eq!(layer.diff_id, DiffId::of(&content));
                return;
            }
            None
        }
        _ => {
            forged(rest, size, cut);
            None
        }
    };
});

/// The stream at the front of `bytes`, and what another library makes of it.
fn whole_stream(bytes: &[u8]) -> Option<(&[u8], Vec<u8>)> {
    let mut decoder = flate2::bufread::DeflateDecoder::new(bytes);
    let mut content = Vec::new();
    let mut limited = (&mut decoder).take(DEVICE_MAX_BYTES + 1);
    limited.read_to_end(&mut content).ok()?;
    if content.len() as u64 > DEVICE_MAX_BYTES {
        return None;
    }
    let taken = usize::try_from(decoder.total_in()).ok()?;
    Some((&bytes[..taken], content))
}

fn index(
    blob: &[u8],
    chunk_max_bytes: u32,
    piece: usize,
) -> Result<(IndexedLayer, Vec<u8>), IndexerError> {
    let mut indexer = LayerIndexer::new(IndexOptions {
        chunk_max_bytes,
        device_max_bytes: DEVICE_MAX_BYTES,
        ..IndexOptions::default()
    })?;
    let mut device = Vec::new();
    for piece in blob.chunks(piece) {
        indexer.push(piece, &mut |chunk| device.extend_from_slice(chunk.bytes))?;
    }
    let layer = indexer.finish(&mut |chunk| device.extend_from_slice(chunk.bytes))?;
    Ok((layer, device))
}

fn check(blob: &[u8], chunk_max_bytes: u32, cut: u8) -> Option<IndexedLayer> {
    let whole = index(blob, chunk_max_bytes, usize::MAX);
    let cut = index(blob, chunk_max_bytes, usize::from(cut) * 97 + 1);
    assert_eq!(whole, cut);
    let (layer, device) = whole.ok()?;
    assert_eq!(layer.diff_id, DiffId::of(&device));
    assert_eq!(layer.device_bytes, device.len() as u64);
    if let Ok(built) = &layer.index {
        let opened = UncheckedIndex::parse_unmodified(built.file.clone())
            .expect("written just now")
            .validate()
            .expect("written just now");
        let map = opened.chunk_map();
        for chunk in map.chunks() {
            let chunk = chunk.expect("validated");
            let bytes = read(map, &chunk, blob, &built.windows);
            assert_eq!(bytes, slice(&device, chunk.device));
        }
    }
    Some(layer)
}

fn read(map: &ChunkMap, chunk: &Chunk, blob: &[u8], windows: &[u8]) -> Vec<u8> {
    let frame = slice(blob, chunk.blob);
    let mut out = Vec::new();
    if !chunk.codec.is_random_access() {
        let mut stream = StreamDecoder::of_chunk(map, chunk.ordinal).expect("a part of a frame");
        let from = stream.chunk().expect("the first part").blob.start();
        let blob = slice(blob, Extent::<()>::new(from, blob.len() as u64).expect("inside"));
        let mut take = |part: &Chunk, bytes: &[u8]| {
            if part.ordinal == chunk.ordinal {
                out = bytes.to_vec();
            }
        };
        stream.push(blob, &mut take).expect("sound");
        return out;
    }
    if chunk.codec != Codec::Deflate {
        decode_chunk_into(frame, chunk, &mut out).expect("sound");
        return out;
    }
    let read = |pin: WindowPin| read_window(slice(windows, pin.extent), &pin, map.algorithm());
    let (bits, kept) = match map.restart(chunk).expect("validated").state {
        RestartState::Member => {
            decode_restarted_into(frame, chunk, RestartAt::Member, &mut out).expect("sound");
            return out;
        }
        RestartState::Block { bits, window } => (bits, window),
    };
    let window = kept.map_or(Vec::new(), |pin| read(pin).expect("sound"));
    let at = RestartAt::Block { bits, window: &window };
    decode_restarted_into(frame, chunk, at, &mut out).expect("sound");
    out
}

/// A frame, a state and a window that belong to nothing.
fn forged(rest: &[u8], size: u8, cut: u8) {
    let window = &rest[..rest.len().min(usize::from(size) * 8)];
    let frame = &rest[window.len()..];
    let chunk = Chunk {
        ordinal: 0,
        device: Extent::from_length(0, 1 + u64::from(size) * 1024).expect("small"),
        blob: Extent::from_length(0, frame.len() as u64).expect("small"),
        codec: Codec::Deflate,
        skip_bytes: u32::from(cut) * 512,
        crc32: Some(0),
        padding_bytes: 0,
        algorithm: StrongAlgorithm::Blake3,
        digest: ChunkDigest([0; 32]),
    };
    let mut out = Vec::new();
    // The digest of nothing that exists: whatever decodes must be refused.
    decode_restarted_into(frame, &chunk, RestartAt::Member, &mut out).expect_err("forged");
    let count = cut % 8;
    let bits = LeadingBits::new(count, size & ((1 << count) - 1)).expect("masked");
    let at = RestartAt::Block { bits, window };
    decode_restarted_into(frame, &chunk, at, &mut out).expect_err("forged");
    let frames = Chunk { codec: Codec::ZstdFrames, ..chunk };
    decode_chunk_into(frame, &frames, &mut out).expect_err("forged");
}

fn slice<S>(bytes: &[u8], extent: Extent<S>) -> &[u8] {
    let at = |offset| usize::try_from(offset).expect("in memory");
    &bytes[at(extent.start())..at(extent.end())]
}
