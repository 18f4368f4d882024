// SPDX-License-Identifier: Apache-2.0
//! A blob that is open: which of its pieces are here, and whether it is verified.
//!
//! ```text
//! Filling --all pieces here, sha256 equal--> Whole
//!         --all pieces here, sha256 differs--> Failed
//!         --the disk fails--> Broken
//! piece:  Missing --claim--> Filling --written--> Present
//!                    ^----------failed-----'
//! ```
//! Whoever makes a piece `Filling` owns it and ends it. Readers look, wait for a change, and look again:
//! the table of pieces is the truth. **Locks** the state, for looks and changes only.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use sluice_blockindex::digest::BlobDigest;
use tokio::sync::watch;

use super::PieceGivers;
use super::files::{Files, PartialFiles};
use super::pieces;
use super::record::{self, Here, NO_ORIGIN, OriginName};
use super::table::Seat;
use crate::cluster::node::NodeId;
use crate::source::SourceError;
use crate::store::lock;

mod look;

pub(super) use look::{Look, Reading};

/// Who gave a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Giver {
    /// A registry, by the name of its source.
    Origin(OriginName),
    /// Another node.
    Node(NodeId),
    /// Some node, before the blob was opened.
    Former,
}

#[derive(Debug)]
enum Piece {
    Missing(Option<SourceError>),
    Filling { have_bytes: u64, giver: Giver },
    Present(Giver),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Filling,
    Whole,
    Failed(BlobDigest),
    Broken,
}

/// The hash over the first bytes; taken out while it is being advanced.
#[derive(Debug, Default)]
struct Hashing {
    hasher: Sha256,
    at: u64,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    pieces: Vec<Piece>,
    hashing: Option<Hashing>,
    readers: usize,
    /// Whom to tell when the blob is wrong and nodes gave parts of it.
    givers: Option<Arc<dyn PieceGivers>>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) blob: BlobDigest,
    pub(super) size_bytes: u64,
    data: File,
    record: Option<File>,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

impl Live {
    /// Opens the blob of a seat. **Blocks**.
    pub(super) fn open(files: &Files, seat: &Seat) -> io::Result<Self> {
        let (blob, size_bytes) = (seat.blob, seat.size_bytes);
        let (data, record, present, phase) = if seat.whole {
            (files.open_whole(blob)?, None, Vec::new(), Phase::Whole)
        } else {
            let PartialFiles {
                data,
                record,
                present,
            } = files.open_partial(blob, size_bytes)?;
            (data, Some(record), present, Phase::Filling)
        };
        let piece = |origin: Option<OriginName>| match origin {
            Some(NO_ORIGIN) => Piece::Present(Giver::Former),
            Some(origin) => Piece::Present(Giver::Origin(origin)),
            None => Piece::Missing(None),
        };
        let state = State {
            phase,
            pieces: present.into_iter().map(piece).collect(),
            hashing: Some(Hashing::default()),
            readers: 0,
            givers: None,
        };
        Ok(Live {
            blob,
            size_bytes,
            data,
            record,
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
        })
    }

    /// Hears of every change from now on.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn tell(&self) {
        self.changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    pub(super) fn read_at(&self, at: u64, length: usize) -> io::Result<Bytes> {
        let mut buffer = vec![0; length];
        self.data.read_exact_at(&mut buffer, at)?;
        Ok(buffer.into())
    }

