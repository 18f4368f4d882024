// SPDX-License-Identifier: Apache-2.0
//! Changes the compression of one layer: any tar blob in, our seekable zstd blob out.
//!
//! ```text
//!  async body ─▶ source ─▶ inflate ─▶ encode ─▶ pool ─▶ write
//!               sha256 of           scans the tar,       frames in order,
//!               the blob            its sha256, cuts     sha256 of the new blob
//! ```
//!
//! Each box is a thread, each arrow a short bounded channel, so that one layer keeps several cores
//! busy and none buffers more than a few MiB; bytes in the pool are reserved from a budget that all
//! layers share. When a box fails it drops its ends, its neighbours see that and stop, and the first
//! real cause is reported: the source's before that of anything that read it.
//!
//! Nothing is believed: the source blob must have its digest and size, and the tar its diff ID, or
//! there is no [`Packed`]. The output lies in a file without a name, which vanishes if it is dropped.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use futures::StreamExt as _;
use sluice_blockindex::annotations::LayerAnnotations;
use sluice_blockindex::digest::{BlobDigest, ConfigDigest, DiffId, Sha256Hasher};
use sluice_blockindex::encode::{EncodeOptions, LayerEncoder};

use crate::image::{BlobBody, ImageError};
use crate::pool::{ByteBudget, Pool};
use crate::verify::Verifier;

mod check;
mod encode;
mod inflate;
mod jobs;
mod toc;

pub use check::check;
pub use toc::{PackedToc, pack_toc};

#[cfg(test)]
mod tests;

/// Parts in a channel between two threads: enough that neither waits for the other's every step, and
/// at [`inflate::PART_BYTES`] each still small.
const CHANNEL_PARTS: usize = 8;
/// Frames of a layer that may be compressed but not yet written: covers a pool of any usual size.
const PENDING_FRAMES: usize = 256;

/// Why a layer could not be packed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// The blob could not be read, or is not what its descriptor says.
    #[error(transparent)]
    Source(#[from] ImageError),
    /// The blob cannot be decompressed.
    #[error("decompress: {reason}")]
    Inflate {
        /// The decoder's words.
        reason: String,
    },
    /// It decompresses to more than is allowed.
    #[error("it decompresses to more than {limit_bytes} bytes ({limit})")]
    TooLarge {
        /// The cap that was passed.
        limit_bytes: u64,
        /// Which option sets it.
        limit: &'static str,
    },
    /// The tar is another than the config says.
    #[error("its tar has diff ID {actual}, the config says {expected}")]
    DiffId {
        /// From the config.
        expected: DiffId,
        /// Of the bytes.
        actual: DiffId,
    },
    /// It cannot be indexed as it is.
    #[error("{reason}")]
    Index {
        /// The indexer's words.
        reason: String,
    },
    /// A chunk could not be compressed.
    #[error("compress: {reason}")]
    Encode {
        /// The encoder's words.
        reason: String,
    },
    /// The spool file could not be written.
    #[error("write spool file: {reason}")]
    Spool {
        /// The kernel's words.
        reason: String,
    },
    /// Another part of the pipeline failed first.
    #[error("stopped")]
    Stopped,
}

/// Caps against blobs that decompress to absurd sizes.
#[derive(Debug, Clone, Copy)]
pub struct Caps {
    /// Most bytes of an uncompressed layer.
    pub layer_bytes: u64,
    /// Most uncompressed bytes per compressed byte, above [`RATIO_FREE_BYTES`].
    pub ratio: u64,
}

/// Up to here any ratio is allowed: layers of a few large empty files are honest and harmless.
pub const RATIO_FREE_BYTES: u64 = 1024 * 1024 * 1024;

impl Default for Caps {
    fn default() -> Self {
        // gzip cannot exceed a ratio of 1032. 1 TiB is far above any layer that a registry takes.
        Self {
            layer_bytes: 1 << 40,
            ratio: 1100,
        }
    }
}

impl Caps {
    /// The cap that holds for a blob of `blob_bytes`, and the option that sets it.
    pub(crate) fn for_blob(&self, blob_bytes: u64) -> (u64, &'static str) {
        let by_ratio = blob_bytes.saturating_mul(self.ratio).max(RATIO_FREE_BYTES);
        match by_ratio < self.layer_bytes {
            true => (by_ratio, "--max-ratio"),
            false => (self.layer_bytes, "--max-layer-bytes"),
        }
    }
}

