// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::chunkmap::ChunkRecord;
use crate::digest::{ChunkDigest, FileDigest};
use crate::erofs::{DeviceSlot, write_tree};
use crate::tree::{FileRun, Inode, InodeKind, Tree};

const DEVICE_BYTES: u32 = 5000;

fn diff_id() -> DiffId {
    DiffId::of(b"tar")
}

/// One file of 1000 bytes at block 2 of a device of 5000 bytes.
fn tree_of(blocks: u64, tag: [u8; 64], start_block: u64) -> Vec<u8> {
    let mut tree = Tree::new();
    let extent = Some(FileRun {
        device: 1,
        start_block,
    });
    let file = Inode::new(InodeKind::Regular {
        size_bytes: 1000,
        extent,
    });
    let directory = tree
        .insert_new(tree.root(), b"d", Inode::implicit_directory())
        .unwrap();
    tree.insert_new(directory, b"f", file).unwrap();
    write_tree(&tree, &[DeviceSlot { tag, blocks }]).unwrap()
}

struct Parts {
    tree: Vec<u8>,
    chunks: Vec<ChunkRecord>,
    files: Vec<FileContent>,
    skeleton: Extent<BlobSpace>,
}

impl Parts {
    fn good() -> Self {
        let chunk = |ordinal, device_bytes| ChunkRecord {
            ordinal,
            device_bytes,
            frame_bytes: 100,
            crc32: 7,
            digest: ChunkDigest([9; 32]),
        };
        let file = |start, bytes| FileContent {
            run: Extent::from_length(start, bytes).unwrap(),
            digest: FileDigest([8; 32]),
        };
        Self {
            tree: tree_of(10, *device_tag(diff_id()), 2),
            chunks: vec![chunk(0, 1024), chunk(1, DEVICE_BYTES - 1024)],
            files: vec![file(512, 5), file(1024, 1000), file(2560, 77)],
            skeleton: Extent::new(208, 300).unwrap(),
        }
    }

    fn file(&self) -> Vec<u8> {
        write_index(&IndexParts {
            tree: &self.tree,
            chunks: &self.chunks,
            files: &self.files,
            diff_id: diff_id(),
            skeleton: SkeletonPin {
                extent: self.skeleton,
                digest: [3; 32],
            },
            algorithm: StrongAlgorithm::Sha256,
            writer: "a writer whose name is longer than thirty-two bytes",
        })
        .unwrap()
    }

    fn error(&self) -> IndexError {
        validated(self.file()).unwrap_err()
    }
}

fn validated(file: Vec<u8>) -> Result<Index<Vec<u8>>, IndexError> {
    UncheckedIndex::parse(file)?.validate()
}

/// Puts the checksums of header and sections right, so that the other rules are reached.
pub(super) fn seal(file: &mut [u8]) {
    let count = file[12] as usize;
    for entry in (64..64 + 32 * count).step_by(32) {
        let word = |at| {
            let bytes: [u8; 8] = file[entry + at..entry + at + 8].try_into().unwrap();
            usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(usize::MAX)
        };
        let (start, end) = (word(8), word(8).saturating_add(word(16)));
        if let Some(section) = file.get(start..end) {
            let crc32 = crc32fast::hash(section).to_le_bytes();
            file[entry + 24..entry + 28].copy_from_slice(&crc32);
        }
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&file[..60]);
    hasher.update(&file[64..64 + 32 * count]);
    file[60..64].copy_from_slice(&hasher.finalize().to_le_bytes());
}

/// Overwrites bytes of a good file, seals it, and returns what validation says.
fn damaged(at: usize, bytes: &[u8]) -> IndexError {
    let mut file = Parts::good().file();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    seal(&mut file);
    validated(file).unwrap_err()
}

/// Where a section of a good file begins.
fn section(id: u32) -> usize {
    let file = Parts::good().file();
    let unchecked = UncheckedIndex::parse(file).unwrap();
    unchecked.section(id).unwrap().start
}

