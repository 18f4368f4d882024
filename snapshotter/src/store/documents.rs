// SPDX-License-Identifier: Apache-2.0
//! Tables whose rows belong to the lazy side: any type that serde can write, by a text key.

use redb::{
    ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _, TableDefinition,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{MetadataStore, StoreError};

/// A table of documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DocumentTable {
    /// Images seen: their manifests, layers, references.
    Images,
    /// Why a layer was not made lazy, for `sluice why`.
    Decisions,
    /// What containers read while they start.
    BootLists,
    /// Images whose layers are kept from eviction.
    Pins,
    /// Where repositories were found.
    Places,
}

impl DocumentTable {
    pub(super) const ALL: [DocumentTable; 5] = [
        DocumentTable::Images,
        DocumentTable::Decisions,
        DocumentTable::BootLists,
        DocumentTable::Pins,
        DocumentTable::Places,
    ];

    pub(super) const fn definition(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        TableDefinition::new(match self {
            DocumentTable::Images => "images",
            DocumentTable::Decisions => "decisions",
            DocumentTable::BootLists => "boot_lists",
            DocumentTable::Pins => "pins",
            DocumentTable::Places => "places",
        })
    }
}

impl MetadataStore {
    /// Stores a document, replacing what the key had.
    pub fn put_document<T: Serialize>(
        &self,
        table: DocumentTable,
        key: &str,
        document: &T,
    ) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(document).map_err(|e| StoreError::corrupt(key, e))?;
        let transaction = self.write("store a document")?;
        transaction
            .open_table(table.definition())?
            .insert(key, bytes.as_slice())?;
        transaction.commit()?;
        Ok(())
    }

    /// Reads a document, changes it (`None`: there is none yet) and stores it (`None`: removes
    /// it), in one transaction. The change must not call the store again.
    pub fn change_document<T: Serialize + DeserializeOwned>(
        &self,
        table: DocumentTable,
        key: &str,
        change: impl FnOnce(Option<T>) -> Option<T>,
    ) -> Result<(), StoreError> {
        let transaction = self.write("change a document")?;
        {
            let mut rows = transaction.open_table(table.definition())?;
            let before = match rows.get(key)? {
                Some(bytes) => Some(decode(key, bytes.value())?),
                None => None,
            };
            match change(before) {
                Some(after) => {
                    let bytes =
                        serde_json::to_vec(&after).map_err(|e| StoreError::corrupt(key, e))?;
                    rows.insert(key, bytes.as_slice())?;
                }
                None => {
                    rows.remove(key)?;
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// The document with this key.
    pub fn document<T: DeserializeOwned>(
        &self,
        table: DocumentTable,
        key: &str,
    ) -> Result<Option<T>, StoreError> {
        let transaction = self.database.begin_read()?;
        match transaction.open_table(table.definition())?.get(key)? {
            Some(bytes) => decode(key, bytes.value()).map(Some),
            None => Ok(None),
        }
    }

    /// All documents of the table, ordered by key.
    pub fn documents<T: DeserializeOwned>(
        &self,
        table: DocumentTable,
    ) -> Result<Vec<(String, T)>, StoreError> {
        let transaction = self.database.begin_read()?;
        let mut found = Vec::new();
        for entry in transaction.open_table(table.definition())?.iter()? {
            let (key, bytes) = entry?;
            found.push((key.value().to_owned(), decode(key.value(), bytes.value())?));
        }
        Ok(found)
    }

    /// How many documents the table has.
    pub fn count_documents(&self, table: DocumentTable) -> Result<u64, StoreError> {
        let transaction = self.database.begin_read()?;
        Ok(transaction.open_table(table.definition())?.len()?)
    }

    /// Removes a document; answers whether it was there.
    pub fn remove_document(&self, table: DocumentTable, key: &str) -> Result<bool, StoreError> {
        let transaction = self.write("remove a document")?;
        let existed = transaction
            .open_table(table.definition())?
            .remove(key)?
            .is_some();
        transaction.commit()?;
        Ok(existed)
    }
}

fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt(key, error))
}
