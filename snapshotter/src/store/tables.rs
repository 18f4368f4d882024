// SPDX-License-Identifier: Apache-2.0
//! The tables of the metadata store. Names and types are format: see `docs/formats/metadata.md`.

use redb::{TableDefinition, WriteTransaction};

use super::StoreError;

/// Counters and the schema version.
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Name -> encoded row.
pub(super) const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
/// (id of the parent, id of the child).
pub(super) const CHILDREN: TableDefinition<'_, (u64, u64), ()> = TableDefinition::new("children");
/// (chain ID, name of the parent or empty) -> name of the snapshot that answers a Prepare for it.
pub(super) const TARGETS: TableDefinition<'_, (&str, &str), &str> = TableDefinition::new("targets");
/// Id of a lazy snapshot -> encoded layer record.
pub(super) const LAYERS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("layers");

/// Row of [`META`]: version of the schema.
pub(super) const VERSION: &str = "version";
/// Row of [`META`]: bits of features without which the file may not be written.
pub(super) const FEATURES_READ_ONLY: &str = "features.read_only";
/// Row of [`META`]: bits of features without which the file may not be read.
pub(super) const FEATURES_INCOMPATIBLE: &str = "features.incompatible";
/// Row of [`META`]: the lowest snapshot id that was never used.
pub(super) const NEXT_ID: &str = "next_id";

/// Makes every table exist, so that readers need not care.
pub(super) fn create(transaction: &WriteTransaction) -> Result<(), StoreError> {
    transaction.open_table(SNAPSHOTS)?;
    transaction.open_table(CHILDREN)?;
    transaction.open_table(TARGETS)?;
    transaction.open_table(LAYERS)?;
    for table in super::DocumentTable::ALL {
        transaction.open_table(table.definition())?;
    }
    Ok(())
}
