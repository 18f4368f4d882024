// SPDX-License-Identifier: Apache-2.0
//! Transactions on the layers of lazy snapshots.

use redb::{ReadableDatabase as _, ReadableTable, WriteTransaction};

use super::row::Row;
use super::tables::{LAYERS, SNAPSHOTS};
use super::{MetadataStore, StoreError, snapshots};
use crate::snapshots::{LazyLayerRecord, SnapshotId};

impl MetadataStore {
    /// All layers of lazy snapshots, with the ids of these.
    pub fn layers(&self) -> Result<Vec<(SnapshotId, LazyLayerRecord)>, StoreError> {
        let transaction = self.database.begin_read()?;
        let mut found = Vec::new();
        for entry in transaction.open_table(LAYERS)?.iter()? {
            let (id, bytes) = entry?;
            found.push((
                SnapshotId(id.value()),
                decode(&id.value().to_string(), bytes.value())?,
            ));
        }
        Ok(found)
    }

    /// Changes the layer of a lazy snapshot, if it still exists; answers whether it does. Nothing
    /// is written if nothing changes.
    pub fn update_layer(
        &self,
        name: &str,
        change: impl FnOnce(&mut LazyLayerRecord),
    ) -> Result<bool, StoreError> {
        let transaction = self.write("update a layer")?;
        {
            let Some(row) = snapshots::read(&transaction.open_table(SNAPSHOTS)?, name)? else {
                return Ok(false);
            };
            let before = load(&transaction.open_table(LAYERS)?, name, &row)?;
            let Some(before) = before else {
                return Ok(false);
            };
            let mut after = before.clone();
            change(&mut after);
            if after == before {
                return Ok(true);
            }
            insert(&transaction, row.id, name, &after)?;
        }
        transaction.commit()?;
        Ok(true)
    }
}

/// The layer of a row; `None` for an ordinary one.
pub(super) fn load(
    layers: &impl ReadableTable<u64, &'static [u8]>,
    name: &str,
    row: &Row,
) -> Result<Option<LazyLayerRecord>, StoreError> {
    if !row.lazy {
        return Ok(None);
    }
    match layers.get(row.id.0)? {
        Some(bytes) => decode(name, bytes.value()).map(Some),
        None => Err(StoreError::corrupt(name, "its layer is not stored")),
    }
}

pub(super) fn insert(
    transaction: &WriteTransaction,
    id: SnapshotId,
    name: &str,
    layer: &LazyLayerRecord,
) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(layer).map_err(|error| StoreError::corrupt(name, error))?;
    transaction
        .open_table(LAYERS)?
        .insert(id.0, bytes.as_slice())?;
    Ok(())
}

fn decode(name: &str, bytes: &[u8]) -> Result<LazyLayerRecord, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt(name, error))
}
