// SPDX-License-Identifier: Apache-2.0
//! Unpacking a layer that cannot be lazy but has lazy layers above it.
//!
//! If such a layer were left to containerd, containerd would download every layer above it as well.
//! So the blob is fetched whole, decompressed into an unnamed temporary file (the tar), checked
//! against blob digest and diff ID, scanned into a tree by the same scanner that makes indexes, and
//! the tree is made real in the snapshot's directory: one code path decides what a tar means. A GNU
//! or PAX sparse file, which the scanner refuses because it is no single run, is first written out in
//! full into a second temporary file ([`sparse`]).
//!
//! Nothing is visible before digests are verified. A crash leaves an unnamed file, which the kernel
//! frees, and a directory that its owner throws away. Works on blocking threads; the fetch side hands
//! over pieces through a bounded queue.

mod materialise;
mod sparse;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use sha2::{Digest as _, Sha256};
use sluice_blockindex::digest::{BlobDigest, DiffId};
use sluice_blockindex::extent::Extent;
use sluice_blockindex::tar::{NotLazy, ScanError, Scanner};
use sluice_blockindex::tree::Tree;
use sluice_fetcher::source::{BlobSource, ReadContext, SourceError};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::below::Below;

pub use materialise::MaterialiseError;

/// Pieces that wait between network and decompression; each is about 16-64 KiB.
const QUEUE_PIECES: usize = 64;
/// Bytes read from the tar at once.
const BUFFER_BYTES: usize = 256 << 10;
/// A layer whose tar is larger than this is left to containerd: it could not be fetched within a
/// Prepare's budget anyway, and the temporary file would fill the disk.
const TAR_CAP_BYTES: u64 = 16 << 30;

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerUnpackError {
    /// The blob could not be fetched.
    #[error("fetch blob: {0}")]
    Source(#[from] SourceError),
    /// The bytes are not the blob that the manifest names.
    #[error("blob has digest {actual}, want {expected}")]
    Blob {
        /// In the manifest.
        expected: BlobDigest,
        /// Of the bytes that came.
        actual: BlobDigest,
    },
    /// The tar is not the one that the image config names.
    #[error("layer has diff ID {actual}, want {expected}")]
    Diff {
        /// In the config.
        expected: DiffId,
        /// Of the tar.
        actual: DiffId,
    },
    /// The blob's compression is not known.
    #[error("blob of media type {0:?} begins like no known compression")]
    Compression(String),
    /// The tar is too large.
    #[error("the layer is larger than {0} bytes")]
    TooLarge(u64),
    /// The tar is malformed, or means what cannot be unpacked.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The tree could not be made real.
    #[error(transparent)]
    Materialise(#[from] MaterialiseError),
    /// A temporary file failed.
    #[error("{what}: {source}")]
    Io {
        /// In the present tense.
        what: &'static str,
        /// How it failed.
        source: io::Error,
    },
    /// The work was called off.
    #[error("cancelled")]
    Cancelled,
}

impl LayerUnpackError {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// How long blocking work may go on.
#[derive(Clone, Debug, Default)]
struct Until {
    cancel: CancellationToken,
    deadline: Option<Instant>,
}

impl Until {
    fn check(&self) -> Result<(), LayerUnpackError> {
        let late = self.deadline.is_some_and(|at| Instant::now() >= at);
        if late || self.cancel.is_cancelled() {
            Err(LayerUnpackError::Cancelled)
        } else {
            Ok(())
        }
    }
}

/// A layer to unpack.
#[derive(Clone, Debug)]
pub struct LayerBlob {
    /// In the manifest.
    pub blob: BlobDigest,
    /// In the manifest.
    pub blob_bytes: u64,
    /// In the manifest; only for messages, the bytes say what they are.
    pub media_type: String,
    /// In the image config.
    pub diff_id: DiffId,
}

impl LayerBlob {
    /// Fetches and verifies the layer and gives its tar, scanned.
    ///
    /// `scratch` is a directory for unnamed files, on the file system of the snapshots.
    /// **Cancel** safe; blocking work ends at its next step, too, when the context is cancelled or its
    /// deadline has passed.
    pub async fn fetch(
        &self,
        source: Arc<dyn BlobSource>,
        context: ReadContext,
        scratch: &Path,
    ) -> Result<ScannedTar, LayerUnpackError> {
        let extent = Extent::new(0, self.blob_bytes).unwrap_or_else(Extent::empty);
        let (sender, receiver) = mpsc::channel(QUEUE_PIECES);
        let (blob, scratch) = (self.clone(), scratch.to_owned());
        let until = Until {
            cancel: context.cancel.clone(),
            deadline: context.deadline,
        };
        let work = tokio::task::spawn_blocking(move || {
            blob.decompress_and_scan(PieceReader::new(receiver), &scratch, &until)
        });
        let feed = async {
            let mut body = source.open(&context, extent).await?.narrow(extent)?.body;
            while let Some(piece) = body.next().await {
                // A closed queue means that the other side failed; it says why.
                if sender.send(Ok(piece?)).await.is_err() {
                    break;
                }
            }
            Ok::<_, SourceError>(())
        };
        let fed = feed.await;
        if let Err(error) = &fed {
            let error = io::Error::other(error.to_string());
            let _ = sender.send(Err(error)).await;
        }
        drop(sender);
        let scanned = work.await.map_err(|error| LayerUnpackError::Io {
            what: "run the unpacker",
            source: io::Error::other(error),
        })?;
        fed?;
        scanned
    }

    fn decompress_and_scan(
        &self,
        compressed: PieceReader,
        scratch: &Path,
        until: &Until,
    ) -> Result<ScannedTar, LayerUnpackError> {
        let mut tar = unnamed_file(scratch)?;
        let mut compressed = Hashing::new(compressed);
        let mut diff = Sha256::new();
        let mut scanner = Some(Scanner::new());
        let mut scanned: Option<ScanError> = None;
        let mut tar_bytes = 0u64;
        {
            let mut plain = self.decoder(&mut compressed)?;
            let mut buffer = vec![0; BUFFER_BYTES];
            loop {
                let count = plain
                    .read(&mut buffer)
                    .map_err(LayerUnpackError::io("decompress the layer"))?;
                // A few bytes of a blob may become gigabytes.
                until.check()?;
                if count == 0 {
                    break;
                }
                let bytes = &buffer[..count];
                diff.update(bytes);
                tar.write_all(bytes)
                    .map_err(LayerUnpackError::io("write the layer's tar"))?;
                tar_bytes += count as u64;
                if tar_bytes > TAR_CAP_BYTES {
                    return Err(LayerUnpackError::TooLarge(TAR_CAP_BYTES));
                }
                if let Some(running) = &mut scanner
                    && let Err(error) = running.push(bytes, &mut ())
                {
                    scanner = None;
                    scanned = Some(error);
                }
            }
        }
        // What follows the compressed data belongs to the blob, so to its digest.
        io::copy(&mut compressed, &mut io::sink())
            .map_err(LayerUnpackError::io("read the blob's end"))?;
        let actual = BlobDigest::from_bytes(compressed.hasher.finalize().into());
        if actual != self.blob {
            return Err(LayerUnpackError::Blob {
                expected: self.blob,
                actual,
            });
        }
        let actual = DiffId::from_bytes(diff.finalize().into());
        if actual != self.diff_id {
            return Err(LayerUnpackError::Diff {
                expected: self.diff_id,
                actual,
            });
        }
        match (scanner.map(Scanner::finish), scanned) {
            (Some(Ok(tree)), _) => Ok(ScannedTar { tree, tar }),
            (Some(Err(ScanError::NotLazy(NotLazy::Sparse { .. }))), _)
            | (None, Some(ScanError::NotLazy(NotLazy::Sparse { .. }))) => {
                let expanded = sparse::expand(&tar, unnamed_file(scratch)?, TAR_CAP_BYTES, until)?;
                let tree = scan(&expanded, until)?;
                Ok(ScannedTar {
                    tree,
                    tar: expanded,
                })
            }
            (Some(Err(error)), _) | (None, Some(error)) => Err(error.into()),
            (None, None) => Err(ScanError::Stopped.into()),
        }
    }

    fn decoder<'a>(
        &self,
        compressed: &'a mut Hashing,
    ) -> Result<Box<dyn Read + 'a>, LayerUnpackError> {
        let what = "read the blob's beginning";
        let head = compressed.peek().map_err(LayerUnpackError::io(what))?;
        const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
        let skippable =
            head.len() > 3 && head[0] & 0xf0 == 0x50 && head[1..4] == [0x2a, 0x4d, 0x18];
        if head.starts_with(ZSTD) || skippable {
            let decoder = zstd::stream::read::Decoder::new(compressed)
                .map_err(LayerUnpackError::io("start zstd"))?;
            return Ok(Box::new(decoder));
        }
        if head.starts_with(&[0x1f, 0x8b]) {
            return Ok(Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(
                compressed,
            ))));
        }
        let tar = head.get(257..262) == Some(b"ustar") || head.iter().all(|byte| *byte == 0);
        if tar || self.media_type.ends_with(".tar") {
            return Ok(Box::new(compressed));
        }
        Err(LayerUnpackError::Compression(self.media_type.clone()))
    }
}

