// SPDX-License-Identifier: Apache-2.0
//! From a frame to the chunks of it that are wanted: decompressed once, each verified and stored.
//!
//! A frame that begins inside a gzip member waits for its window first (`windows`), without a decoder's slot:
//! who has one never waits for who needs one.

use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::chunkmap::{Chunk, Codec, DeviceForm, RestartState};
use sluice_blockindex::frames::{
    DecodeFrameError, decode_chunk, decompress_span_into, device_bytes_of,
};
use sluice_blockindex::gzip::LeadingBits;
use sluice_blockindex::gzip::restart::RestartAt;
use tokio::sync::oneshot;

use super::Core;
use super::error::FetchFailure;
use super::flight::Transfer;
use super::layer::LayerHandle;
use super::plan::CutFrame;
use super::windows::{self, Reader};
use crate::metrics::priority_word;
use crate::peer::wire::Form;
use crate::source::ReadContext;
use crate::steps::StepKind;
use crate::store::{Committed, StoreError};

/// Decoding, checking and writing one frame. A disk that takes seconds is broken or drowned.
pub(crate) const WRITE_STEP: StepKind =
    StepKind::new("chunk write", std::time::Duration::from_secs(5));

/// What came of a chunk.
pub(super) type Decoded = (u32, Result<Committed, DecodeFailure>);

/// Why a chunk did not become present.
#[derive(Clone, Debug)]
pub(super) enum DecodeFailure {
    Corrupt(DecodeFrameError),
    /// It is right, and waits in memory: the store did not take it.
    NotKept(Arc<StoreError>),
    Store(Arc<StoreError>),
    /// Its window could not be had.
    Window(FetchFailure),
}

/// What came of the chunks of one frame.
pub(super) struct Unpacked {
    /// Bytes of the frame.
    pub(super) frame_bytes: usize,
    pub(super) chunks: Vec<Decoded>,
}

/// The output before a frame of gzip.
enum Window {
    /// Device bytes: they may be what a later frame copies from, too.
    Device(Bytes),
    /// As it is kept in the file of windows, where bytes that this frame does not copy are zeros.
    Thin(Vec<u8>),
}

impl Window {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Device(bytes) => bytes,
            Self::Thin(bytes) => bytes,
        }
    }
}

/// One frame to be decoded, and whom for.
#[derive(Debug)]
pub(super) struct Decode {
    pub(super) core: Arc<Core>,
    pub(super) layer: Arc<LayerHandle>,
    pub(super) transfer: Arc<Transfer>,
    pub(super) frame: CutFrame,
    /// The device bytes right before the frame, if they are being decoded.
    pub(super) before: Option<oneshot::Receiver<Bytes>>,
    /// Who waits for the last device bytes of this one.
    pub(super) tail: Option<oneshot::Sender<Bytes>>,
}