    pub(super) fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.data.write_all_at(bytes, at)
    }

    /// Whether it was verified.
    pub(super) fn is_whole(&self) -> bool {
        lock(&self.state).phase == Phase::Whole
    }

    /// Makes the caller the owner of a piece, if it is missing.
    pub(super) fn claim(&self, number: u32, giver: Giver) -> bool {
        let mut state = lock(&self.state);
        let filling = state.phase == Phase::Filling;
        match usize::try_from(number)
            .ok()
            .and_then(|at| state.pieces.get_mut(at))
        {
            Some(piece @ Piece::Missing(_)) if filling => {
                *piece = Piece::Filling {
                    have_bytes: 0,
                    giver,
                };
                true
            }
            _ => false,
        }
    }

    /// The end of the run of missing pieces that begins with `number`, at most `until`.
    pub(super) fn run_end(&self, number: u32, until: u64) -> u64 {
        let state = lock(&self.state);
        let missing = state.pieces.iter().skip(skipped_to(number) + 1);
        let missing = missing
            .take_while(|piece| matches!(piece, Piece::Missing(_)))
            .count();
        let last = number.saturating_add(u32::try_from(missing).unwrap_or(u32::MAX));
        let wanted = pieces::at(until.saturating_sub(1)).max(number);
        pieces::extent(self.size_bytes, last.min(wanted)).end()
    }

    /// The owner has written so much of a piece, which `giver` gives.
    pub(super) fn progress(&self, number: u32, bytes: u64, from: &Giver) {
        self.with_piece(number, |piece| {
            *piece = Piece::Filling {
                have_bytes: bytes,
                giver: from.clone(),
            };
        });
    }

    /// The owner has written all of a piece; its record is written by him, too.
    ///
    /// With `next` he goes on with that piece in the same moment, if it is missing: no reader finds it so and
    /// has it fetched by a request of its own. Says whether he does.
    pub(super) fn landed(&self, number: u32, giver: Giver, next: Option<u32>) -> bool {
        let mut state = lock(&self.state);
        let mut claimed = false;
        if let Some(next) = next.and_then(|next| state.pieces.get_mut(skipped_to(next)))
            && matches!(next, Piece::Missing(_))
        {
            let giver = giver.clone();
            *next = Piece::Filling {
                have_bytes: 0,
                giver,
            };
            claimed = true;
        }
        if let Some(piece) = state.pieces.get_mut(skipped_to(number)) {
            *piece = Piece::Present(giver);
        }
        drop(state);
        self.tell();
        claimed
    }

    /// The owner gives a piece up.
    pub(super) fn missed(&self, number: u32, failure: Option<SourceError>) {
        self.with_piece(number, |piece| {
            if matches!(piece, Piece::Filling { .. }) {
                *piece = Piece::Missing(failure);
            }
        });
    }

    fn with_piece(&self, number: u32, change: impl FnOnce(&mut Piece)) {
        if let Some(piece) = lock(&self.state).pieces.get_mut(skipped_to(number)) {
            change(piece);
        }
        self.tell();
    }

    /// Writes the record of a piece. **Blocks**.
    pub(super) fn record(&self, number: u32, crc: u32, giver: &Giver) -> io::Result<()> {
        let origin = match giver {
            Giver::Origin(origin) => *origin,
            Giver::Node(_) | Giver::Former => NO_ORIGIN,
        };
        let (at, entry) = record::entry(number, &Here { crc, origin });
        match &self.record {
            Some(record) => record.write_all_at(&entry, at),
            None => Ok(()),
        }
    }

    /// Nothing can be kept any more.
    pub(super) fn broke(&self) {
        let mut state = lock(&self.state);
        if state.phase == Phase::Filling {
            state.phase = Phase::Broken;
        }
        drop(state);
        self.tell();
    }

    pub(super) fn enter(&self) {
        lock(&self.state).readers += 1;
    }

    pub(super) fn leave(&self) {
        lock(&self.state).readers -= 1;
    }

    /// Whether anybody reads.
    pub(super) fn is_wanted(&self) -> bool {
        lock(&self.state).readers > 0
    }

    /// Nodes may give parts from now on.
    pub(super) fn may_come_from(&self, givers: &Arc<dyn PieceGivers>) {
        lock(&self.state).givers = Some(Arc::clone(givers));
    }

    /// The blob is wrong: the nodes that gave parts are told on.
    pub(super) fn tell_on_nodes(&self) {
        let givers = lock(&self.state).givers.clone();
        let nodes = self.nodes();
        if let Some(givers) = givers.filter(|_| !nodes.is_empty()) {
            givers.lied(&nodes);
        }
    }

    fn nodes(&self) -> Vec<NodeId> {
        let state = lock(&self.state);
        let node = |piece: &Piece| match piece {
            Piece::Present(Giver::Node(node)) => Some(node.clone()),
            _ => None,
        };
        let mut nodes: Vec<NodeId> = state.pieces.iter().filter_map(node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// Takes the hash out, if it can go on; only one caller has it.
    pub(super) fn take_hashing(&self) -> Option<Verifying> {
        let mut state = lock(&self.state);
        let at = state.hashing.as_ref()?.at;
        let next = state.pieces.get(skipped(at));
        let ready = at == self.size_bytes || matches!(next, Some(Piece::Present(_)));
        if state.phase != Phase::Filling || !ready {
            return None;
        }
        state.hashing.take().map(Verifying)
    }

    /// Puts it back.
    pub(super) fn put_hashing(&self, verifying: Verifying) {
        lock(&self.state).hashing = Some(verifying.0);
    }

    /// All was hashed: the blob is what it is.
    pub(super) fn judged(&self, actual: BlobDigest) -> bool {
        let equal = actual == self.blob;
        lock(&self.state).phase = match equal {
            true => Phase::Whole,
            false => Phase::Failed(actual),
        };
        self.tell();
        equal
    }

    pub(super) fn seal(&self, files: &Files) -> io::Result<()> {
        files.seal(self.blob, &self.data)
    }
}

/// The right to advance the hash.
#[derive(Debug)]
pub(super) struct Verifying(Hashing);

impl Verifying {
    /// Hashes the next piece; `None` when there is none. **Blocks**.
    pub(super) fn advance(&mut self, live: &Live) -> io::Result<Option<BlobDigest>> {
        if self.0.at < live.size_bytes {
            let extent = pieces::extent(live.size_bytes, pieces::at(self.0.at));
            let length = usize::try_from(extent.len()).unwrap_or(0);
            self.0.hasher.update(live.read_at(extent.start(), length)?);
            self.0.at = extent.end();
        }
        let done = self.0.at == live.size_bytes;
        Ok(done.then(|| BlobDigest::from_bytes(self.0.hasher.clone().finalize().into())))
    }
}

/// Pieces before that of `offset`.
fn skipped(offset: u64) -> usize {
    skipped_to(pieces::at(offset))
}

fn skipped_to(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
