// SPDX-License-Identifier: Apache-2.0
//! Whether an image is lazy, layer by layer, and if not, why.

use std::collections::BTreeMap;

use sluice_blockindex::digest::ChainId;
use sluice_proto::control::{BootList, WhyLayer, WhyResponse};

use super::images::FoundManifest;
use super::{ControlError, ControlService};
use crate::lazy::{Decision, decision_key};
use crate::resolve::resolve_image;
use crate::snapshots::{LABEL_SNAPSHOT_REF, SnapshotKind, SnapshotRecord};
use crate::store::DocumentTable;

/// A snapshot whose Prepare had no `containerd.io/snapshot.ref`.
const NOT_ASKED: &str = "unpacked by a client that does not ask";
const NOT_UNPACKED: &str = "not unpacked for this snapshotter";
const NOT_REMEMBERED: &str = "ordinary; the reason is not remembered";

/// What is known of one layer in one namespace.
fn explain(record: Option<&SnapshotRecord>, decision: Option<&Decision>) -> (bool, String) {
    match (record, decision) {
        (None, Some(decision)) => (false, decision.reason.clone()),
        (None, None) => (false, NOT_UNPACKED.to_owned()),
        (
            Some(SnapshotRecord {
                layer: Some(layer), ..
            }),
            _,
        ) => (true, layer.index_source.described().to_owned()),
        (Some(record), _) if !record.labels.contains_key(LABEL_SNAPSHOT_REF) => {
            (false, NOT_ASKED.to_owned())
        }
        (Some(_), Some(decision)) if decision.unpacked => (
            false,
            format!(
                "{}; unpacked here for the lazy layers above it",
                decision.reason
            ),
        ),
        (Some(_), Some(decision)) => (false, decision.reason.clone()),
        (Some(_), None) => (false, NOT_REMEMBERED.to_owned()),
    }
}

/// Where the registry's part of a lazy layer is asked for first.
fn place_of(record: &SnapshotRecord) -> Option<String> {
    let place = record.layer.as_ref()?.sources.first()?;
    Some(place.to_string())
}

impl ControlService {
    pub(super) async fn why(
        &self,
        image: &str,
        namespace: &str,
    ) -> Result<WhyResponse, ControlError> {
        let found = self.find(image, namespace).await?;
        let mut seen = std::collections::BTreeSet::new();
        let (mut layers, mut boot_lists) = (Vec::new(), Vec::new());
        for manifest in found {
            let config = manifest.config()?;
            // An original and its converted twin share a config and so all chain IDs.
            if seen.insert((manifest.namespace.clone(), config)) {
                let (of_it, lists) = self.why_manifest(&manifest).await?;
                layers.extend(of_it);
                boot_lists.extend(lists);
            }
        }
        let lazy_layers = layers.iter().filter(|layer| layer.lazy).count();
        let lazy = !layers.is_empty() && lazy_layers == layers.len();
        let summary = match lazy {
            true => "lazy".to_owned(),
            false => format!("{lazy_layers} of {} layers are lazy", layers.len()),
        };
        Ok(WhyResponse {
            layers,
            lazy,
            summary,
            boot_lists,
        })
    }

    async fn why_manifest(
        &self,
        found: &FoundManifest,
    ) -> Result<(Vec<WhyLayer>, Vec<BootList>), ControlError> {
        let namespace = found.namespace.clone();
        let image = resolve_image(&*self.content, &namespace, found.config()?).await?;
        let chains = image.chain_ids.clone();
        let (records, decisions) = self
            .metadata(move |metadata| {
                let wanted = |record: &SnapshotRecord| {
                    record.kind == SnapshotKind::Committed
                        // A snapshot that answered a Prepare serves all namespaces.
                        && record.namespace().is_none_or(|its| its == namespace)
                        && record
                            .chain_id()
                            .is_some_and(|chain_id| chains.contains(&chain_id))
                };
                let mut records: BTreeMap<ChainId, SnapshotRecord> = BTreeMap::new();
                for record in metadata.list(wanted)? {
                    let Some(chain_id) = record.chain_id() else {
                        continue;
                    };
                    // The same chain may be there twice, on different parents; lazy counts.
                    let lazy = record.is_lazy();
                    if lazy || !records.contains_key(&chain_id) {
                        records.insert(chain_id, record);
                    }
                }
                let mut decisions: BTreeMap<ChainId, Decision> = BTreeMap::new();
                for chain_id in &chains {
                    let key = decision_key(&namespace, *chain_id);
                    if let Some(decision) = metadata.document(DocumentTable::Decisions, &key)? {
                        decisions.insert(*chain_id, decision);
                    }
                }
                Ok((records, decisions))
            })
            .await?;
        let record_of = |chain_id: &ChainId| records.get(chain_id)?.layer.as_ref();
        let lists = self.boot_lists(image.chain_ids.iter().map(record_of)).await;
        let layers = image.chain_ids.iter().zip(&image.diff_ids);
        let layers = layers
            .map(|(chain_id, diff_id)| {
                let record = records.get(chain_id);
                let (lazy, reason) = explain(record, decisions.get(chain_id));
                WhyLayer {
                    namespace: found.namespace.clone(),
                    chain_id: chain_id.to_string(),
                    diff_id: diff_id.to_string(),
                    snapshot: record.map(|record| record.name.clone()).unwrap_or_default(),
                    lazy,
                    reason,
                    place: record.and_then(place_of).unwrap_or_default(),
                }
            })
            .collect();
        Ok((layers, lists))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshots::{SnapshotId, Usage};
    use std::time::SystemTime;

    fn record(label: bool) -> SnapshotRecord {
        SnapshotRecord {
            id: SnapshotId(1),
            name: "ns/1/x".into(),
            kind: SnapshotKind::Committed,
            parent: None,
            labels: label
                .then(|| (LABEL_SNAPSHOT_REF.to_owned(), "c".to_owned()))
                .into_iter()
                .collect(),
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
            usage: Usage::default(),
            layer: None,
        }
    }

    #[test]
    fn every_case_has_its_words() {
        let decision = |unpacked| Decision {
            kind: "not_lazy".into(),
            reason: "sparse".into(),
            unpacked,
            at: 0,
        };
        let (asked, unasked) = (record(true), record(false));
        for (record, decision, reason) in [
            (None, None, NOT_UNPACKED),
            (Some(&unasked), None, NOT_ASKED),
            (Some(&unasked), Some(decision(false)), NOT_ASKED),
            (Some(&asked), None, NOT_REMEMBERED),
            (Some(&asked), Some(decision(false)), "sparse"),
            (
                Some(&asked),
                Some(decision(true)),
                "sparse; unpacked here for the lazy layers above it",
            ),
        ] {
            assert_eq!(
                explain(record, decision.as_ref()),
                (false, reason.to_owned())
            );
        }
    }
}
