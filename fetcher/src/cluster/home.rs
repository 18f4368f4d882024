// SPDX-License-Identifier: Apache-2.0
//! Which node fetches a piece from the origin, on behalf of its zone.
//!
//! A *piece* is the run of a layer's chunks that begin in the same [`PIECE_BYTES`] of its device. Each
//! piece has a home: of the nodes that may be one, that with the highest hash of node and piece
//! (rendezvous hashing). So all nodes that see the same members agree without a word, a node that comes
//! or goes moves only its own share, and the one that takes over is the second on everybody's list.
//! Nodes that see different members disagree for a while; that costs a second fetch, never a wrong one.
//!
//! Each zone has homes of its own for each piece. Where zones share what they fetch ([`SharedZones`]), the
//! home with the highest weight of all of them asks the origin, and the homes of the other zones ask it.

use std::collections::BTreeSet;

use sluice_blockindex::chunkmap::Chunk;
use sluice_blockindex::digest::IndexDigest;

use super::node::{Node, Role, View};

/// Device bytes of a piece: about 1 MiB of a blob, what a request to the origin is worth. Smaller
/// pieces cost requests; larger ones make one node's line the bottleneck of a start.
pub const PIECE_BYTES: u64 = 2 << 20;

/// A piece of a layer, or of anything else that has homes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PieceKey {
    /// The layer, by its index.
    pub index: IndexDigest,
    /// Which piece of it.
    pub number: u32,
}

impl PieceKey {
    /// The piece that a chunk with a frame of its own is in.
    #[must_use]
    pub fn of(index: IndexDigest, chunk: &Chunk) -> Self {
        Self::at(index, chunk.device.start())
    }

    /// The piece of what begins at this device byte.
    #[must_use]
    pub fn at(index: IndexDigest, device_offset: u64) -> Self {
        let number = device_offset / PIECE_BYTES;
        PieceKey {
            index,
            // Chunk maps are capped far below.
            number: u32::try_from(number).unwrap_or(u32::MAX),
        }
    }

    /// What stands for an object with this digest, such as an index.
    #[must_use]
    pub fn of_object(digest: IndexDigest) -> Self {
        PieceKey {
            index: digest,
            number: u32::MAX,
        }
    }
}

/// The weight of a node for a piece: the highest is its home.
fn weight(node: &Node, piece: &PieceKey) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(piece.index.as_bytes());
    hasher.update(&piece.number.to_le_bytes());
    hasher.update(node.id.as_str().as_bytes());
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// How many nodes of a zone may be homes, where the requests at an origin are limited for the zone: each
/// home has three of them at least, one for readers, one for boot lists and one for the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HomeLimit(usize);

impl HomeLimit {
    /// As many as there are.
    pub const NONE: HomeLimit = HomeLimit(usize::MAX);

    /// For so many requests at one origin at a time; 0: no limit.
    #[must_use]
    pub fn of_requests(requests: u32) -> Self {
        match usize::try_from(requests) {
            Ok(0) | Err(_) => Self::NONE,
            Ok(requests) => HomeLimit((requests / 3).max(1)),
        }
    }
}

/// The nodes that may be homes in `zone`: its supernodes, or all of its nodes where it has none; of these
/// as many as `limit` says, the same for all who see the same members.
pub fn eligible<'a>(view: &'a View, zone: &str, limit: HomeLimit) -> Vec<&'a Node> {
    let mut nodes = candidates(view, zone);
    if nodes.len() > limit.0 {
        nodes.sort_by_cached_key(|node| std::cmp::Reverse((rank(node), node.id.clone())));
        nodes.truncate(limit.0);
    }
    nodes
}

/// Who is a home where not all may be, the highest first: by name, so that who comes or goes moves one home.
fn rank(node: &Node) -> u64 {
    let hash = blake3::hash(node.id.as_str().as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(bytes)
}

fn candidates<'a>(view: &'a View, zone: &str) -> Vec<&'a Node> {
    let of_role = |role| -> Vec<&Node> {
        let nodes = std::iter::once(&view.me).chain(&view.others);
        nodes
            .filter(|node| node.zone == zone && node.role == role)
            .collect()
    };
    let supernodes = of_role(Role::Supernode);
    if supernodes.is_empty() {
        of_role(Role::Node)
    } else {
        supernodes
    }
}

