// SPDX-License-Identifier: Apache-2.0
//! What is simulated. Every number stands here, with the reason for its default.

use serde::{Deserialize, Serialize};
use sluice_fetcher::cluster::uploads::UploadLimits;

/// A cluster, an image, and what befalls them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scenario {
    /// Decides everything that is random.
    pub seed: u64,
    /// How many nodes start the image.
    pub nodes: u32,
    /// Containers of the image on each node; they share its store.
    pub containers: u32,
    /// Zones, alike in size.
    pub zones: u32,
    /// Nodes in a rack.
    pub rack: u32,
    /// Supernodes per zone; they start no container. 0: all nodes are homes.
    pub supernodes: u32,
    /// All containers start within so many milliseconds. 0, the worst case, is the default.
    pub stagger_ms: f64,
    /// The image.
    pub image: Image,
    /// Lines and distances.
    pub links: Links,
    /// What the nodes' policy is told.
    pub policy: Policy,
    /// Death.
    pub failures: Failures,
}

/// An image, and what a container of it reads while it starts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Image {
    /// Compressed bytes in all.
    pub bytes: u64,
    /// Compressed bytes that a start fetches.
    pub start_bytes: u64,
    /// Requests of a start, each wanted only after the one before was used.
    pub requests: u32,
    /// The pieces that these are in.
    pub start_pieces: u32,
    /// The part of these that is read ahead: asked together with the one before. 0 to 1.
    pub read_ahead: f64,
    /// Requests that are asked in advance beyond that, always: a boot list. 0: none.
    pub boot_window: u32,
    /// Compressed bytes of a piece: half of its device bytes, as images compress.
    pub piece_bytes: u64,
    /// Chunks of a request: what is sent, checked and sent on as a whole.
    pub chunks: u32,
    /// What the container does between two requests, in milliseconds.
    pub compute_ms: f64,
    /// By how much that differs, at most: 0.2 is from 80 % to 120 %.
    pub compute_spread: f64,
    /// Whether the rest of the image is fetched after the start.
    pub background: bool,
}

/// Lines and distances. Times are round trips.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Links {
    /// A node's line to it, in megabits per second.
    pub down_mbit: f64,
    /// A node's line from it.
    pub up_mbit: f64,
    /// A supernode's lines, both ways.
    pub supernode_mbit: f64,
    /// The registry's line, shared by all.
    pub registry_mbit: f64,
    /// Within a rack.
    pub rack_ms: f64,
    /// Within a zone.
    pub zone_ms: f64,
    /// Between zones.
    pub elsewhere_ms: f64,
    /// To the registry, with the time that it takes to find a blob.
    pub registry_ms: f64,
    /// Round trips to connect to a node that was not talked to before: 1 for TCP, 2 with TLS 1.3.
    pub handshakes: f64,
    /// What a node takes to answer a request.
    pub answer_ms: f64,
    /// What a node takes to check, unpack and keep a chunk before it is sent on.
    pub chunk_ms: f64,
}

/// What the nodes' policy is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// `upload_slots`.
    pub slots: usize,
    /// Of these, for background.
    pub background_slots: usize,
    /// Uploads of one thing at once before askers are sent on.
    pub fanout: usize,
    /// Holders named in a busy answer.
    pub named: usize,
    /// Name who is still receiving, not only who has it all.
    pub name_receiving: bool,
    /// How long a node that is not being fed yet keeps an asker, before it says that it lacks the thing.
    pub grace_ms: f64,
    /// Keep holders by piece, not by what exactly was asked for.
    pub holders_by_piece: bool,
    /// Pieces that a node fetches at once in the background.
    pub background_window: u32,
    /// Where a node begins in the background.
    pub background_order: BackgroundOrder,
    /// `origin`, bytes per second for each zone; 0: no limit.
    pub origin: u64,
    /// What a node may take of it at once before it has to wait.
    pub origin_burst: u64,
    /// `upload`, bytes per second of each node; 0: no limit.
    pub upload: u64,
    /// Whether late answers are hedged.
    pub hedge: bool,
}

/// In which order a node fetches the rest of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackgroundOrder {
    /// All from the first byte.
    Same,
    /// Each from a place of its own, then round.
    Rotated,
    /// Each in an order of its own.
    Shuffled,
}

/// Death.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Failures {
    /// The part of the nodes that is killed. 0 to 1.
    pub killed: f64,
    /// At a random moment of the first so many milliseconds.
    pub within_ms: f64,
    /// Whether the host goes too: nobody is told, and only silence shows it.
    pub silent: bool,
    /// After so much silence a node is given up.
    pub silence_ms: f64,
    /// After so long the others have it out of their view.
    pub expelled_ms: f64,
    /// The part of the nodes that is slow. 0 to 1.
    pub slow: f64,
    /// What a slow one takes to answer a request.
    pub slow_answer_ms: f64,
}

impl Default for Scenario {
    fn default() -> Self {
        Scenario {
            seed: 1,
            nodes: 100,
            containers: 1,
            zones: 1,
            rack: 32,
            supernodes: 0,
            stagger_ms: 0.0,
            image: Image::default(),
            links: Links::default(),
            policy: Policy::default(),
            failures: Failures::default(),
        }
    }
}

impl Default for Image {
    /// The Python image of `make demo`, as measured there.
    fn default() -> Self {
        Image {
            bytes: 139_200_000,
            start_bytes: 30_300_000,
            requests: 130,
            start_pieces: 65,
            read_ahead: 0.0,
            boot_window: 0,
            piece_bytes: 1 << 20,
            chunks: 4,
            compute_ms: 5.0,
            compute_spread: 0.2,
            background: true,
        }
    }
}

impl Default for Links {
    /// A data centre of 1 Gbit/s, the registry some way off behind one line of the same speed.
    fn default() -> Self {
        Links {
            down_mbit: 1000.0,
            up_mbit: 1000.0,
            supernode_mbit: 10_000.0,
            registry_mbit: 1000.0,
            rack_ms: 0.2,
            zone_ms: 0.5,
            elsewhere_ms: 10.0,
            registry_ms: 20.0,
            handshakes: 2.0,
            answer_ms: 0.2,
            chunk_ms: 0.5,
        }
    }
}

impl Default for Policy {
    fn default() -> Self {
        let limits = UploadLimits::of_slots(16);
        Policy {
            slots: limits.slots,
            background_slots: limits.background,
            fanout: limits.fanout,
            named: limits.named,
            name_receiving: true,
            grace_ms: 500.0,
            holders_by_piece: false,
            background_window: 4,
            background_order: BackgroundOrder::Rotated,
            origin: 0,
            origin_burst: 4 << 20,
            upload: 0,
            hedge: true,
        }
    }
}

impl Default for Failures {
    fn default() -> Self {
        Failures {
            killed: 0.0,
            within_ms: 3000.0,
            silent: false,
            silence_ms: 3000.0,
            expelled_ms: 4000.0,
            slow: 0.0,
            slow_answer_ms: 400.0,
        }
    }
}
