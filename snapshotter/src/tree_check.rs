// SPDX-License-Identifier: Apache-2.0
//! The tree of an index that another node made, or that was pushed beside an image, held against the layer's bytes.
//!
//! Until a layer is complete its names, modes and owners are those of the index, whoever made it. When it is sealed its
//! bytes are read once anyway: what the tar says must be that tree, or the seal fails and nothing of the layer can be read
//! any more. The index is dropped then, not taken again, and the node that gave it is left alone.

use std::sync::Arc;

use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::indexer::{TreeFault, TreeProof};
use sluice_fetcher::store::{DeviceKey, Objection, SealWitness, Witnesses};

use crate::indexes::IndexFiles;
use crate::zone_indexes::ZoneIndexes;

/// The witness of the seals of one layer.
#[derive(Debug)]
pub(crate) struct TreeCheck {
    /// The layer.
    pub(crate) key: DeviceKey,
    /// The blob that its index is of.
    pub(crate) blob: BlobDigest,
    /// Where the index is.
    pub(crate) indexes: Arc<IndexFiles>,
    /// Who is told of one that is wrong.
    pub(crate) zone: Option<Arc<ZoneIndexes>>,
}

impl Witnesses for TreeCheck {
    fn witness(self: Arc<Self>) -> Box<dyn SealWitness> {
        Box::new(Reading {
            check: self,
            proof: TreeProof::default(),
        })
    }
}

struct Reading {
    check: Arc<TreeCheck>,
    proof: TreeProof,
}

impl SealWitness for Reading {
    fn push(&mut self, bytes: &[u8]) {
        self.proof.push(bytes);
    }

    fn finish(self: Box<Self>) -> Result<(), Objection> {
        let TreeCheck {
            key,
            blob,
            indexes,
            zone,
        } = &*self.check;
        let unknown = |error: &dyn std::fmt::Display| Objection::Unknown(error.to_string());
        let index = indexes.get(key.index).map_err(|error| unknown(&error))?;
        let index = index.ok_or_else(|| unknown(&"its index is gone"))?;
        let tree = index.tree().map_err(|error| unknown(&error))?;
        let result = self.proof.finish(tree, key.diff_id);
        index.source().release_pages();
        let fault = match result {
            Ok(()) => {
                zone.iter().for_each(|zone| zone.tree_was_right());
                return Ok(());
            }
            // Rot in the index, not in what was said of the layer.
            Err(fault @ TreeFault::Tree(_)) => return Err(unknown(&fault)),
            Err(fault) => fault,
        };
        zone.iter()
            .for_each(|zone| zone.tree_was_false(*blob, key.index));
        Err(Objection::Forged(fault.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::IndexUse;
    use crate::disk::DiskReserve;
    use crate::indexes::{IndexPin, PinnedBlob};
    use crate::node_indexes::NodeIndexes;
    use crate::zone_indexes::ZoneIndexMetrics;
    use sluice_blockindex::indexer::{IndexOptions, index_blob};

    fn tar_of(name: &str) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(4);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, name, &b"text"[..])
            .unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn an_index_with_another_tree_than_its_bytes_is_dropped_and_not_taken_again() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let tar = tar_of("file");
        let made = index_blob(&tar, IndexOptions::default()).unwrap();
        let built = made.index.unwrap();
        let node_indexes = Arc::new(NodeIndexes::open(&at("node"), 1 << 20).unwrap());
        let keep = || node_indexes.keep_given(made.blob, &built.payload, None, "b");
        keep().unwrap();
        let indexes = Arc::new(IndexFiles::open(&at("indexes")).unwrap());
        let pin = IndexPin {
            digest: built.digest,
            diff_id: made.diff_id,
            blob_bytes: made.blob_bytes,
            blob: PinnedBlob::Either(made.blob),
        };
        indexes.put(&built.payload, &pin).unwrap();
        let zone = Arc::new(ZoneIndexes::new(
            Arc::clone(&node_indexes),
            None,
            IndexUse::On,
            DiskReserve::default(),
            ZoneIndexMetrics::default(),
        ));
        let check = Arc::new(TreeCheck {
            key: DeviceKey {
                diff_id: made.diff_id,
                index: built.digest,
            },
            blob: made.blob,
            indexes: Arc::clone(&indexes),
            zone: Some(Arc::clone(&zone)),
        });
        let verdict = |bytes: &[u8]| {
            let mut witness = Arc::clone(&check).witness();
            bytes.chunks(100).for_each(|part| witness.push(part));
            witness.finish()
        };
        assert!(verdict(&tar).is_ok());
        assert!(node_indexes.has(made.blob) && !zone.is_forged(built.digest));
        // The same size, another name.
        let forged = verdict(&tar_of("fiLe"));
        assert!(matches!(forged, Err(Objection::Forged(_))), "{forged:?}");
        assert!(!node_indexes.has(made.blob) && zone.is_forged(built.digest));
        // What cannot be looked at proves nothing.
        std::fs::remove_file(indexes.path(built.digest)).unwrap();
        let unknown = verdict(&tar);
        assert!(matches!(unknown, Err(Objection::Unknown(_))), "{unknown:?}");
    }
}
