// SPDX-License-Identifier: Apache-2.0
//! The structs of an index file, as they stand on disk. Byte table: `docs/formats/layer-index.md`.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const MAGIC: [u8; 8] = *b"SLUICEIX";
pub(super) const VERSION: u32 = 1;
/// Sections start on multiples of this: the page size, so that a mapped tree is aligned as the
/// kernel and [`crate::tree`]'s readers like it.
pub(super) const SECTION_ALIGN: u64 = 4096;
/// A reader accepts no more sections; the table is read before anything is verified.
pub(super) const SECTIONS_MAX: u32 = 64;

/// Features a reader may ignore.
pub(super) const COMPATIBLE: u64 = 0;
/// Features that a reader may ignore as long as it does not rewrite the file.
pub(super) const READ_ONLY: u64 = 0;
/// Incompatible feature: the index is of a blob that Sluice did not write. It names that blob, has no
/// skeleton, and its chunks may have any codec.
pub(super) const UNMODIFIED: u64 = 1;
/// Incompatible feature, beside [`UNMODIFIED`]: the device is no tar but the contents that the blob's own table
/// of contents names.
pub(super) const CONTENTS: u64 = 2;

pub(super) const SECTION_TREE: u32 = 1;
pub(super) const SECTION_CHUNKS: u32 = 2;
pub(super) const SECTION_FILES: u32 = 3;
pub(super) const SECTION_METADATA: u32 = 4;
/// Restart points; only in an index of an unmodified blob.
pub(super) const SECTION_RESTARTS: u32 = 5;

/// Section flag: a reader that does not know the section must refuse the file.
pub(super) const FLAG_REQUIRED: u32 = 1;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub magic: [u8; 8],
    pub version: U32,
    pub section_count: U32,
    pub compatible: U64,
    pub read_only: U64,
    pub incompatible: U64,
    pub file_bytes: U64,
    pub reserved: [u8; 12],
    /// CRC-32 of this struct before this field and of the section table.
    pub crc32: U32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawSection {
    pub id: U32,
    pub flags: U32,
    pub offset: U64,
    pub bytes: U64,
    pub crc32: U32,
    pub reserved: U32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawMetadata {
    pub diff_id: [u8; 32],
    pub device_bytes: U64,
    pub frames_bytes: U64,
    pub skeleton_start: U64,
    pub skeleton_bytes: U64,
    pub skeleton_digest: [u8; 32],
    pub chunk_count: U32,
    pub file_count: U32,
    pub algorithm: u8,
    pub reserved: [u8; 7],
    pub writer: [u8; 32],
    /// From here on zeros unless the index is of an unmodified blob.
    pub blob_digest: [u8; 32],
    pub blob_bytes: U64,
    pub windows_bytes: U64,
    pub windows_digest: [u8; 32],
    pub reserved_tail: [u8; 32],
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawFilesHeader {
    pub count: U32,
    pub algorithm: u8,
    pub reserved: [u8; 11],
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawFile {
    pub start: U64,
    pub bytes: U64,
    pub digest: [u8; 32],
}

const _: () = assert!(size_of::<RawHeader>() == 64);
const _: () = assert!(offset_of!(RawHeader, compatible) == 16);
const _: () = assert!(offset_of!(RawHeader, file_bytes) == 40);
const _: () = assert!(offset_of!(RawHeader, crc32) == 60);
const _: () = assert!(size_of::<RawSection>() == 32);
const _: () = assert!(offset_of!(RawSection, crc32) == 24);
const _: () = assert!(size_of::<RawMetadata>() == 256);
const _: () = assert!(offset_of!(RawMetadata, skeleton_digest) == 64);
const _: () = assert!(offset_of!(RawMetadata, algorithm) == 104);
const _: () = assert!(offset_of!(RawMetadata, writer) == 112);
const _: () = assert!(offset_of!(RawMetadata, blob_digest) == 144);
const _: () = assert!(offset_of!(RawMetadata, windows_bytes) == 184);
const _: () = assert!(offset_of!(RawMetadata, reserved_tail) == 224);
const _: () = assert!(size_of::<RawFilesHeader>() == 16);
const _: () = assert!(size_of::<RawFile>() == 48);
