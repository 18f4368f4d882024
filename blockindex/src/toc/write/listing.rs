// SPDX-License-Identifier: Apache-2.0
//! The entries of a TOC, as text that lacks only where the contents stand.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use time::OffsetDateTime;

use super::headers::Crc64;
use super::pieces::ChunkPlace;
use crate::digest::{BlobDigest, DIGEST_BYTES, Sha256Hasher};
use crate::tar::{Entry, shown};
use crate::toc::TocFormat;
use crate::toc::open::ESTARGZ_NAME;
use crate::tree::Timestamp;

/// The most bytes of the JSON: what readers of containers/storage take, and below what [`crate::toc`] does.
const JSON_MAX_BYTES: u64 = 150 * 1024 * 1024;
/// What an entry of a chunk takes besides its name, at most.
const CHUNK_JSON_BYTES: u64 = 320;
/// Pieces of a content are multiples of a page.
const PAGE_BYTES: u64 = 4096;

/// A content that passes.
#[derive(Debug)]
pub(super) struct Content {
    bytes: u64,
    piece_bytes: u64,
    done: u64,
    /// Of a content of several chunks; of others it is the chunk's.
    hasher: Option<Sha256Hasher>,
    crc64: Crc64,
}

impl Content {
    /// Cut into about as many pieces of equal size as the target says, on pages.
    pub(super) fn new(bytes: u64, target_bytes: u64) -> Self {
        let pieces = (bytes.saturating_add(target_bytes / 2) / target_bytes).max(1);
        let piece_bytes = match pieces {
            1 => bytes,
            pieces => bytes.div_ceil(pieces).next_multiple_of(PAGE_BYTES),
        };
        Self {
            bytes,
            piece_bytes,
            done: 0,
            hasher: (piece_bytes < bytes).then(Sha256Hasher::new),
            crc64: Crc64::default(),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn crc64(&self) -> [u8; 8] {
        self.crc64.finish()
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.crc64.update(bytes);
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
    }

    /// How much of the content its open chunk still takes.
    pub(super) fn left_of_chunk(&self) -> u64 {
        let in_chunk = self.piece_bytes - self.done % self.piece_bytes;
        in_chunk.min(self.bytes - self.done)
    }

    /// Passes so many bytes, no more than are left of the chunk; returns whether that ends it.
    pub(super) fn advance(&mut self, bytes: u64) -> bool {
        self.done += bytes;
        self.done == self.bytes || self.done.is_multiple_of(self.piece_bytes)
    }
}

/// A content of the list.
#[derive(Debug)]
struct Listed {
    /// Where in the text its places belong.
    at: usize,
    /// Where the name stands in the text, as JSON.
    name: std::ops::Range<usize>,
    bytes: u64,
    piece_bytes: u64,
    digest: Option<[u8; DIGEST_BYTES]>,
}

impl Listed {
    fn chunks(&self) -> u64 {
        self.bytes.div_ceil(self.piece_bytes)
    }
}

/// All entries so far.
#[derive(Debug, Default)]
pub(super) struct Listing {
    text: String,
    contents: Vec<Listed>,
    chunks: u64,
    /// At most so many bytes of JSON it will be.
    json_bytes: u64,
    name: std::ops::Range<usize>,
    /// The name as it is.
    last_name: String,
}

/// Whether this is the file that an eStargz tar ends with.
pub(super) fn is_toc_name(name: &[u8]) -> bool {
    let mut components = name
        .split(|byte| *byte == b'/')
        .filter(|component| !matches!(*component, b"" | b"."));
    components.next() == Some(ESTARGZ_NAME.as_bytes()) && components.next().is_none()
}

/// Whether a TOC can say this time: years of four digits.
pub(super) fn time_is_written(time: Timestamp) -> bool {
    text_of_time(time).is_some()
}

fn text_of_time(at: Timestamp) -> Option<String> {
    let time = OffsetDateTime::from_unix_timestamp(at.seconds).ok()?;
    if !(1..=9999).contains(&time.year()) {
        return None;
    }
    let (year, month, day) = (time.year(), u8::from(time.month()), time.day());
    let (hour, minute, second) = time.to_hms();
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if at.nanoseconds > 0 {
        let _ = write!(text, ".{:09}", at.nanoseconds);
    }
    text.push('Z');
    Some(text)
}

/// Text that a TOC gives back as it is: readers take U+FFFD for bytes that were no text.
fn text(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    (!text.contains(['\0', char::REPLACEMENT_CHARACTER])).then_some(text)
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn type_of(kind: u8) -> Option<&'static str> {
    Some(match kind {
        b'0' => "reg",
        b'1' => "hardlink",
        b'2' => "symlink",
        b'3' => "char",
        b'4' => "block",
        b'5' => "dir",
        b'6' => "fifo",
        _ => return None,
    })
}

impl Listing {
    pub(super) fn held_bytes(&self) -> u64 {
        let contents = self.contents.capacity() * size_of::<Listed>();
        self.text.capacity() as u64 + contents as u64 + self.chunks * size_of::<ChunkPlace>() as u64
    }

    pub(super) fn chunks(&self) -> u64 {
        self.chunks
    }

    /// The name of the entry that came last.
    pub(super) fn last_name(&self) -> &str {
        &self.last_name
    }

    /// Why this entry cannot be listed.
    pub(super) fn objection(&self, entry: &Entry) -> Option<String> {
        let name = || shown(&entry.name);
        let names = [&entry.name, &entry.link_name].into_iter();
        let mut names = names.chain(entry.xattrs.iter().map(|(name, _)| name));
        if names.any(|name| text(name).is_none()) {
            return Some(format!("{}: a name that is no UTF-8", name()));
        }
        if type_of(entry.kind).is_none() {
            return Some(format!("{}: entry of another type", name()));
        }
        (self.json_bytes > JSON_MAX_BYTES)
            .then(|| format!("table of contents of more than {JSON_MAX_BYTES} bytes"))
    }

    /// Adds an entry for which there is no objection.
    pub(super) fn entry(&mut self, entry: &Entry) {
        let name = text(&entry.name).unwrap_or_default();
        name.clone_into(&mut self.last_name);
        let kind = type_of(entry.kind).unwrap_or_default();
        let before = self.text.len();
        let out = &mut self.text;
        out.push_str(if before == 0 {
            "{\"name\":"
        } else {
            ",{\"name\":"
        });
        let start = out.len();
        out.push_str(&quoted(name));
        self.name = start..out.len();
        let _ = write!(out, ",\"type\":\"{kind}\"");
        if let Some(link) = text(&entry.link_name).filter(|link| !link.is_empty()) {
            let _ = write!(out, ",\"linkName\":{}", quoted(link));
        }
        let size = if entry.kind == b'0' { entry.size } else { 0 };
        for (field, number) in [
            ("mode", entry.mode),
            ("size", size),
            ("uid", entry.uid),
            ("gid", entry.gid),
            ("devMajor", entry.major),
            ("devMinor", entry.minor),
        ] {
            if number != 0 {
                let _ = write!(out, ",\"{field}\":{number}");
            }
        }
        if let Some(time) = text_of_time(entry.mtime) {
            let _ = write!(out, ",\"modtime\":\"{time}\"");
        }
        for (number, (name, value)) in entry.xattrs.iter().enumerate() {
            out.push_str(if number == 0 { ",\"xattrs\":{" } else { "," });
            let name = quoted(text(name).unwrap_or_default());
            let _ = write!(out, "{name}:\"{}\"", STANDARD.encode(value));
        }
        out.push_str(if entry.xattrs.is_empty() { "}" } else { "}}" });
        self.json_bytes += (out.len() - before) as u64;
    }

    /// The content of the entry that came last.
    pub(super) fn content(&mut self, content: Content) {
        let listed = Listed {
            at: self.text.len() - 1,
            name: self.name.clone(),
            bytes: content.bytes,
            piece_bytes: content.piece_bytes,
            digest: content.hasher.map(Sha256Hasher::finish),
        };
        let chunks = listed.chunks();
        self.chunks += chunks;
        let each = CHUNK_JSON_BYTES + listed.name.len() as u64;
        self.json_bytes = self.json_bytes.saturating_add(each.saturating_mul(chunks));
        self.contents.push(listed);
    }

    /// The JSON of the entries, once it is known where [`Self::chunks`] chunks stand.
    pub(super) fn write(&self, chunks: &[ChunkPlace], format: TocFormat, out: &mut String) {
        let (mut done, mut chunks) = (0, chunks.iter());
        for content in &self.contents {
            out.push_str(&self.text[done..content.at]);
            done = content.at;
            let count = usize::try_from(content.chunks()).unwrap_or(usize::MAX);
            let places = chunks.as_slice();
            let places = &places[..count.min(places.len())];
            chunks = chunks.as_slice()[places.len()..].iter();
            content.write(&self.text[content.name.clone()], places, format, out);
        }
        out.push_str(&self.text[done..]);
    }
}

impl Listed {
    /// The rest of the entry, but for its last brace, with the entries of further chunks.
    fn write(&self, name: &str, places: &[ChunkPlace], format: TocFormat, out: &mut String) {
        let digest = self.digest.or(places.first().map(|place| place.digest));
        let digest = BlobDigest::from_bytes(digest.unwrap_or_default());
        let _ = write!(out, ",\"digest\":\"{digest}\"");
        for (number, place) in places.iter().enumerate() {
            let at = number as u64 * self.piece_bytes;
            if number > 0 {
                let _ = write!(
                    out,
                    "}},{{\"name\":{name},\"type\":\"chunk\",\"chunkOffset\":{at}"
                );
            }
            let _ = write!(out, ",\"offset\":{}", place.start);
            if let (0, Some(last), TocFormat::ZstdChunked) = (number, places.last(), format) {
                let _ = write!(out, ",\"endOffset\":{}", last.end);
            }
            if places.len() > 1 {
                let bytes = self.piece_bytes.min(self.bytes - at);
                let _ = write!(out, ",\"chunkSize\":{bytes}");
            }
            let digest = BlobDigest::from_bytes(place.digest);
            let _ = write!(out, ",\"chunkDigest\":\"{digest}\"");
        }
    }
}
