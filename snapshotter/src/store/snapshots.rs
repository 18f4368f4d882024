// SPDX-License-Identifier: Apache-2.0
//! Transactions on snapshots. Each follows the rules of containerd's metadata for snapshots:
//! which check comes first decides which error a caller sees, so their order is part of it.

use std::collections::BTreeSet;
use std::time::SystemTime;

use redb::{ReadTransaction, ReadableDatabase as _, ReadableTable, Table, WriteTransaction};
use sluice_blockindex::digest::ChainId;

use super::row::Row;
use super::tables::{CHILDREN, LAYERS, META, NEXT_ID, SNAPSHOTS, TARGETS};
use super::{MetadataStore, StoreError, layers};
use crate::snapshots::{Labels, LazyLayerRecord, SnapshotId, SnapshotKind, SnapshotRecord, Usage};

/// An active snapshot or a view to be stored.
#[derive(Debug, Clone)]
pub struct NewSnapshot {
    /// From [`MetadataStore::allocate_id`].
    pub id: SnapshotId,
    /// Key.
    pub key: String,
    /// [`SnapshotKind::Active`] or [`SnapshotKind::View`].
    pub kind: SnapshotKind,
    /// Name of the parent.
    pub parent: Option<String>,
    /// Labels as given.
    pub labels: Labels,
}

/// A committed snapshot that answers a Prepare for its chain ID.
#[derive(Debug, Clone)]
pub struct NewCommitted {
    /// From [`MetadataStore::allocate_id`].
    pub id: SnapshotId,
    /// Chain ID of the stack that ends with it.
    pub chain_id: ChainId,
    /// Name of the parent, exactly as the Prepare gave it.
    pub parent: Option<String>,
    /// Labels as given, `containerd.io/snapshot.ref` among them.
    pub labels: Labels,
    /// The layer, if it is lazy; else the directory is complete.
    pub layer: Option<LazyLayerRecord>,
    /// Resources of the directory; zero for a lazy one.
    pub usage: Usage,
}

/// Outcome of [`MetadataStore::adopt`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// The snapshot that answers.
    pub record: SnapshotRecord,
    /// Whether it was stored by this call, else it was there before.
    pub created: bool,
}

impl MetadataStore {
    /// The snapshot with this key or name.
    pub fn get(&self, name: &str) -> Result<SnapshotRecord, StoreError> {
        let transaction = self.database.begin_read()?;
        load(&transaction, name)?.ok_or_else(|| StoreError::NotFound { name: name.into() })
    }

    /// The committed snapshot that answers a Prepare for this chain ID on this parent.
    pub fn target(
        &self,
        chain_id: ChainId,
        parent: Option<&str>,
    ) -> Result<Option<SnapshotRecord>, StoreError> {
        let transaction = self.database.begin_read()?;
        let targets = transaction.open_table(TARGETS)?;
        let chain_id = chain_id.to_string();
        let Some(name) = targets.get((chain_id.as_str(), parent.unwrap_or("")))? else {
            return Ok(None);
        };
        let name = name.value().to_owned();
        match load(&transaction, &name)? {
            Some(record) => Ok(Some(record)),
            None => Err(StoreError::corrupt(
                name,
                "named by a target but not stored",
            )),
        }
    }

    /// The committed snapshot `name` and all below it, itself first; empty for `None`.
    ///
    /// **Errors**: [`StoreError::ParentNotFound`] and [`StoreError::ParentNotCommitted`] as for a
    /// parent in a Prepare.
    pub fn chain(&self, name: Option<&str>) -> Result<Vec<SnapshotRecord>, StoreError> {
        let transaction = self.database.begin_read()?;
        chain(&transaction, name)
    }

