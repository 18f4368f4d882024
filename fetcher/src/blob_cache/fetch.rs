// SPDX-License-Identifier: Apache-2.0
//! Bringing missing pieces: runs of them from the origin, single ones from other nodes.
//!
//! A task owns the piece that it fills, and ends it in every case: written, or given up by a guard. It goes
//! on with the next piece while somebody reads the blob and nobody else has that piece.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use sluice_blockindex::extent::Extent;

use super::live::{Giver, Live};
use super::metrics::From;
use super::record::origin_name;
use super::table::Seat;
use super::{GivenPiece, Piece, Shared, Supply, pieces};
use crate::cluster::node::NodeId;
use crate::source::{Priority, ReadContext, SourceError};

/// Pieces that are asked of other nodes at once for one blob: while one home waits for the origin, others
/// send. More would only make the order of arrival worse for who reads from the front.
pub(super) const AHEAD: u32 = 4;
/// Nodes that are tried for a piece before the origin.
const NODES_TRIED: usize = 3;
/// Pieces of a body that are written in one go, as far as they have arrived.
const WRITE_TOGETHER: usize = 32;

/// Why a piece did not land.
enum Miss {
    Source(SourceError),
    /// This node cannot write.
    Disk,
}

/// A claimed piece. Dropped, it is missing again.
struct Claim {
    live: Arc<Live>,
    number: u32,
    failure: Option<SourceError>,
    landed: bool,
}