impl Decode {
    /// Decodes the frame and stores its chunks. Ends in any case: waits are those for the frame before, for
    /// a window (bounded by the source's time-out) and for a slot. **Cancel** safe, but for what is being written.
    pub(super) async fn run(mut self) -> Unpacked {
        let frame_bytes = self.frame.bytes.len();
        let restart = match self.restart().await {
            Ok(restart) => restart,
            Err(failure) => {
                let failed = |chunk: &Chunk| (chunk.ordinal, Err(failure.clone()));
                return Unpacked {
                    frame_bytes,
                    chunks: self.frame.chunks.iter().map(failed).collect(),
                };
            }
        };
        let core = Arc::clone(&self.core);
        let slot = core.decodes.take(&self.transfer.urgency).await;
        let done = tokio::task::spawn_blocking(move || self.unpack(restart.as_ref())).await;
        drop(slot);
        match done {
            Ok(chunks) => Unpacked {
                frame_bytes,
                chunks,
            },
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }

    /// What a frame of gzip begins with; `None` for other codecs, and where a member begins no window.
    async fn restart(&mut self) -> Result<Option<Restart>, DecodeFailure> {
        let Some(chunk) = self.frame.chunks.first().copied() else {
            return Ok(None);
        };
        if chunk.codec != Codec::Deflate {
            return Ok(None);
        }
        let restart = self.layer.chunks().restart(&chunk);
        let no_such = StoreError::NoSuchChunk {
            chunk: chunk.ordinal,
        };
        // Only of a mapped index that was damaged.
        let restart = restart.ok_or_else(|| DecodeFailure::Store(Arc::new(no_such)))?;
        let before = match self.before.take() {
            Some(before) => before.await.ok(),
            None => None,
        };
        match restart.state {
            RestartState::Member => Ok(Some(Restart::Member)),
            RestartState::Block { bits, window: None } => {
                let window = Window::Device(before.unwrap_or_default());
                Ok(Some(Restart::Block(bits, window)))
            }
            RestartState::Block {
                bits,
                window: Some(pin),
            } => {
                let needed = usize::try_from(pin.bytes).unwrap_or(usize::MAX);
                if let Some(bytes) = before.filter(|bytes| bytes.len() >= needed) {
                    return Ok(Some(Restart::Block(bits, Window::Device(bytes))));
                }
                let (device, start) =
                    (Arc::clone(&self.layer.device), windows::frame_start(&chunk));
                let reading = move || windows::of_device(&device, start, pin.bytes);
                // A panic of it is reported where it happens; the file of windows may do.
                let read = tokio::task::spawn_blocking(reading).await.ok().flatten();
                if let Some(bytes) = read {
                    return Ok(Some(Restart::Block(bits, Window::Device(bytes.into()))));
                }
                let reader = self.layer.window_reader(&self.core, &self.transfer);
                let window = self.layer.windows.get(&reader, &chunk, &pin).await;
                let window = window.map_err(DecodeFailure::Window)?;
                Ok(Some(Restart::Block(bits, Window::Thin(window))))
            }
        }
    }

    /// **Blocks**.
    fn unpack(mut self, restart: Option<&Restart>) -> Vec<Decoded> {
        let Some((first, last)) = self.frame.chunks.first().zip(self.frame.chunks.last()) else {
            return Vec::new();
        };
        let (key, ordinal) = (self.layer.key(), first.ordinal);
        let subject = std::fmt::from_fn(move |f| write!(f, "chunk {ordinal} of {key}"));
        let whom = priority_word(self.transfer.urgency.effective());
        let _step = self.core.metrics.steps().enter(WRITE_STEP, whom, subject);
        let spans = matches!(last.codec, Codec::Deflate | Codec::ZstdFrames);
        if !spans {
            let one = |chunk: &Chunk| {
                let bytes = decode_chunk(&self.frame.bytes, chunk);
                (
                    chunk.ordinal,
                    bytes
                        .map_err(DecodeFailure::Corrupt)
                        .and_then(|bytes| self.keep(chunk, bytes)),
                )
            };
            return self.frame.chunks.iter().map(one).collect();
        }
        let mut out = Vec::new();
        let at = restart.map(Restart::at);
        let failed = decompress_span_into(&self.frame.bytes, last, at, &mut out).err();
        let one = |chunk: &Chunk| {
            let bytes = match &failed {
                Some(error) => Err(error.clone()),
                None => part_of(&out, chunk),
            };
            let kept = bytes
                .map_err(DecodeFailure::Corrupt)
                .and_then(|bytes| self.keep(chunk, bytes));
            (chunk.ordinal, kept)
        };
        let chunks: Vec<Decoded> = self.frame.chunks.iter().map(one).collect();
        let corrupt = |it: &Decoded| matches!(it.1, Err(DecodeFailure::Corrupt(_)));
        if let Some(tail) = self.tail.take()
            && !chunks.iter().any(corrupt)
        {
            let before = match restart {
                Some(Restart::Block(_, Window::Device(bytes))) => &bytes[..],
                _ => &[],
            };
            // Nobody waits when the next frame is not wanted.
            let _ = tail.send(windows::tail_of(before, &out));
        }
        chunks
    }

    fn keep(&self, chunk: &Chunk, bytes: Vec<u8>) -> Result<Committed, DecodeFailure> {
        let kept = self.core.passing.keep(&self.layer.device, chunk, bytes)?;
        if let Some(peers) = self.core.peers()
            && let Some(form) = self.form_of(chunk)
        {
            // Other nodes will ask for it: it is passed on as it came.
            peers.frames.put(chunk.digest, form, &self.frame.bytes);
        }
        Ok(kept)
    }

    /// How the frame may be given to who wants the chunk; `None` when it would not do for that alone.
    fn form_of(&self, chunk: &Chunk) -> Option<Form> {
        match chunk.codec {
            Codec::Zstd => Some(Form::Frame),
            // Zstd frames of any kind: to the other node as if they had been made for the wire.
            // Those that a table of contents names may hold more than the chunk.
            Codec::ZstdFrames
                if self.layer.chunks().form() == DeviceForm::Tar
                    && self.layer.sharing(chunk.ordinal).len() == 1 =>
            {
                Some(Form::Zstd)
            }
            _ => None,
        }
    }
}

/// How a frame of gzip begins.
enum Restart {
    Member,
    Block(LeadingBits, Window),
}

impl Restart {
    fn at(&self) -> RestartAt<'_> {
        match self {
            Self::Member => RestartAt::Member,
            Self::Block(bits, window) => RestartAt::Block {
                bits: *bits,
                window: window.bytes(),
            },
        }
    }
}

/// The bytes of a chunk in the output of its frame, verified.
fn part_of(out: &[u8], chunk: &Chunk) -> Result<Vec<u8>, DecodeFrameError> {
    let skip = usize::try_from(chunk.skip_bytes).unwrap_or(usize::MAX);
    let length = usize::try_from(chunk.content_bytes()).unwrap_or(usize::MAX);
    let content = out.get(skip..).and_then(|rest| rest.get(..length));
    device_bytes_of(content.unwrap_or_default().to_vec(), chunk)
}

impl LayerHandle {
    /// Who reads windows of this layer for a transfer.
    pub(super) fn window_reader<'a>(&'a self, core: &'a Core, transfer: &Transfer) -> Reader<'a> {
        let context = ReadContext::new(transfer.urgency.effective());
        Reader {
            chunks: self.chunks(),
            metrics: &core.metrics,
            context: context.with_cancel(self.cancel.clone()),
            stall: core.options.stall,
        }
    }
}
