// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::chunkmap::{ChunkMap, write_chunk_map};

fn sample(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|i| u8::try_from((i * i / 97) % 61).unwrap())
        .collect()
}

fn encoded(content: &[u8]) -> (Chunk, Vec<u8>) {
    let chunk = encode_chunk(0, content, DEFAULT_LEVEL, StrongAlgorithm::Blake3).unwrap();
    let map = write_chunk_map(StrongAlgorithm::Blake3, &[chunk.record]).unwrap();
    (ChunkMap::parse(map).unwrap().chunk(0).unwrap(), chunk.frame)
}

#[test]
fn chunks_round_trip() {
    for bytes in [1, 511, 512, 131_072, 1_048_576] {
        let content = sample(bytes);
        let (chunk, frame) = encoded(&content);
        assert_eq!(decode_chunk(&frame, &chunk).unwrap(), content);
    }
}

#[test]
fn sizes_outside_the_rules_are_refused() {
    for bytes in [0, 1_048_577] {
        let result = encode_chunk(0, &sample(bytes), 3, StrongAlgorithm::Blake3);
        assert_eq!(
            result.unwrap_err(),
            EncodeFrameError::Size {
                bytes: bytes as u64
            }
        );
    }
}

#[test]
fn incompressible_chunks_stay_below_the_frame_cap() {
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_le_bytes()[7]
    })
    .take(1_048_576)
    .collect();
    let (chunk, frame) = encoded(&noise);
    assert!(frame.len() as u64 <= FRAME_MAX_BYTES && frame.len() > noise.len());
    assert_eq!(decode_chunk(&frame, &chunk).unwrap(), noise);
}

#[test]
fn every_flipped_bit_is_noticed() {
    let content = sample(3000);
    let (chunk, frame) = encoded(&content);
    for bit in 0..frame.len() * 8 {
        let mut damaged = frame.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        // A flipped bit that zstd does not use (a reserved or unused header bit) may leave the content
        // as it was; then and only then the chunk is accepted.
        if let Ok(bytes) = decode_chunk(&damaged, &chunk) {
            assert_eq!(bytes, content, "bit {bit}");
        }
    }
}

#[test]
fn only_exactly_one_frame_is_accepted() {
    let content = sample(3000);
    let (chunk, frame) = encoded(&content);
    let with_length = |bytes: &[u8]| {
        let mut chunk = chunk;
        chunk.blob = crate::extent::Extent::from_length(0, bytes.len() as u64).unwrap();
        decode_chunk(bytes, &chunk)
    };
    let mut cut = frame.clone();
    cut.pop();
    assert!(matches!(
        decode_chunk(&cut, &chunk),
        Err(DecodeFrameError::FrameLength { .. })
    ));
    assert!(matches!(
        with_length(&cut),
        Err(DecodeFrameError::NotOneFrame { .. })
    ));
    let twice = [frame.clone(), frame.clone()].concat();
    assert!(matches!(
        with_length(&twice),
        Err(DecodeFrameError::NotOneFrame { .. })
    ));
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9];
    assert!(matches!(
        with_length(&skippable),
        Err(DecodeFrameError::NotOneFrame { .. })
    ));
    assert!(matches!(
        with_length(b""),
        Err(DecodeFrameError::NotOneFrame { .. })
    ));
}

#[test]
fn wrong_size_crc_and_digest_are_told_apart() {
    let content = sample(3000);
    let (chunk, frame) = encoded(&content);
    let mut longer = chunk;
    longer.device = crate::extent::Extent::from_length(0, 3001).unwrap();
    assert!(matches!(
        decode_chunk(&frame, &longer),
        Err(DecodeFrameError::ContentSize {
            expected: 3001,
            actual: Some(3000),
            ..
        })
    ));
    let mut crc = chunk;
    crc.crc32 = crc.crc32.map(|crc| crc ^ 1);
    assert!(matches!(
        decode_chunk(&frame, &crc),
        Err(DecodeFrameError::Crc32 { .. })
    ));
    let mut digest = chunk;
    digest.algorithm = StrongAlgorithm::Sha256;
    let mut out = vec![1, 2, 3];
    let result = decode_chunk_into(&frame, &digest, &mut out);
    assert!(matches!(result, Err(DecodeFrameError::Digest { .. })));
    assert!(out.is_empty());
}

#[test]
fn a_frame_does_not_depend_on_what_its_thread_did_before() {
    let chunks: Vec<Vec<u8>> = (1..20).map(|i| sample(i * 8001)).collect();
    for level in [1, DEFAULT_LEVEL, 5, 7, 9, 12] {
        let encode =
            move |bytes: &[u8]| encode_chunk(0, bytes, level, StrongAlgorithm::Blake3).unwrap();
        let on_a_new_thread = |bytes: &Vec<u8>| {
            let bytes = bytes.clone();
            std::thread::spawn(move || encode(&bytes)).join().unwrap()
        };
        let fresh: Vec<EncodedChunk> = chunks.iter().map(on_a_new_thread).collect();
        for _ in 0..2 {
            for (bytes, expected) in chunks.iter().zip(&fresh).rev() {
                assert_eq!(&encode(bytes), expected, "level {level}");
            }
        }
    }
}
