// SPDX-License-Identifier: Apache-2.0
//! Blobs as registries store them, kept for those who pull them whole or in ranges.
//!
//! Knows nothing of HTTP: a reader asks for an extent and says from where missing bytes may come
//! ([`Supply`]); the cache gives a stream that begins while the blob is still arriving.
//!
//! # How
//! A blob is kept in pieces of [`PIECE_BYTES`]. Each piece that is missing is fetched once, however many
//! readers wait for it (single flight by piece); readers follow the writer. A piece has a checksum in the
//! record beside the data, so a blob that was left half-way resumes after a restart or a crash. When all
//! pieces are here, the sha256 of the blob decides: equal, the file is synced and renamed to its place
//! among the whole ones; different, it is dropped, who gave parts of it is told on, and the next attempt
//! takes from the origin only.
//!
//! # Invariants
//! - A blob counts as whole only after its sha256 was verified; only whole ones are trusted at a start.
//! - Who reads a blob to its end does not get its last [`HELD_BACK_BYTES`] before that.
//! - Who reads a part in the middle of a blob gets bytes of a whole one, or of the very origin that he
//!   named: what a node or another registry gave is not shown to him unverified.
//! - What cannot be kept (budget, disk) is streamed all the same.
//!
//! # Bounds
//! Bytes on disk: the budget, by least recent use, in whole blobs; a blob counts with its size from its
//! first byte on. Fetches: [`FETCHES`] at a time. Each wait ends by the source's own time-outs or after
//! [`BlobCacheOptions::stall`]. No lock is held across I/O.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cluster::node::NodeId;
use crate::source::{BlobSource, BlobStream, ReadContext, SourceError};
use crate::store::lock;

mod fetch;
mod files;
mod judge;
mod live;
mod metrics;
mod pieces;
mod read;
mod record;
mod table;

use files::Files;
use table::Table;

pub use metrics::BlobMetrics;
pub use pieces::{HELD_BACK_BYTES, PIECE_BYTES, Piece};

/// Fetches of pieces or runs of pieces at a time, over all blobs. Above what a client opens for one image
/// (containerd: 3 by default, docker: 3) times the images that a node pulls at once.
const FETCHES: usize = 64;

/// How a cache keeps blobs.
#[derive(Clone, Debug)]
pub struct BlobCacheOptions {
    /// Its directory; made where it is missing.
    pub directory: PathBuf,
    /// Most bytes on disk. A blob that is larger is streamed and not kept.
    pub budget_bytes: u64,
    /// Longest wait of a reader without any progress of its blob.
    pub stall: Duration,
}

/// Why nothing is read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlobError {
    /// The source failed, or the blob is not what its digest says.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The same digest is known with another size.
    #[error("blob {blob} has {known} bytes, not {asked}")]
    Size {
        /// Which.
        blob: BlobDigest,
        /// As known.
        known: u64,
        /// As asked.
        asked: u64,
    },
}

/// Where missing bytes of a blob may come from, on behalf of one reader.
#[derive(Clone, Debug)]
pub struct Supply {
    /// The registry, with the credential of the reader. Its label names whose bytes they are.
    pub origin: Arc<dyn BlobSource>,
    /// Other nodes, where there are any.
    pub nodes: Option<Arc<dyn PieceGivers>>,
}

/// A piece on its way from another node.
pub struct GivenPiece {
    /// Who gives it.
    pub node: NodeId,
    /// Its bytes, in order. An error or an early end is the node's failure.
    pub body: BoxStream<'static, Result<Bytes, SourceError>>,
}

impl fmt::Debug for GivenPiece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GivenPiece")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// Other nodes that may have pieces, or fetch them.
#[async_trait]
pub trait PieceGivers: Send + Sync + fmt::Debug {
    /// Asks for a piece; `skip` were asked for it before and failed. `None`: the origin is to be asked.
    ///
    /// **Cancel** safe. Bounded by its own deadlines.
    async fn open(&self, piece: &Piece, skip: &[NodeId]) -> Option<GivenPiece>;

    /// These gave parts of a blob that has another digest, and one of them lies.
    fn lied(&self, nodes: &[NodeId]);
}

/// The cache. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BlobCache {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    files: Files,
    options: BlobCacheOptions,
    table: Mutex<Table>,
    fetches: Arc<Semaphore>,
    metrics: BlobMetrics,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl BlobCache {
    /// Opens the directory and drops what no longer fits the budget. **Blocks**.
    ///
    /// **Errors** of the file system.
    pub fn open(options: BlobCacheOptions, metrics: BlobMetrics) -> io::Result<Self> {
        let (files, found) = Files::open(&options.directory)?;
        let table = Table::new(options.budget_bytes, found);
        let shared = Shared {
            files,
            options,
            table: Mutex::new(table),
            fetches: Arc::new(Semaphore::new(FETCHES)),
            metrics,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        };
        let over = lock(&shared.table).make_room(0).unwrap_or_default();
        for blob in over {
            shared.files.remove(blob)?;
            lock(&shared.table).evicted(blob);
        }
        shared.note_held();
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// The size of a blob that is here as a whole.
    #[must_use]
    pub fn whole_bytes(&self, blob: BlobDigest) -> Option<u64> {
        lock(&self.shared.table).whole_bytes(blob)
    }

    /// Bytes that the kept blobs count for.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        lock(&self.shared.table).held_bytes()
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &BlobMetrics {
        &self.shared.metrics
    }

    /// Whether a piece is here, or on its way.
    #[must_use]
    pub fn has_piece(&self, piece: &Piece) -> bool {
        let live = lock(&self.shared.table).live(piece.blob);
        self.whole_bytes(piece.blob).is_some() || live.is_some_and(|it| it.has(piece.number))
    }

    /// Reads `extent` of a blob of `size_bytes`, fetching what is missing.
    ///
    /// The stream may be dropped at any time; what is being fetched for it goes on to the end of its piece.
    ///
    /// **Errors** [`BlobError`] before the first byte; later ones from the stream. An extent beyond the
    /// end is [`SourceError::BeyondEnd`].
    pub async fn read(
        &self,
        context: &ReadContext,
        blob: BlobDigest,
        size_bytes: u64,
        extent: Extent<BlobSpace>,
        supply: Supply,
    ) -> Result<BlobStream, BlobError> {
        if extent.end() > size_bytes {
            return Err(SourceError::BeyondEnd { asked: extent }.into());
        }
        read::open(
            &self.shared,
            context,
            blob,
            size_bytes,
            extent,
            supply,
            false,
        )
        .await
    }

    /// Reads a piece for another node, which verifies the whole blob: whatever is here of it, unverified, or
    /// as the supply gives it.
    ///
    /// **Errors** [`BlobError`]. **Cancel** safe.
    pub async fn read_piece(
        &self,
        context: &ReadContext,
        piece: &Piece,
        supply: Supply,
    ) -> Result<BlobStream, BlobError> {
        let (blob, size_bytes) = (piece.blob, piece.blob_bytes);
        read::open(
            &self.shared,
            context,
            blob,
            size_bytes,
            piece.extent(),
            supply,
            true,
        )
        .await
    }

    /// Ends what is being fetched and waits for it. What is here stays.
    pub async fn stop(&self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl Shared {
    fn note_held(&self) {
        let held = lock(&self.table).held_bytes();
        self.metrics.held(held);
    }
}

#[cfg(test)]
mod tests;
