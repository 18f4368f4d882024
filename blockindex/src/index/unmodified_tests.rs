// SPDX-License-Identifier: Apache-2.0
use std::io::Write;

use super::format::{FLAG_REQUIRED, RawSection};
use super::tests::seal;
use super::*;
use crate::chunkmap::{ChunkMapError, Codec};
use crate::indexer::{BuiltIndex, IndexOptions, index_blob};

/// A gzip blob with a few restart points, and its index.
fn sample() -> (Vec<u8>, BuiltIndex) {
    let content: Vec<u8> = (0u32..300_000)
        .map(|at| (at.wrapping_mul(at) >> 11).to_le_bytes()[0] & 0x1f)
        .collect();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    builder
        .append_data(&mut header, "file", content.as_slice())
        .unwrap();
    let tar = builder.into_inner().unwrap();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    for part in tar.chunks(50_000) {
        // A block each.
        encoder.write_all(part).unwrap();
        encoder.flush().unwrap();
    }
    let blob = encoder.finish().unwrap();
    let options = IndexOptions {
        chunk_max_bytes: 100_000,
        ..IndexOptions::default()
    };
    let index = index_blob(&blob, options).unwrap().index.unwrap();
    (blob, index)
}

fn validated(file: Vec<u8>) -> Result<Index<Vec<u8>>, IndexError> {
    UncheckedIndex::parse_unmodified(file)?.validate()
}

/// Where a section begins in the file.
fn section(file: &[u8], id: u32) -> usize {
    let unchecked = UncheckedIndex::parse_unmodified(file.to_vec()).unwrap();
    unchecked.section(id).unwrap().start
}

/// Overwrites bytes of a section, seals the file, and returns what validation says.
fn damaged(id: u32, at: usize, bytes: &[u8]) -> IndexError {
    let (_, built) = sample();
    let mut file = built.file;
    let start = section(&file, id) + at;
    file[start..start + bytes.len()].copy_from_slice(bytes);
    seal(&mut file);
    validated(file).unwrap_err()
}

#[test]
fn an_index_of_an_unmodified_blob_reads_back() {
    let (blob, built) = sample();
    let index = validated(built.file.clone()).unwrap();
    let unmodified = index.metadata().unmodified.unwrap();
    assert_eq!(unmodified.digest, BlobDigest::of(&blob));
    assert_eq!(unmodified.bytes, blob.len() as u64);
    let windows = unmodified.windows.unwrap();
    assert_eq!(windows.bytes, built.windows.len() as u64);
    assert_eq!(windows.digest, *BlobDigest::of(&built.windows).as_bytes());
    assert!(index.metadata().skeleton.extent.is_empty());
    assert!(index.fits_blob(blob.len() as u64) && !index.fits_blob(blob.len() as u64 - 1));
    assert!(index.chunk_map().restart_count() > 2);
    assert_eq!(
        decompress_index(&built.payload, 1 << 20).unwrap(),
        built.file
    );
    UncheckedIndex::parse_unmodified(built.file)
        .unwrap()
        .reopen()
        .unwrap();
}

#[test]
fn neither_kind_of_index_passes_for_the_other() {
    let (_, built) = sample();
    assert!(matches!(
        UncheckedIndex::parse(built.file.clone()),
        Err(IndexError::Kind { .. })
    ));
    // Without the feature it has a section that must be known, and is not.
    let mut file = built.file;
    file[32] = 0;
    seal(&mut file);
    assert!(matches!(
        UncheckedIndex::parse(file.clone()),
        Err(IndexError::Section {
            id: SECTION_RESTARTS
        })
    ));
    assert!(UncheckedIndex::parse_unmodified(file).is_err());
}

#[test]
fn an_index_of_another_blob_is_refused() {
    let (blob, built) = sample();
    let index = validated(built.file).unwrap();
    let (digest, bytes) = (BlobDigest::of(&blob), blob.len() as u64);
    index.check_blob(digest, bytes).unwrap();
    let other = BlobDigest::of(b"other");
    assert!(matches!(
        index.check_blob(other, bytes),
        Err(IndexError::OtherBlob { actual, .. }) if actual == digest
    ));
    assert!(matches!(
        index.check_blob(digest, bytes + 1),
        Err(IndexError::Disagree { .. })
    ));
}

#[test]
fn the_metadata_of_unmodified_blobs_is_checked() {
    use IndexError as E;
    let metadata = |at, bytes: &[u8]| damaged(SECTION_METADATA, at, bytes);
    // Frames beyond the blob; a skeleton; windows that are too many, or of which the file has none.
    assert!(matches!(
        metadata(176, &10u64.to_le_bytes()),
        E::Disagree {
            what: "frames and blob",
            ..
        }
    ));
    assert!(matches!(metadata(56, &[1]), E::Skeleton { .. }));
    assert!(matches!(metadata(64, &[1]), E::Skeleton { .. }));
    assert!(matches!(metadata(184, &[255; 8]), E::AboveCap { .. }));
    assert!(matches!(
        metadata(184, &[0; 40]),
        E::ChunkMap(ChunkMapError::Restart { .. })
    ));
    assert!(matches!(metadata(224, &[1]), E::Reserved { .. }));
    let codec = |code| damaged(SECTION_CHUNKS, 32 + 24, &[code]);
    assert!(matches!(
        codec(99),
        E::ChunkMap(ChunkMapError::Codec { .. })
    ));
    assert!(matches!(
        codec(Codec::ZstdFrames.code()),
        E::ChunkMap(ChunkMapError::Restarts { .. })
    ));
    assert!(matches!(
        damaged(SECTION_RESTARTS, 0, &[1]),
        E::ChunkMap(ChunkMapError::Restart { ordinal: 0, .. })
    ));
}

#[test]
fn restart_points_of_nothing_are_refused() {
    let (_, built) = sample();
    let mut file = built.file;
    // The section is renamed to one that may be skipped: then the points are missing.
    let entry = 64 + 4 * size_of::<RawSection>();
    assert_eq!(file[entry..entry + 8], [5, 0, 0, 0, 1, 0, 0, 0]);
    file[entry] = 77;
    file[entry + 4] &= !u8::try_from(FLAG_REQUIRED).unwrap();
    seal(&mut file);
    assert!(matches!(
        validated(file),
        Err(IndexError::ChunkMap(ChunkMapError::Restarts {
            actual: 0,
            ..
        }))
    ));
}
