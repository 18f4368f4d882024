// SPDX-License-Identifier: Apache-2.0
//! What a manifest's annotations pin of a layer's TOC.

use super::{TOC_JSON_MAX_BYTES, TOC_MAX_BYTES, TocError};
use crate::digest::{BlobDigest, DIGEST_BYTES};
use crate::extent::{BlobSpace, Extent};
use crate::seektable::SKIPPABLE_HEADER_BYTES;

/// sha256 of the TOC's JSON: eStargz layers, and the zstd:chunked ones of the same tools.
pub const ESTARGZ_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// sha256 of the TOC as it stands in a zstd:chunked layer.
pub const ZSTD_CHUNKED_CHECKSUM: &str = "io.github.containers.zstd-chunked.manifest-checksum";
/// Where it stands: offset, bytes, bytes of the JSON, and type, with colons.
pub const ZSTD_CHUNKED_POSITION: &str = "io.github.containers.zstd-chunked.manifest-position";
/// Where the headers of its tar stand, as tar-split keeps them: offset, bytes, bytes decompressed, with colons.
pub const ZSTD_CHUNKED_HEADERS: &str = "io.github.containers.zstd-chunked.tarsplit-position";
/// Bytes of the tar of an eStargz layer.
pub const ESTARGZ_TAR_BYTES: &str = "io.containers.estargz.uncompressed-size";
/// The same two as the tools of eStargz name them.
const OTHER_CHECKSUM: &str = "io.containers.zstd-chunked.manifest-checksum";
const OTHER_POSITION: &str = "io.containers.zstd-chunked.manifest-position";

/// The one type of TOC that is known.
pub(super) const POSITION_TYPE: u64 = 1;

/// The TOC of a layer as its manifest pins it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TocPin {
    /// The blob's footer says where it is, and of which format.
    Footer {
        /// sha256 of the JSON.
        json_digest: [u8; DIGEST_BYTES],
    },
    /// The annotations say where it is; it is zstd:chunked.
    Position {
        /// Where it stands in the blob.
        extent: Extent<BlobSpace>,
        /// Bytes of the JSON.
        json_bytes: u64,
        /// sha256 of the bytes in the blob.
        digest: [u8; DIGEST_BYTES],
    },
}

impl TocPin {
    /// Reads the annotations of a layer's descriptor; `None` when they name no TOC. Where annotations say the
    /// place, no footer is needed.
    ///
    /// **Errors**: annotations that mean nothing, or a TOC above what is accepted.
    pub fn of_annotations<'a>(
        get: impl Fn(&str) -> Option<&'a str>,
    ) -> Result<Option<Self>, TocError> {
        let estargz = get(ESTARGZ_DIGEST);
        let checksum = get(ZSTD_CHUNKED_CHECKSUM).or_else(|| get(OTHER_CHECKSUM));
        let position = get(ZSTD_CHUNKED_POSITION).or_else(|| get(OTHER_POSITION));
        match (checksum, position) {
            (Some(checksum), Some(position)) => zstd_chunked(checksum, position).map(Some),
            (Some(_), None) => Err(TocError::Missing {
                name: ZSTD_CHUNKED_POSITION,
            }),
            (None, Some(_)) => Err(TocError::Missing {
                name: ZSTD_CHUNKED_CHECKSUM,
            }),
            (None, None) => estargz
                .map(|text| {
                    let json_digest = digest(ESTARGZ_DIGEST, text)?;
                    Ok(Self::Footer { json_digest })
                })
                .transpose(),
        }
    }
}

fn digest(name: &'static str, text: &str) -> Result<[u8; DIGEST_BYTES], TocError> {
    let parsed: Result<BlobDigest, _> = text.parse();
    let parsed = parsed.map_err(|_| wrong(name, text))?;
    Ok(*parsed.as_bytes())
}

fn wrong(name: &'static str, value: &str) -> TocError {
    TocError::Annotation {
        name,
        value: value.chars().take(100).collect(),
    }
}

fn zstd_chunked(checksum: &str, position: &str) -> Result<TocPin, TocError> {
    let error = || wrong(ZSTD_CHUNKED_POSITION, position);
    let numbers: Option<Vec<u64>> = position.split(':').map(|it| it.parse().ok()).collect();
    let Some([start, bytes, json_bytes, POSITION_TYPE]) = numbers.as_deref() else {
        return Err(error());
    };
    let (bytes, json_bytes) = (*bytes, *json_bytes);
    for (bytes, cap) in [(bytes, TOC_MAX_BYTES), (json_bytes, TOC_JSON_MAX_BYTES)] {
        if bytes > cap {
            return Err(TocError::TooLarge { bytes, cap });
        }
    }
    let extent = Extent::from_length(*start, bytes)
        .filter(|extent| !extent.is_empty() && extent.start() >= SKIPPABLE_HEADER_BYTES)
        .ok_or_else(error)?;
    Ok(TocPin::Position {
        extent,
        json_bytes,
        digest: digest(ZSTD_CHUNKED_CHECKSUM, checksum)?,
    })
}
