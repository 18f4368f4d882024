// SPDX-License-Identifier: Apache-2.0
//! A node, and what it knows of the others: values only.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

/// The longest name of a node, zone or rack: as a DNS name's longest.
const NAME_MAX_BYTES: usize = 253;

/// A name that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("want 1 to 253 letters, digits, dots, dashes or underscores")]
pub struct InvalidName;

/// Whether `text` may name a node, a zone or a rack.
///
/// **Errors** [`InvalidName`]. Such names stand in logs, labels and hashes: nothing has to be escaped.
pub fn check_name(text: &str) -> Result<(), InvalidName> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if (1..=NAME_MAX_BYTES).contains(&text.len()) && text.chars().all(plain) {
        Ok(())
    } else {
        Err(InvalidName)
    }
}

/// The name of a node; unique in its cluster and the same after a restart. Cheap to clone: tables of
/// holders and scores are full of them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// Takes a name.
    ///
    /// **Errors** [`InvalidName`].
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        check_name(text).map(|()| NodeId(text.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({})", self.0)
    }
}

/// What a node does for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Runs containers; home of pieces where its zone has no supernode.
    #[default]
    Node,
    /// Home of the pieces of its zone.
    Supernode,
    /// Takes and never gives: no home, and nobody asks it.
    Leech,
}

impl Role {
    /// The word in configuration, metrics and `sluice status`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Node => "node",
            Role::Supernode => "supernode",
            Role::Leech => "leech",
        }
    }

    /// The role of this word; `None` where there is none, or none yet.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Role::Node, Role::Supernode, Role::Leech]
            .into_iter()
            .find(|role| role.as_str() == word)
    }
}

/// A node as others know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub id: NodeId,
    /// Nodes with cheap links between them.
    pub zone: String,
    /// Nodes with still cheaper ones; may be empty.
    pub rack: String,
    /// What it does for others.
    pub role: Role,
    /// Where its peer API listens.
    pub address: SocketAddr,
    /// Version of its program, for people.
    pub version: String,
    /// The newest version of the peer protocol that it speaks.
    pub protocol: u32,
    /// How much of its upload is taken, in percent.
    pub load: u8,
    /// Uploads that it could begin now.
    pub free_slots: u16,
}

/// How far away a node is. Orders from near to far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Distance {
    /// In the same rack.
    Rack,
    /// In the same zone.
    Zone,
    /// In another one.
    Elsewhere,
}

impl Distance {
    /// The word in metrics and `sluice nodes`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Distance::Rack => "rack",
            Distance::Zone => "zone",
            Distance::Elsewhere => "elsewhere",
        }
    }
}

/// Who is there, as one node sees it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The node itself.
    pub me: Node,
    /// All others that are believed to live, by name.
    pub others: Vec<Node>,
}

impl View {
    /// A node by itself.
    #[must_use]
    pub fn alone(me: Node) -> Self {
        View {
            me,
            others: Vec::new(),
        }
    }

    /// The node of this name, unless it is unknown or believed dead.
    #[must_use]
    pub fn node(&self, id: &NodeId) -> Option<&Node> {
        if self.me.id == *id {
            return Some(&self.me);
        }
        self.others.iter().find(|node| node.id == *id)
    }

    /// How far `node` is from here.
    #[must_use]
    pub fn distance(&self, node: &Node) -> Distance {
        if node.zone != self.me.zone {
            Distance::Elsewhere
        } else if node.rack == self.me.rack {
            Distance::Rack
        } else {
            Distance::Zone
        }
    }

    /// All nodes of a zone, this one included where it is its own.
    pub fn in_zone<'a>(&'a self, zone: &'a str) -> impl Iterator<Item = &'a Node> {
        let all = std::iter::once(&self.me).chain(&self.others);
        all.filter(move |node| node.zone == zone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        for good in ["a", "node-1.zone_2", "10.0.0.1", &"x".repeat(253)] {
            assert_eq!(
                NodeId::parse(good).map(|id| id.to_string()),
                Ok(good.into())
            );
        }
        for bad in ["", "a b", "a/b", "ä", "a\n", &"x".repeat(254)] {
            assert_eq!(NodeId::parse(bad), Err(InvalidName), "{bad:?}");
        }
    }
}