    /// An active snapshot or a view, and the chain it stands on, nearest parent first.
    pub fn with_chain(
        &self,
        key: &str,
    ) -> Result<(SnapshotRecord, Vec<SnapshotRecord>), StoreError> {
        let transaction = self.database.begin_read()?;
        let record =
            load(&transaction, key)?.ok_or_else(|| StoreError::NotFound { name: key.into() })?;
        let chain = chain(&transaction, record.parent.as_deref())?;
        Ok((record, chain))
    }

    /// All snapshots that the predicate accepts, ordered by name.
    pub fn list(
        &self,
        mut accept: impl FnMut(&SnapshotRecord) -> bool,
    ) -> Result<Vec<SnapshotRecord>, StoreError> {
        let transaction = self.database.begin_read()?;
        let (snapshots, layers) = (
            transaction.open_table(SNAPSHOTS)?,
            transaction.open_table(LAYERS)?,
        );
        let mut found = Vec::new();
        for entry in snapshots.iter()? {
            let (name, bytes) = entry?;
            let row = Row::decode(name.value(), bytes.value())?;
            let layer = layers::load(&layers, name.value(), &row)?;
            let record = row.into_record(name.value(), layer);
            if accept(&record) {
                found.push(record);
            }
        }
        Ok(found)
    }

    /// The ids of all snapshots, and whether each has a directory.
    pub fn ids(&self) -> Result<(BTreeSet<SnapshotId>, BTreeSet<SnapshotId>), StoreError> {
        let transaction = self.database.begin_read()?;
        let (mut with_directory, mut without) = (BTreeSet::new(), BTreeSet::new());
        for entry in transaction.open_table(SNAPSHOTS)?.iter()? {
            let (name, bytes) = entry?;
            let row = Row::decode(name.value(), bytes.value())?;
            if row.lazy {
                &mut without
            } else {
                &mut with_directory
            }
            .insert(row.id);
        }
        Ok((with_directory, without))
    }

    /// Stores an active snapshot or a view.
    pub fn create(&self, new: NewSnapshot) -> Result<SnapshotRecord, StoreError> {
        let transaction = self.write("create a snapshot")?;
        let record = {
            let mut snapshots = transaction.open_table(SNAPSHOTS)?;
            let parent_id = committed_parent(&snapshots, new.parent.as_deref())?;
            vacant(&snapshots, &new.key)?;
            let row = Row::new(new.id, new.kind, new.parent, new.labels, SystemTime::now());
            insert(&mut snapshots, &new.key, &row)?;
            link(&transaction, parent_id, new.id)?;
            row.into_record(&new.key, None)
        };
        transaction.commit()?;
        Ok(record)
    }

    /// Makes the active snapshot `key` the committed snapshot `name`. Labels are replaced.
    pub fn commit(
        &self,
        key: &str,
        name: &str,
        usage: Usage,
        labels: Labels,
    ) -> Result<SnapshotRecord, StoreError> {
        let transaction = self.write("commit a snapshot")?;
        let record = {
            let mut snapshots = transaction.open_table(SNAPSHOTS)?;
            vacant(&snapshots, name)?;
            let mut row =
                read(&snapshots, key)?.ok_or_else(|| StoreError::NotFound { name: key.into() })?;
            if row.kind != SnapshotKind::Active {
                return Err(StoreError::NotActive {
                    name: key.into(),
                    kind: row.kind,
                });
            }
            let now = SystemTime::now();
            row.kind = SnapshotKind::Committed;
            row.usage = usage;
            row.set_labels(labels, now);
            row.set_created(now);
            snapshots.remove(key)?;
            insert(&mut snapshots, name, &row)?;
            row.into_record(name, None)
        };
        transaction.commit()?;
        Ok(record)
    }

