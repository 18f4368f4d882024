// SPDX-License-Identifier: Apache-2.0
//! A blob in memory, for tests.

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::{BlobSource, BlobStream, ReadContext, SourceError, SourceKind};

/// Serves a blob from memory in pieces of a chosen size.
#[derive(Clone, Debug)]
pub struct MemorySource {
    blob: Bytes,
    piece_bytes: usize,
}

impl MemorySource {
    /// Serves `blob` in pieces of 64 KiB.
    pub fn new(blob: impl Into<Bytes>) -> Self {
        MemorySource {
            blob: blob.into(),
            piece_bytes: 64 * 1024,
        }
    }

    /// The same with pieces of `piece_bytes` (at least 1).
    #[must_use]
    pub fn with_pieces(mut self, piece_bytes: usize) -> Self {
        self.piece_bytes = piece_bytes.max(1);
        self
    }
}

#[async_trait]
impl BlobSource for MemorySource {
    fn label(&self) -> &str {
        "memory"
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Local
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        context.check()?;
        let bounds = usize::try_from(extent.start())
            .ok()
            .zip(usize::try_from(extent.end()).ok())
            .filter(|(_, end)| *end <= self.blob.len());
        let Some((start, end)) = bounds else {
            return Err(SourceError::BeyondEnd { asked: extent });
        };
        let state = (
            self.blob.slice(start..end),
            self.piece_bytes,
            context.clone(),
        );
        let body = stream::try_unfold(state, |(mut rest, piece_bytes, context)| async move {
            if rest.is_empty() {
                return Ok(None);
            }
            context.check()?;
            let piece = rest.split_to(piece_bytes.min(rest.len()));
            Ok(Some((piece, (rest, piece_bytes, context))))
        });
        Ok(BlobStream::new(extent, body))
    }
}
