// SPDX-License-Identifier: Apache-2.0
//! The structs of chunk map and restart table, as they stand on disk.
//! Byte tables: `docs/formats/layer-index.md`.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::digest::DIGEST_BYTES;

/// First bytes of the chunk map.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub device_bytes: U64,
    pub frames_bytes: U64,
    pub chunk_count: U32,
    pub algorithm: u8,
    pub reserved: [u8; 11],
}

/// One chunk.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawChunk {
    pub device_start: U64,
    pub frame_start: U64,
    pub frame_bytes: U32,
    pub crc32: U32,
    pub codec: u8,
    pub reserved: u8,
    pub padding_bytes: U16,
    pub skip_bytes: U32,
    pub digest: [u8; DIGEST_BYTES],
}

/// One restart point; the table has nothing else.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawRestart {
    pub frame_start: U64,
    pub window_start: U64,
    pub payload_bytes: U32,
    pub window_bytes: U32,
    pub kind: u8,
    pub bit_count: u8,
    pub bit_value: u8,
    pub reserved: [u8; 5],
    pub digest: [u8; DIGEST_BYTES],
}

/// Restart point at the header of a gzip member.
pub(super) const KIND_MEMBER: u8 = 1;
/// Restart point between two deflate blocks.
pub(super) const KIND_BLOCK: u8 = 2;

const _: () = assert!(size_of::<RawHeader>() == 32);
const _: () = assert!(offset_of!(RawHeader, chunk_count) == 16);
const _: () = assert!(offset_of!(RawHeader, algorithm) == 20);
const _: () = assert!(size_of::<RawChunk>() == 64);
const _: () = assert!(offset_of!(RawChunk, frame_bytes) == 16);
const _: () = assert!(offset_of!(RawChunk, codec) == 24);
const _: () = assert!(offset_of!(RawChunk, padding_bytes) == 26);
const _: () = assert!(offset_of!(RawChunk, skip_bytes) == 28);
const _: () = assert!(offset_of!(RawChunk, digest) == 32);
const _: () = assert!(size_of::<RawRestart>() == 64);
const _: () = assert!(offset_of!(RawRestart, payload_bytes) == 16);
const _: () = assert!(offset_of!(RawRestart, kind) == 24);
const _: () = assert!(offset_of!(RawRestart, digest) == 32);
