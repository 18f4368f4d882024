// SPDX-License-Identifier: Apache-2.0
//! Several sources of one blob, asked in order.

use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::{BlobSource, BlobStream, Class, ReadContext, SourceError, SourceKind};

/// Asks its sources in order until one opens. The list can grow while it is in use.
///
/// Only the opening moves on to the next source; put a [`super::RetrySource`] around it to have a
/// broken stream resumed from whichever source opens then.
#[derive(Debug, Default)]
pub struct TieredSource {
    sources: RwLock<Vec<Arc<dyn BlobSource>>>,
}

impl TieredSource {
    /// Nearest source first.
    pub fn new(sources: Vec<Arc<dyn BlobSource>>) -> Self {
        TieredSource {
            sources: RwLock::new(sources),
        }
    }

    /// Adds a source behind those of the same or a nearer kind.
    pub fn add(&self, source: Arc<dyn BlobSource>) {
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        let at = sources.partition_point(|present| present.kind() <= source.kind());
        sources.insert(at, source);
    }

    fn list(&self) -> Vec<Arc<dyn BlobSource>> {
        self.sources
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

#[async_trait]
impl BlobSource for TieredSource {
    fn label(&self) -> &str {
        "tiered"
    }

    /// The kind of its farthest source: what a read may cost at worst.
    fn kind(&self) -> SourceKind {
        self.list()
            .iter()
            .map(|source| source.kind())
            .max()
            .unwrap_or(SourceKind::Origin)
    }

    fn whole_blob_only(&self) -> bool {
        let sources = self.list();
        !sources.is_empty() && sources.iter().all(|source| source.whole_blob_only())
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        let mut worst = None;
        for source in self.list() {
            match source.open(context, extent).await {
                Ok(stream) => return Ok(stream),
                Err(error) if error.class() == Class::Cancelled => return Err(error),
                Err(error) => {
                    tracing::debug!(source = source.label(), %error, "source failed, try the next");
                    worst = Some(more_telling(worst, error));
                }
            }
        }
        Err(worst.unwrap_or(SourceError::NoSource {
            blob: "this blob".into(),
        }))
    }
}

/// Of the failures of several sources, the one a caller should act on: one that may pass (so that it
/// is tried again), else the first.
pub(super) fn more_telling(present: Option<SourceError>, new: SourceError) -> SourceError {
    match present {
        Some(present) if present.class() == Class::Transient || new.class() != Class::Transient => {
            present
        }
        _ => new,
    }
}
