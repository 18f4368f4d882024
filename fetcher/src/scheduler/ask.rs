// SPDX-License-Identifier: Apache-2.0
//! The part of a transfer that asks other nodes: one step of its route at a time.
//!
//! A node that is asked gives a sign of life at once: chunks, or word that it is fetching them. One that
//! is silent for longer than its answers ever took is asked a second time elsewhere, within the budget
//! for that (a hedge); one that stays silent is left for the next on the route. Chunks land as they
//! come, whoever sends them.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{BoxStream, SelectAll};
use futures::{StreamExt as _, TryStreamExt as _};
use sluice_blockindex::chunkmap::{Chunk, Codec};
use sluice_blockindex::frames::{DecodeFrameError, decode_chunk, device_bytes_of};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::decode::{DecodeFailure, Decoded};
use super::error::FetchFailure;
use super::receive::DECODES;
use super::transfer::{Run, joined};
use crate::clock;
use crate::cluster::choice::Outcome;
use crate::cluster::home::PieceKey;
use crate::cluster::node::{Node, NodeId};
use crate::peer::client::PeerError;
use crate::peer::route::{Route, Step, patience};
use crate::peer::wire::{
    CHUNKS_MAX, Form, Part, WantedChunk, WantedChunks, WantedLayer, WireError,
};
use crate::peer::{Peers, Reach};
use crate::source::{Class, Priority, SourceKind};
use crate::store::{Committed, lock};

/// What came of asking.
pub(super) enum Asked {
    /// Look again: something landed, or the next step is due.
    Again,
    /// Go to the origin.
    Origin,
}

/// The way of a transfer to a piece, and how far it may go.
pub(super) struct Way {
    piece: PieceKey,
    reach: Reach,
    pub(super) way: Route,
}

/// The reach that asking a node takes.
fn reach_of(peers: &Peers, node: &Node) -> Reach {
    match peers.is_near(&node.id) {
        true => Reach::All,
        false => Reach::OtherZones,
    }
}

/// What is heard of those that are asked.
enum Heard {
    Part(usize, Part),
    Failed(usize, PeerError),
    Ended(usize),
}

/// One node that is asked.
struct Ask {
    node: NodeId,
    began: Instant,
    first_byte: Option<Duration>,
    /// Nothing more will be heard of it.
    over: bool,
    /// How it did is known.
    judged: bool,
}