/// What is packed.
#[derive(Debug, Clone)]
pub struct Input {
    /// Names the blob in messages.
    pub what: String,
    /// Digest of the source blob.
    pub blob: BlobDigest,
    /// Size of the source blob.
    pub blob_bytes: u64,
    /// What the tar must be.
    pub diff_id: DiffId,
    /// What to refuse.
    pub caps: Caps,
    /// How the new blob is made.
    pub encode: EncodeOptions,
    /// Gets the bytes of the source blob as they come, for a caller that may want them unchanged. They
    /// are verified if packing succeeds.
    pub keep: Option<Arc<File>>,
}

/// A packed layer: verified, and not yet anywhere.
#[derive(Debug)]
pub struct Packed {
    /// Digest of the new blob.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_bytes: u64,
    /// Its bytes.
    pub spool: Arc<File>,
    /// Bytes of the tar.
    pub tar_bytes: u64,
    /// Where the index is, or why there is none: then the blob is ordinary zstd.
    pub index: Result<IndexPlace, String>,
}

/// Where a blob's index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexPlace {
    /// Its bytes in the blob.
    pub extent: sluice_blockindex::extent::Extent<sluice_blockindex::extent::BlobSpace>,
    /// Their digest.
    pub digest: sluice_blockindex::digest::IndexDigest,
}

impl Packed {
    /// The annotations of the layer in the image with `config`, or why it cannot be lazy.
    pub fn annotations(
        &self,
        diff_id: DiffId,
        config: ConfigDigest,
    ) -> Result<LayerAnnotations, &str> {
        self.index
            .as_ref()
            .map_err(String::as_str)
            .map(|index| LayerAnnotations {
                index_extent: index.extent,
                index_digest: index.digest,
                blob: self.blob,
                blob_bytes: self.blob_bytes,
                diff_id,
                config,
                port: None,
                boot: Vec::new(),
            })
    }
}

/// The parts of a body, as an async task passes them to [`pack`].
pub type BodyParts = tokio::sync::mpsc::Receiver<Result<Bytes, ImageError>>;

/// Parts of a blob waiting between the network and the thread that takes them.
const BODY_PARTS: usize = 16;

/// A body for a thread: what to poll beside it, and the parts as they come, up to an error.
///
/// **Cancel**: dropped, the future closes the channel, and the thread ends by itself.
pub(crate) fn feed(mut body: BlobBody) -> (impl Future<Output = ()>, BodyParts) {
    let (sender, parts) = tokio::sync::mpsc::channel(BODY_PARTS);
    let feed = async move {
        while let Some(part) = body.next().await {
            let failed = part.is_err();
            if sender.send(part).await.is_err() || failed {
                break;
            }
        }
    };
    (feed, parts)
}