/// A verified layer, ready to be made real.
#[derive(Debug)]
pub struct ScannedTar {
    tree: Tree,
    tar: File,
}

impl ScannedTar {
    /// Whether attributes of directories below are needed, besides those of the root, which has none of
    /// its own.
    #[must_use]
    pub fn has_implicit_directories(&self) -> bool {
        let mut pending = vec![self.tree.root()];
        while let Some(directory) = pending.pop() {
            for child in self.tree.children(directory).values() {
                let inode = self.tree.inode(*child);
                if inode.is_directory() {
                    if inode.implicit {
                        return true;
                    }
                    pending.push(*child);
                }
            }
        }
        false
    }

    /// Makes the tree real in an empty directory, as the lower directory of an overlay mount, and
    /// durable. Blocks.
    pub fn materialise(
        &self,
        directory: &Path,
        below: &Below<'_>,
        cancel: &CancellationToken,
    ) -> Result<(), LayerUnpackError> {
        materialise::materialise(&self.tree, &self.tar, directory, below, cancel)?;
        Ok(())
    }
}

/// Scans a whole tar from its beginning.
fn scan(tar: &File, until: &Until) -> Result<Tree, LayerUnpackError> {
    use std::os::unix::fs::FileExt as _;
    let mut scanner = Scanner::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut offset = 0;
    loop {
        let count = tar
            .read_at(&mut buffer, offset)
            .map_err(LayerUnpackError::io("read the layer's tar"))?;
        until.check()?;
        if count == 0 {
            return Ok(scanner.finish()?);
        }
        scanner.push(&buffer[..count], &mut ())?;
        offset += count as u64;
    }
}

