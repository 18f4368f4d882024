// SPDX-License-Identifier: Apache-2.0
//! The judgement on a blob: hashed as its pieces come, it becomes whole or goes.

use std::sync::Arc;

use sluice_blockindex::digest::BlobDigest;

use super::Shared;
use super::live::Live;
use super::table::Seat;
use crate::store::lock;

impl Shared {
    /// The blob cannot be kept: it goes, its readers are served past the cache.
    pub(super) fn broke(self: &Arc<Self>, live: &Arc<Live>) {
        live.broke();
        self.drop_blob(live);
    }

    fn drop_blob(self: &Arc<Self>, live: &Arc<Live>) {
        let (shared, blob) = (Arc::clone(self), live.blob);
        lock(&self.table).go(blob);
        self.tasks.spawn_blocking(move || {
            if let Err(error) = shared.files.remove(blob) {
                tracing::warn!(%blob, "failed to remove a blob: {error}");
            }
            lock(&shared.table).evicted(blob);
            shared.note_held();
        });
    }

    /// Goes on with the hash as far as pieces are here; at the end of the blob, judges it. The seat keeps
    /// the blob where it is meanwhile.
    pub(super) fn verify(self: &Arc<Self>, seat: &Arc<Seat>, live: &Arc<Live>) {
        let Some(mut verifying) = live.take_hashing() else {
            return;
        };
        let (shared, seat, live) = (Arc::clone(self), Arc::clone(seat), Arc::clone(live));
        self.tasks.spawn_blocking(move || {
            let _seat = seat;
            loop {
                match verifying.advance(&live) {
                    Ok(Some(actual)) => return shared.judge(&live, actual),
                    Ok(None) => live.put_hashing(verifying),
                    Err(error) => {
                        tracing::warn!(blob = %live.blob, "failed to read a kept blob: {error}");
                        return shared.broke(&live);
                    }
                }
                match live.take_hashing() {
                    Some(next) => verifying = next,
                    None => return,
                }
            }
        });
    }

    /// **Blocks**.
    fn judge(self: &Arc<Self>, live: &Arc<Live>, actual: BlobDigest) {
        // Before readers hear of it: who comes again must find it marked.
        if actual != live.blob {
            tracing::warn!(blob = %live.blob, %actual, "a blob has another digest, dropped");
            self.metrics.bad();
            let mut table = lock(&self.table);
            table.note_bad(live.blob);
            table.go(live.blob);
            drop(table);
            live.tell_on_nodes();
            live.judged(actual);
            self.drop_blob(live);
            return;
        }
        // Before the last bytes go out: a client that has all may ask again at once.
        match live.seal(&self.files) {
            Ok(()) => lock(&self.table).sealed(live.blob),
            Err(error) => {
                // It is whole for those who have it open, and is looked at again by the next.
                tracing::warn!(blob = %live.blob, "failed to keep a whole blob: {error}");
            }
        }
        live.judged(actual);
    }
}