/// The homes of a piece in `zone`, the first first, at most `count`; may contain the node itself.
pub fn homes<'a>(
    view: &'a View,
    zone: &str,
    piece: &PieceKey,
    limit: HomeLimit,
    count: usize,
) -> Vec<&'a Node> {
    let mut nodes: Vec<(u64, &Node)> = eligible(view, zone, limit)
        .into_iter()
        .map(|node| (weight(node, piece), node))
        .collect();
    // Equal weights do not happen; if they do, all agree all the same.
    nodes.sort_by(|(a, left), (b, right)| b.cmp(a).then_with(|| left.id.cmp(&right.id)));
    nodes
        .into_iter()
        .map(|(_, node)| node)
        .take(count)
        .collect()
}

/// Which zones fetch each piece from the origin once for all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SharedZones {
    /// None: each zone fetches for itself.
    #[default]
    None,
    /// All there are.
    All,
    /// These.
    Named(BTreeSet<String>),
}

impl SharedZones {
    /// Whether `zone` is one of them.
    #[must_use]
    pub fn contains(&self, zone: &str) -> bool {
        match self {
            SharedZones::None => false,
            SharedZones::All => true,
            SharedZones::Named(zones) => zones.contains(zone),
        }
    }
}

/// The homes of a piece in the zone that fetches it from the origin for all that share, the first first, at
/// most `count`. Empty where that is this node's own zone, or its zone shares nothing.
pub fn far_homes<'a>(
    view: &'a View,
    shared: &SharedZones,
    piece: &PieceKey,
    limit: HomeLimit,
    count: usize,
) -> Vec<&'a Node> {
    if !shared.contains(&view.me.zone) {
        return Vec::new();
    }
    let nodes = std::iter::once(&view.me).chain(&view.others);
    let zones: BTreeSet<&str> = nodes.map(|node| node.zone.as_str()).collect();
    let firsts = zones
        .into_iter()
        .filter(|zone| shared.contains(zone))
        .filter_map(|zone| homes(view, zone, piece, limit, 1).pop());
    // The highest of a zone is its first home, so that one is the highest of all.
    let best = firsts.max_by_key(|node| (weight(node, piece), std::cmp::Reverse(&node.id)));
    match best {
        Some(node) if node.zone != view.me.zone => homes(view, &node.zone, piece, limit, count),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cluster::node::NodeId;

    pub(crate) fn node(id: &str, zone: &str, role: Role) -> Node {
        Node {
            id: NodeId::parse(id).unwrap(),
            zone: zone.into(),
            rack: String::new(),
            role,
            address: ([127, 0, 0, 1], 1).into(),
            version: String::new(),
            protocol: 1,
            load: 0,
            free_slots: 1,
        }
    }

    fn zone_of(nodes: &[&str]) -> View {
        let others = nodes[1..].iter().map(|id| node(id, "z", Role::Node));
        View {
            me: node(nodes[0], "z", Role::Node),
            others: others.collect(),
        }
    }

    fn piece(number: u32) -> PieceKey {
        PieceKey {
            index: IndexDigest::of(b"layer"),
            number,
        }
    }

    fn first(view: &View, number: u32) -> String {
        homes(view, "z", &piece(number), HomeLimit::NONE, 1)[0]
            .id
            .to_string()
    }

    #[test]
    fn pieces_are_spread_and_all_agree() {
        let view = zone_of(&["a", "b", "c", "d"]);
        let seen_by_c = zone_of(&["c", "d", "b", "a"]);
        let mut shares = BTreeMap::new();
        for number in 0..4000 {
            let home = first(&view, number);
            assert_eq!(home, first(&seen_by_c, number));
            *shares.entry(home).or_insert(0) += 1;
        }
        assert!(
            shares.values().all(|share| (850..1150).contains(share)),
            "{shares:?}"
        );
    }

    #[test]
    fn a_node_that_goes_moves_its_own_share_to_the_second() {
        let all = zone_of(&["a", "b", "c", "d"]);
        let without_b = zone_of(&["a", "c", "d"]);
        for number in 0..1000 {
            let piece = piece(number);
            let [before, second] = homes(&all, "z", &piece, HomeLimit::NONE, 2)[..] else {
                panic!("two homes")
            };
            let after = first(&without_b, number);
            let expected = if before.id.as_str() == "b" {
                second
            } else {
                before
            };
            assert_eq!(after, expected.id.to_string());
        }
    }

    #[test]
    fn supernodes_are_homes_and_leeches_are_not() {
        let mut view = zone_of(&["a", "b"]);
        view.others.push(node("x", "other", Role::Supernode));
        view.others.push(node("l", "z", Role::Leech));
        let ids = |view: &View, zone: &str| -> Vec<String> {
            eligible(view, zone, HomeLimit::NONE)
                .iter()
                .map(|it| it.id.to_string())
                .collect()
        };
        assert_eq!(ids(&view, "z"), ["a", "b"]);
        assert_eq!(ids(&view, "other"), ["x"]);
        assert!(ids(&view, "nowhere").is_empty());
        view.others.push(node("s", "z", Role::Supernode));
        assert_eq!(ids(&view, "z"), ["s"]);
        assert_eq!(homes(&view, "z", &piece(0), HomeLimit::NONE, 3).len(), 1);
    }

    #[test]
    fn a_limit_of_requests_is_one_of_homes() {
        let names = ["a", "b", "c", "d", "e", "f"];
        let all = zone_of(&names);
        let names_of = |view: &View, requests| -> BTreeSet<String> {
            let homes = eligible(view, "z", HomeLimit::of_requests(requests));
            homes.iter().map(|it| it.id.to_string()).collect()
        };
        for (requests, homes) in [(0, 6), (1, 1), (3, 1), (5, 1), (10, 3), (18, 6), (100, 6)] {
            assert_eq!(names_of(&all, requests).len(), homes, "{requests} requests");
        }
        let three = names_of(&all, 9);
        let reversed: Vec<&str> = names.iter().rev().copied().collect();
        assert_eq!(names_of(&zone_of(&reversed), 9), three, "all agree");
        for gone in names {
            let left: Vec<&str> = names.into_iter().filter(|it| *it != gone).collect();
            let now = names_of(&zone_of(&left), 9);
            let kept = three.intersection(&now).count();
            assert_eq!(
                kept,
                if three.contains(gone) { 2 } else { 3 },
                "without {gone}"
            );
        }
    }

    /// What a node of `zone` sees of three zones, of 2, 4 and 2 nodes, the last with one supernode.
    fn seen_from(zone: &str) -> View {
        let mut nodes: Vec<Node> = [("east", 2), ("west", 4), ("north", 2)]
            .into_iter()
            .flat_map(|(zone, count)| {
                (0..count).map(move |i| node(&format!("{zone}-{i}"), zone, Role::Node))
            })
            .collect();
        nodes.push(node("north-s", "north", Role::Supernode));
        let me = nodes.iter().position(|node| node.zone == zone).unwrap();
        View {
            me: nodes.remove(me),
            others: nodes,
        }
    }

    fn far(zone: &str, shared: &SharedZones, number: u32) -> Vec<String> {
        let view = seen_from(zone);
        let far = far_homes(&view, shared, &piece(number), HomeLimit::NONE, 2);
        far.iter().map(|node| node.id.to_string()).collect()
    }

    #[test]
    fn one_zone_of_those_that_share_asks_the_origin_and_all_agree() {
        let mut shares = BTreeMap::new();
        for number in 0..2000 {
            let [east, west, north] =
                ["east", "west", "north"].map(|zone| far(zone, &SharedZones::All, number));
            let asked: Vec<&Vec<String>> = [&east, &west, &north]
                .into_iter()
                .filter(|it| !it.is_empty())
                .collect();
            assert_eq!(
                asked.len(),
                2,
                "one zone asks nobody else: {east:?} {west:?} {north:?}"
            );
            assert_eq!(asked[0], asked[1]);
            let zone = asked[0][0].split('-').next().unwrap().to_owned();
            assert!(far(&zone, &SharedZones::All, number).is_empty());
            *shares.entry(zone).or_insert(0) += 1;
        }
        // By the number of their homes: 2, 4 and 1 of 7.
        assert!((470..670).contains(&shares["east"]), "{shares:?}");
        assert!((1030..1260).contains(&shares["west"]), "{shares:?}");
        assert!((210..360).contains(&shares["north"]), "{shares:?}");
    }

    #[test]
    fn zones_that_share_nothing_ask_nobody() {
        let two = SharedZones::Named(["east", "north"].map(str::to_owned).into());
        let mut asked = BTreeSet::new();
        for number in 0..200 {
            assert!(far("west", &two, number).is_empty());
            assert!(far("east", &SharedZones::None, number).is_empty());
            asked.extend(far("east", &two, number));
        }
        assert_eq!(asked, BTreeSet::from(["north-s".to_owned()]));
    }
}