fn unnamed_file(directory: &Path) -> Result<File, LayerUnpackError> {
    crate::durable::unnamed(directory).map_err(LayerUnpackError::io("create a temporary file"))
}

/// Reads pieces from a queue, on a blocking thread.
struct PieceReader {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl PieceReader {
    fn new(pieces: mpsc::Receiver<io::Result<Bytes>>) -> Self {
        Self {
            pieces,
            current: Bytes::new(),
        }
    }

    fn fill(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.current = piece?,
                None => break,
            }
        }
        Ok(&self.current)
    }
}

/// Hashes what is read through it; can look ahead.
struct Hashing {
    inner: PieceReader,
    hasher: Sha256,
}

/// Enough to see a tar's magic.
const PEEK_BYTES: usize = 512;

impl Hashing {
    fn new(inner: PieceReader) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
        }
    }

    fn peek(&mut self) -> io::Result<Bytes> {
        self.inner.fill()?;
        while self.inner.current.len() < PEEK_BYTES {
            let Some(next) = self.inner.pieces.blocking_recv() else {
                break;
            };
            self.inner.current = [&self.inner.current[..], &next?[..]].concat().into();
        }
        Ok(self
            .inner
            .current
            .slice(..self.inner.current.len().min(PEEK_BYTES)))
    }
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.inner.fill()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.hasher.update(&buffer[..count]);
        let _ = self.inner.current.split_to(count);
        Ok(count)
    }
}
