// SPDX-License-Identifier: Apache-2.0
//! Boot lists: the chunks that a container reads while it starts, in the order of their first reads.
//!
//! A list is of one run of layers, which [`BootKey`] names by the digests of their indexes: so it can
//! never be applied to other chunks, whatever an image is called, and two nodes find the same key
//! without asking. It has two forms, both of varints of the distance to the chunk before:
//!
//! - the *whole* list, which a node stores and nodes exchange ([`BootList::encode`]);
//! - its *part* of one layer, which stands in annotations of the layer ([`BootPart::to_texts`]) and
//!   also says where in the whole list its chunks stand, so that the parts make up the list again.
//!
//! Each list has exactly one spelling: what decodes is encoded to the same bytes. Lists come from
//! whoever wrote the manifest and from other nodes: every count is bounded before it is believed.
//! Whether a chunk exists is for the user to check against the layer's chunk map.
//!
//! The byte tables are in `docs/formats/boot-list.md`.

mod code;

use std::collections::HashSet;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

use crate::digest::{DIGEST_BYTES, IndexDigest};
use code::{Reader, put_varint, unzigzag, zigzag};

/// The most chunks of a list: 2 GiB of devices. A container that reads more while it starts is served
/// as well by reading ahead, and no line carries it in one burst.
pub const BOOT_CHUNKS_MAX: usize = 16 * 1024;
/// The most layers of a list; far above the 127 that overlayfs and container tools accept.
pub const BOOT_LAYERS_MAX: usize = 512;

const VERSION: u8 = 1;
const FORM_WHOLE: u8 = 1;
const FORM_PART: u8 = 2;

/// Why a boot list is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BootListError {
    /// Another version, or a part where a whole list is wanted.
    #[error("boot list of version {version}, form {form}")]
    Form {
        /// As read.
        version: u8,
        /// As read.
        form: u8,
    },
    /// It ends in the middle.
    #[error("boot list is cut short")]
    Cut,
    /// Bytes follow its end.
    #[error("bytes after the end of a boot list")]
    Trailing,
    /// A number is not written in its shortest form, or is too large.
    #[error("a number of a boot list is not well-formed")]
    Number,
    /// More than is accepted.
    #[error("boot list of {count} {what}, at most {max} are accepted")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        count: u64,
        /// How many are accepted.
        max: usize,
    },
    /// A chunk stands in the list twice.
    #[error("chunk {chunk} of layer {layer} stands in a boot list twice")]
    Twice {
        /// The layer's place in the list.
        layer: u16,
        /// The chunk.
        chunk: u32,
    },
    /// A chunk of a layer that the list does not have.
    #[error("boot list names layer {layer} of {layers}")]
    NoSuchLayer {
        /// The layer's place.
        layer: u64,
        /// How many there are.
        layers: usize,
    },
    /// Chunks of one layer that belong together are divided: such a list has a shorter spelling.
    #[error("boot list is not in its shortest form")]
    Divided,
    /// Not base64.
    #[error("boot list is not base64")]
    Text,
}

/// Names a run of layers by their indexes: the key of its boot list.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootKey([u8; DIGEST_BYTES]);

impl BootKey {
    /// The key of the run of these layers, lowest first.
    #[must_use]
    pub fn of_layers(indexes: &[IndexDigest]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(b"sluice boot list");
        for index in indexes {
            hasher.update(index.as_bytes());
        }
        Self(hasher.finalize().into())
    }

    /// The key with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; DIGEST_BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; DIGEST_BYTES] {
        &self.0
    }
}

impl fmt::Display for BootKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for BootKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BootKey({self})")
    }
}

/// A chunk of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootChunk {
    /// The layer's place in the list, from 0, lowest first.
    pub layer: u16,
    /// The chunk's place in the layer's chunk map.
    pub chunk: u32,
}

/// The boot list of a run of layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootList {
    layers: Vec<IndexDigest>,
    chunks: Vec<BootChunk>,
}