    /// Stores a committed snapshot that answers a Prepare, unless one for the same chain ID and
    /// parent exists: then that one answers and nothing changes.
    pub fn adopt(&self, new: NewCommitted) -> Result<Adopted, StoreError> {
        let transaction = self.write("adopt a snapshot")?;
        let chain_id = new.chain_id.to_string();
        let name = format!(
            "sluice/{}/{}",
            chain_id.trim_start_matches("sha256:"),
            new.id
        );
        let record = {
            let mut snapshots = transaction.open_table(SNAPSHOTS)?;
            let parent_id = committed_parent(&snapshots, new.parent.as_deref())?;
            let mut targets = transaction.open_table(TARGETS)?;
            let target = (chain_id.as_str(), new.parent.as_deref().unwrap_or(""));
            let existing = targets.get(target)?.map(|name| name.value().to_owned());
            if let Some(existing) = existing {
                let row = read(&snapshots, &existing)?
                    .ok_or_else(|| StoreError::corrupt(&existing, "target is not stored"))?;
                let layer = layers::load(&transaction.open_table(LAYERS)?, &existing, &row)?;
                return Ok(Adopted {
                    record: row.into_record(&existing, layer),
                    created: false,
                });
            }
            targets.insert(target, name.as_str())?;
            let committed = SnapshotKind::Committed;
            let mut row = Row::new(
                new.id,
                committed,
                new.parent.clone(),
                new.labels,
                SystemTime::now(),
            );
            row.usage = new.usage;
            row.lazy = new.layer.is_some();
            row.target = Some(chain_id.clone());
            vacant(&snapshots, &name)?;
            insert(&mut snapshots, &name, &row)?;
            link(&transaction, parent_id, new.id)?;
            if let Some(layer) = &new.layer {
                layers::insert(&transaction, new.id, &name, layer)?;
            }
            row.into_record(&name, new.layer)
        };
        transaction.commit()?;
        Ok(Adopted {
            record,
            created: true,
        })
    }

    /// Removes a snapshot that has no children; answers what it was. Its directory stays.
    pub fn remove(&self, name: &str) -> Result<SnapshotRecord, StoreError> {
        let transaction = self.write("remove a snapshot")?;
        let record = {
            let mut snapshots = transaction.open_table(SNAPSHOTS)?;
            let row = read(&snapshots, name)?
                .ok_or_else(|| StoreError::NotFound { name: name.into() })?;
            let mut children = transaction.open_table(CHILDREN)?;
            if children
                .range((row.id.0, 0)..=(row.id.0, u64::MAX))?
                .next()
                .is_some()
            {
                return Err(StoreError::HasChildren { name: name.into() });
            }
            if let Some(parent) = &row.parent {
                let parent = read(&snapshots, parent)?
                    .ok_or_else(|| StoreError::corrupt(name, "its parent is not stored"))?;
                children.remove((parent.id.0, row.id.0))?;
            }
            if let Some(chain_id) = &row.target {
                let parent = row.parent.as_deref().unwrap_or("");
                transaction
                    .open_table(TARGETS)?
                    .remove((chain_id.as_str(), parent))?;
            }
            let mut layers = transaction.open_table(LAYERS)?;
            let layer = layers::load(&layers, name, &row)?;
            layers.remove(row.id.0)?;
            snapshots.remove(name)?;
            row.into_record(name, layer)
        };
        transaction.commit()?;
        Ok(record)
    }

    /// Updates the labels that the mask names: `labels.<key>` one of them, `labels` all; an empty
    /// mask means all. An empty or missing value removes a label.
    ///
    /// **Errors**: [`StoreError::ImmutableField`] for any other path; nothing is changed then.
    pub fn update_labels(
        &self,
        name: &str,
        mut labels: Labels,
        mask: &[String],
    ) -> Result<SnapshotRecord, StoreError> {
        let transaction = self.write("update labels")?;
        let record = {
            let mut snapshots = transaction.open_table(SNAPSHOTS)?;
            let mut row = read(&snapshots, name)?
                .ok_or_else(|| StoreError::NotFound { name: name.into() })?;
            let mut updated = row.labels.clone();
            for path in mask {
                if let Some(key) = path.strip_prefix("labels.") {
                    updated.insert(key.into(), labels.get(key).cloned().unwrap_or_default());
                } else if path == "labels" {
                    updated = labels.clone();
                } else {
                    return Err(StoreError::ImmutableField {
                        name: name.into(),
                        field: path.clone(),
                    });
                }
            }
            if mask.is_empty() {
                updated = std::mem::take(&mut labels);
            }
            row.set_labels(updated, SystemTime::now());
            insert(&mut snapshots, name, &row)?;
            let layer = layers::load(&transaction.open_table(LAYERS)?, name, &row)?;
            row.into_record(name, layer)
        };
        transaction.commit()?;
        Ok(record)
    }
}

