// SPDX-License-Identifier: Apache-2.0
//! Who waits for a prewarm: when the last one goes away, so does the work.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use tokio::sync::watch;

use super::{Inner, JobKey, Progress};

/// Who watches hears of the work this often even if nothing changes: silence would look like a hang.
const BEAT: Duration = Duration::from_secs(10);
/// What is told is this far apart at least.
const PAUSE: Duration = Duration::from_millis(100);

/// A prewarm that is watched; dropped, it is not watched any more.
pub struct Watching {
    pub(super) inner: Arc<Inner>,
    pub(super) key: JobKey,
    pub(super) number: u64,
    pub(super) progress: watch::Receiver<Progress>,
}

impl fmt::Debug for Watching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (image, scope) = (&self.key.0, self.key.1);
        f.debug_struct("Watching")
            .field("image", image)
            .field("scope", &scope)
            .finish_non_exhaustive()
    }
}

impl Watching {
    /// How far it is; the last value has a last phase.
    pub fn progress(&mut self) -> &mut watch::Receiver<Progress> {
        &mut self.progress
    }

    /// How far it is whenever that changes, and every ten seconds, to the end. Dropped, it is not watched any
    /// more.
    pub fn told(mut self) -> impl Stream<Item = Progress> + Send + 'static {
        async_stream::stream! {
            loop {
                let now = self.progress.borrow_and_update().clone();
                let is_last = now.phase.is_last();
                yield now;
                if is_last {
                    return;
                }
                tokio::time::sleep(PAUSE).await;
                let changed = tokio::time::timeout(BEAT, self.progress.changed()).await;
                if let Ok(Err(_)) = changed {
                    // It ended without a last word: the stream does so, too.
                    return;
                }
            }
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut jobs = self.inner.jobs();
        let job = jobs.table.get_mut(&self.key);
        if let Some(job) = job.filter(|job| job.number == self.number) {
            job.watchers -= 1;
            if job.watchers == 0 && !job.detached {
                job.cancel.cancel();
            }
        }
    }
}
