// SPDX-License-Identifier: Apache-2.0
//! What follows the frames: the TOC, and what says where it is.

use std::collections::BTreeMap;

use super::headers::Headers;
use super::listing::Listing;
use super::pieces::gzip_member;
use super::{LISTS_LEVEL_MAX, TocOptions, TocRecords, TocWriteError};
use crate::digest::{BlobDigest, DiffId, Sha256Hasher};
use crate::frames::compress;
use crate::seektable::SKIPPABLE_HEADER_BYTES;
use crate::toc::footer::{SKIPPABLE_MAGIC, estargz_footer, zstd_chunked_footer};
use crate::toc::open::ESTARGZ_NAME;
use crate::toc::pin::POSITION_TYPE;
use crate::toc::{
    ESTARGZ_DIGEST, ESTARGZ_TAR_BYTES, TOC_MAX_BYTES, Toc, TocError, TocFormat, TocLayer, TocPin,
    ZSTD_CHUNKED_CHECKSUM, ZSTD_CHUNKED_HEADERS, ZSTD_CHUNKED_POSITION,
};

const BLOCK: usize = 512;

/// A layer whose tar has been read to its end.
#[derive(Debug)]
pub struct TocPlan {
    pub(super) options: TocOptions,
    pub(super) diff_id: DiffId,
    /// Bytes of the tar that were cut into frames.
    pub(super) tar_bytes: u64,
    /// Of eStargz their digest.
    pub(super) before_end: Option<Sha256Hasher>,
    /// Of eStargz what ends the tar, unless it is in the frames.
    pub(super) end: Vec<u8>,
    pub(super) headers: Option<Headers>,
    /// Or why there is none.
    pub(super) listing: Result<Listing, String>,
}

/// What follows the frames, and what the layer is then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocTrailer {
    /// The rest of the blob.
    pub bytes: Vec<u8>,
    /// Size of the whole blob.
    pub blob_bytes: u64,
    /// Diff ID of the blob: of eStargz another than that of the tar that came in, unless there is no TOC.
    pub diff_id: DiffId,
    /// Bytes of the tar of the blob.
    pub tar_bytes: u64,
    /// The annotations that pin the TOC, or why there is none.
    pub toc: Result<BTreeMap<String, String>, String>,
}

impl TocPlan {
    /// Diff ID of the tar that came in: to be compared with the image config before anything is published.
    pub fn diff_id(&self) -> DiffId {
        self.diff_id
    }

    /// Writes what follows the frames that `records` tell of.
    ///
    /// The TOC is read, and an index made of it, as a node does, before it is returned. A layer whose TOC is
    /// refused there gets none.
    ///
    /// **Errors**: records of another layer, or no memory.
    pub fn assemble(self, records: &TocRecords) -> Result<TocTrailer, TocWriteError> {
        let made = match &self.listing {
            Err(reason) => Err(reason.clone()),
            Ok(listing) => {
                let (expected, actual) = (listing.chunks(), records.chunks.len() as u64);
                if expected != actual {
                    return Err(TocWriteError::Records { expected, actual });
                }
                match self.options.format {
                    TocFormat::Estargz => self.estargz(listing, records)?,
                    TocFormat::ZstdChunked => self.zstd_chunked(listing, records)?,
                }
            }
        };
        let made = made.and_then(|made| {
            let checked = made.check(records.blob_bytes, self.diff_id);
            checked.map(|()| made).map_err(|error| error.to_string())
        });
        let (bytes, diff_id, tar_bytes, toc) = match made {
            Ok(made) => (made.bytes, made.diff_id, made.tar_bytes, Ok(made.pins)),
            Err(reason) => {
                let mut bytes = Vec::new();
                if !self.end.is_empty() {
                    gzip_member(&self.end, self.options.level, &mut bytes)?;
                }
                let tar_bytes = self.tar_bytes + self.end.len() as u64;
                (bytes, self.ended_by(&self.end), tar_bytes, Err(reason))
            }
        };
        Ok(TocTrailer {
            blob_bytes: records.blob_bytes + bytes.len() as u64,
            bytes,
            diff_id,
            tar_bytes,
            toc,
        })
    }

    /// The diff ID of what is in the frames with this behind it.
    fn ended_by(&self, end: &[u8]) -> DiffId {
        let Some(mut hasher) = self.before_end.clone() else {
            return self.diff_id;
        };
        hasher.update(end);
        DiffId::from_bytes(hasher.finish())
    }

    fn json(&self, listing: &Listing, records: &TocRecords) -> String {
        let mut json = "{\"version\":1,\"entries\":[".to_owned();
        listing.write(&records.chunks, self.options.format, &mut json);
        json.push(']');
        if let Some(headers) = &self.headers {
            let digest = BlobDigest::of(&headers.payload);
            json.push_str(&format!(",\"tarSplitDigest\":\"{digest}\""));
        }
        json.push('}');
        json
    }

