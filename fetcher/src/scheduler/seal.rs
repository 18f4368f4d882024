// SPDX-License-Identifier: Apache-2.0
//! Reading whole devices, to seal or to audit them: one at a time, on a thread of its own, never while a reader is
//! receiving, and slowly while others wait for a processor: hashing takes one as a whole.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::pressure::Courtesy;
use super::{Fetcher, LayerHandle};
use crate::metrics::FROM_STORE;
use crate::source::Priority;
use crate::steps::StepKind;
use crate::store::{Audit, Device, OnRot, SealStep, StoreError, Witnesses};

/// How long such work looks away while a reader is receiving.
const SEAL_NAP: Duration = Duration::from_millis(2);

/// The next megabyte of a device, and the syncs of a seal: they wait for all writes of a disk.
const READ_STEP: StepKind = StepKind::new("seal or audit", Duration::from_secs(60));

impl Fetcher {
    /// Hashes a complete layer and records that it is what its diff ID says. Runs on a thread of its
    /// own, one layer at a time, and stands still while readers are receiving.
    ///
    /// **Errors** those of [`crate::store::Device::seal`]. **Cancel** the hashing stops.
    pub async fn seal(&self, layer: &Arc<LayerHandle>) -> Result<(), StoreError> {
        if layer.device.is_sealed() {
            return Ok(());
        }
        let witnesses = layer.witnesses.clone();
        let result = self
            .undisturbing(layer, move |device, step| {
                device.seal_before(witnesses.map(Witnesses::witness), step)
            })
            .await;
        match &result {
            Ok(()) => {
                self.core.metrics.sealed(true);
                layer.drop_twin();
            }
            Err(StoreError::Failed(_)) => self.core.metrics.sealed(false),
            Err(StoreError::Rotten { rotten_chunks }) => {
                (0..*rotten_chunks).for_each(|_| self.core.metrics.corrupt(FROM_STORE));
            }
            Err(_) => {}
        }
        result
    }

    /// Reads all that is present of a layer and compares it with the index. Runs on a thread of its own, one
    /// layer at a time and none beside a seal, and stands still while anything comes that somebody waits for.
    ///
    /// **Errors** those of [`crate::store::Device::audit`]. **Cancel** it stops before the next chunk.
    pub async fn audit(
        &self,
        layer: &Arc<LayerHandle>,
        on_rot: OnRot,
    ) -> Result<Audit, StoreError> {
        let audited = self
            .undisturbing(layer, move |device, step| device.audit(on_rot, step))
            .await;
        if let Ok(audit) = &audited {
            (0..audit.rotten.len()).for_each(|_| self.core.metrics.corrupt(FROM_STORE));
            if audit.dropped || audit.other_diff_id.is_some() {
                self.drop_twins_of(&layer.key());
            }
        }
        audited
    }

    /// Runs long work on a device on a thread of its own, one at a time; it stands still while readers are
    /// receiving, and slows down to a ninth while others wait for a processor. **Cancel** it stops at its next step.
    async fn undisturbing<T: Send + 'static>(
        &self,
        layer: &Arc<LayerHandle>,
        work: impl FnOnce(&Device, &mut dyn FnMut() -> SealStep) -> Result<T, StoreError>
        + Send
        + 'static,
    ) -> Result<T, StoreError> {
        let stop = layer.cancel.child_token();
        // Dropped when the caller goes away: then the thread stops at its next step.
        let _guard = stop.clone().drop_guard();
        let _permit = tokio::select! {
            permit = self.core.sealing.acquire() => permit.map_err(|_| StoreError::Stopped)?,
            () = stop.cancelled() => return Err(StoreError::Cancelled),
        };
        let (core, device) = (Arc::clone(&self.core), Arc::clone(&layer.device));
        let token = stop.clone();
        let work = self.core.tasks.spawn_blocking(move || {
            let key = device.key();
            let step = core.metrics.steps().enter(READ_STEP, "background", key);
            let mut courtesy = Courtesy::new(Instant::now());
            work(&device, &mut || {
                step.rest();
                while !token.is_cancelled() {
                    let nap = if core.gate.may_run(Priority::Boot) {
                        let now = Instant::now();
                        courtesy.rest(now, core.pressure.is_high(now))
                    } else {
                        Some(SEAL_NAP)
                    };
                    let Some(nap) = nap else { break };
                    std::thread::sleep(nap);
                }
                step.begin();
                if token.is_cancelled() {
                    SealStep::Cancel
                } else {
                    SealStep::Continue
                }
            })
        });
        work.await.map_err(|_| StoreError::Cancelled)?
    }
}