impl Run {
    /// Takes the next step of the way to the first of the claimed chunks.
    pub(super) async fn ask_peers(&self, peers: &Arc<Peers>) -> Result<Asked, FetchFailure> {
        let Some(piece) = self.first_claim() else {
            return Ok(Asked::Again);
        };
        let priority = self.transfer.urgency.effective();
        let reach = self.transfer.reach();
        let (step, given_up) = {
            let mut route = lock(&self.route);
            let way = match &mut *route {
                Some(known) if known.piece == piece && known.reach == reach => &mut known.way,
                other => {
                    let way = peers.route(&piece, reach, priority, clock::now());
                    &mut other.insert(Way { piece, reach, way }).way
                }
            };
            let step = peers.scored(|scores| way.next(scores, clock::now()));
            (step, way.given_up())
        };
        if let Some(node) = given_up {
            peers.observe(&node, Outcome::Slow);
        }
        match step {
            Step::Origin => {
                if reach == Reach::All && !peers.is_origin_home(&piece) {
                    self.core.metrics.bypassed();
                    tracing::info!(
                        device = %self.layer.key(), piece = piece.number,
                        "go to the origin for a piece of another home"
                    );
                }
                Ok(Asked::Origin)
            }
            Step::Pause(pause) => {
                let work = async {
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = self.transfer.diverted(reach) => {}
                    }
                };
                self.unless_called_off(work).await?;
                Ok(Asked::Again)
            }
            Step::Ask { node, present_only } => {
                let within = |node: &Node| reach >= reach_of(peers, node);
                let Some(node) = peers.giver(&node).filter(within) else {
                    self.on_route(&piece, |way| way.failed(&node));
                    return Ok(Asked::Again);
                };
                self.ask(peers, piece, node, present_only).await?;
                Ok(Asked::Again)
            }
        }
    }

    fn on_route(&self, piece: &PieceKey, change: impl FnOnce(&mut Route)) {
        if let Some(known) = &mut *lock(&self.route)
            && known.piece == *piece
        {
            change(&mut known.way);
        }
    }

    fn first_claim(&self) -> Option<PieceKey> {
        let first = self.layer.flights.claims(&self.transfer).first().copied()?;
        let chunk = self.layer.chunks().chunk(first)?;
        Some(self.layer.piece(&chunk))
    }

    /// The claimed chunks of a piece.
    fn claims_of(&self, piece: &PieceKey) -> Vec<Chunk> {
        let claims = self.layer.flights.claims(&self.transfer).into_iter();
        claims
            .filter_map(|chunk| self.layer.chunks().chunk(chunk))
            .filter(|chunk| self.layer.piece(chunk) == *piece)
            .take(CHUNKS_MAX)
            .collect()
    }

    async fn ask(
        &self,
        peers: &Arc<Peers>,
        piece: PieceKey,
        node: Node,
        present_only: bool,
    ) -> Result<(), FetchFailure> {
        let urgency = &self.transfer.urgency;
        let slots = self.core.origins.of(&format!("node {}", node.id));
        let _slot = self.unless_called_off(slots.take(urgency)).await?;
        self.unless_called_off(self.core.gate.turn(urgency)).await?;
        self.land_present();
        let chunks = self.claims_of(&piece);
        if chunks.is_empty() {
            return Ok(());
        }
        let mut asking = Asking {
            reach: reach_of(peers, &node),
            run: self,
            peers,
            piece,
            wanted: self.wanted(peers, &chunks, present_only),
            left: chunks.iter().map(|chunk| chunk.ordinal).collect(),
            asks: Vec::new(),
            heard: SelectAll::new(),
        };
        asking.add(node);
        let result = asking.receive().await;
        self.transfer.fed(false);
        urgency.receiving(&self.core.gate, false);
        result
    }

    fn wanted(&self, peers: &Peers, chunks: &[Chunk], present_only: bool) -> WantedChunks {
        WantedChunks {
            node: peers.me(),
            layer: WantedLayer {
                key: self.layer.key(),
                blob: self.layer.blob(),
                blob_bytes: self.layer.blob_bytes(),
                places: self.layer.origins().clone(),
            },
            chunks: chunks
                .iter()
                .map(|chunk| WantedChunk {
                    ordinal: chunk.ordinal,
                    digest: chunk.digest.0,
                })
                .collect(),
            priority: self.transfer.urgency.effective(),
            present_only,
        }
    }
}

/// One request to a node, and perhaps the same to a second.
struct Asking<'a> {
    run: &'a Run,
    peers: &'a Arc<Peers>,
    /// What asking takes.
    reach: Reach,
    piece: PieceKey,
    wanted: WantedChunks,
    /// Chunks that have not come.
    left: BTreeSet<u32>,
    asks: Vec<Ask>,
    heard: SelectAll<BoxStream<'static, Heard>>,
}

