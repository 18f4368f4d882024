// SPDX-License-Identifier: Apache-2.0
//! Layers that others made seekable, eStargz and zstd:chunked: their table of contents (TOC) in, a layer index out.
//!
//! Such a blob is an ordinary gzip or zstd layer, cut where contents begin, with a JSON document at its end that
//! names each file, its attributes, and where its content stands in the blob, by chunks with their sha256. The
//! image's manifest pins that document.
//!
//! ```text
//! TocPin::of_annotations   what the manifest pins of the layer
//!   first_read, locate     which bytes of the blob are the TOC: one read, of eStargz sometimes a second
//!   Toc::open              these bytes, verified and decompressed
//!   Toc::index             tree, chunk map and file table
//! ```
//!
//! A TOC does not say where contents stand in the tar: how long the headers before them are is known to who reads
//! the blob. So the device is no tar ([`DeviceForm::Contents`](crate::chunkmap::DeviceForm)): it has the contents
//! one after the other in the order of the TOC, each from a block on. What an entry means is decided as for an
//! entry of a tar (`tar/apply.rs`), in the same order.
//!
//! Nothing in a TOC is believed because it is pinned: all its numbers are checked, and what it can make a reader
//! hold or do is bounded. The document is read entry by entry, never as a whole structure.
//!
//! [`write`](mod@write) makes such blobs. `docs/decisions/042-toc-layers.md` and `044-writing-other-formats.md` have the
//! reasons.

mod build;
mod chunks;
mod entries;
mod error;
mod footer;
mod open;
mod pin;
pub mod write;

use crate::digest::{BlobDigest, DiffId};
use crate::extent::{BlobSpace, Extent};

pub use error::TocError;
pub use footer::TocPlace;
pub use pin::{
    ESTARGZ_DIGEST, ESTARGZ_TAR_BYTES, TocPin, ZSTD_CHUNKED_CHECKSUM, ZSTD_CHUNKED_HEADERS,
    ZSTD_CHUNKED_POSITION,
};

/// The most bytes that a TOC may take in a blob: some million files.
pub const TOC_MAX_BYTES: u64 = 64 * 1024 * 1024;

/// The most bytes of a TOC's JSON: what a node holds in memory at most besides the tree.
pub const TOC_JSON_MAX_BYTES: u64 = 256 * 1024 * 1024;

/// Whose format a TOC has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TocFormat {
    /// Members of gzip; the TOC is the tar's last file.
    Estargz,
    /// Frames of zstd; the TOC stands in a skippable frame.
    ZstdChunked,
}

impl TocFormat {
    /// The word for people and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Estargz => "estargz",
            Self::ZstdChunked => "zstd-chunked",
        }
    }
}

/// The layer that a TOC is of, as its manifest and config say.
#[derive(Debug, Clone, Copy)]
pub struct TocLayer<'a> {
    /// Digest of the blob.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_bytes: u64,
    /// Diff ID: a name here, which nothing that the TOC leads to can prove.
    pub diff_id: DiffId,
    /// Name of the program, for people who look into the index.
    pub writer: &'a str,
}

/// A TOC whose bytes are those that the manifest pins; nothing of what it says is checked yet.
#[derive(Debug, Clone)]
pub struct Toc {
    format: TocFormat,
    /// Where it stands in the blob.
    extent: Extent<BlobSpace>,
    /// Of eStargz the header of the tar's last file, which is the TOC itself.
    header: Vec<u8>,
    json: Vec<u8>,
}

#[cfg(test)]
pub(crate) mod sample;
#[cfg(test)]
mod tests;
