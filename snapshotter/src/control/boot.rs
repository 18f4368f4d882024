// SPDX-License-Identifier: Apache-2.0
//! What is known of boot lists, for `sluice status`, `why` and `optimize`.

use sluice_blockindex::boot::BootKey;
use sluice_blockindex::digest::IndexDigest;
use sluice_proto::control as wire;
use sluice_proto::control::{LearnedBootListsRequest, LearnedBootListsResponse};

use super::{ControlError, ControlService};
use crate::boot::BootSummary;
use crate::snapshots::LazyLayerRecord;

/// The runs of an image, by what is known of its layers, lowest first; `None`: not lazy.
fn runs<'a>(
    layers: impl Iterator<Item = Option<&'a LazyLayerRecord>>,
) -> Vec<Vec<LazyLayerRecord>> {
    let mut runs: Vec<Vec<LazyLayerRecord>> = vec![Vec::new()];
    for layer in layers {
        match (layer, runs.last_mut()) {
            (Some(layer), Some(run)) => run.push(layer.clone()),
            (None, Some(run)) if !run.is_empty() => runs.push(Vec::new()),
            _ => {}
        }
    }
    runs.retain(|run| !run.is_empty());
    runs
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn to_wire(summary: BootSummary) -> wire::BootList {
    wire::BootList {
        chunks: number(summary.chunks),
        origin: summary
            .origin
            .map_or_else(String::new, |origin| origin.as_str().to_owned()),
        starts: number(summary.starts),
        off: summary.off.unwrap_or_default(),
        loaded_bytes: summary.loaded_bytes,
        read_bytes: summary.read_bytes,
    }
}

impl ControlService {
    /// What is known of the lists of an image with these layers, lowest first; `None`: not lazy.
    pub(super) async fn boot_lists(
        &self,
        layers: impl Iterator<Item = Option<&LazyLayerRecord>>,
    ) -> Vec<wire::BootList> {
        let boot = &self.lazy.parts().boot;
        let mut lists = Vec::new();
        for run in runs(layers) {
            lists.push(to_wire(boot.summary(&run).await));
        }
        lists
    }

    /// What starts on this node have shown.
    pub(super) async fn learned_boot_lists(
        &self,
        request: &LearnedBootListsRequest,
    ) -> Result<LearnedBootListsResponse, ControlError> {
        let boot = &self.lazy.parts().boot;
        let mut lists = Vec::new();
        for run in &request.runs {
            let index = |text: &String| {
                let digest = text.parse::<IndexDigest>();
                digest.map_err(|_| ControlError::Request(text.clone()))
            };
            let indexes: Vec<IndexDigest> = run
                .index_digests
                .iter()
                .map(index)
                .collect::<Result<_, _>>()?;
            let learned = boot.learned(BootKey::of_layers(&indexes)).await;
            lists.push(wire::LearnedBootList {
                list: learned
                    .list
                    .map_or_else(Vec::new, |list| list.encode())
                    .into(),
                starts: number(learned.starts),
                off: learned.off.unwrap_or_default(),
            });
        }
        let window = boot.recorded();
        Ok(LearnedBootListsResponse {
            lists,
            off: match window {
                Some(_) => String::new(),
                None => "[boot] enabled is false".to_owned(),
            },
            window_ms: window.map_or(0, |window| {
                u64::try_from(window.as_millis()).unwrap_or(u64::MAX)
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_blockindex::digest::{BlobDigest, ChainId, DiffId};

    fn layer(name: &str) -> LazyLayerRecord {
        let name = name.as_bytes();
        LazyLayerRecord {
            chain_id: ChainId::of(name),
            diff_id: DiffId::of(name),
            index_digest: IndexDigest::of(name),
            blob_digest: BlobDigest::of(name),
            blob_bytes: 1,
            index_source: crate::snapshots::IndexSource::Blob,
            device_bytes: 1,
            sources: Vec::new(),
        }
    }

    #[test]
    fn runs_end_where_a_layer_is_not_lazy() {
        let (a, b, c) = (layer("a"), layer("b"), layer("c"));
        let of = |layers: &[Option<&LazyLayerRecord>]| runs(layers.iter().copied());
        assert_eq!(of(&[]), Vec::<Vec<LazyLayerRecord>>::new());
        assert_eq!(of(&[None, None]), Vec::<Vec<LazyLayerRecord>>::new());
        let one = vec![vec![a.clone(), b.clone()]];
        assert_eq!(of(&[Some(&a), Some(&b)]), one);
        let two = [one, vec![vec![c.clone()]]].concat();
        assert_eq!(
            of(&[None, Some(&a), Some(&b), None, None, Some(&c), None]),
            two
        );
    }
}
