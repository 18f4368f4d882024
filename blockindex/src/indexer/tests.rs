// SPDX-License-Identifier: Apache-2.0
use std::io::Write;

use flate2::{Compression, FlushCompress, Status};
use proptest::prelude::*;

use super::*;
use crate::chunkmap::{Access, Chunk, ChunkMap, Codec, RestartState};
use crate::digest::DiffId;
use crate::frames::{
    DecodeFrameError, StreamDecoder, decode_chunk, decode_restarted_into, decompress_span_into,
};
use crate::gzip::restart::RestartAt;
use crate::index::{Index, UncheckedIndex};
use crate::windows::read_window;

/// Text with long and short repetitions: blocks with copies near and far.
fn text(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap()
    };
    let mut out: Vec<u8> = Vec::with_capacity(bytes + 300);
    while out.len() < bytes {
        let length = 3 + next() % 20;
        if out.len() > 300 && next() % 2 != 0 {
            let distance = 1 + next() % out.len().min(32_000);
            for _ in 0..length {
                out.push(out[out.len() - distance]);
            }
        } else {
            for _ in 0..length {
                out.push(next().to_le_bytes()[0] & 0x3f);
            }
        }
    }
    out.truncate(bytes);
    out
}

/// A tar of files with these contents.
fn tar(contents: &[Vec<u8>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (at, content) in contents.iter().enumerate() {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1);
        let path = format!("directory/file-{at}");
        builder
            .append_data(&mut header, path, content.as_slice())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Compression::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A raw deflate stream with a flush of `flush` after each piece.
fn deflate(pieces: &[&[u8]], level: u32, flush: FlushCompress) -> Vec<u8> {
    let mut compress = flate2::Compress::new(Compression::new(level), false);
    let mut out = Vec::new();
    let mut run = |mut input: &[u8], flush| loop {
        out.reserve(input.len() + 100);
        let before = compress.total_in();
        let status = compress.compress_vec(input, &mut out, flush).unwrap();
        let taken = usize::try_from(compress.total_in() - before).unwrap();
        input = &input[taken..];
        let room = out.capacity() - out.len();
        if status == Status::StreamEnd
            || input.is_empty() && flush != FlushCompress::Finish && room > 0
        {
            break;
        }
    };
    for piece in pieces {
        run(piece, flush);
    }
    run(&[], FlushCompress::Finish);
    out
}

/// A member around a raw stream.
fn member(header: &[u8], stream: &[u8], content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap();
    [
        header,
        stream,
        &crc32fast::hash(content).to_le_bytes(),
        &length.to_le_bytes(),
    ]
    .concat()
}

const HEADER: &[u8] = &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];

fn small(chunk_max_bytes: u32) -> IndexOptions {
    IndexOptions {
        chunk_max_bytes,
        ..IndexOptions::default()
    }
}

/// An indexed blob that is opened again as a node would.
struct Opened {
    layer: IndexedLayer,
    index: Index<Vec<u8>>,
    windows: Vec<u8>,
    blob: Vec<u8>,
}

impl Opened {
    fn new(blob: &[u8], options: IndexOptions) -> Self {
        let layer = index_blob(blob, options).unwrap();
        let built = layer.index.clone().unwrap();
        let index = UncheckedIndex::parse_unmodified(built.file.clone())
            .unwrap()
            .validate()
            .unwrap();
        index
            .check_blob(BlobDigest::of(blob), blob.len() as u64)
            .unwrap();
        Self {
            layer,
            index,
            windows: built.windows,
            blob: blob.to_vec(),
        }
    }

    /// Device bytes of each chunk.
    fn lengths(&self) -> Vec<u64> {
        let chunks = self.map().chunks().flatten();
        chunks.map(|it| it.device.len()).collect()
    }

    fn map(&self) -> &ChunkMap {
        self.index.chunk_map()
    }

    /// The first chunk from `from` on that shares its frame with none.
    fn alone(&self, from: u32) -> Chunk {
        let chunks: Vec<Chunk> = self.map().chunks().flatten().collect();
        let alone = |pair: &&[Chunk]| pair[0].skip_bytes == 0 && pair[1].skip_bytes == 0;
        let from = usize::try_from(from).unwrap();
        chunks[from..].windows(2).find(alone).unwrap()[0]
    }

    fn frame(&self, chunk: &Chunk) -> &[u8] {
        slice(&self.blob, chunk.blob)
    }

    /// The window of a chunk's restart point; `None` at a member.
    fn window(&self, chunk: &Chunk) -> Option<(crate::gzip::LeadingBits, Vec<u8>)> {
        match self.map().restart(chunk).unwrap().state {
            RestartState::Member => None,
            RestartState::Block { bits, window } => {
                let read = |pin: crate::chunkmap::WindowPin| {
                    let payload = slice(&self.windows, pin.extent);
                    read_window(payload, &pin, self.map().algorithm()).unwrap()
                };
                Some((bits, window.map(read).unwrap_or_default()))
            }
        }
    }

    /// Reads one chunk as a node would: its frame, and its window if it has one.
    fn read(&self, chunk: &Chunk) -> Vec<u8> {
        if chunk.codec != Codec::Deflate {
            return decode_chunk(self.frame(chunk), chunk).unwrap();
        }
        let window = self.window(chunk);
        let at = match &window {
            None => RestartAt::Member,
            Some((bits, window)) => RestartAt::Block {
                bits: *bits,
                window,
            },
        };
        let mut out = Vec::new();
        decode_restarted_into(self.frame(chunk), chunk, at, &mut out).unwrap();
        out
    }

    /// Every chunk by itself, last first, equals the tar.
    fn check(&self, tar: &[u8]) {
        assert_eq!(self.layer.diff_id, DiffId::of(tar));
        assert_eq!(self.layer.device_bytes, tar.len() as u64);
        for ordinal in (0..self.map().count()).rev() {
            let chunk = self.map().chunk(ordinal).unwrap();
            assert_eq!(self.read(&chunk), slice(tar, chunk.device), "{chunk:?}");
        }
    }
}

fn slice<S>(bytes: &[u8], extent: Extent<S>) -> &[u8] {
    let at = |offset| usize::try_from(offset).unwrap();
    &bytes[at(extent.start())..at(extent.end())]
}

fn sample() -> Vec<u8> {
    tar(&[
        text(1, 700_000),
        text(2, 100),
        text(3, 2_000_000),
        Vec::new(),
        text(4, 300_000),
    ])
}

#[test]
fn every_chunk_of_a_gzip_blob_is_read_alone() {
    let tar = sample();
    for level in [0, 3, 6, 9] {
        let opened = Opened::new(&gzip(&tar, level), IndexOptions::default());
        opened.check(&tar);
        assert_eq!(opened.map().access(), Access::Random);
        assert!(opened.map().count() >= 3, "level {level}");
        assert_eq!(
            opened.map().restart_count(),
            usize::try_from(opened.map().count()).unwrap()
        );
        assert!(opened.index.files().unwrap().len() == 4);
    }
    // The fastest level of some libraries makes one block of everything.
    let opened = Opened::new(&gzip(&tar, 1), IndexOptions::default());
    opened.check(&tar);
    assert_eq!((opened.map().count(), opened.map().restart_count()), (6, 1));
}

#[test]
fn a_shared_frame_is_decompressed_once_for_all_its_chunks() {
    let tar = sample();
    let compressed = zstd::bulk::compress(&tar, 3).unwrap();
    for (blob, at) in [(gzip(&tar, 1), Some(RestartAt::Member)), (compressed, None)] {
        let opened = Opened::new(&blob, IndexOptions::default());
        let chunks: Vec<Chunk> = opened.map().chunks().flatten().collect();
        assert!(chunks.len() > 4 && chunks.iter().all(|it| it.blob == chunks[0].blob));
        let mut out = vec![1];
        for chunk in chunks.iter().rev() {
            decompress_span_into(opened.frame(chunk), chunk, at, &mut out).unwrap();
            assert!(out == tar[..usize::try_from(chunk.device.end()).unwrap()]);
        }
        let (frame, chunk) = (opened.frame(&chunks[1]), &chunks[1]);
        let cut = decompress_span_into(&frame[1..], chunk, at, &mut out);
        assert!(matches!(cut, Err(DecodeFrameError::FrameLength { .. })) && out.is_empty());
        let other = at.is_none().then_some(RestartAt::Member);
        let wrong = decompress_span_into(frame, chunk, other, &mut out);
        assert!(matches!(wrong, Err(DecodeFrameError::Codec { .. })));
    }
}

#[test]
fn windows_are_thin_and_still_enough() {
    let tar = sample();
    let opened = Opened::new(&gzip(&tar, 6), small(64 * 1024));
    opened.check(&tar);
    let (mut kept, mut windows) = (0, 0);
    for chunk in opened.map().chunks().flatten() {
        let Some((bits, window)) = opened.window(&chunk) else {
            continue;
        };
        windows += 1;
        kept += window.iter().filter(|byte| **byte != 0).count();
        // The bytes of the device before are as good as the thin window.
        let start = usize::try_from(chunk.device.start()).unwrap()
            - usize::try_from(chunk.skip_bytes).unwrap();
        let whole = &tar[start.saturating_sub(32 * 1024)..start];
        let at = RestartAt::Block {
            bits,
            window: whole,
        };
        let mut out = Vec::new();
        decode_restarted_into(opened.frame(&chunk), &chunk, at, &mut out).unwrap();
        assert_eq!(out, slice(&tar, chunk.device));
    }
    assert!(windows > 20, "{windows}");
    assert!(kept < windows * 30_000, "{kept} of {windows} windows");
}

#[test]
fn a_window_that_lost_a_byte_is_noticed() {
    let tar = sample();
    let opened = Opened::new(&gzip(&tar, 6), small(256 * 1024));
    let chunk = opened.alone(1);
    let (bits, window) = opened.window(&chunk).unwrap();
    let decode = |bits, window: &[u8]| {
        let mut out = vec![1];
        let at = RestartAt::Block { bits, window };
        let result = decode_restarted_into(opened.frame(&chunk), &chunk, at, &mut out);
        assert!(result.is_ok() || out.is_empty());
        result
    };
    decode(bits, &window).unwrap();
    let mut needed = 0;
    for at in (0..window.len()).filter(|at| window[*at] != 0).step_by(17) {
        let mut other = window.clone();
        other[at] ^= 0x80;
        // Each byte that was kept is copied somewhere: a change shows.
        assert!(matches!(
            decode(bits, &other),
            Err(DecodeFrameError::Crc32 { .. })
        ));
        needed += 1;
    }
    assert!(needed > 30, "{needed}");
    assert!(decode(bits, &window[1..]).is_err());
    assert!(decode(bits, &[]).is_err());
    for count in 0..8 {
        for value in 0..1 << count {
            let other = crate::gzip::LeadingBits::new(count, value).unwrap();
            assert_eq!(decode(other, &window).is_ok(), other == bits);
        }
    }
    assert_eq!(crate::gzip::LeadingBits::new(8, 0), None);
    assert_eq!(crate::gzip::LeadingBits::new(3, 8), None);
}

#[test]
fn damaged_frames_are_errors() {
    let tar = sample();
    let opened = Opened::new(&gzip(&tar, 6), small(64 * 1024));
    let chunk = opened.alone(1);
    let (bits, window) = opened.window(&chunk).unwrap();
    let at = RestartAt::Block {
        bits,
        window: &window,
    };
    let frame = opened.frame(&chunk);
    let mut out = Vec::new();
    let mut harmless = 0;
    for byte in (0..frame.len()).step_by(7) {
        let mut damaged = frame.to_vec();
        damaged[byte] ^= 1 << (byte % 8);
        // A copy from elsewhere may bring the same bytes, and the last byte may belong to the next frame.
        match decode_restarted_into(&damaged, &chunk, at, &mut out) {
            Ok(()) => {
                assert_eq!(out, slice(&tar, chunk.device));
                harmless += 1;
            }
            Err(_) => assert!(out.is_empty()),
        }
    }
    assert!(
        harmless < frame.len() / 700,
        "{harmless} of {} in {chunk:?}",
        frame.len()
    );
    for length in (0..frame.len()).rev().step_by(11) {
        let mut shorter = chunk;
        shorter.blob = Extent::from_length(chunk.blob.start(), length as u64).unwrap();
        let result = decode_restarted_into(&frame[..length], &shorter, at, &mut out);
        // The last bytes may hold nothing but the end of a block.
        assert!(result.is_err() || length + 4 >= frame.len(), "{length}");
        let result = decode_restarted_into(&frame[..length], &chunk, at, &mut out);
        assert!(matches!(result, Err(DecodeFrameError::FrameLength { .. })));
    }
    let without = decode_chunk(frame, &chunk);
    assert!(matches!(without, Err(DecodeFrameError::Codec { .. })));
    let zstd = Opened::new(
        &zstd::encode_all(tar.as_slice(), 3).unwrap(),
        IndexOptions::default(),
    );
    let other = zstd.map().chunk(0).unwrap();
    let result = decode_restarted_into(zstd.frame(&other), &other, at, &mut out);
    assert!(matches!(result, Err(DecodeFrameError::Codec { .. })));
}

#[test]
fn members_are_clean_and_need_no_window() {
    let tar = sample();
    let blob: Vec<u8> = tar.chunks(50_000).flat_map(|part| gzip(part, 6)).collect();
    let opened = Opened::new(&blob, IndexOptions::default());
    opened.check(&tar);
    assert!(
        opened.windows.is_empty()
            && opened
                .index
                .metadata()
                .unmodified
                .unwrap()
                .windows
                .is_none()
    );
    let lengths = opened.lengths();
    assert!(
        lengths[..lengths.len() - 1].iter().all(|it| *it == 150_000),
        "{lengths:?}"
    );
    // Members of many blocks: chunks inside of them, too.
    let opened = Opened::new(
        &[gzip(&tar[..1_500_000], 6), gzip(&tar[1_500_000..], 6)].concat(),
        small(200_000),
    );
    opened.check(&tar);
    let members = opened
        .map()
        .chunks()
        .flatten()
        .filter(|it| opened.window(it).is_none())
        .count();
    assert!(members >= 1 && !opened.windows.is_empty());
}

#[test]
fn headers_empty_members_and_what_follows_are_accepted() {
    let tar = tar(&[text(5, 40_000)]);
    let stream = deflate(&[&tar], 6, FlushCompress::None);
    let mut full = vec![0x1f, 0x8b, 8, 0x1e, 1, 2, 3, 4, 2, 3, 4, 0, 1, 2, 3, 4];
    full.extend(b"name\0comment\0");
    let crc = crc32fast::hash(&full).to_le_bytes();
    full.extend(&crc[..2]);
    let blob = member(&full, &stream, &tar);
    let empty = gzip(&[], 6);
    let open = |parts: &[&[u8]]| Opened::new(&parts.concat(), IndexOptions::default());
    for (parts, trailing, garbage) in [
        (&[&blob[..]][..], 0, false),
        (&[&blob, &[0; 512]], 512, false),
        (&[&blob, b"garbage"], 7, true),
        (&[&blob, &[0x1f]], 1, true),
        (&[&blob, &[0x1f, 0]], 2, true),
        (&[&blob, &[0, 0, 0x1f, 0x8b, 8]], 5, true),
        (&[&empty, &blob], 0, false),
        (&[&empty, &empty, &blob, &empty], 0, false),
    ] {
        let opened = open(parts);
        opened.check(&tar);
        assert_eq!(
            (opened.layer.trailing_bytes, opened.layer.trailing_garbage),
            (trailing, garbage)
        );
        assert_eq!(opened.layer.blob_bytes, parts.concat().len() as u64);
    }
}

#[test]
fn what_ordinary_tools_refuse_is_refused() {
    let tar = tar(&[text(5, 40_000)]);
    let blob = gzip(&tar, 6);
    for length in (2..100).chain((100..blob.len()).rev().step_by(101)) {
        match index_blob(&blob[..length], IndexOptions::default()) {
            Err(IndexerError::Gzip(GzipError::Truncated { offset })) => {
                assert_eq!(offset, length as u64);
            }
            other => panic!("{length}: {other:?}"),
        }
    }
    let end = blob.len();
    for (at, what) in [(end - 8, "crc32"), (end - 1, "length")] {
        let mut damaged = blob.clone();
        damaged[at] ^= 1;
        let expected = GzipError::Trailer {
            offset: end as u64,
            what,
        };
        assert_eq!(
            index_blob(&damaged, IndexOptions::default()),
            Err(IndexerError::Gzip(expected))
        );
    }
    let mut flags = blob.clone();
    flags[3] = 0x80;
    assert!(matches!(
        index_blob(&flags, IndexOptions::default()),
        Err(IndexerError::Gzip(GzipError::Header { offset: 0, .. }))
    ));
    // A second member that begins as one and is none.
    let two = [&blob[..], &[0x1f, 0x8b, 7]].concat();
    assert!(matches!(
        index_blob(&two, IndexOptions::default()),
        Err(IndexerError::Gzip(GzipError::Header { offset, .. })) if offset == end as u64
    ));
    // It copies from the member before.
    let dictionary = text(9, 1000);
    let mut compress = flate2::Compress::new(Compression::best(), false);
    compress.set_dictionary(&dictionary).unwrap();
    let mut stream = Vec::with_capacity(5000);
    compress
        .compress_vec(&dictionary, &mut stream, FlushCompress::Finish)
        .unwrap();
    let two = [gzip(&dictionary, 6), member(HEADER, &stream, &dictionary)].concat();
    assert!(matches!(
        index_blob(&two, IndexOptions::default()),
        Err(IndexerError::Gzip(GzipError::Deflate { .. }))
    ));
    // Nor does a reader of a frame that has both.
    let mut out = Vec::new();
    let result = crate::gzip::restart::inflate_into(&two, RestartAt::Member, 2000, &mut out);
    assert!(matches!(result, Err(GzipError::Deflate { .. })));
    let mut indexer = LayerIndexer::new(IndexOptions::default()).unwrap();
    let damaged = [&blob[..10], &[0xff; 100_000]].concat();
    assert!(indexer.push(&damaged, &mut |_| {}).is_err());
    assert_eq!(
        indexer.push(b"more", &mut |_| {}),
        Err(IndexerError::Failed)
    );
    assert_eq!(indexer.finish(&mut |_| {}), Err(IndexerError::Failed));
}

#[test]
fn blocks_longer_than_a_chunk_share_a_frame() {
    let tar = tar(&[vec![7; 5_000_000], text(8, 200_000), vec![0; 3_000_000]]);
    let opened = Opened::new(&gzip(&tar, 9), IndexOptions::default());
    opened.check(&tar);
    let shared = opened
        .map()
        .chunks()
        .flatten()
        .filter(|it| it.skip_bytes > 0)
        .count();
    assert!(shared > 2, "{shared}");
    assert!(opened.map().restart_count() < usize::try_from(opened.map().count()).unwrap());
}

#[test]
fn a_block_that_is_too_long_is_not_lazy() {
    // One block of fixed codes: 300 MB of the same byte, as a single literal and copies of 258 bytes.
    let mut bits = Bits::default();
    bits.push(0b011, 3);
    bits.push_code(0b0011_0000, 8);
    let copies = 120_000;
    for _ in 0..copies {
        // Length 258 is symbol 285, distance 1 is code 0.
        bits.push_code(0b1100_0101, 8);
        bits.push_code(0, 5);
    }
    bits.push_code(0, 7);
    let content = vec![0; 1 + 258 * copies];
    let blob = member(HEADER, &bits.finish(), &content);
    let layer = index_blob(&blob, IndexOptions::default()).unwrap();
    assert_eq!(layer.diff_id, DiffId::of(&content));
    let reason = layer.index.unwrap_err();
    assert!(
        reason.contains("deflate block of 30960001 bytes"),
        "{reason}"
    );
    let limit = IndexOptions {
        device_max_bytes: 20_000_000,
        ..IndexOptions::default()
    };
    assert_eq!(
        index_blob(&blob, limit),
        Err(IndexerError::DeviceTooLarge {
            limit_bytes: 20_000_000
        })
    );
}

#[test]
fn the_first_byte_of_a_whole_window_is_kept() {
    // A copy from as far back as there can be, right after a restart point: no encoder at hand makes one.
    let (before, copied) = (40_000, 258);
    let mut content = text(41, before - 512);
    for _ in 0..copied {
        content.push(content[content.len() - 32_768]);
    }
    let tar = tar(&[content]);
    let mut stream = deflate(&[&tar[..before]], 6, FlushCompress::Sync);
    let sync = [0, 0, 0xff, 0xff];
    let end = stream.windows(4).rposition(|it| it == sync).unwrap() + 4;
    stream.truncate(end);
    let mut bits = Bits::default();
    bits.push(0b010, 3);
    bits.push_code(0b1100_0101, 8);
    bits.push_code(29, 5);
    bits.push(8191, 13);
    bits.push_code(0, 7);
    bits.push(0b001, 3);
    stream.extend(bits.finish());
    let rest = &tar[before + copied..];
    let length = u16::try_from(rest.len()).unwrap();
    stream.extend(length.to_le_bytes());
    stream.extend((!length).to_le_bytes());
    stream.extend(rest);
    let options = small(u32::try_from(before).unwrap());
    let opened = Opened::new(&member(HEADER, &stream, &tar), options);
    opened.check(&tar);
    let (_, window) = opened.window(&opened.map().chunk(1).unwrap()).unwrap();
    assert_eq!(window.len(), 32 * 1024);
    let needed = window.iter().filter(|byte| **byte != 0).count();
    assert!(needed <= copied, "{needed}");
}

/// A deflate stream, bit by bit.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    used: usize,
}