impl BootList {
    /// A list of these chunks, in the order in which they are read.
    ///
    /// **Errors**: too many layers or chunks, a chunk twice, or of a layer that is not there.
    pub fn new(layers: Vec<IndexDigest>, chunks: Vec<BootChunk>) -> Result<Self, BootListError> {
        bound("layers", to_u64(layers.len()), BOOT_LAYERS_MAX)?;
        bound("chunks", to_u64(chunks.len()), BOOT_CHUNKS_MAX)?;
        let mut seen = HashSet::with_capacity(chunks.len());
        for at in &chunks {
            let BootChunk { layer, chunk } = *at;
            if usize::from(layer) >= layers.len() {
                let layer = layer.into();
                let layers = layers.len();
                return Err(BootListError::NoSuchLayer { layer, layers });
            }
            if !seen.insert(*at) {
                return Err(BootListError::Twice { layer, chunk });
            }
        }
        Ok(Self { layers, chunks })
    }

    /// The list that these parts make up for a run of layers.
    ///
    /// A part of an index that is not among them is left out. Where parts contradict each other, the
    /// lower layer goes first.
    ///
    /// **Errors**: more layers or chunks than a list may have.
    pub fn of_parts<'a>(
        layers: Vec<IndexDigest>,
        parts: impl IntoIterator<Item = &'a BootPart>,
    ) -> Result<Self, BootListError> {
        bound("layers", to_u64(layers.len()), BOOT_LAYERS_MAX)?;
        let mut placed: Vec<(u32, BootChunk)> = Vec::new();
        let mut seen = HashSet::new();
        for part in parts {
            let Some(layer) = layers.iter().position(|index| *index == part.index) else {
                continue;
            };
            let Ok(layer) = u16::try_from(layer) else {
                continue;
            };
            for at in &part.chunks {
                let chunk = BootChunk {
                    layer,
                    chunk: at.chunk,
                };
                if seen.insert(chunk) {
                    placed.push((at.position, chunk));
                }
            }
            bound("chunks", to_u64(placed.len()), BOOT_CHUNKS_MAX)?;
        }
        placed.sort_by_key(|(position, chunk)| (*position, chunk.layer));
        let chunks = placed.into_iter().map(|(_, chunk)| chunk).collect();
        Ok(Self { layers, chunks })
    }

    /// The indexes of its layers, lowest first.
    #[must_use]
    pub fn layers(&self) -> &[IndexDigest] {
        &self.layers
    }

    /// Its chunks, in the order in which they are read.
    #[must_use]
    pub fn chunks(&self) -> &[BootChunk] {
        &self.chunks
    }

    /// Names the run of its layers.
    #[must_use]
    pub fn key(&self) -> BootKey {
        BootKey::of_layers(&self.layers)
    }

    /// What of it belongs to one layer; `None` when nothing does.
    #[must_use]
    pub fn part(&self, layer: u16) -> Option<BootPart> {
        let index = *self.layers.get(usize::from(layer))?;
        let chunks: Vec<PlacedChunk> = (0..)
            .zip(&self.chunks)
            .filter(|(_, at)| at.layer == layer)
            .map(|(position, at)| PlacedChunk {
                position,
                chunk: at.chunk,
            })
            .collect();
        (!chunks.is_empty()).then_some(BootPart { index, chunks })
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION, FORM_WHOLE];
        put_varint(&mut bytes, to_u64(self.layers.len()));
        for index in &self.layers {
            bytes.extend_from_slice(index.as_bytes());
        }
        put_varint(&mut bytes, to_u64(self.chunks.len()));
        let mut expected = vec![0; self.layers.len()];
        for run in self.chunks.chunk_by(|a, b| a.layer == b.layer) {
            let layer = usize::from(run[0].layer);
            put_varint(&mut bytes, to_u64(layer));
            put_varint(&mut bytes, to_u64(run.len()));
            let ordinals = run.iter().map(|at| at.chunk);
            expected[layer] = put_chunks(&mut bytes, expected[layer], ordinals);
        }
        bytes
    }

    /// Reads what [`Self::encode`] writes.
    ///
    /// **Errors**: any other bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, BootListError> {
        let mut reader = Reader::new(bytes);
        expect_form(&mut reader, FORM_WHOLE)?;
        let count = bound("layers", reader.varint()?, BOOT_LAYERS_MAX)?;
        let mut layers = Vec::new();
        for _ in 0..count {
            layers.push(IndexDigest::from_bytes(reader.digest()?));
        }
        let total = bound("chunks", reader.varint()?, BOOT_CHUNKS_MAX)?;
        let mut chunks: Vec<BootChunk> = Vec::new();
        let mut expected = vec![0_i64; layers.len()];
        while chunks.len() < total {
            let layer = reader.varint()?;
            let no_such = || BootListError::NoSuchLayer {
                layer,
                layers: layers.len(),
            };
            let place = usize::try_from(layer).map_err(|_| no_such())?;
            let next = expected.get_mut(place).ok_or_else(no_such)?;
            let layer = u16::try_from(layer).map_err(|_| no_such())?;
            if chunks.last().is_some_and(|last| last.layer == layer) {
                return Err(BootListError::Divided);
            }
            let run = take_chunks(&mut reader, next, total - chunks.len())?;
            chunks.extend(run.into_iter().map(|chunk| BootChunk { layer, chunk }));
        }
        reader.end()?;
        Self::new(layers, chunks)
    }
}