    fn estargz(
        &self,
        listing: &Listing,
        records: &TocRecords,
    ) -> Result<Result<Made, String>, TocWriteError> {
        let json = self.json(listing, records).into_bytes();
        let digest = BlobDigest::of(&json);
        let tar = tar_of_toc(json);
        let mut bytes = Vec::new();
        gzip_member(&tar, self.options.level, &mut bytes)?;
        if bytes.len() as u64 > TOC_MAX_BYTES {
            return Ok(Err(too_large(bytes.len())));
        }
        bytes.extend(estargz_footer(records.blob_bytes));
        let tar_bytes = self.tar_bytes + tar.len() as u64;
        Ok(Ok(Made {
            bytes,
            diff_id: self.ended_by(&tar),
            tar_bytes,
            pins: [
                (ESTARGZ_DIGEST, digest.to_string()),
                (ESTARGZ_TAR_BYTES, tar_bytes.to_string()),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
        }))
    }

    fn zstd_chunked(
        &self,
        listing: &Listing,
        records: &TocRecords,
    ) -> Result<Result<Made, String>, TocWriteError> {
        let json = self.json(listing, records).into_bytes();
        let toc = compress(&json, self.options.level.min(LISTS_LEVEL_MAX))?;
        if toc.len() as u64 > TOC_MAX_BYTES {
            return Ok(Err(too_large(toc.len())));
        }
        let mut tail = Tail {
            start: records.blob_bytes,
            bytes: Vec::new(),
        };
        let (Some(toc_start), toc_bytes) = (tail.skippable(&toc), toc.len() as u64) else {
            return Ok(Err(too_large(toc.len())));
        };
        let place = [toc_start, toc_bytes, json.len() as u64];
        let numbers = |numbers: &[u64]| {
            let texts: Vec<String> = numbers.iter().map(u64::to_string).collect();
            texts.join(":")
        };
        let position = numbers(&[place[0], place[1], place[2], POSITION_TYPE]);
        let mut pins = BTreeMap::from([
            (
                ZSTD_CHUNKED_CHECKSUM.to_owned(),
                BlobDigest::of(&toc).to_string(),
            ),
            (ZSTD_CHUNKED_POSITION.to_owned(), position),
        ]);
        let mut headers_place = [0; 3];
        if let Some(headers) = &self.headers {
            let Some(start) = tail.skippable(&headers.payload) else {
                return Ok(Err(too_large(headers.payload.len())));
            };
            headers_place = [start, headers.payload.len() as u64, headers.bytes];
            pins.insert(ZSTD_CHUNKED_HEADERS.to_owned(), numbers(&headers_place));
        }
        tail.skippable(&zstd_chunked_footer(place, headers_place));
        Ok(Ok(Made {
            bytes: tail.bytes,
            diff_id: self.diff_id,
            tar_bytes: self.tar_bytes,
            pins,
        }))
    }
}

fn too_large(bytes: usize) -> String {
    format!("table of contents of {bytes} bytes, compressed")
}

/// A trailer with a TOC.
struct Made {
    bytes: Vec<u8>,
    diff_id: DiffId,
    tar_bytes: u64,
    pins: BTreeMap<String, String>,
}

impl Made {
    /// Reads the TOC as a node does that has annotations and blob.
    fn check(&self, frames_bytes: u64, diff_id: DiffId) -> Result<(), TocError> {
        let pin = TocPin::of_annotations(|name| self.pins.get(name).map(String::as_str))?;
        let pin = pin.ok_or(TocError::Footer)?;
        let blob_bytes = frames_bytes + self.bytes.len() as u64;
        let place = pin.locate(&self.bytes, blob_bytes)?;
        let range = |offset: u64| usize::try_from(offset - frames_bytes).ok();
        let bytes = range(place.extent.start())
            .zip(range(place.extent.end()))
            .and_then(|(start, end)| self.bytes.get(start..end))
            .ok_or(TocError::Footer)?;
        let toc = Toc::open(&pin, &place, bytes)?;
        toc.index(&TocLayer {
            // The digest stands in the index and is part of no check.
            blob: BlobDigest::of(b""),
            blob_bytes,
            diff_id,
            writer: "",
        })?;
        Ok(())
    }
}

struct Tail {
    start: u64,
    bytes: Vec<u8>,
}

impl Tail {
    /// Adds a skippable frame; where its payload stands, unless that is too long for one.
    fn skippable(&mut self, payload: &[u8]) -> Option<u64> {
        let length = u32::try_from(payload.len()).ok()?;
        let start = self.start + self.bytes.len() as u64 + SKIPPABLE_HEADER_BYTES;
        self.bytes.extend_from_slice(SKIPPABLE_MAGIC);
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(payload);
        Some(start)
    }
}

/// The end of an eStargz tar: the TOC as its last file. No mode, owner or time, as its other writers have it.
fn tar_of_toc(mut json: Vec<u8>) -> Vec<u8> {
    let mut header = [0_u8; BLOCK];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, ESTARGZ_NAME.as_bytes());
    for field in [100, 108, 116] {
        put(field, b"0000000\0");
    }
    put(124, format!("{:011o}\0", json.len()).as_bytes());
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    put(329, b"0000000\0");
    put(337, b"0000000\0");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let padded = json.len().next_multiple_of(BLOCK);
    // Two blocks of zeros end the tar.
    json.resize(padded + 2 * BLOCK, 0);
    [&header[..], &json].concat()
}
