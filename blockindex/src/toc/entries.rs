// SPDX-License-Identifier: Apache-2.0
//! The JSON of a TOC, entry by entry.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::TocError;
use crate::digest::{BlobDigest, DIGEST_BYTES};
use crate::tar::{Entry, shown};
use crate::tree::Timestamp;

/// What the writer of the JSON put for bytes that are no UTF-8: which bytes they were nobody knows.
const REPLACEMENT: char = '\u{fffd}';

/// Name and value.
type Xattr = (Vec<u8>, Vec<u8>);

/// An entry as it is written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawEntry {
    #[serde(default)]
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) size: i64,
    #[serde(default)]
    modtime: Option<String>,
    #[serde(default)]
    link_name: String,
    #[serde(default)]
    mode: i64,
    #[serde(default)]
    uid: i64,
    #[serde(default)]
    gid: i64,
    #[serde(default)]
    dev_major: i64,
    #[serde(default)]
    dev_minor: i64,
    #[serde(default)]
    xattrs: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub(super) digest: String,
    #[serde(default)]
    pub(super) offset: i64,
    #[serde(default)]
    pub(super) inner_offset: i64,
    #[serde(default)]
    pub(super) end_offset: i64,
    #[serde(default)]
    pub(super) chunk_offset: i64,
    #[serde(default)]
    pub(super) chunk_size: i64,
    #[serde(default)]
    pub(super) chunk_digest: String,
}

impl RawEntry {
    pub(super) fn is_chunk(&self) -> bool {
        self.kind == "chunk"
    }

    pub(super) fn error(&self, what: &'static str) -> TocError {
        TocError::Entry {
            path: shown(self.name.as_bytes()),
            what,
        }
    }

    /// The entry of the tar that it stands for.
    pub(super) fn to_tar(&self) -> Result<Entry, TocError> {
        let kind = match self.kind.as_str() {
            "reg" => b'0',
            "hardlink" => b'1',
            "symlink" => b'2',
            "char" => b'3',
            "block" => b'4',
            "dir" => b'5',
            "fifo" => b'6',
            _ => return Err(self.error("unknown type")),
        };
        for text in [&self.name, &self.link_name] {
            if text.contains(REPLACEMENT) {
                return Err(self.error("a name that is no UTF-8"));
            }
            if text.contains('\0') {
                return Err(self.error("a name with a NUL"));
            }
        }
        Ok(Entry {
            kind,
            name: self.name.clone().into_bytes(),
            link_name: self.link_name.clone().into_bytes(),
            size: self.size,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime()?,
            major: self.dev_major,
            minor: self.dev_minor,
            xattrs: self.xattrs()?,
            sparse: false,
            other_fields: false,
        })
    }

    fn mtime(&self) -> Result<Timestamp, TocError> {
        let text = match self.modtime.as_deref() {
            None | Some("") => return Ok(Timestamp::default()),
            Some(text) => text,
        };
        let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| self.error("bad time"))?;
        Ok(Timestamp {
            seconds: time.unix_timestamp(),
            nanoseconds: time.nanosecond(),
        })
    }

    fn xattrs(&self) -> Result<Vec<Xattr>, TocError> {
        let mut xattrs = Vec::new();
        for (name, value) in self.xattrs.iter().flatten() {
            if name.contains(REPLACEMENT) || name.contains('\0') {
                return Err(self.error("bad name of an extended attribute"));
            }
            let value = STANDARD.decode(value);
            let value = value.map_err(|_| self.error("bad extended attribute"))?;
            xattrs.push((name.clone().into_bytes(), value));
        }
        Ok(xattrs)
    }
}

/// The sha256 that a digest names; `None` for none.
pub(super) fn sha256_of(text: &str) -> Result<Option<[u8; DIGEST_BYTES]>, &'static str> {
    if text.is_empty() {
        return Ok(None);
    }
    let parsed: Result<BlobDigest, _> = text.parse();
    let parsed = parsed.map_err(|_| "a digest that is no sha256")?;
    Ok(Some(*parsed.as_bytes()))
}

/// Reads all entries in order; one is held at a time.
///
/// **Errors**: no JSON of this shape, another version, or what `each` says.
pub(super) fn for_each(
    json: &[u8],
    each: &mut dyn FnMut(RawEntry) -> Result<(), TocError>,
) -> Result<(), TocError> {
    let mut reading = Reading {
        each,
        failed: None,
        version: None,
        listed: false,
    };
    let mut parser = serde_json::Deserializer::from_slice(json);
    let parsed = Document(&mut reading)
        .deserialize(&mut parser)
        .and_then(|()| parser.end());
    if let Some(failed) = reading.failed {
        return Err(failed);
    }
    parsed.map_err(|error| TocError::Json {
        reason: error.to_string(),
    })?;
    match (reading.version, reading.listed) {
        (Some(1), true) => Ok(()),
        (Some(1), false) => Err(TocError::Json {
            reason: "no entries".to_owned(),
        }),
        (version, _) => Err(TocError::Version {
            version: version.unwrap_or_default(),
        }),
    }
}

struct Reading<'a> {
    each: &'a mut dyn FnMut(RawEntry) -> Result<(), TocError>,
    failed: Option<TocError>,
    version: Option<i64>,
    listed: bool,
}

struct Document<'r, 'a>(&'r mut Reading<'a>);
struct Entries<'r, 'a>(&'r mut Reading<'a>);

impl<'de> DeserializeSeed<'de> for Document<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Document<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "version" => self.0.version = Some(map.next_value()?),
                "entries" if self.0.listed => return Err(A::Error::custom("entries twice")),
                "entries" => {
                    self.0.listed = true;
                    map.next_value_seed(Entries(self.0))?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Entries<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(entry) = list.next_element::<RawEntry>()? {
            if let Err(error) = (self.0.each)(entry) {
                self.0.failed = Some(error);
                return Err(A::Error::custom("entry refused"));
            }
        }
        Ok(())
    }
}
