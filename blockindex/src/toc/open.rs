// SPDX-License-Identifier: Apache-2.0
//! From the bytes of a TOC to its JSON, verified.

use super::{TOC_JSON_MAX_BYTES, Toc, TocError, TocFormat, TocPin, TocPlace};
use crate::digest::{DIGEST_BYTES, Sha256Hasher};
use crate::gzip::restart::{RestartAt, inflate_into};
use crate::tar;

/// Bytes of a tar's header.
const BLOCK: usize = 512;
/// The name under which an eStargz tar has its TOC.
pub(super) const ESTARGZ_NAME: &str = "stargz.index.json";

impl Toc {
    /// Verifies and decompresses the TOC, whose bytes in the blob these are; `place` is what
    /// [`TocPin::locate`] says.
    ///
    /// Allocates at most [`TOC_JSON_MAX_BYTES`], and nothing before that is known.
    ///
    /// **Errors**: other bytes than those that are pinned ([`TocError::is_of_bytes`]), or too many.
    pub fn open(pin: &TocPin, place: &TocPlace, bytes: &[u8]) -> Result<Self, TocError> {
        // Of the bytes in the blob where that is known, before anything looks at them.
        if let TocPin::Position { digest, .. } = pin
            && sha256(bytes) != *digest
        {
            return Err(TocError::Digest);
        }
        let (header, json) = match place.format {
            TocFormat::Estargz => estargz(bytes)?,
            TocFormat::ZstdChunked => (Vec::new(), zstd_chunked(bytes, place.json_bytes)?),
        };
        if let TocPin::Footer { json_digest } = pin
            && sha256(&json) != *json_digest
        {
            return Err(TocError::Digest);
        }
        Ok(Self {
            format: place.format,
            extent: place.extent,
            header,
            json,
        })
    }

    /// Whose format it has.
    pub fn format(&self) -> TocFormat {
        self.format
    }

    /// Bytes of its JSON.
    pub fn json_bytes(&self) -> u64 {
        self.json.len() as u64
    }
}

fn sha256(bytes: &[u8]) -> [u8; DIGEST_BYTES] {
    let mut hasher = Sha256Hasher::new();
    hasher.update(bytes);
    hasher.finish()
}

fn damaged(reason: impl ToString) -> TocError {
    let reason = reason.to_string();
    TocError::Damaged { reason }
}

/// A gzip member that is a tar of one file: its header, and the file.
fn estargz(bytes: &[u8]) -> Result<(Vec<u8>, Vec<u8>), TocError> {
    let mut tar = Vec::new();
    inflate_into(bytes, RestartAt::Member, BLOCK, &mut tar).map_err(damaged)?;
    let file = tar::first_file(&tar).map_err(damaged)?;
    let (name, size) = file.ok_or_else(|| damaged("no file in its tar"))?;
    if name != ESTARGZ_NAME.as_bytes() {
        return Err(damaged("another name in its tar"));
    }
    let cap = TOC_JSON_MAX_BYTES;
    if size > cap {
        return Err(TocError::TooLarge { bytes: size, cap });
    }
    let size = usize::try_from(size).map_err(damaged)?;
    inflate_into(bytes, RestartAt::Member, BLOCK + size, &mut tar).map_err(damaged)?;
    let json = tar.split_off(BLOCK);
    Ok((tar, json))
}

/// Frames of zstd that give exactly `json_bytes`, which were found to be within the cap.
fn zstd_chunked(bytes: &[u8], json_bytes: u64) -> Result<Vec<u8>, TocError> {
    let capacity = usize::try_from(json_bytes).map_err(damaged)?;
    let json = zstd::bulk::decompress(bytes, capacity).map_err(damaged)?;
    match json.len() == capacity {
        true => Ok(json),
        false => Err(damaged("another size than is said of it")),
    }
}
