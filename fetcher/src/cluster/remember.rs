// SPDX-License-Identifier: Apache-2.0
//! Who was there, as it is kept over a restart: pure.
//!
//! The text is JSON. What of it makes no sense is left out, as it is of gossip: a file is no more to be
//! trusted than the network was that filled it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::membership::NODES_MAX;
use super::node::{Node, NodeId, Role, View};

#[derive(Serialize, Deserialize)]
struct Written {
    nodes: Vec<WrittenNode>,
}

#[derive(Serialize, Deserialize)]
struct WrittenNode {
    name: String,
    zone: String,
    rack: String,
    role: String,
    address: SocketAddr,
    version: String,
    protocol: u32,
}

/// The other nodes of a view, without what passes (their load).
#[must_use]
pub fn write(view: &View) -> Vec<u8> {
    let nodes = view.others.iter().map(|node| WrittenNode {
        name: node.id.to_string(),
        zone: node.zone.clone(),
        rack: node.rack.clone(),
        role: node.role.as_str().to_owned(),
        address: node.address,
        version: node.version.clone(),
        protocol: node.protocol,
    });
    let written = Written {
        nodes: nodes.collect(),
    };
    serde_json::to_vec_pretty(&written).unwrap_or_default()
}

/// The nodes of such a text. Nothing is known of their load: each is taken to have `free_slots`.
///
/// **Errors**: the text is none of ours.
pub fn read(text: &[u8], free_slots: u16) -> Result<Vec<Node>, serde_json::Error> {
    let written: Written = serde_json::from_slice(text)?;
    let nodes = written.nodes.into_iter().take(NODES_MAX);
    let nodes = nodes.filter_map(|node| {
        Some(Node {
            id: NodeId::parse(&node.name).ok()?,
            zone: node.zone,
            rack: node.rack,
            role: Role::parse(&node.role)?,
            address: node.address,
            version: node.version,
            protocol: node.protocol,
            load: 0,
            free_slots,
        })
    });
    Ok(nodes.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, role: Role) -> Node {
        Node {
            id: NodeId::parse(name).unwrap(),
            zone: "z".into(),
            rack: "r".into(),
            role,
            address: ([10, 0, 0, 1], 9641).into(),
            version: "0.1.0".into(),
            protocol: 3,
            load: 0,
            free_slots: 16,
        }
    }

    #[test]
    fn a_view_is_kept_and_nonsense_is_not() {
        let view = View {
            me: node("me", Role::Node),
            others: vec![node("a", Role::Supernode), node("b", Role::Leech)],
        };
        let text = write(&view);
        assert_eq!(read(&text, 16).unwrap(), view.others);
        let text = String::from_utf8(text).unwrap();
        let changed = text.replace("\"leech\"", "\"boss\"");
        assert_eq!(read(changed.as_bytes(), 16).unwrap(), view.others[..1]);
        let changed = text.replace("\"a\"", "\"a a\"");
        assert_eq!(read(changed.as_bytes(), 16).unwrap(), view.others[1..]);
        for wrong in ["", "{}", "[]", &text[..text.len() / 2]] {
            assert!(read(wrong.as_bytes(), 16).is_err(), "{wrong}");
        }
    }
}
