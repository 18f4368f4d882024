// SPDX-License-Identifier: Apache-2.0
//! Giving the indexes that are here to other nodes, from their files.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt as _;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::Extent;
use sluice_fetcher::peer::wire::{IndexSizes, OfferedIndex};
use sluice_fetcher::peer::{HeldIndex, IndexShelf, Refused};
use sluice_fetcher::source::{
    BlobSource, BlobStream, FileSource, Priority, ReadContext, SourceError,
};

use super::ZoneIndexes;
use crate::config::IndexUse;
use crate::node_indexes::IndexParts;

fn failed(error: impl std::fmt::Display) -> Refused {
    Refused::Failed(error.to_string())
}

async fn whole(file: &FileSource, bytes: u64) -> Result<BlobStream, SourceError> {
    let beyond = SourceError::BeyondEnd {
        asked: Extent::empty(),
    };
    let extent = Extent::new(0, bytes).ok_or(beyond)?;
    let context = ReadContext::new(Priority::Background);
    file.open(&context, extent).await
}

impl ZoneIndexes {
    /// Where the index of a blob is, and how much it is.
    pub(super) async fn parts_of(
        &self,
        blob: BlobDigest,
    ) -> io::Result<Option<(IndexParts, IndexSizes)>> {
        let indexes = Arc::clone(&self.node_indexes);
        let looked = tokio::task::spawn_blocking(move || {
            let Some(parts) = indexes.parts(blob)? else {
                return Ok(None);
            };
            let bytes = |path: &std::path::Path| path.metadata().map(|it| it.len());
            let sizes = IndexSizes {
                index_bytes: bytes(&parts.payload)?,
                windows_bytes: parts.windows.as_deref().map_or(Ok(0), bytes)?,
            };
            Ok(Some((parts, sizes)))
        });
        looked.await.map_err(io::Error::other)?
    }
}

#[async_trait]
impl IndexShelf for ZoneIndexes {
    async fn blob_index(&self, blob: BlobDigest) -> Result<HeldIndex, Refused> {
        if self.policy == IndexUse::Off {
            return Err(Refused::NotHere);
        }
        let found = self.parts_of(blob).await.map_err(failed)?;
        let (parts, sizes) = found.ok_or(Refused::NotHere)?;
        // Both are open before the first byte is sent: a trim takes names, and not what is being read.
        let opened = tokio::task::spawn_blocking(move || {
            let windows = parts.windows.as_deref().map(FileSource::open_path);
            Ok((FileSource::open_path(&parts.payload)?, windows.transpose()?))
        });
        let opened: Result<_, SourceError> = opened.await.map_err(failed)?;
        let (payload, windows) = opened.map_err(failed)?;
        let payload = whole(&payload, sizes.index_bytes).await.map_err(failed)?;
        let mut body = payload.body;
        if let Some(windows) = windows {
            let windows = whole(&windows, sizes.windows_bytes).await;
            body = body.chain(windows.map_err(failed)?.body).boxed();
        }
        Ok(HeldIndex { sizes, body })
    }

    async fn note_blob_index(&self, offered: OfferedIndex) -> Result<(), Refused> {
        if self.policy != IndexUse::On {
            let why = "[index] node is not \"on\"";
            return Err(Refused::NotAllowed(why.to_owned()));
        }
        // Full: the teller goes on without, and the index is made again where it is wanted.
        self.offers
            .try_send(offered)
            .map_err(|_| failed("too many indexes are waiting"))
    }
}