fn chain(
    transaction: &ReadTransaction,
    name: Option<&str>,
) -> Result<Vec<SnapshotRecord>, StoreError> {
    let mut chain: Vec<SnapshotRecord> = Vec::new();
    let mut next = name.map(str::to_owned);
    while let Some(name) = next {
        let record = load(transaction, &name)?.ok_or_else(|| StoreError::ParentNotFound {
            parent: name.clone(),
        })?;
        if record.kind != SnapshotKind::Committed {
            return Err(StoreError::ParentNotCommitted {
                parent: name,
                kind: record.kind,
            });
        }
        if chain.iter().any(|below| below.id == record.id) {
            return Err(StoreError::corrupt(name, "is its own ancestor"));
        }
        next = record.parent.clone();
        chain.push(record);
    }
    Ok(chain)
}

fn load(transaction: &ReadTransaction, name: &str) -> Result<Option<SnapshotRecord>, StoreError> {
    let Some(row) = read(&transaction.open_table(SNAPSHOTS)?, name)? else {
        return Ok(None);
    };
    let layer = layers::load(&transaction.open_table(LAYERS)?, name, &row)?;
    Ok(Some(row.into_record(name, layer)))
}

pub(super) fn read(
    snapshots: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &str,
) -> Result<Option<Row>, StoreError> {
    match snapshots.get(name)? {
        Some(bytes) => Row::decode(name, bytes.value()).map(Some),
        None => Ok(None),
    }
}

fn insert(
    snapshots: &mut Table<'_, &'static str, &'static [u8]>,
    name: &str,
    row: &Row,
) -> Result<(), StoreError> {
    snapshots.insert(name, row.encode(name)?.as_slice())?;
    Ok(())
}

fn vacant(
    snapshots: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &str,
) -> Result<(), StoreError> {
    match snapshots.get(name)? {
        Some(_) => Err(StoreError::AlreadyExists { name: name.into() }),
        None => Ok(()),
    }
}

/// The id of the parent, which must be committed; `None` if there is no parent.
fn committed_parent(
    snapshots: &impl ReadableTable<&'static str, &'static [u8]>,
    parent: Option<&str>,
) -> Result<Option<SnapshotId>, StoreError> {
    let Some(parent) = parent else {
        return Ok(None);
    };
    let row = read(snapshots, parent)?.ok_or_else(|| StoreError::ParentNotFound {
        parent: parent.into(),
    })?;
    if row.kind != SnapshotKind::Committed {
        return Err(StoreError::ParentNotCommitted {
            parent: parent.into(),
            kind: row.kind,
        });
    }
    Ok(Some(row.id))
}

/// Stores the parent relation, and that the id is used.
fn link(
    transaction: &WriteTransaction,
    parent: Option<SnapshotId>,
    child: SnapshotId,
) -> Result<(), StoreError> {
    if let Some(parent) = parent {
        transaction
            .open_table(CHILDREN)?
            .insert((parent.0, child.0), ())?;
    }
    let mut meta = transaction.open_table(META)?;
    let stored = meta.get(NEXT_ID)?.map_or(0, |value| value.value());
    meta.insert(NEXT_ID, stored.max(child.0.saturating_add(1)))?;
    Ok(())
}