#[test]
fn a_good_index_reads_back() {
    let index = validated(Parts::good().file()).unwrap();
    assert_eq!(index.diff_id(), diff_id());
    assert_eq!(index.device_bytes(), u64::from(DEVICE_BYTES));
    assert_eq!(index.chunk_map().count(), 2);
    assert_eq!(index.files().unwrap().at_block(2).unwrap().run.len(), 1000);
    assert_eq!(index.files().unwrap().at_block(3), None);
    assert_eq!(index.files().unwrap().at_block(u64::MAX), None);
    assert_eq!(index.metadata().writer, "a writer whose name is longer th");
    assert_eq!(
        index.metadata().skeleton.extent,
        Extent::new(208, 300).unwrap()
    );
    assert!(index.fits_blob(300) && !index.fits_blob(299));
    let tree = index.tree().unwrap();
    let directory = tree.lookup(tree.root(), b"d").unwrap().unwrap();
    assert!(tree.lookup(directory, b"f").unwrap().is_some());
    assert_eq!(section(SECTION_TREE) % 4096, 0);
}

#[test]
fn payloads_round_trip_and_bombs_are_refused() {
    let file = Parts::good().file();
    let payload = compress_index(&file).unwrap();
    let bytes = file.len() as u64;
    assert_eq!(decompress_index(&payload, bytes).unwrap(), file);
    assert_eq!(
        decompress_index(&payload, bytes - 1),
        Err(IndexError::AboveCap {
            bytes,
            cap: bytes - 1
        })
    );
    for length in 0..payload.len() {
        assert!(
            decompress_index(&payload[..length], bytes).is_err(),
            "{length}"
        );
    }
    let twice = [payload.clone(), payload].concat();
    assert_eq!(decompress_index(&twice, bytes), Err(IndexError::Payload));
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0];
    assert!(
        decompress_index(&skippable, bytes)
            .and_then(validated)
            .is_err()
    );
}

#[test]
fn every_flipped_bit_is_noticed() {
    let file = Parts::good().file();
    for bit in 0..file.len() * 8 {
        // Compatible and read-only features are for readers to ignore, under a checksum.
        let mut damaged = file.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(validated(damaged).is_err(), "bit {bit}");
    }
    for length in 0..file.len() {
        assert!(validated(file[..length].to_vec()).is_err(), "{length}");
    }
}

#[test]
fn each_rule_of_the_header_is_checked() {
    use IndexError as E;
    assert_eq!(damaged(0, b"X"), E::Magic);
    assert_eq!(damaged(8, &[2]), E::Version { version: 2 });
    assert!(matches!(
        damaged(12, &[65]),
        E::SectionPlace { ordinal: 65, .. }
    ));
    assert_eq!(damaged(32, &[4]), E::Features { features: 4 });
    assert!(matches!(damaged(40, &[1]), E::Length { .. }));
    assert_eq!(damaged(48, &[1]), E::Reserved { place: "header" });
    // The second section: off its alignment, over the first, beyond the file, of an unknown kind.
    assert!(matches!(
        damaged(96 + 8, &[1]),
        E::SectionPlace { ordinal: 1, .. }
    ));
    assert!(matches!(
        damaged(96 + 8, &4096u64.to_le_bytes()),
        E::SectionPlace { .. }
    ));
    assert!(matches!(
        damaged(96 + 16, &[255; 8]),
        E::SectionPlace { .. }
    ));
    assert_eq!(damaged(96, &[9]), E::Section { id: 9 });
    assert_eq!(damaged(96, &[1]), E::Section { id: 1 });
    assert!(matches!(damaged(96 + 28, &[1]), E::Reserved { .. }));
    for flags in [[3, 0, 0, 0], [1, 0, 0, 0x80]] {
        assert!(matches!(damaged(64 + 4, &flags), E::Reserved { .. }));
    }
    assert!(matches!(damaged(200, &[1]), E::Reserved { .. }));
    let mut without_seal = Parts::good().file();
    without_seal[16] ^= 1;
    assert!(matches!(
        validated(without_seal),
        Err(E::Crc32 { id: 0, .. })
    ));
}

#[test]
fn unknown_sections_that_are_not_required_are_skipped() {
    let mut file = Parts::good().file();
    // The chunk map renamed to a section of the future that may be ignored: it is passed over, and
    // what is wrong then is only that there is no chunk map.
    file[96..100].copy_from_slice(&77u32.to_le_bytes());
    file[100] = 0;
    seal(&mut file);
    assert_eq!(
        validated(file).unwrap_err(),
        IndexError::Section { id: SECTION_CHUNKS }
    );
}

