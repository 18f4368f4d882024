// SPDX-License-Identifier: Apache-2.0
//! Signatures are of digests, and a conversion changes digests: whoever converts a signed image is told so.

use std::sync::PoisonError;
use std::time::Duration;

use sluice_blockindex::digest::BlobDigest;

use super::Conversion;
use crate::image::Document;
use crate::report::Event;

/// Manifests that are looked up whether they are signed: each costs up to four requests, and an image has
/// seldom more platforms.
const SIGNED_MAX: usize = 16;

/// How long all of that may take: it is a hint, and the image is converted already.
const SIGNED_PATIENCE: Duration = Duration::from_secs(20);

/// A manifest or index at the source, and what it became.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Renamed {
    before: BlobDigest,
    now: BlobDigest,
}

impl Conversion {
    /// Takes note of what a manifest or index became.
    pub(super) fn rename(&self, before: &Document, now: &Document) {
        let (before, now) = (before.digest, now.digest);
        let mut renamed = self.renamed.lock().unwrap_or_else(PoisonError::into_inner);
        if before != now {
            renamed.push(Renamed { before, now });
        }
    }

    /// Says what was signed under its old digest. The index is made last, and is the likeliest.
    pub(super) async fn tell_signed(&self) {
        let asked = tokio::time::timeout(SIGNED_PATIENCE, self.ask_signers()).await;
        if asked.is_err() {
            let image = self.source.label();
            tracing::warn!(
                image,
                "the registry does not say whether the image is signed"
            );
        }
    }

    async fn ask_signers(&self) {
        let renamed: Vec<Renamed> = {
            let renamed = self.renamed.lock().unwrap_or_else(PoisonError::into_inner);
            renamed.iter().rev().take(SIGNED_MAX).copied().collect()
        };
        for Renamed { before, now } in renamed {
            let signers = self.source.signers(before).await;
            if !signers.is_empty() {
                self.reporter.event(&Event::Signed {
                    image: self.source.label().to_owned(),
                    manifest: before.to_string(),
                    signers,
                    destination: self.destination.label().to_owned(),
                    digest: now.to_string(),
                });
            }
        }
    }
}
