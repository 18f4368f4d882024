// SPDX-License-Identifier: Apache-2.0
//! Table of file contents: where each stands on the device, and its strong digest.
//!
//! All contents of the tar in device order, also those that a later entry replaced: the skeleton
//! needs them. A file is found by where its run starts, which, unlike its inode number, stays the
//! same when trees are merged.

use zerocopy::{FromBytes, IntoBytes};

use super::IndexError;
use super::format::{RawFile, RawFilesHeader};
use crate::digest::{FileDigest, StrongAlgorithm};
use crate::extent::{DeviceSpace, Extent};
use crate::units::BLOCK_BYTES;

/// One file content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileContent {
    /// Where it stands on the device.
    pub run: Extent<DeviceSpace>,
    /// Strong digest of it.
    pub digest: FileDigest,
}

/// The table, read in place.
#[derive(Debug, Clone, Copy)]
pub struct FileTable<'a> {
    records: &'a [RawFile],
    algorithm: StrongAlgorithm,
}

impl<'a> FileTable<'a> {
    pub(super) fn open(section: &'a [u8]) -> Result<Self, IndexError> {
        let length = |expected: u64| IndexError::FilesLength {
            expected,
            actual: section.len() as u64,
        };
        let header_bytes = size_of::<RawFilesHeader>() as u64;
        let (header, rest) =
            RawFilesHeader::ref_from_prefix(section).map_err(|_| length(header_bytes))?;
        let expected = u64::from(header.count.get()) * size_of::<RawFile>() as u64;
        if rest.len() as u64 != expected {
            return Err(length(header_bytes + expected));
        }
        let algorithm =
            StrongAlgorithm::from_code(header.algorithm).ok_or(IndexError::Algorithm {
                code: header.algorithm,
            })?;
        if header.reserved != [0; 11] {
            return Err(IndexError::Reserved {
                place: "file table",
            });
        }
        let records = <[RawFile]>::ref_from_bytes(rest).map_err(|_| length(expected))?;
        Ok(Self { records, algorithm })
    }

    /// Checks that all contents start on blocks, ascend, and lie inside the device.
    pub(super) fn check(&self, device_bytes: u64) -> Result<(), IndexError> {
        let mut end = 0;
        for (ordinal, record) in (0u32..).zip(self.records) {
            let (start, bytes) = (record.start.get(), record.bytes.get());
            let run = content(record).map(|content| content.run).filter(|run| {
                !run.is_empty()
                    && run.start() % BLOCK_BYTES == 0
                    && run.start() >= end
                    && run.end() <= device_bytes
            });
            let Some(run) = run else {
                return Err(IndexError::FileContent {
                    ordinal,
                    start,
                    bytes,
                });
            };
            end = run.end();
        }
        Ok(())
    }

    /// How many contents there are.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Algorithm of the digests.
    pub fn algorithm(&self) -> StrongAlgorithm {
        self.algorithm
    }

    /// The content at `ordinal`, counted as the skeleton counts.
    pub fn content(&self, ordinal: usize) -> Option<FileContent> {
        content(self.records.get(ordinal)?)
    }

    /// All contents in device order.
    pub fn contents(self) -> impl Iterator<Item = FileContent> + 'a {
        self.records.iter().filter_map(content)
    }

    /// The content that starts at block `start_block` of the device, by binary search.
    pub fn at_block(&self, start_block: u64) -> Option<FileContent> {
        let start = start_block.checked_mul(BLOCK_BYTES)?;
        let found = self
            .records
            .binary_search_by_key(&start, |record| record.start.get());
        self.content(found.ok()?)
    }
}

fn content(record: &RawFile) -> Option<FileContent> {
    Some(FileContent {
        run: Extent::from_length(record.start.get(), record.bytes.get())?,
        digest: FileDigest(record.digest),
    })
}

pub(super) fn write(
    algorithm: StrongAlgorithm,
    contents: &[FileContent],
) -> Result<Vec<u8>, IndexError> {
    let count = u32::try_from(contents.len()).map_err(|_| IndexError::TooLarge)?;
    let header = RawFilesHeader {
        count: count.into(),
        algorithm: algorithm.code(),
        reserved: [0; 11],
    };
    let mut section = header.as_bytes().to_vec();
    section.reserve_exact(size_of::<RawFile>() * contents.len());
    for content in contents {
        let raw = RawFile {
            start: content.run.start().into(),
            bytes: content.run.len().into(),
            digest: content.digest.0,
        };
        section.extend_from_slice(raw.as_bytes());
    }
    Ok(section)
}