impl Claim {
    fn new(live: &Arc<Live>, number: u32, giver: Giver) -> Option<Self> {
        live.claim(number, giver).then(|| Claim {
            live: Arc::clone(live),
            number,
            failure: None,
            landed: false,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.landed {
            self.live.missed(self.number, self.failure.take());
        }
    }
}

impl Shared {
    /// Begins to fetch from piece `number` on, for a reader that wants bytes up to `until`. Says whether
    /// anything was begun; otherwise somebody else was quicker.
    pub(super) fn launch(
        self: &Arc<Self>,
        seat: &Arc<Seat>,
        live: &Arc<Live>,
        number: u32,
        until: u64,
        supply: &Supply,
    ) -> bool {
        let giver = Giver::Origin(origin_name(supply.origin.label()));
        if let Some(givers) = &supply.nodes {
            live.may_come_from(givers);
        }
        let nodes = supply.nodes.is_some();
        let ahead = if nodes { AHEAD } else { 1 };
        let mut begun = false;
        for number in number..number.saturating_add(ahead) {
            let wanted = pieces::extent(live.size_bytes, number);
            if wanted.is_empty() || wanted.start() >= until {
                break;
            }
            let Some(claim) = Claim::new(live, number, giver.clone()) else {
                continue;
            };
            begun = true;
            let (shared, seat, supply) = (Arc::clone(self), Arc::clone(seat), supply.clone());
            let until = if nodes { wanted.end() } else { until };
            self.tasks.spawn(async move {
                let stop = shared.stop.clone();
                let fetch = shared.fetch(&seat, claim, until, &supply);
                stop.run_until_cancelled(fetch).await;
            });
        }
        begun
    }

    async fn fetch(self: &Arc<Self>, seat: &Arc<Seat>, claim: Claim, until: u64, supply: &Supply) {
        // Never closed.
        let Ok(_permit) = self.fetches.acquire().await else {
            return;
        };
        let mut claim = claim;
        if let Some(nodes) = &supply.nodes {
            match self.from_nodes(seat, &mut claim, nodes.as_ref()).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(()) => return self.broke(&claim.live),
            }
        }
        let live = Arc::clone(&claim.live);
        if let Err(Miss::Disk) = self.from_origin(seat, claim, until, supply).await {
            self.broke(&live);
        }
    }

    /// Fills the piece from the nodes that the route names. `Ok(false)`: the origin's turn.
    async fn from_nodes(
        self: &Arc<Self>,
        seat: &Arc<Seat>,
        claim: &mut Claim,
        nodes: &dyn super::PieceGivers,
    ) -> Result<bool, ()> {
        let live = Arc::clone(&claim.live);
        let mut skip: Vec<NodeId> = Vec::new();
        let Some(piece) = Piece::new(live.blob, live.size_bytes, claim.number) else {
            return Ok(false);
        };
        while skip.len() < NODES_TRIED {
            let Some(GivenPiece { node, mut body }) = nodes.open(&piece, &skip).await else {
                return Ok(false);
            };
            let giver = Giver::Node(node.clone());
            match self.fill(claim, &mut body, &giver, From::Node).await {
                Ok(()) => {
                    self.verify(seat, &live);
                    return Ok(true);
                }
                Err(Miss::Disk) => return Err(()),
                Err(Miss::Source(error)) => {
                    tracing::debug!(blob = %live.blob, piece = claim.number, %node, "no piece of a node: {error}");
                    skip.push(node);
                }
            }
        }
        Ok(false)
    }

    /// Fills the piece, and those after it as long as they are wanted, by one request to the origin.
    async fn from_origin(
        self: &Arc<Self>,
        seat: &Arc<Seat>,
        mut claim: Claim,
        until: u64,
        supply: &Supply,
    ) -> Result<(), Miss> {
        let live = Arc::clone(&claim.live);
        let start = pieces::extent(live.size_bytes, claim.number).start();
        let end = live.run_end(claim.number, until);
        let giver = Giver::Origin(origin_name(supply.origin.label()));
        // Nobody's priority is lower: a client waits for it.
        let context = ReadContext::new(Priority::Foreground).with_cancel(self.stop.clone());
        let wanted = Extent::new(start, end).unwrap_or_else(Extent::empty);
        let opened = supply.origin.open(&context, wanted).await;
        let stream = opened.and_then(|stream| stream.narrow(wanted));
        let mut body = match stream {
            Ok(stream) => stream.body,
            Err(error) => {
                claim.failure = Some(error.clone());
                return Err(Miss::Source(error));
            }
        };
        let mut left: Option<Bytes> = None;
        // Each round fills one piece.
        loop {
            let mut rest = match left.take() {
                Some(bytes) => futures::stream::iter([Ok(bytes)]).chain(body).boxed(),
                None => body,
            };
            let next = claim.number.saturating_add(1);
            let extent = pieces::extent(live.size_bytes, next);
            let next = (!extent.is_empty() && extent.end() <= end).then_some(next);
            let filled = self.fill_from(&mut claim, &mut rest, &giver, From::Origin, next);
            let going_on = match filled.await {
                Ok((bytes, going_on)) => {
                    left = bytes;
                    going_on
                }
                Err(Miss::Source(error)) => {
                    claim.failure = Some(error.clone());
                    return Err(Miss::Source(error));
                }
                Err(Miss::Disk) => return Err(Miss::Disk),
            };
            self.verify(seat, &live);
            body = rest;
            claim = match going_on {
                Some(claim) => claim,
                None => return Ok(()),
            };
        }
    }

    async fn fill(
        &self,
        claim: &mut Claim,
        body: &mut BoxStream<'static, Result<Bytes, SourceError>>,
        giver: &Giver,
        from: From,
    ) -> Result<(), Miss> {
        // Bytes beyond the end are nobody's: the digest judges those within.
        self.fill_from(claim, body, giver, from, None)
            .await
            .map(drop)
    }

    /// Fills the claimed piece; gives back what the body had beyond its end, and the claim to the next one
    /// where that is named, missing, and somebody still reads.
    async fn fill_from(
        &self,
        claim: &mut Claim,
        body: &mut BoxStream<'static, Result<Bytes, SourceError>>,
        giver: &Giver,
        from: From,
        next: Option<u32>,
    ) -> Result<(Option<Bytes>, Option<Claim>), Miss> {
        let live = Arc::clone(&claim.live);
        let number = claim.number;
        let extent = pieces::extent(live.size_bytes, number);
        let (mut at, mut crc) = (extent.start(), crc32fast::Hasher::new());
        let mut left = None;
        live.progress(number, 0, giver);
        let mut arriving = body.ready_chunks(WRITE_TOGETHER);
        while at < extent.end() {
            let Some(arrived) = arriving.next().await else {
                return Err(Miss::Source(SourceError::ShortBody {
                    offset: at,
                    expected_end: extent.end(),
                }));
            };
            let mut writes: Vec<Bytes> = Vec::new();
            let (mut upto, mut failure) = (at, None);
            for bytes in arrived {
                match bytes {
                    Ok(mut bytes) => {
                        let room = usize::try_from(extent.end() - upto).unwrap_or(usize::MAX);
                        let beyond = bytes.split_off(room.min(bytes.len()));
                        upto += bytes.len() as u64;
                        self.metrics.came(from, bytes.len() as u64);
                        if !bytes.is_empty() {
                            crc.update(&bytes);
                            writes.push(bytes);
                        }
                        if !beyond.is_empty() {
                            left = Some(match left.take() {
                                None => beyond,
                                Some(more) => [more, beyond].concat().into(),
                            });
                        }
                    }
                    Err(error) => failure = Some(error),
                }
            }
            let (target, from_here) = (Arc::clone(&live), at);
            let written = tokio::task::spawn_blocking(move || {
                let mut offset = from_here;
                for bytes in &writes {
                    target.write_at(offset, bytes)?;
                    offset += bytes.len() as u64;
                }
                std::io::Result::Ok(())
            });
            self.on_disk(&live, written.await)?;
            at = upto;
            if at < extent.end() {
                live.progress(number, at - extent.start(), giver);
            }
            // An error after the last byte of the piece is the next one's.
            if let Some(error) = failure
                && at < extent.end()
            {
                return Err(Miss::Source(error));
            }
        }
        let (target, crc, by) = (Arc::clone(&live), crc.finalize(), giver.clone());
        let recorded = tokio::task::spawn_blocking(move || target.record(number, crc, &by));
        self.on_disk(&live, recorded.await)?;
        let next = next.filter(|_| live.is_wanted());
        let claimed = live.landed(number, giver.clone(), next);
        claim.landed = true;
        let next = next.filter(|_| claimed).map(|number| Claim {
            live,
            number,
            failure: None,
            landed: false,
        });
        Ok((left, next))
    }

    fn on_disk(
        &self,
        live: &Live,
        done: Result<std::io::Result<()>, tokio::task::JoinError>,
    ) -> Result<(), Miss> {
        let error = match done {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(blob = %live.blob, "failed to keep a blob, its readers go past the cache: {error}");
        Err(Miss::Disk)
    }
}