/// A chunk of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacedChunk {
    /// Its place in the whole list, from 0.
    pub position: u32,
    /// Its place in the layer's chunk map.
    pub chunk: u32,
}

/// What of a boot list belongs to one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootPart {
    index: IndexDigest,
    chunks: Vec<PlacedChunk>,
}

impl BootPart {
    /// The index whose chunks it names.
    #[must_use]
    pub fn index(&self) -> IndexDigest {
        self.index
    }

    /// Its chunks; their positions ascend.
    #[must_use]
    pub fn chunks(&self) -> &[PlacedChunk] {
        &self.chunks
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode_part(self.index, &self.chunks)
    }

    /// Reads what [`Self::encode`] writes.
    ///
    /// **Errors**: any other bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, BootListError> {
        let mut reader = Reader::new(bytes);
        expect_form(&mut reader, FORM_PART)?;
        let index = IndexDigest::from_bytes(reader.digest()?);
        let total = bound("chunks", reader.varint()?, BOOT_CHUNKS_MAX)?;
        let mut chunks: Vec<PlacedChunk> = Vec::new();
        let (mut expected, mut position) = (0, 0_u64);
        while chunks.len() < total {
            let skip = reader.varint()?;
            if skip == 0 && !chunks.is_empty() {
                return Err(BootListError::Divided);
            }
            position = position.saturating_add(skip);
            let run = take_chunks(&mut reader, &mut expected, total - chunks.len())?;
            for chunk in run {
                position = position.saturating_add(1);
                let last = bound("places", position, BOOT_CHUNKS_MAX)?;
                let position = u32::try_from(last - 1).map_err(|_| BootListError::Number)?;
                chunks.push(PlacedChunk { position, chunk });
            }
        }
        reader.end()?;
        let mut seen = HashSet::with_capacity(chunks.len());
        if let Some(twice) = chunks.iter().find(|at| !seen.insert(at.chunk)) {
            let chunk = twice.chunk;
            return Err(BootListError::Twice { layer: 0, chunk });
        }
        Ok(Self { index, chunks })
    }

    /// As texts for annotations, at most `max_texts` of at most `max_bytes` each: as many chunks as fit, the first
    /// ones, which are waited for first. With how many these are. Each text is a part by itself.
    #[must_use]
    pub fn to_texts(&self, max_texts: usize, max_bytes: usize) -> (Vec<String>, usize) {
        let (mut texts, mut rest) = (Vec::new(), self.chunks.as_slice());
        while !rest.is_empty() && texts.len() < max_texts {
            let text = |count: usize| STANDARD.encode(encode_part(self.index, &rest[..count]));
            // Each further chunk only makes it longer.
            let (mut fits, mut too_long) = (0, rest.len() + 1);
            while too_long - fits > 1 {
                let middle = fits + (too_long - fits) / 2;
                if text(middle).len() <= max_bytes {
                    fits = middle
                } else {
                    too_long = middle
                }
            }
            if fits == 0 {
                break;
            }
            texts.push(text(fits));
            rest = &rest[fits..];
        }
        (texts, self.chunks.len() - rest.len())
    }

    /// Reads what [`Self::to_texts`] writes.
    ///
    /// **Errors**: any other texts, and none at all.
    pub fn from_texts(texts: &[impl AsRef<str>]) -> Result<Self, BootListError> {
        let (mut whole, mut seen) = (None::<Self>, HashSet::new());
        for text in texts {
            let bytes = STANDARD.decode(text.as_ref());
            let part = Self::decode(&bytes.map_err(|_| BootListError::Text)?)?;
            if let Some(twice) = part.chunks.iter().find(|at| !seen.insert(at.chunk)) {
                let chunk = twice.chunk;
                return Err(BootListError::Twice { layer: 0, chunk });
            }
            let Some(before) = &mut whole else {
                whole = Some(part);
                continue;
            };
            let places = |part: &Self| {
                let (first, last) = (part.chunks.first(), part.chunks.last());
                first
                    .zip(last)
                    .map(|(first, last)| (first.position, last.position))
            };
            let ascend = match (places(before), places(&part)) {
                (Some((_, last)), Some((first, _))) => last < first,
                _ => false,
            };
            if before.index != part.index || !ascend {
                return Err(BootListError::Divided);
            }
            before.chunks.extend(part.chunks);
        }
        whole.ok_or(BootListError::Text)
    }
}

