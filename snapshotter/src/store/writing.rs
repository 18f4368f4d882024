// SPDX-License-Identifier: Apache-2.0
//! A write transaction as a step that is watched: it waits for other writers, and for the disk.

use std::ops::Deref;
use std::time::Duration;

use redb::WriteTransaction;
use sluice_fetcher::steps::{StepGuard, StepKind};

use super::{MetadataStore, StoreError};

/// A transaction takes milliseconds, and one sync of the disk.
const WRITE_STEP: StepKind = StepKind::new("metadata write", Duration::from_secs(5));

/// An open write transaction; dropped, nothing of it is stored.
pub(super) struct Writing {
    transaction: WriteTransaction,
    _step: StepGuard,
}

impl MetadataStore {
    /// Begins a transaction, which is named after what it does.
    pub(super) fn write(&self, what: &'static str) -> Result<Writing, StoreError> {
        let step = self.steps.enter(WRITE_STEP, "sluiced", what);
        Ok(Writing {
            transaction: self.database.begin_write()?,
            _step: step,
        })
    }
}

impl Deref for Writing {
    type Target = WriteTransaction;

    fn deref(&self) -> &WriteTransaction {
        &self.transaction
    }
}

impl Writing {
    /// Stores it durably.
    pub(super) fn commit(self) -> Result<(), StoreError> {
        Ok(self.transaction.commit()?)
    }
}
