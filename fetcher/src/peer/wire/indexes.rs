// SPDX-License-Identifier: Apache-2.0
//! Indexes of blobs that nobody converted, on the wire: a blob's digest, and sizes that are bounded before anything is
//! reserved for them.

use bytes::Bytes;
use sluice_blockindex::annotations::INDEX_MAX_BYTES;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::windows::WINDOWS_MAX_BYTES;
use sluice_proto::peer as proto;

use super::{WireError, digest, malformed};
use crate::cluster::node::NodeId;

/// How much an index is: within the limits of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexSizes {
    /// Bytes of the payload, compressed.
    pub index_bytes: u64,
    /// Bytes of the file of windows; 0 where there is none.
    pub windows_bytes: u64,
}

impl IndexSizes {
    /// Both together.
    #[must_use]
    pub const fn total_bytes(&self) -> u64 {
        self.index_bytes.saturating_add(self.windows_bytes)
    }

    /// As they are sent.
    #[must_use]
    pub const fn to_proto(self) -> proto::BlobIndexSizes {
        proto::BlobIndexSizes {
            index_bytes: self.index_bytes,
            windows_bytes: self.windows_bytes,
        }
    }
}

impl TryFrom<proto::BlobIndexSizes> for IndexSizes {
    type Error = WireError;

    fn try_from(sizes: proto::BlobIndexSizes) -> Result<Self, WireError> {
        let bounded = |what, count, limit| match count > limit {
            true => Err(WireError::TooMany { what, count, limit }),
            false => Ok(count),
        };
        if sizes.index_bytes == 0 {
            return Err(malformed("size of an index"));
        }
        Ok(IndexSizes {
            index_bytes: bounded("bytes of an index", sizes.index_bytes, INDEX_MAX_BYTES)?,
            windows_bytes: bounded("bytes of windows", sizes.windows_bytes, WINDOWS_MAX_BYTES)?,
        })
    }
}

fn blob_of(bytes: &[u8]) -> Result<BlobDigest, WireError> {
    digest(bytes, "blob digest").map(BlobDigest::from_bytes)
}

/// A request for the index of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedIndex {
    /// Who asks.
    pub node: NodeId,
    /// Of which blob.
    pub blob: BlobDigest,
    /// Nobody waits for it.
    pub background: bool,
}

impl TryFrom<proto::BlobIndexRequest> for WantedIndex {
    type Error = WireError;

    fn try_from(request: proto::BlobIndexRequest) -> Result<Self, WireError> {
        Ok(WantedIndex {
            node: NodeId::parse(&request.node)?,
            blob: blob_of(&request.blob_digest)?,
            background: request.background,
        })
    }
}

impl WantedIndex {
    /// As it is sent.
    #[must_use]
    pub fn to_proto(&self) -> proto::BlobIndexRequest {
        proto::BlobIndexRequest {
            node: self.node.to_string(),
            blob_digest: Bytes::copy_from_slice(self.blob.as_bytes()),
            background: self.background,
        }
    }
}

/// An index that a node has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferedIndex {
    /// Who has it.
    pub node: NodeId,
    /// Of which blob.
    pub blob: BlobDigest,
    /// How much it is.
    pub sizes: IndexSizes,
}

impl TryFrom<proto::BlobIndexOffer> for OfferedIndex {
    type Error = WireError;

    fn try_from(offer: proto::BlobIndexOffer) -> Result<Self, WireError> {
        let sizes = offer.sizes.ok_or_else(|| malformed("size of an index"))?;
        Ok(OfferedIndex {
            node: NodeId::parse(&offer.node)?,
            blob: blob_of(&offer.blob_digest)?,
            sizes: sizes.try_into()?,
        })
    }
}

impl OfferedIndex {
    /// As it is sent.
    #[must_use]
    pub fn to_proto(&self) -> proto::BlobIndexOffer {
        proto::BlobIndexOffer {
            node: self.node.to_string(),
            blob_digest: Bytes::copy_from_slice(self.blob.as_bytes()),
            sizes: Some(self.sizes.to_proto()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_outside_is_bounded() {
        let offer = OfferedIndex {
            node: NodeId::parse("a").unwrap(),
            blob: BlobDigest::of(b"blob"),
            sizes: IndexSizes {
                index_bytes: INDEX_MAX_BYTES,
                windows_bytes: WINDOWS_MAX_BYTES,
            },
        };
        assert_eq!(OfferedIndex::try_from(offer.to_proto()), Ok(offer.clone()));
        type Spoil = fn(&mut proto::BlobIndexOffer);
        let cases: [(Spoil, bool); 6] = [
            (|it| it.node.clear(), true),
            (|it| it.blob_digest.truncate(31), true),
            (|it| it.sizes = None, true),
            (|it| it.sizes.as_mut().unwrap().index_bytes = 0, true),
            (|it| it.sizes.as_mut().unwrap().index_bytes += 1, true),
            (|it| it.sizes.as_mut().unwrap().windows_bytes = 0, false),
        ];
        for (number, (spoil, refused)) in cases.into_iter().enumerate() {
            let mut spoilt = offer.to_proto();
            spoil(&mut spoilt);
            assert_eq!(OfferedIndex::try_from(spoilt).is_err(), refused, "{number}");
        }
        let mut wide = offer.sizes.to_proto();
        wide.windows_bytes = u64::MAX;
        assert!(matches!(
            IndexSizes::try_from(wide),
            Err(WireError::TooMany { .. })
        ));
        let wanted = WantedIndex {
            node: offer.node,
            blob: offer.blob,
            background: true,
        };
        assert_eq!(WantedIndex::try_from(wanted.to_proto()), Ok(wanted));
    }
}
