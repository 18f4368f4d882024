// SPDX-License-Identifier: Apache-2.0
//! Boot lists on the wire: bytes of bounded size, which whoever takes them decodes and checks.

use bytes::Bytes;
use sluice_blockindex::boot::BootKey;
use sluice_proto::peer as proto;

use super::{WireError, digest};
use crate::cluster::node::NodeId;

/// The most bytes of a list: twice what one of the most layers and chunks takes at four bytes a chunk.
pub const LIST_MAX_BYTES: usize = 256 << 10;

fn bounded(list: Bytes) -> Result<Bytes, WireError> {
    if list.len() > LIST_MAX_BYTES {
        return Err(WireError::TooMany {
            what: "bytes of a boot list",
            count: list.len() as u64,
            limit: LIST_MAX_BYTES as u64,
        });
    }
    Ok(list)
}

fn key_of(bytes: &[u8]) -> Result<BootKey, WireError> {
    digest(bytes, "key of a boot list").map(BootKey::from_bytes)
}

/// A request for a boot list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedList {
    /// Who asks.
    pub node: NodeId,
    /// Of which run of layers.
    pub key: BootKey,
}

impl TryFrom<proto::BootListRequest> for WantedList {
    type Error = WireError;

    fn try_from(request: proto::BootListRequest) -> Result<Self, WireError> {
        Ok(WantedList {
            node: NodeId::parse(&request.node)?,
            key: key_of(&request.key)?,
        })
    }
}

impl WantedList {
    /// As it is sent.
    #[must_use]
    pub fn to_proto(&self) -> proto::BootListRequest {
        proto::BootListRequest {
            node: self.node.to_string(),
            key: Bytes::copy_from_slice(self.key.as_bytes()),
        }
    }
}

/// The bytes of an answer.
pub(crate) fn list_of(reply: proto::BootListReply) -> Result<Bytes, WireError> {
    bounded(reply.list)
}

/// A list that a node has learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferedList {
    /// Who has learnt it.
    pub node: NodeId,
    /// Of which run of layers.
    pub key: BootKey,
    /// Its bytes, unchecked.
    pub list: Bytes,
}

impl TryFrom<proto::BootListOffer> for OfferedList {
    type Error = WireError;

    fn try_from(offer: proto::BootListOffer) -> Result<Self, WireError> {
        Ok(OfferedList {
            node: NodeId::parse(&offer.node)?,
            key: key_of(&offer.key)?,
            list: bounded(offer.list)?,
        })
    }
}

impl OfferedList {
    /// As it is sent.
    #[must_use]
    pub fn to_proto(&self) -> proto::BootListOffer {
        proto::BootListOffer {
            node: self.node.to_string(),
            key: Bytes::copy_from_slice(self.key.as_bytes()),
            list: self.list.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_outside_is_bounded() {
        let offer = OfferedList {
            node: NodeId::parse("a").unwrap(),
            key: BootKey::from_bytes([7; 32]),
            list: Bytes::from(vec![0; LIST_MAX_BYTES]),
        };
        assert_eq!(OfferedList::try_from(offer.to_proto()), Ok(offer.clone()));
        let mut long = offer.to_proto();
        long.list = Bytes::from(vec![0; LIST_MAX_BYTES + 1]);
        let mut reply = proto::BootListReply {
            list: long.list.clone(),
        };
        assert!(matches!(
            OfferedList::try_from(long),
            Err(WireError::TooMany { .. })
        ));
        assert!(list_of(reply.clone()).is_err());
        reply.list.truncate(LIST_MAX_BYTES);
        assert!(list_of(reply).is_ok());
        let mut short = offer.to_proto();
        short.key.truncate(31);
        assert!(matches!(
            OfferedList::try_from(short),
            Err(WireError::Malformed { .. })
        ));
        let wanted = WantedList {
            node: offer.node,
            key: offer.key,
        };
        assert_eq!(WantedList::try_from(wanted.to_proto()), Ok(wanted.clone()));
        let mut nobody = wanted.to_proto();
        nobody.node.clear();
        assert!(matches!(
            WantedList::try_from(nobody),
            Err(WireError::Name(_))
        ));
    }
}