/// Packs one layer into `spool`. Blocks: for a thread of its own. `progress` is told compressed bytes
/// as they are read.
///
/// **Errors**: [`PackError`]; nothing of the output is to be used then. **Cancel**: drop the sender of
/// `body`; all threads end soon after.
pub fn pack(
    input: &Input,
    body: BodyParts,
    spool: File,
    pool: &Pool,
    budget: &Arc<ByteBudget>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Packed, PackError> {
    let encoder = LayerEncoder::new(input.encode.clone()).map_err(jobs::failed)?;
    let (frames_tx, frames_rx) = sync_channel(PENDING_FRAMES);
    let ((plan, _claim), written) = pipeline(
        input,
        body,
        progress,
        |tar| jobs::encode(encoder, tar, frames_tx, pool, budget),
        || encode::write_frames(frames_rx, spool),
    )?;
    checked_diff_id(input, plan.diff_id())?;
    encode::finish(plan, written)
}

/// Runs the threads up to the one that writes: `encode` gets the tar and returns on this thread, `write`
/// takes what that sends, on another.
///
/// **Errors**: the first real cause among what they report.
fn pipeline<P, W: Send>(
    input: &Input,
    body: BodyParts,
    progress: &(dyn Fn(u64) + Sync),
    encode: impl FnOnce(Receiver<Bytes>) -> Result<P, PackError>,
    write: impl FnOnce() -> Result<W, PackError> + Send,
) -> Result<(P, W), PackError> {
    let (blob_tx, blob_rx) = sync_channel(CHANNEL_PARTS);
    let (tar_tx, tar_rx) = sync_channel(CHANNEL_PARTS);
    let drain = AtomicBool::new(false);
    let cap = input.caps.for_blob(input.blob_bytes);
    let outcome = std::thread::scope(|scope| {
        let source = scope.spawn(|| {
            read_source(input, body, blob_tx, &drain, |part| {
                progress(part.len() as u64);
                let mut keep = input.keep.as_deref();
                keep.as_mut()
                    .map_or(Ok(()), |file| file.write_all(part))
                    .map_err(spool_error)
            })
        });
        let inflate = scope.spawn(|| inflate::inflate(blob_rx, cap, tar_tx, &drain));
        let write = scope.spawn(write);
        let plan = encode(tar_rx);
        (join(source), join(inflate), plan, join(write))
    });
    let (source, inflate, plan, written) = outcome;
    let errors = [
        source.err(),
        inflate.err(),
        plan.as_ref().err().cloned(),
        written.as_ref().err().cloned(),
    ];
    if let Some(error) = first_error(errors) {
        return Err(error);
    }
    Ok((plan?, written?))
}

/// That the tar is the one that the config names.
fn checked_diff_id(input: &Input, actual: DiffId) -> Result<(), PackError> {
    let expected = input.diff_id;
    match actual == expected {
        true => Ok(()),
        false => Err(PackError::DiffId { expected, actual }),
    }
}

/// The first real cause among what the threads report, the source first.
fn first_error(errors: impl IntoIterator<Item = Option<PackError>>) -> Option<PackError> {
    let errors = errors.into_iter().flatten();
    // The first of several that are alike.
    errors.min_by_key(|error| matches!(error, PackError::Stopped))
}

fn join<T>(
    thread: std::thread::ScopedJoinHandle<'_, Result<T, PackError>>,
) -> Result<T, PackError> {
    let panicked = |_| PackError::Encode {
        reason: "a thread panicked".to_owned(),
    };
    thread.join().map_err(panicked)?
}

/// Verifies the blob while it passes on; `each` is given its parts as well.
///
/// `drain`, set before the receiver goes away, tells to read on without it, because the blob itself
/// may be another, which is then the cause. The last part is passed on before the digest is known; [`pack`] looks at all results at the end.
fn read_source(
    input: &Input,
    mut body: BodyParts,
    next: SyncSender<Bytes>,
    drain: &AtomicBool,
    mut each: impl FnMut(&[u8]) -> Result<(), PackError>,
) -> Result<(), PackError> {
    let mut verifier = Verifier::new(&input.what, input.blob, input.blob_bytes);
    let mut next = Some(next);
    while let Some(part) = body.blocking_recv() {
        let part = part?;
        verifier.update(&part)?;
        each(&part)?;
        let Some(channel) = &next else { continue };
        if channel.send(part).is_err() {
            next = None;
            if !drain.load(Ordering::Acquire) {
                return Err(PackError::Stopped);
            }
        }
    }
    Ok(verifier.finish()?)
}

/// Appends to the spool and hashes what it appends.
#[derive(Debug)]
struct SpoolWriter {
    file: std::io::BufWriter<File>,
    hasher: Sha256Hasher,
    bytes: u64,
}

impl SpoolWriter {
    fn new(file: File) -> Self {
        // Frames are about 40 KiB; a larger buffer saves system calls.
        let file = std::io::BufWriter::with_capacity(1024 * 1024, file);
        Self {
            file,
            hasher: Sha256Hasher::new(),
            bytes: 0,
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), PackError> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(spool_error)
    }

    fn finish(self) -> Result<(Arc<File>, BlobDigest, u64), PackError> {
        let file = self
            .file
            .into_inner()
            .map_err(|e| spool_error(e.into_error()))?;
        Ok((
            Arc::new(file),
            BlobDigest::from_bytes(self.hasher.finish()),
            self.bytes,
        ))
    }
}

fn spool_error(error: std::io::Error) -> PackError {
    PackError::Spool {
        reason: error.to_string(),
    }
}
