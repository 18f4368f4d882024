// SPDX-License-Identifier: Apache-2.0
use proptest::prelude::*;

use super::*;

fn records(sizes: &[(u32, u32)]) -> Vec<ChunkRecord> {
    (0..)
        .zip(sizes)
        .map(|(ordinal, &(device_bytes, frame_bytes))| ChunkRecord {
            ordinal,
            device_bytes,
            frame_bytes,
            crc32: ordinal * 7,
            digest: ChunkDigest([u8::try_from(ordinal % 251).unwrap(); 32]),
        })
        .collect()
}

fn map(sizes: &[(u32, u32)]) -> ChunkMap {
    let bytes = write_chunk_map(StrongAlgorithm::Blake3, &records(sizes)).unwrap();
    ChunkMap::parse(bytes).unwrap()
}

fn device(start: u64, end: u64) -> Extent<DeviceSpace> {
    Extent::new(start, end).unwrap()
}

#[test]
fn an_empty_device_has_no_chunk() {
    let map = map(&[]);
    assert_eq!(
        (map.count(), map.device_bytes(), map.frames_bytes()),
        (0, 0, 0)
    );
    assert_eq!(map.covering(device(0, 10)), 0..0);
    assert_eq!(map.at(0), None);
}

#[test]
fn lookups_find_the_chunks_that_overlap() {
    let map = map(&[(1000, 10), (500, 20), (2, 30)]);
    let cases = [
        (device(0, 1), 0..1),
        (device(0, 0), 0..0),
        (device(999, 1000), 0..1),
        (device(999, 1001), 0..2),
        (device(1000, 1001), 1..2),
        (device(1500, 9999), 2..3),
        (device(0, u64::MAX), 0..3),
        (device(1502, 1503), 0..0),
    ];
    for (extent, expected) in cases {
        assert_eq!(map.covering(extent), expected, "{extent}");
    }
    let chunk = map.at(1501).unwrap();
    assert_eq!(chunk.device, device(1500, 1502));
    assert_eq!(chunk.blob, Extent::new(30, 60).unwrap());
    assert_eq!((chunk.ordinal, chunk.crc32), (2, Some(14)));
    assert_eq!(map.chunk(3), None);
}

/// Overwrites bytes of a good map of two chunks and returns what the parser says.
fn damaged(at: usize, bytes: &[u8]) -> ChunkMapError {
    let mut section =
        write_chunk_map(StrongAlgorithm::Blake3, &records(&[(1000, 10), (500, 20)])).unwrap();
    section[at..at + bytes.len()].copy_from_slice(bytes);
    ChunkMap::parse(section).unwrap_err()
}

#[test]
fn each_rule_is_checked() {
    use ChunkMapError as E;
    let big = 2_000_000u64.to_le_bytes();
    assert!(matches!(
        damaged(0, &1000u64.to_le_bytes()),
        E::Device { ordinal: 1, .. }
    ));
    assert!(matches!(damaged(0, &big), E::Device { ordinal: 1, .. }));
    assert!(matches!(
        damaged(8, &29u64.to_le_bytes()),
        E::Frame { ordinal: 1, .. }
    ));
    assert!(matches!(damaged(16, &[3]), E::Length { .. }));
    assert!(matches!(damaged(19, &[255]), E::Length { .. }));
    assert!(matches!(damaged(20, &[9]), E::Algorithm { code: 9 }));
    assert!(matches!(damaged(31, &[1]), E::Reserved { ordinal: None }));
    assert!(matches!(damaged(32, &[1]), E::Device { ordinal: 0, .. }));
    assert!(matches!(damaged(96, &big), E::Device { ordinal: 0, .. }));
    assert!(matches!(damaged(96 + 8, &[9]), E::Frame { ordinal: 1, .. }));
    assert!(matches!(
        damaged(96 + 8, &[255; 8]),
        E::Frame { ordinal: 1, .. }
    ));
    assert!(matches!(
        damaged(32 + 16, &[0]),
        E::Frame {
            ordinal: 0,
            bytes: 0,
            ..
        }
    ));
    assert!(matches!(
        damaged(32 + 24, &[2]),
        E::Codec {
            ordinal: 0,
            code: 2
        }
    ));
    assert!(matches!(
        damaged(96 + 31, &[2]),
        E::Reserved { ordinal: Some(1) }
    ));
    assert!(matches!(
        ChunkMap::parse(vec![0; 31]).unwrap_err(),
        E::Length { .. }
    ));
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let cap = u32::try_from(CHUNK_MAX_BYTES).unwrap();
    for sizes in [&[(0, 1)][..], &[(1, 0)], &[(cap + 1, 1)]] {
        assert!(write_chunk_map(StrongAlgorithm::Sha256, &records(sizes)).is_err());
    }
    let mut swapped = records(&[(1, 1), (1, 1)]);
    swapped.swap(0, 1);
    assert!(write_chunk_map(StrongAlgorithm::Sha256, &swapped).is_err());
}

proptest! {
    /// Model: a plain vector with the ordinal of each device byte.
    #[test]
    fn covering_equals_a_plain_vector(
        sizes in prop::collection::vec((1u32..40, 1u32..9), 0..30),
        start in 0u64..1300,
        length in 0u64..200,
    ) {
        let map = map(&sizes);
        let owner: Vec<u32> = (0..).zip(&sizes)
            .flat_map(|(ordinal, (bytes, _))| std::iter::repeat_n(ordinal, *bytes as usize))
            .collect();
        prop_assert_eq!(map.device_bytes(), owner.len() as u64);
        let inside: Vec<u32> = (start..start + length)
            .filter_map(|offset| owner.get(usize::try_from(offset).unwrap()).copied())
            .collect();
        let expected = match (inside.first(), inside.last()) {
            (Some(first), Some(last)) => *first..last + 1,
            _ => 0..0,
        };
        prop_assert_eq!(map.covering(device(start, start + length)), expected);
        for (offset, ordinal) in (0..).zip(&owner) {
            prop_assert_eq!(map.at(offset).unwrap().ordinal, *ordinal);
        }
    }
}