impl Bits {
    fn push(&mut self, value: u32, count: usize) {
        for at in 0..count {
            if self.used.is_multiple_of(8) {
                self.bytes.push(0);
            }
            let last = self.bytes.last_mut().unwrap();
            *last |= u8::try_from(value >> at & 1).unwrap() << (self.used % 8);
            self.used += 1;
        }
    }

    /// Huffman codes stand with their highest bit first.
    fn push_code(&mut self, code: u32, count: usize) {
        for at in (0..count).rev() {
            self.push(code >> at & 1, 1);
        }
    }

    fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

#[test]
fn a_stream_of_empty_blocks_still_has_windows() {
    // After the restart point, more empty blocks than the lookahead sees, and then a copy.
    let first = text(11, 40_000);
    let mut stream = deflate(&[&first], 6, FlushCompress::Sync);
    // The end of the stream: replace it by empty stored blocks and one block that copies.
    let end = stream
        .windows(4)
        .rposition(|it| it == [0, 0, 0xff, 0xff])
        .unwrap()
        + 4;
    stream.truncate(end);
    for _ in 0..20_000 {
        stream.extend([0, 0, 0, 0xff, 0xff]);
    }
    let mut bits = Bits::default();
    bits.push(0b011, 3);
    // 258 bytes from 32,768 back: distance code 29, 13 extra bits.
    bits.push_code(0b1100_0101, 8);
    bits.push_code(29, 5);
    bits.push(8191, 13);
    bits.push_code(0, 7);
    stream.extend(bits.finish());
    let mut content = first.clone();
    for _ in 0..258 {
        content.push(content[content.len() - 32_768]);
    }
    let blob = member(HEADER, &stream, &content);
    let mut layer = LayerIndexer::new(small(40_000)).unwrap();
    let mut device = Vec::new();
    layer
        .push(&blob, &mut |chunk| device.extend_from_slice(chunk.bytes))
        .unwrap();
    // No tar, so no index; but the same through the parts below the tar.
    let layer = layer
        .finish(&mut |chunk| device.extend_from_slice(chunk.bytes))
        .unwrap();
    assert_eq!(device, content);
    assert!(layer.index.is_err());
    // The window of the restart point before the empty blocks is kept, although nothing seen copies from it.
    let mut window = first[first.len() - 32_768..].to_vec();
    let after = &stream[end..end + 64 * 1024];
    crate::gzip::sparse::thin(
        &mut window,
        crate::gzip::LeadingBits::default(),
        after,
        usize::MAX,
    );
    assert_eq!(window, first[first.len() - 32_768..]);
}

#[test]
fn zstd_frames_are_grouped_and_long_ones_go_by_prefix() {
    let tar = sample();
    let frames: Vec<u8> = tar
        .chunks(40_000)
        .flat_map(|part| zstd::encode_all(part, 3).unwrap())
        .chain([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3])
        .collect();
    let opened = Opened::new(&frames, IndexOptions::default());
    opened.check(&tar);
    assert_eq!(opened.map().access(), Access::Random);
    let lengths = opened.lengths();
    assert!(
        lengths[..lengths.len() - 1].iter().all(|it| *it == 160_000),
        "{lengths:?}"
    );

    // One frame of up to 16 MiB is shared.
    let one = zstd::encode_all(tar.as_slice(), 3).unwrap();
    let opened = Opened::new(&one, IndexOptions::default());
    opened.check(&tar);
    assert_eq!(opened.map().access(), Access::Random);
    assert_eq!(opened.map().chunk(1).unwrap().skip_bytes, 1 << 19);

    for length in 5..one.len() {
        let error = index_blob(&one[..length], IndexOptions::default()).unwrap_err();
        assert!(
            matches!(error, IndexerError::Truncated { .. }),
            "{length}: {error}"
        );
        if length > 2000 {
            break;
        }
    }
    let mut damaged = one.clone();
    damaged[one.len() / 2] ^= 0xff;
    // zstd needs no checksum: what it does not notice, the diff ID shows.
    match index_blob(&damaged, IndexOptions::default()) {
        Err(error) => assert!(matches!(error, IndexerError::Zstd { .. })),
        Ok(layer) => assert_ne!(layer.diff_id, DiffId::of(&tar)),
    }
    assert!(matches!(
        index_blob(&[&one[..], b"garbage"].concat(), IndexOptions::default()),
        Err(IndexerError::Zstd { .. })
    ));
}

#[test]
fn a_single_zstd_frame_goes_by_prefix() {
    let tar = tar(&[text(21, 9_000_000), vec![0; 9_000_000]]);
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let blob = [
        &skippable[..],
        &zstd::encode_all(tar.as_slice(), 1).unwrap(),
    ]
    .concat();
    let opened = Opened::new(&blob, IndexOptions::default());
    assert_eq!(opened.layer.diff_id, DiffId::of(&tar));
    assert_eq!(opened.map().access(), Access::Prefix);
    assert_eq!(opened.layer.index.as_ref().unwrap().access, Access::Prefix);
    let codecs: Vec<Codec> = opened.map().chunks().flatten().map(|it| it.codec).collect();
    assert_eq!(codecs[0], Codec::ZstdStream);
    assert!(codecs[1..].iter().all(|it| *it == Codec::ZstdNext));
    let last = opened.map().chunk(opened.map().count() - 1).unwrap();
    assert_eq!(last.blob.end(), blob.len() as u64);
    let chunk = opened.map().chunk(1).unwrap();
    assert!(matches!(
        decode_chunk(opened.frame(&chunk), &chunk),
        Err(DecodeFrameError::Codec { .. })
    ));
    // From the frame's start on they come one after the other, whatever the pieces.
    for piece in [1000, 100_000, blob.len()] {
        let mut decoder = StreamDecoder::of_chunk(opened.map(), 7).unwrap();
        let start = usize::try_from(decoder.chunk().unwrap().blob.start()).unwrap();
        assert_eq!(start, skippable.len());
        let mut device = Vec::new();
        for part in blob[start..].chunks(piece) {
            decoder
                .push(part, &mut |chunk, bytes| {
                    assert_eq!(chunk.device.start(), device.len() as u64);
                    device.extend_from_slice(bytes);
                })
                .unwrap();
        }
        assert!(device == tar && decoder.chunk().is_none());
    }
    let damage = |at: usize| {
        let mut damaged = blob[skippable.len()..].to_vec();
        damaged[at] ^= 0x55;
        let mut decoder = StreamDecoder::of_chunk(opened.map(), 0).unwrap();
        let mut given = 0;
        let result = decoder.push(&damaged, &mut |chunk, bytes| {
            assert_eq!(bytes, slice(&tar, chunk.device));
            given += 1;
        });
        assert!(result.is_err() && decoder.chunk().is_none());
        given
    };
    assert_eq!(damage(1), 0);
    assert!(damage(usize::try_from(chunk.blob.end()).unwrap() * 3) >= 2);
    let alone = Opened::new(&gzip(&sample(), 6), IndexOptions::default());
    assert!(matches!(
        StreamDecoder::of_chunk(alone.map(), 0),
        Err(DecodeFrameError::Codec { .. })
    ));
}

#[test]
fn a_plain_tar_is_cut_as_small_as_wanted() {
    let tar = tar(&[text(1, 300_000), text(2, 5)]);
    for chunk_max_bytes in [512, 1000, 100_000, 131_072, 1 << 20] {
        let opened = Opened::new(&tar, small(chunk_max_bytes));
        opened.check(&tar);
        let most = opened.lengths().into_iter().max().unwrap();
        assert_eq!(most, u64::from(chunk_max_bytes).min(131_072));
    }
}

#[test]
fn a_plain_tar_is_its_own_device() {
    let tar = sample();
    let opened = Opened::new(&tar, IndexOptions::default());
    opened.check(&tar);
    assert_eq!(opened.layer.format, BlobFormat::Tar);
    let chunk = opened.map().chunk(3).unwrap();
    assert_eq!(
        (chunk.device.start(), chunk.device.len()),
        (3 << 17, 1 << 17)
    );
    assert_eq!(chunk.blob.range(), chunk.device.range());
    assert!(
        index_blob(&[], IndexOptions::default())
            .unwrap()
            .index
            .is_ok()
    );
}

#[test]
fn options_out_of_range_are_refused() {
    for chunk_max_bytes in [0, (1 << 20) + 1] {
        assert_eq!(
            LayerIndexer::new(small(chunk_max_bytes)).err(),
            Some(IndexerError::ChunkSize { chunk_max_bytes })
        );
    }
}

#[test]
fn a_tar_that_cannot_be_lazy_has_a_diff_id_and_a_reason() {
    let noise = text(31, 100_000);
    let layer = index_blob(&gzip(&noise, 6), IndexOptions::default()).unwrap();
    assert_eq!(layer.diff_id, DiffId::of(&noise));
    assert!(layer.index.unwrap_err().contains("tar header"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Model: the tar itself. Whatever the encoder, its flushes, its members and the chunk size, any
    /// range of the device that is read chunk by chunk equals it, and the pieces in which the blob
    /// came make no difference.
    #[test]
    fn any_read_equals_the_tar(
        seed in any::<u64>(),
        sizes in prop::collection::vec(0usize..150_000, 1..6),
        level in 0u32..10,
        flush in prop::sample::select(vec![FlushCompress::None, FlushCompress::Partial, FlushCompress::Sync, FlushCompress::Full]),
        member_bytes in 10_000usize..400_000,
        flush_bytes in 500usize..50_000,
        chunk_max_bytes in 2_000u32..100_000,
        piece in 1usize..200_000,
        reads in prop::collection::vec((any::<u32>(), 1u32..100_000), 4),
    ) {
        let contents: Vec<Vec<u8>> = sizes.iter().zip(seed..).map(|(size, seed)| text(seed, *size)).collect();
        let tar = tar(&contents);
        let blob: Vec<u8> = tar.chunks(member_bytes).flat_map(|part| {
            let pieces: Vec<&[u8]> = part.chunks(flush_bytes).collect();
            member(HEADER, &deflate(&pieces, level, flush), part)
        }).collect();
        let opened = Opened::new(&blob, small(chunk_max_bytes));
        opened.check(&tar);
        for (start, length) in reads {
            let start = u64::from(start) % tar.len() as u64;
            let end = (start + u64::from(length)).min(tar.len() as u64);
            let want: Extent<DeviceSpace> = Extent::new(start, end).unwrap();
            let mut got = Vec::new();
            for ordinal in opened.map().covering(want) {
                let chunk = opened.map().chunk(ordinal).unwrap();
                let bytes = opened.read(&chunk);
                let part = chunk.device.intersect(want).unwrap();
                let at = |offset: u64| usize::try_from(offset - chunk.device.start()).unwrap();
                got.extend_from_slice(&bytes[at(part.start())..at(part.end())]);
            }
            prop_assert_eq!(&got, slice(&tar, want));
        }
        let mut indexer = LayerIndexer::new(small(chunk_max_bytes)).unwrap();
        let mut device = Vec::new();
        for part in blob.chunks(piece) {
            indexer.push(part, &mut |chunk| device.extend_from_slice(chunk.bytes)).unwrap();
        }
        let layer = indexer.finish(&mut |chunk| device.extend_from_slice(chunk.bytes)).unwrap();
        prop_assert_eq!(device, tar);
        prop_assert!(layer == opened.layer);
    }
}
