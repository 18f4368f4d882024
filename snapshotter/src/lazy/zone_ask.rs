// SPDX-License-Identifier: Apache-2.0
//! Asks the zone for the indexes of an image that this node has not seen, before its layers are decided.
//!
//! All layers at once, within half of what is left until the deadline: where nobody answers, the registry may still have
//! an artifact, and the ordinary pull must not begin late. What comes is kept in [`crate::node_indexes`], where the
//! decision of each layer finds it; what does not come is as if nobody had it.

use std::sync::Arc;

use tokio::time::Instant;

use super::Inner;
use super::unmodified::unmarked;
use crate::config::IndexUse;
use crate::plan::Layout;
use crate::zone_indexes::WantedBlob;

impl Inner {
    /// Brings the indexes that other nodes have of layers that the manifest says nothing about.
    pub(super) async fn bring_indexes(self: &Arc<Self>, layout: &Layout, deadline: Instant) {
        let zone = &self.parts.zone_indexes;
        let trusted = || {
            let mut places = layout.origins.iter();
            places.any(|place| self.options.trust.allows(place))
        };
        if self.options.index_use.node != IndexUse::On || !zone.has_peers() || !trusted() {
            return;
        }
        let wanted =
            unmarked(layout, self.options.index_use).map(|(blob, bytes, diff_id)| WantedBlob {
                blob,
                expected: Some((diff_id, bytes)),
            });
        let fit = |wanted: &WantedBlob| self.index_jobs.unfit(wanted.blob).is_none();
        let wanted: Vec<WantedBlob> = wanted.filter(fit).collect();
        let lacking = self.blocking(move |inner| {
            let lacks = |it: &WantedBlob| !inner.has_usable_index(it.blob);
            wanted.into_iter().filter(lacks).collect::<Vec<_>>()
        });
        let lacking = lacking.await;
        if lacking.is_empty() {
            return;
        }
        let half = deadline.saturating_duration_since(Instant::now()) / 2;
        let until = Instant::now() + half;
        let bring = |wanted: WantedBlob| async move {
            let brought = tokio::time::timeout_at(until, zone.bring(wanted)).await;
            brought.unwrap_or_else(|_| {
                zone.was_late();
                false
            })
        };
        let asked = lacking.len();
        let brought = futures::future::join_all(lacking.into_iter().map(bring)).await;
        let count = brought.iter().filter(|brought| **brought).count();
        if count > 0 {
            tracing::info!(
                count,
                lacking = asked,
                "other nodes gave indexes of an image"
            );
        }
    }
}
