// SPDX-License-Identifier: Apache-2.0
//! Sluice's formats: tar scanner, EROFS trees, chunk maps, seekable zstd, layer index files; and the index
//! of blobs as they are.
//!
//! Pure: no clock, no network, no files; every decoder takes bytes and is fuzzed. What the formats
//! look like byte by byte is in `docs/formats/`.
#![forbid(unsafe_code)]

pub mod annotations;
pub mod artifact;
pub mod boot;
pub mod chunkmap;
pub mod digest;
pub mod dump;
pub mod encode;
pub mod erofs;
pub mod extent;
pub mod frames;
pub mod gzip;
pub mod index;
pub mod indexer;
pub mod merge;
pub mod seektable;
pub mod skeleton;
pub mod tar;
pub mod toc;
pub mod tree;
pub mod units;
pub mod windows;
