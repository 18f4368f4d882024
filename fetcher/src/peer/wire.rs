// SPDX-License-Identifier: Apache-2.0
//! Messages of the peer API as meant, and the checks of what comes from outside.

mod indexes;
mod lists;

use std::collections::BTreeSet;
use std::net::SocketAddr;

use bytes::Bytes;
use sluice_blockindex::chunkmap::Chunk;
use sluice_blockindex::digest::{BlobDigest, DIGEST_BYTES, DiffId, IndexDigest};
use sluice_blockindex::extent::{BlobSpace, Extent};
use sluice_proto::peer as proto;

use crate::cluster::node::{InvalidName, Node, NodeId, Role, check_name};
use crate::registry::Repository;
use crate::source::{OriginSet, Priority};
use crate::store::DeviceKey;

pub use indexes::{IndexSizes, OfferedIndex, WantedIndex};
pub(crate) use lists::list_of;
pub use lists::{LIST_MAX_BYTES, OfferedList, WantedList};

/// The most chunks in one request: 8 MiB of the smallest that a converter makes.
pub const CHUNKS_MAX: usize = 4096;
/// The most places of a blob that are looked at.
pub const PLACES_MAX: usize = 16;
/// The most characters of a version that are kept.
const VERSION_MAX_CHARS: usize = 64;
/// The most bytes of an object: as of an index.
pub const OBJECT_MAX_BYTES: u64 = sluice_blockindex::annotations::INDEX_MAX_BYTES;
/// Bytes of an object in one message.
pub const OBJECT_PART_BYTES: usize = 1 << 20;

/// A message that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// A field has the wrong length or form.
    #[error("{field} is malformed")]
    Malformed {
        /// Which.
        field: &'static str,
    },
    /// Too much of something.
    #[error("{what}: {count}, at most {limit}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: u64,
        /// The most.
        limit: u64,
    },
    /// The asker has no valid name.
    #[error("node name: {0}")]
    Name(#[from] InvalidName),
}

fn malformed(field: &'static str) -> WireError {
    WireError::Malformed { field }
}

fn digest(bytes: &[u8], field: &'static str) -> Result<[u8; DIGEST_BYTES], WireError> {
    bytes.try_into().map_err(|_| malformed(field))
}

pub(super) fn places(written: &[proto::Place]) -> OriginSet {
    let known = written.iter().take(PLACES_MAX);
    // What is no valid name is left out: the others may do.
    OriginSet::new(known.filter_map(|it| Repository::new(&it.host, &it.repository).ok()))
}

/// Places as they are sent.
#[must_use]
pub fn places_to_proto(set: &OriginSet) -> Vec<proto::Place> {
    let all = set.places().into_iter().take(PLACES_MAX);
    all.map(|place| proto::Place {
        host: place.host().to_owned(),
        repository: place.name().to_owned(),
    })
    .collect()
}

/// The node that an answer to Hello tells of, at the address where it was asked.
///
/// **Errors** [`WireError`]: its names or its role are none.
pub fn node_of(reply: &proto::HelloReply, address: SocketAddr) -> Result<Node, WireError> {
    let role = [Role::Node, Role::Supernode, Role::Leech]
        .into_iter()
        .find(|role| role.as_str() == reply.role)
        .ok_or_else(|| malformed("role"))?;
    check_name(&reply.zone)?;
    if !reply.rack.is_empty() {
        check_name(&reply.rack)?;
    }
    Ok(Node {
        id: NodeId::parse(&reply.node)?,
        zone: reply.zone.clone(),
        rack: reply.rack.clone(),
        role,
        address,
        version: reply.version.chars().take(VERSION_MAX_CHARS).collect(),
        protocol: reply.protocol,
        load: u8::try_from(reply.load).unwrap_or(100).min(100),
        free_slots: u16::try_from(reply.free_slots).unwrap_or(u16::MAX),
    })
}

/// A layer that somebody wants chunks of.
#[derive(Clone, Debug)]
pub struct WantedLayer {
    /// Its name in the store.
    pub key: DeviceKey,
    /// The blob that has it.
    pub blob: BlobDigest,
    /// Size of that blob.
    pub blob_bytes: u64,
    /// Where it may be fetched.
    pub places: OriginSet,
}

/// A chunk that somebody wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedChunk {
    /// Its place in the chunk map.
    pub ordinal: u32,
    /// What the asker says its strong digest is.
    pub digest: [u8; DIGEST_BYTES],
}

