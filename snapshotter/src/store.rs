// SPDX-License-Identifier: Apache-2.0
//! The metadata store: snapshots, lazy layers and documents of the lazy side, in one redb file.
//!
//! Every method is one short transaction on the calling thread: it may wait for the disk and for
//! other writers, so async code calls it on a blocking thread. No method calls out while its
//! transaction is open, so a transaction never spans I/O on snapshots, an RPC or a mount. Writers
//! are serialised by redb; readers see the last commit and never wait for a writer. Every commit
//! is durable when the method returns.
//!
//! **Invariants** (checked by [`MetadataStore::check`]): a parent exists, is committed and does
//! not form a cycle; the children table holds exactly the parent relation; the targets table
//! points to committed snapshots with that chain ID and parent; a layer row exists exactly for
//! lazy snapshots; ids are unique and below the stored counter.
//!
//! **After a crash**: a transaction is there wholly or not at all. After an I/O error redb refuses
//! further writes until the daemon is started again.
//!
//! The encoding is in `docs/formats/metadata.md`.

mod check;
mod documents;
mod error;
mod layers;
mod migrate;
mod row;
mod snapshots;
mod tables;
mod writing;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod migrate_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use redb::{Builder, Database, ReadableDatabase as _, ReadableTable as _};

pub use documents::DocumentTable;
pub use error::{ErrorClass, StoreError};
pub use snapshots::{Adopted, NewCommitted, NewSnapshot};

use sluice_fetcher::steps::Steps;

use crate::snapshots::SnapshotId;
use tables::{FEATURES_INCOMPATIBLE, FEATURES_READ_ONLY, META, NEXT_ID, VERSION};

/// Version of the schema that this code reads and writes.
pub const SCHEMA_VERSION: u64 = 1;

/// redb's page cache. The default of 1 GiB is for data; our metadata is a few megabytes.
const CACHE_BYTES: usize = 16 << 20;

/// The metadata store of one root directory.
#[derive(Debug)]
pub struct MetadataStore {
    database: Database,
    next_id: AtomicU64,
    steps: Steps,
}

impl MetadataStore {
    /// Opens the store in this file, creating it if there is none, and brings one of an older version to the
    /// present one ([`migrate`]).
    ///
    /// **Errors**: [`StoreError::Schema`] for a file of a later version, which is left as it is;
    /// [`StoreError::Redb`] also when another process has the file open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_by(path, migrate::STEPS)
    }

    /// As [`Self::open`], by these steps.
    fn open_by(path: &Path, steps: &[migrate::Change]) -> Result<Self, StoreError> {
        if !path.exists() {
            // redb's first writes are not atomic: after a crash amid them the file has no header
            // and is refused for ever. So the file appears under its name when it is complete.
            let unnamed = path.with_extension("new");
            match std::fs::remove_file(&unnamed) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => drop(Self::start(Builder::new().create(&unnamed)?, steps)?),
            }
            std::fs::rename(&unnamed, path)?;
            if let Some(directory) = path.parent() {
                File::open(directory)?.sync_all()?;
            }
        }
        let open = || Builder::new().set_cache_size(CACHE_BYTES).create(path);
        let mut database = open()?;
        if let Some(found) = version_of(&database)?
            && !migrate::needed(found, steps)?.is_empty()
        {
            // Closed, the file is whole.
            drop(database);
            let kept = migrate::keep_copy(path, found)?;
            tracing::info!(from = found, kept = %kept.display(), "bring metadata to the present version");
            database = open()?;
        }
        Self::start(database, steps)
    }

    /// Opens the store on another storage, for tests that cut the power.
    #[cfg(test)]
    fn open_on(backend: impl redb::StorageBackend) -> Result<Self, StoreError> {
        let database = Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create_with_backend(backend)?;
        Self::start(database, migrate::STEPS)
    }

    fn start(database: Database, steps: &[migrate::Change]) -> Result<Self, StoreError> {
        let present = migrate::version_after(steps);
        let transaction = database.begin_write()?;
        let next_id = {
            let mut meta = transaction.open_table(META)?;
            let read = |key: &str| -> Result<Option<u64>, StoreError> {
                Ok(meta.get(key)?.map(|value| value.value()))
            };
            let (version, next_id) = (read(VERSION)?, read(NEXT_ID)?.unwrap_or(1));
            // No version knows feature bits yet; one that forbids writing is as bad as one that
            // forbids reading, because the daemon cannot run without writing.
            let unknown =
                read(FEATURES_INCOMPATIBLE)?.unwrap_or(0) | read(FEATURES_READ_ONLY)?.unwrap_or(0);
            let found = version.unwrap_or(present);
            let needed = migrate::needed(found, steps)?;
            if unknown != 0 {
                return Err(StoreError::Schema {
                    found,
                    features: unknown,
                });
            }
            needed.iter().try_for_each(|step| step(&transaction))?;
            if version != Some(present) {
                meta.insert(VERSION, present)?;
                meta.insert(NEXT_ID, next_id)?;
            }
            next_id
        };
        tables::create(&transaction)?;
        transaction.commit()?;
        Ok(Self {
            database,
            next_id: AtomicU64::new(next_id),
            steps: Steps::new(),
        })
    }

    /// Has its writes entered into these steps, which somebody watches.
    #[must_use]
    pub fn watched_by(self, steps: Steps) -> Self {
        Self { steps, ..self }
    }

    /// A number that no snapshot has or had. It becomes durable with the snapshot that uses it.
    pub fn allocate_id(&self) -> SnapshotId {
        SnapshotId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Makes [`MetadataStore::allocate_id`] skip all numbers up to this one: a directory of that
    /// name was found that no row knows.
    pub fn reserve_ids_through(&self, id: SnapshotId) {
        self.next_id
            .fetch_max(id.0.saturating_add(1), Ordering::Relaxed);
    }
}

/// The version of a file; `None` of one that is new.
fn version_of(database: &Database) -> Result<Option<u64>, StoreError> {
    match database.begin_read()?.open_table(META) {
        Ok(meta) => Ok(meta.get(VERSION)?.map(|version| version.value())),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