fn encode_part(index: IndexDigest, chunks: &[PlacedChunk]) -> Vec<u8> {
    let mut bytes = vec![VERSION, FORM_PART];
    bytes.extend_from_slice(index.as_bytes());
    put_varint(&mut bytes, to_u64(chunks.len()));
    let (mut expected, mut position) = (0, 0);
    for run in chunks.chunk_by(|a, b| a.position.checked_add(1) == Some(b.position)) {
        let skip = run[0].position.saturating_sub(position);
        put_varint(&mut bytes, skip.into());
        put_varint(&mut bytes, to_u64(run.len()));
        expected = put_chunks(&mut bytes, expected, run.iter().map(|at| at.chunk));
        position = run[run.len() - 1].position.saturating_add(1);
    }
    bytes
}

/// Writes chunks of a layer, of which `expected` would cost nothing; gives the next such one.
fn put_chunks(bytes: &mut Vec<u8>, mut expected: i64, chunks: impl Iterator<Item = u32>) -> i64 {
    for chunk in chunks {
        put_varint(bytes, zigzag(i64::from(chunk) - expected));
        expected = i64::from(chunk) + 1;
    }
    expected
}

/// Reads a count and as many chunks, at most `most`.
fn take_chunks(
    reader: &mut Reader<'_>,
    expected: &mut i64,
    most: usize,
) -> Result<Vec<u32>, BootListError> {
    let count = bound("chunks of one layer in turn", reader.varint()?, most)?;
    if count == 0 {
        return Err(BootListError::Divided);
    }
    let mut chunks = Vec::new();
    for _ in 0..count {
        let distance = unzigzag(reader.varint()?);
        let chunk = expected.checked_add(distance);
        let chunk = chunk.and_then(|chunk| u32::try_from(chunk).ok());
        let chunk = chunk.ok_or(BootListError::Number)?;
        chunks.push(chunk);
        *expected = i64::from(chunk) + 1;
    }
    Ok(chunks)
}

fn expect_form(reader: &mut Reader<'_>, wanted: u8) -> Result<(), BootListError> {
    let (version, form) = (reader.byte()?, reader.byte()?);
    if (version, form) == (VERSION, wanted) {
        Ok(())
    } else {
        Err(BootListError::Form { version, form })
    }
}

fn bound(what: &'static str, count: u64, max: usize) -> Result<usize, BootListError> {
    usize::try_from(count)
        .ok()
        .filter(|count| *count <= max)
        .ok_or(BootListError::TooMany { what, count, max })
}

fn to_u64(count: usize) -> u64 {
    // Every target's addresses fit.
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