#[test]
fn reserved_bytes_and_algorithms_of_sections_are_checked() {
    use IndexError as E;
    let metadata = section(SECTION_METADATA);
    let files = section(SECTION_FILES);
    assert!(matches!(damaged(metadata + 105, &[1]), E::Reserved { .. }));
    assert!(matches!(damaged(metadata + 255, &[1]), E::Reserved { .. }));
    assert_eq!(damaged(metadata + 104, &[7]), E::Algorithm { code: 7 });
    assert!(matches!(
        damaged(metadata + 104, &[1]),
        E::Disagree {
            what: "strong algorithm",
            ..
        }
    ));
    assert_eq!(damaged(files + 4, &[0]), E::Algorithm { code: 0 });
    assert!(matches!(damaged(files + 4, &[1]), E::Disagree { .. }));
    assert!(matches!(damaged(files + 5, &[1]), E::Reserved { .. }));
    assert!(matches!(damaged(files, &[4]), E::FilesLength { .. }));
    assert!(matches!(damaged(files, &[255; 4]), E::FilesLength { .. }));
    assert!(matches!(
        damaged(section(SECTION_CHUNKS) + 31, &[1]),
        E::ChunkMap(_)
    ));
}

#[test]
fn parts_must_agree() {
    use IndexError as E;
    let metadata = section(SECTION_METADATA);
    for (at, what) in [
        (32, "device bytes"),
        (40, "frame bytes"),
        (96, "chunks"),
        (100, "files"),
    ] {
        match damaged(metadata + at, &[1]) {
            E::Disagree { what: actual, .. } => assert_eq!(actual, what),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(
        damaged(metadata, &[1, 2, 3]),
        E::Disagree {
            what: "diff ID",
            ..
        }
    ));
    assert!(matches!(
        damaged(metadata + 48, &[199]),
        E::Skeleton { start: 199, .. }
    ));
    assert!(matches!(
        damaged(metadata + 56, &[255; 8]),
        E::Skeleton { .. }
    ));
    let mut parts = Parts::good();
    parts.tree = tree_of(11, *device_tag(diff_id()), 2);
    assert!(matches!(
        parts.error(),
        E::Disagree {
            what: "device blocks",
            ..
        }
    ));
    parts.tree = tree_of(10, [b'0'; 64], 2);
    assert!(matches!(
        parts.error(),
        E::Disagree {
            what: "diff ID",
            ..
        }
    ));
}

#[test]
fn contents_must_have_their_place_and_files_their_content() {
    let with = |at: usize, start, bytes| {
        let mut parts = Parts::good();
        parts.files[at].run = Extent::from_length(start, bytes).unwrap();
        parts.error()
    };
    for (at, start, bytes) in [(0, 513, 5), (0, 512, 0), (0, 512, 513), (2, 4608, 393)] {
        let ordinal = u32::try_from(at).unwrap();
        let overlapped = (at, bytes) == (0, 513);
        match with(at, start, bytes) {
            IndexError::FileContent {
                ordinal: actual, ..
            } => {
                assert_eq!(actual, if overlapped { 1 } else { ordinal });
            }
            other => panic!("{other:?}"),
        }
    }
    let no_digest = IndexError::FileDigest {
        start_block: 2,
        bytes: 1000,
    };
    assert_eq!(with(1, 1024, 999), no_digest);
    assert_eq!(with(1, 1536, 1000), no_digest);
}

#[test]
fn reopening_skips_only_the_walk_over_the_tree() {
    let mut parts = Parts::good();
    parts.tree = tree_of(10, *device_tag(diff_id()), 3);
    assert!(matches!(parts.error(), IndexError::FileDigest { .. }));
    assert!(
        UncheckedIndex::parse(parts.file())
            .unwrap()
            .reopen()
            .is_ok()
    );
    let mut rotten = parts.file();
    let last = rotten.len() - 1;
    rotten[last] ^= 1;
    assert!(matches!(
        UncheckedIndex::parse(rotten).unwrap().reopen(),
        Err(IndexError::Crc32 {
            id: SECTION_METADATA,
            ..
        })
    ));
}