impl Asking<'_> {
    fn add(&mut self, node: Node) {
        let number = self.asks.len();
        self.asks.push(Ask {
            node: node.id.clone(),
            began: clock::now(),
            first_byte: None,
            over: false,
            judged: false,
        });
        let (peers, wanted) = (Arc::clone(self.peers), self.wanted.clone());
        let (core, priority) = (&self.run.core, wanted.priority);
        core.metrics.requested(self.kind(), priority);
        // Opening is a part of the stream, so that one wait bounds both.
        let opening = futures::stream::once(async move { peers.chunks(&node, &wanted).await });
        let parts = opening.try_flatten();
        let heard = parts.map(move |part| match part {
            Ok(part) => Heard::Part(number, part),
            Err(error) => Heard::Failed(number, error),
        });
        let end = futures::stream::once(async move { Heard::Ended(number) });
        self.heard.push(heard.chain(end).boxed());
    }

    /// Of which kind those are that are asked.
    fn kind(&self) -> SourceKind {
        match self.reach {
            Reach::All => SourceKind::Peer,
            Reach::Origin | Reach::OtherZones => SourceKind::OtherZone,
        }
    }

    async fn receive(mut self) -> Result<(), FetchFailure> {
        let mut decodes = JoinSet::new();
        let read = self.read(&mut decodes).await;
        // What was read is decoded in any case: it is paid for.
        while let Some(decoded) = decodes.join_next().await {
            self.settle(decoded)?;
        }
        self.judge();
        read
    }

    async fn read(&mut self, decodes: &mut JoinSet<AskDecoded>) -> Result<(), FetchFailure> {
        let run = self.run;
        let peers = Arc::clone(self.peers);
        let options = peers.options();
        let (gate, urgency) = (&run.core.gate, &run.transfer.urgency);
        let mut called_off = pin!(run.called_off());
        let mut diverted = pin!(run.transfer.diverted(self.reach));
        let (mut last_sign, mut last_chunk) = (clock::now(), clock::now());
        let mut signs = false;
        let mut hedged = self.wanted.present_only;
        let mut paused = false;
        loop {
            if decodes.is_empty() && (self.left.is_empty() || self.all_over()) {
                return Ok(());
            }
            let reading = !paused && decodes.len() < DECODES && !self.all_over();
            let hedge_after = self.peers.hedge_after(&self.asks[0].node);
            let hedge_at = last_sign + hedge_after.max(options.hedge_floor);
            let may_hedge = !hedged && !signs && urgency.effective() == Priority::Foreground;
            // A home that works may have the request wait behind others, on a slow line for long. What nobody
            // waits for is not worth a second fetch.
            let promises = patience(urgency.effective()).max(run.core.options.stall);
            let silent_at = (last_sign + options.silence).min(last_chunk + promises);
            tokio::select! {
                biased;
                () = &mut called_off => return Err(FetchFailure::Cancelled),
                Some(decoded) = decodes.join_next() => {
                    self.settle(decoded)?;
                    (last_sign, last_chunk) = (clock::now(), clock::now());
                }
                // Another node asks this one for a chunk of these: it must not wait for a third.
                () = &mut diverted => return Ok(()),
                () = gate.turn(urgency), if paused => {
                    paused = false;
                    (last_sign, last_chunk) = (clock::now(), clock::now());
                }
                Some(heard) = self.heard.next(), if reading => {
                    last_sign = clock::now();
                    if let Heard::Part(number, _) = &heard {
                        self.peers.heard(&self.asks[*number].node);
                    }
                    match heard {
                        Heard::Part(number, Part::Chunk { ordinal, form, data }) => {
                            signs = true;
                            run.transfer.fed(true);
                            last_chunk = last_sign;
                            self.take(number, ordinal, form, data, decodes).await;
                            urgency.receiving(gate, true);
                            paused = !gate.may_run(urgency.effective());
                        }
                        Heard::Part(_, Part::Working) => {
                            signs = true;
                            run.transfer.fed(true);
                        }
                        Heard::Part(number, Part::Lacking(ordinals)) => self.lacks(number, &ordinals),
                        Heard::Part(number, Part::Busy(named)) => self.busy(number, named),
                        Heard::Failed(number, error) => self.failed(number, &error),
                        Heard::Ended(number) => self.asks[number].over = true,
                    }
                }
                () = tokio::time::sleep_until(hedge_at), if reading && may_hedge => {
                    match self.heard_since(last_sign) {
                        Some(heard) => last_sign = heard,
                        None => {
                            hedged = true;
                            self.hedge();
                        }
                    }
                }
                () = tokio::time::sleep_until(silent_at), if reading => {
                    if clock::now() < last_chunk + promises
                        && let Some(heard) = self.heard_since(last_sign)
                    {
                        last_sign = heard;
                        continue;
                    }
                    run.core.metrics.stalled(self.kind());
                    for number in 0..self.asks.len() {
                        self.failed(number, &PeerError::Silent(options.silence));
                    }
                }
            }
        }
    }

    /// When something came of the node asked first, on another stream, if that was later than `sign`: on a
    /// full line one answer waits for others.
    fn heard_since(&self, sign: Instant) -> Option<Instant> {
        let heard = self.peers.last_heard(&self.asks[0].node);
        heard.filter(|heard| *heard > sign)
    }

    fn all_over(&self) -> bool {
        self.asks.iter().all(|ask| ask.over)
    }

    /// Asks the next home besides, if the budget allows.
    fn hedge(&mut self) {
        let first = self.asks[0].node.clone();
        self.peers.observe(&first, Outcome::Late);
        let mut spare = None;
        self.run
            .on_route(&self.piece, |way| spare = way.spare(&first));
        let spare = spare.and_then(|id| self.peers.giver(&id));
        if let Some(node) = spare
            && self.reach == reach_of(self.peers, &node)
            && self.peers.try_hedge()
        {
            tracing::debug!(node = %first, other = %node.id, "silent: ask another besides");
            self.run.core.metrics.hedged();
            self.add(node);
        }
    }

    /// Takes a chunk and starts decoding it.
    async fn take(
        &mut self,
        number: usize,
        ordinal: u32,
        form: Form,
        data: Bytes,
        decodes: &mut JoinSet<AskDecoded>,
    ) {
        let (run, ask) = (self.run, &mut self.asks[number]);
        let bytes = data.len() as u64;
        ask.first_byte.get_or_insert(clock::now() - ask.began);
        let priority = run.transfer.urgency.effective();
        run.core.metrics.arrived(self.kind(), priority, bytes);
        run.layer.arrived(self.kind(), bytes);
        self.peers.downloaded(bytes, false).await;
        let asked = |wanted: &WantedChunk| wanted.ordinal.cmp(&ordinal);
        if self.wanted.chunks.binary_search_by(asked).is_err() {
            let field = "chunk that nobody asked for";
            self.failed(number, &PeerError::Wire(WireError::Malformed { field }));
            return;
        }
        // From two nodes it comes twice.
        let left = self.left.contains(&ordinal);
        let Some(chunk) = run.layer.chunks().chunk(ordinal).filter(|_| left) else {
            return;
        };
        let (core, device) = (Arc::clone(&run.core), Arc::clone(&run.layer.device));
        let (transfer, peers) = (Arc::clone(&run.transfer), Arc::clone(self.peers));
        decodes.spawn(async move {
            let _slot = core.decodes.take(&transfer.urgency).await;
            let core = Arc::clone(&core);
            let work = tokio::task::spawn_blocking(move || {
                let bytes = match form {
                    Form::Frame => frame(&data, &chunk).map_err(DecodeFailure::Corrupt)?,
                    Form::Raw => {
                        device_bytes_of(data.to_vec(), &chunk).map_err(DecodeFailure::Corrupt)?
                    }
                    Form::Zstd => unpack(&data, &chunk).map_err(DecodeFailure::Corrupt)?,
                };
                let kept = core.passing.keep(&device, &chunk, bytes)?;
                if form != Form::Raw {
                    // This node may be asked for it next.
                    peers.frames.put(chunk.digest, form, &data);
                }
                Ok(kept)
            });
            match work.await {
                Ok(result) => (number, (ordinal, result)),
                Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
            }
        });
    }

    fn settle(
        &mut self,
        decoded: Result<AskDecoded, tokio::task::JoinError>,
    ) -> Result<(), FetchFailure> {
        let run = self.run;
        let (number, (chunk, result)) = joined(decoded)?;
        match result {
            Ok(committed) => {
                if committed == Committed::Stored {
                    run.core.metrics.committed(self.kind().as_str());
                }
                self.left.remove(&chunk);
                run.layer.flights.finish(chunk, None);
                Ok(())
            }
            Err(DecodeFailure::Store(error)) => Err(FetchFailure::Store(error)),
            // Whole chunks come: none needs a window.
            Err(DecodeFailure::Window(failure)) => Err(failure),
            Err(DecodeFailure::NotKept(error)) => {
                self.left.remove(&chunk);
                run.not_kept(chunk, error)
            }
            Err(DecodeFailure::Corrupt(error)) => {
                run.core.metrics.corrupt(self.kind().as_str());
                self.failed(number, &PeerError::Corrupt(error));
                Ok(())
            }
        }
    }

    /// It is over: remembers how those did of whom nothing is known yet.
    fn judge(&mut self) {
        for ask in self.asks.iter_mut().filter(|ask| !ask.judged) {
            ask.judged = true;
            if let Some(first_byte) = ask.first_byte {
                let outcome = Outcome::Answered { first_byte };
                self.peers.observe(&ask.node, outcome);
            }
            // It came to its end without all, and was to fetch what it did not have.
            if ask.over && !self.left.is_empty() && !self.wanted.present_only {
                let node = ask.node.clone();
                self.run.on_route(&self.piece, |way| way.failed(&node));
            }
        }
    }

    fn lacks(&mut self, number: usize, ordinals: &BTreeSet<u32>) {
        if self.left.is_disjoint(ordinals) {
            return;
        }
        let node = self.asks[number].node.clone();
        if self.wanted.present_only {
            self.peers.observe(&node, Outcome::Lacked);
        } else {
            // A home that cannot fetch it: what else it sends is welcome, but the rest comes elsewhere.
            self.run.on_route(&self.piece, |way| way.failed(&node));
        }
    }

    fn busy(&mut self, number: usize, named: Vec<NodeId>) {
        let ask = &mut self.asks[number];
        (ask.over, ask.judged) = (true, true);
        self.peers.observe(&ask.node, Outcome::Busy);
        self.run.core.metrics.peer_busy();
        let node = ask.node.clone();
        let (view, now) = (self.peers.view(), clock::now());
        self.peers.scored(|scores| {
            let busy = |way: &mut Route| way.busy(&node, &named, &view, scores, now);
            self.run.on_route(&self.piece, busy);
        });
    }

    fn failed(&mut self, number: usize, error: &PeerError) {
        let (run, kind) = (self.run, self.kind());
        let ask = &mut self.asks[number];
        ask.over = true;
        if std::mem::replace(&mut ask.judged, true) {
            return;
        }
        let (outcome, class) = match error {
            PeerError::Corrupt(_) | PeerError::Wire(_) | PeerError::Object { .. } => {
                (Outcome::Lied, Class::Corrupt)
            }
            PeerError::Silent(_) => (Outcome::Slow, Class::Transient),
            PeerError::Lacking => (Outcome::Lacked, Class::Permanent),
            PeerError::Busy => (Outcome::Busy, Class::Transient),
            PeerError::Link(_) | PeerError::Status(_) => (Outcome::Failed, Class::Transient),
        };
        run.core.metrics.failed(kind, class);
        let node = ask.node.clone();
        tracing::warn!(
            device = %run.layer.key(), node = %node,
            "failed to get chunks of a node: {error}"
        );
        self.peers.observe(&node, outcome);
        run.on_route(&self.piece, |way| way.failed(&node));
    }
}