impl WantedChunk {
    /// Whether the asker knows the chunk, and so has the index.
    #[must_use]
    pub fn names(&self, chunk: &Chunk) -> bool {
        self.ordinal == chunk.ordinal && self.digest == chunk.digest.0
    }
}

/// A request for chunks.
#[derive(Clone, Debug)]
pub struct WantedChunks {
    /// Who asks.
    pub node: NodeId,
    /// Of which layer.
    pub layer: WantedLayer,
    /// Which, ascending, each once.
    pub chunks: Vec<WantedChunk>,
    /// How urgent.
    pub priority: Priority,
    /// Only what is present or on its way.
    pub present_only: bool,
}

impl TryFrom<proto::ChunksRequest> for WantedChunks {
    type Error = WireError;

    fn try_from(request: proto::ChunksRequest) -> Result<Self, WireError> {
        let priority = match request.urgency() {
            proto::Urgency::Foreground => Priority::Foreground,
            proto::Urgency::Boot => Priority::Boot,
            proto::Urgency::Background => Priority::Background,
        };
        let layer = request.layer.ok_or_else(|| malformed("layer"))?;
        if request.chunks.len() > CHUNKS_MAX {
            return Err(WireError::TooMany {
                what: "chunks",
                count: request.chunks.len() as u64,
                limit: CHUNKS_MAX as u64,
            });
        }
        let chunk = |chunk: &proto::ChunkName| {
            Ok(WantedChunk {
                ordinal: chunk.ordinal,
                digest: digest(&chunk.digest, "chunk digest")?,
            })
        };
        let chunks: Vec<WantedChunk> = request
            .chunks
            .iter()
            .map(chunk)
            .collect::<Result<_, WireError>>()?;
        if chunks.is_empty() || !chunks.is_sorted_by(|a, b| a.ordinal < b.ordinal) {
            return Err(malformed("chunks"));
        }
        Ok(WantedChunks {
            node: NodeId::parse(&request.node)?,
            layer: WantedLayer {
                key: DeviceKey {
                    diff_id: DiffId::from_bytes(digest(&layer.diff_id, "diff ID")?),
                    index: IndexDigest::from_bytes(digest(&layer.index_digest, "index digest")?),
                },
                blob: BlobDigest::from_bytes(digest(&layer.blob_digest, "blob digest")?),
                blob_bytes: layer.blob_bytes,
                places: places(&layer.places),
            },
            chunks,
            priority,
            present_only: request.present_only,
        })
    }
}

impl WantedChunks {
    /// As it is sent.
    #[must_use]
    pub fn to_proto(&self) -> proto::ChunksRequest {
        let bytes = |digest: &[u8]| Bytes::copy_from_slice(digest);
        let chunk = |chunk: &WantedChunk| proto::ChunkName {
            ordinal: chunk.ordinal,
            digest: bytes(&chunk.digest),
        };
        let urgency = match self.priority {
            Priority::Foreground => proto::Urgency::Foreground,
            Priority::Boot => proto::Urgency::Boot,
            Priority::Background => proto::Urgency::Background,
        };
        proto::ChunksRequest {
            node: self.node.to_string(),
            layer: Some(proto::LayerName {
                index_digest: bytes(self.layer.key.index.as_bytes()),
                diff_id: bytes(self.layer.key.diff_id.as_bytes()),
                blob_digest: bytes(self.layer.blob.as_bytes()),
                blob_bytes: self.layer.blob_bytes,
                places: places_to_proto(&self.layer.places),
            }),
            chunks: self.chunks.iter().map(chunk).collect(),
            urgency: urgency.into(),
            present_only: self.present_only,
        }
    }
}

/// A request for an object.
#[derive(Clone, Debug)]
pub struct WantedObject {
    /// Who asks.
    pub node: NodeId,
    /// Its sha256.
    pub digest: IndexDigest,
    /// The blob that it lies in.
    pub blob: BlobDigest,
    /// Size of that blob.
    pub blob_bytes: u64,
    /// Where in the blob.
    pub extent: Extent<BlobSpace>,
    /// Where the blob may be fetched.
    pub places: OriginSet,
    /// Only if it is here.
    pub present_only: bool,
}

impl TryFrom<proto::ObjectRequest> for WantedObject {
    type Error = WireError;

