// SPDX-License-Identifier: Apache-2.0
//! Checks the invariants of the whole metadata store.

use std::collections::{BTreeMap, BTreeSet};

use redb::{ReadableDatabase as _, ReadableTable as _};

use super::row::Row;
use super::tables::{CHILDREN, LAYERS, META, NEXT_ID, SNAPSHOTS, TARGETS};
use super::{MetadataStore, StoreError};
use crate::snapshots::SnapshotKind;

impl MetadataStore {
    /// Reads everything and checks the invariants in this module's parent.
    ///
    /// **Errors**: [`StoreError::Corrupt`] names the first row that breaks one.
    pub fn check(&self) -> Result<(), StoreError> {
        let transaction = self.database.begin_read()?;
        let mut rows = BTreeMap::new();
        for entry in transaction.open_table(SNAPSHOTS)?.iter()? {
            let (name, bytes) = entry?;
            rows.insert(
                name.value().to_owned(),
                Row::decode(name.value(), bytes.value())?,
            );
        }
        let next_id = transaction
            .open_table(META)?
            .get(NEXT_ID)?
            .map_or(0, |v| v.value());

        let (mut ids, mut lazy, mut links, mut targets) = (
            BTreeSet::new(),
            BTreeSet::new(),
            BTreeSet::new(),
            BTreeMap::new(),
        );
        for (name, row) in &rows {
            if !ids.insert(row.id.0) || row.id.0 >= next_id {
                return Err(StoreError::corrupt(
                    name,
                    format!("id {} is not its own", row.id),
                ));
            }
            if row.lazy {
                lazy.insert(row.id.0);
            }
            if (row.lazy || row.target.is_some()) && row.kind != SnapshotKind::Committed {
                return Err(StoreError::corrupt(name, "must be committed"));
            }
            if let Some(parent) = &row.parent {
                let parent = rows
                    .get(parent)
                    .filter(|parent| parent.kind == SnapshotKind::Committed)
                    .ok_or_else(|| StoreError::corrupt(name, "has no committed parent"))?;
                links.insert((parent.id.0, row.id.0));
            }
            let mut steps = 0;
            let mut above = row;
            while let Some(below) = above.parent.as_ref().and_then(|name| rows.get(name)) {
                above = below;
                steps += 1;
                if steps > rows.len() {
                    return Err(StoreError::corrupt(name, "is its own ancestor"));
                }
            }
            if let Some(chain_id) = &row.target {
                let key = (chain_id.clone(), row.parent.clone().unwrap_or_default());
                if targets.insert(key, name.clone()).is_some() {
                    return Err(StoreError::corrupt(
                        name,
                        "is not the only one for its chain",
                    ));
                }
            }
        }

        let mut stored_links = BTreeSet::new();
        for entry in transaction.open_table(CHILDREN)?.iter()? {
            stored_links.insert(entry?.0.value());
        }
        let mut stored_layers = BTreeSet::new();
        for entry in transaction.open_table(LAYERS)?.iter()? {
            stored_layers.insert(entry?.0.value());
        }
        let mut stored_targets = BTreeMap::new();
        for entry in transaction.open_table(TARGETS)?.iter()? {
            let (key, name) = entry?;
            let (chain_id, parent) = key.value();
            stored_targets.insert(
                (chain_id.to_owned(), parent.to_owned()),
                name.value().to_owned(),
            );
        }
        for (table, same) in [
            ("children", stored_links == links),
            ("layers", stored_layers == lazy),
            ("targets", stored_targets == targets),
        ] {
            if !same {
                return Err(StoreError::corrupt(table, "does not match the snapshots"));
            }
        }
        Ok(())
    }
}