/// Which ask, and what came of the chunk.
type AskDecoded = (usize, Decoded);

/// Decodes a frame as it stands in the blob. Of unmodified blobs none is sent: what is decoded of it may need a
/// window, or all that stands before.
fn frame(data: &[u8], chunk: &Chunk) -> Result<Vec<u8>, DecodeFrameError> {
    match chunk.codec {
        Codec::Zstd => decode_chunk(data, chunk),
        codec => Err(DecodeFrameError::Codec {
            ordinal: chunk.ordinal,
            codec,
        }),
    }
}

/// Decompresses a chunk that was compressed for the wire, within its known size.
fn unpack(data: &[u8], chunk: &Chunk) -> Result<Vec<u8>, DecodeFrameError> {
    let ordinal = chunk.ordinal;
    let zstd = |reason: String| DecodeFrameError::Zstd { ordinal, reason };
    let most = usize::try_from(chunk.content_bytes()).map_err(|error| zstd(error.to_string()))?;
    let bytes = zstd::bulk::decompress(data, most).map_err(|error| zstd(error.to_string()))?;
    device_bytes_of(bytes, chunk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::TestLayer;
    use crate::fixture::unmodified::{Unmodified, Written};

    #[test]
    fn frames_are_taken_of_blobs_that_sluice_wrote_only() {
        let frame_of = |layer: &TestLayer, chunk: &Chunk| {
            let at = |offset| usize::try_from(offset).unwrap();
            layer.blob[at(chunk.blob.start())..at(chunk.blob.end())].to_vec()
        };
        let own = TestLayer::even(1, 2, 3000);
        let chunk = own.chunks.chunk(1).unwrap();
        assert_eq!(
            frame(&frame_of(&own, &chunk), &chunk).unwrap(),
            own.bytes_of(1)
        );
        for written in Written::RANDOM {
            let layer = Unmodified::new(2, written, 300_000).layer;
            let chunk = layer.chunks.chunk(1).unwrap();
            let taken = frame(&frame_of(&layer, &chunk), &chunk);
            assert!(
                matches!(taken, Err(DecodeFrameError::Codec { .. })),
                "{written:?}"
            );
            assert_eq!(
                unpack(&zstd::bulk::compress(layer.bytes_of(1), 1).unwrap(), &chunk).unwrap(),
                layer.bytes_of(1)
            );
        }
    }
}