    fn try_from(request: proto::ObjectRequest) -> Result<Self, WireError> {
        let extent = Extent::new(request.start, request.end).ok_or_else(|| malformed("extent"))?;
        if extent.len() > OBJECT_MAX_BYTES {
            return Err(WireError::TooMany {
                what: "bytes of an object",
                count: extent.len(),
                limit: OBJECT_MAX_BYTES,
            });
        }
        if extent.is_empty() || extent.end() > request.blob_bytes {
            return Err(malformed("extent"));
        }
        Ok(WantedObject {
            node: NodeId::parse(&request.node)?,
            digest: IndexDigest::from_bytes(digest(&request.digest, "digest")?),
            blob: BlobDigest::from_bytes(digest(&request.blob_digest, "blob digest")?),
            blob_bytes: request.blob_bytes,
            extent,
            places: places(&request.places),
            present_only: request.present_only,
        })
    }
}

impl WantedObject {
    /// As it is sent.
    #[must_use]
    pub fn to_proto(&self) -> proto::ObjectRequest {
        proto::ObjectRequest {
            node: self.node.to_string(),
            digest: Bytes::copy_from_slice(self.digest.as_bytes()),
            blob_digest: Bytes::copy_from_slice(self.blob.as_bytes()),
            blob_bytes: self.blob_bytes,
            start: self.extent.start(),
            end: self.extent.end(),
            places: places_to_proto(&self.places),
            present_only: self.present_only,
        }
    }
}

/// How the bytes of a chunk are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The device bytes.
    Raw,
    /// The frame of the blob.
    Frame,
    /// A zstd frame of the device bytes, made for the wire.
    Zstd,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// A chunk.
    Chunk {
        /// Which.
        ordinal: u32,
        /// Form of `data`.
        form: Form,
        /// Its bytes, unverified.
        data: Bytes,
    },
    /// These will not come.
    Lacking(BTreeSet<u32>),
    /// No slot is free; these nodes may have it.
    Busy(Vec<NodeId>),
    /// Still fetching.
    Working,
}

impl TryFrom<proto::ChunksPart> for Part {
    type Error = WireError;

    fn try_from(part: proto::ChunksPart) -> Result<Self, WireError> {
        match part.part {
            Some(proto::chunks_part::Part::Chunk(chunk)) => Ok(Part::Chunk {
                ordinal: chunk.ordinal,
                form: match chunk.form() {
                    proto::Form::Raw => Form::Raw,
                    proto::Form::Frame => Form::Frame,
                    proto::Form::Zstd => Form::Zstd,
                },
                data: chunk.data,
            }),
            Some(proto::chunks_part::Part::Lacking(lacking)) => {
                Ok(Part::Lacking(lacking.ordinals.into_iter().collect()))
            }
            Some(proto::chunks_part::Part::Busy(busy)) => {
                let named = busy.nodes.iter().take(PLACES_MAX);
                Ok(Part::Busy(
                    named.filter_map(|id| NodeId::parse(id).ok()).collect(),
                ))
            }
            Some(proto::chunks_part::Part::Working(proto::Working {})) => Ok(Part::Working),
            None => Err(malformed("part")),
        }
    }
}

/// No slot is free; these nodes have what is asked for, or are receiving it.
pub(super) fn busy_of(named: &[NodeId]) -> proto::Busy {
    proto::Busy {
        nodes: named.iter().map(ToString::to_string).collect(),
        retry_ms: 0,
    }
}

impl From<Part> for proto::ChunksPart {
    fn from(part: Part) -> Self {
        use proto::chunks_part::Part as Written;
        let part = match part {
            Part::Chunk {
                ordinal,
                form,
                data,
            } => {
                let form = match form {
                    Form::Raw => proto::Form::Raw,
                    Form::Frame => proto::Form::Frame,
                    Form::Zstd => proto::Form::Zstd,
                };
                Written::Chunk(proto::ChunkBytes {
                    ordinal,
                    form: form.into(),
                    data,
                })
            }
            Part::Lacking(ordinals) => Written::Lacking(proto::Lacking {
                ordinals: ordinals.into_iter().collect(),
                reason: String::new(),
            }),
            Part::Busy(nodes) => Written::Busy(busy_of(&nodes)),
            Part::Working => Written::Working(proto::Working {}),
        };
        proto::ChunksPart { part: Some(part) }
    }
}
