// SPDX-License-Identifier: Apache-2.0
//! What is in the chunk store, what stays there, and what goes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::UNIX_EPOCH;

use sluice_blockindex::digest::DiffId;
use sluice_fetcher::store::DeviceKey;
use sluice_proto::control::{
    CacheResponse, CachedLayer as Layer, EvictRequest, EvictResponse, EvictedLayer, PinRequest,
    PinResponse, PinnedImage,
};

use super::{ControlError, ControlService};
use crate::layers::device_key;
use crate::lazy::{CachedLayer, EvictTarget, PinDocument};

/// Devices by the chain IDs that they stand for.
type Devices = BTreeMap<String, DeviceKey>;

/// A pin, with what is held for it.
fn pinned(pin: PinDocument, devices: &Devices, cached: &[CachedLayer]) -> PinnedImage {
    let keys: BTreeSet<&DeviceKey> = pin
        .chain_ids
        .iter()
        .filter_map(|it| devices.get(it))
        .collect();
    let held = cached.iter().filter(|layer| keys.contains(&layer.key));
    PinnedImage {
        layers: u32::try_from(keys.len()).unwrap_or(u32::MAX),
        held_bytes: held.map(|layer| layer.held_bytes).sum(),
        image: pin.image,
        namespace: pin.namespace,
        manifest_digest: pin.manifest,
    }
}

impl ControlService {
    async fn devices(&self) -> Result<Devices, ControlError> {
        let records = self.metadata(|metadata| metadata.layers()).await?;
        let layers = records.into_iter().map(|(_, layer)| layer);
        Ok(layers
            .map(|layer| (layer.chain_id.to_string(), device_key(&layer)))
            .collect())
    }

    pub(super) async fn cache(&self) -> Result<CacheResponse, ControlError> {
        let names = self.names_by_chain().await;
        let devices = self.devices().await?;
        let mut images: BTreeMap<DeviceKey, BTreeSet<String>> = BTreeMap::new();
        for (chain, key) in &devices {
            let named = names.get(chain).into_iter().flatten().cloned();
            images.entry(*key).or_default().extend(named);
        }
        let cached = self.lazy.cached().await?;
        let pins = self.lazy.pins().await?.into_iter();
        let pins = pins.map(|pin| pinned(pin, &devices, &cached)).collect();
        let (mut held_bytes, mut pinned_bytes) = (0, 0);
        let mut layers = Vec::with_capacity(cached.len());
        for layer in cached {
            held_bytes += layer.held_bytes;
            if layer.stays.is_some() {
                pinned_bytes += layer.held_bytes;
            }
            let last_used = layer.last_used.duration_since(UNIX_EPOCH);
            layers.push(Layer {
                diff_id: layer.key.diff_id.to_string(),
                index_digest: layer.key.index.to_string(),
                images: images
                    .remove(&layer.key)
                    .unwrap_or_default()
                    .into_iter()
                    .collect(),
                held_bytes: layer.held_bytes,
                device_bytes: layer.device_bytes,
                present_bytes: layer.present_bytes,
                sealed: layer.sealed,
                last_used: last_used.map_or(0, |age| age.as_secs()),
                stays: layer.stays.unwrap_or_default(),
            });
        }
        Ok(CacheResponse {
            layers,
            pins,
            budget_bytes: self.lazy.store_budget_bytes().unwrap_or(0),
            held_bytes,
            pinned_bytes,
        })
    }

    pub(super) async fn evict(&self, request: EvictRequest) -> Result<EvictResponse, ControlError> {
        let EvictRequest {
            target,
            namespace,
            unused,
        } = request;
        let target = match target.parse::<DiffId>() {
            _ if unused => EvictTarget::Unused,
            Ok(diff_id) if self.has_layer(diff_id).await? => EvictTarget::Layer(diff_id),
            _ => {
                let devices = self.devices().await?;
                let mut keys = BTreeSet::new();
                for found in self.seen(&target, &namespace).await? {
                    let chains = found.chain_ids.iter();
                    keys.extend(chains.filter_map(|chain| devices.get(chain)));
                }
                EvictTarget::Devices(keys)
            }
        };
        let evicted = self.lazy.evict(target).await?.into_iter();
        let layers = evicted.map(|layer| EvictedLayer {
            diff_id: layer.key.diff_id.to_string(),
            index_digest: layer.key.index.to_string(),
            freed_bytes: layer.freed_bytes,
            stays: layer.stays.unwrap_or_default(),
        });
        Ok(EvictResponse {
            layers: layers.collect(),
        })
    }

    async fn has_layer(&self, diff_id: DiffId) -> Result<bool, ControlError> {
        let cached = self.lazy.cached().await?;
        Ok(cached.iter().any(|layer| layer.key.diff_id == diff_id))
    }

    /// The manifests of an image of which a lazy pull was seen, as pins would name them.
    async fn seen(&self, image: &str, namespace: &str) -> Result<Vec<PinDocument>, ControlError> {
        let mut seen = Vec::new();
        for found in self.find(image, namespace).await? {
            let pin = self.lazy.seen(image, &found.namespace, &found.digest);
            seen.extend(pin.await?);
        }
        match seen.is_empty() {
            true => Err(ControlError::NotLazy(image.to_owned())),
            false => Ok(seen),
        }
    }

    pub(super) async fn pin(&self, request: PinRequest) -> Result<PinResponse, ControlError> {
        let PinRequest {
            image,
            namespace,
            unpin,
        } = request;
        let changed = if unpin {
            // The image may be gone, or containerd be down: the pin knows its name.
            let found = self.find(&image, &namespace).await.unwrap_or_default();
            let manifests: BTreeSet<String> = found.into_iter().map(|it| it.digest).collect();
            let (name, within) = (image.clone(), namespace);
            let gone = self.lazy.unpin(move |pin| {
                let named = pin.image == name || pin.manifest == name;
                let here = within.is_empty() || pin.namespace == within;
                here && (named || manifests.contains(&pin.manifest))
            });
            let gone = gone.await?;
            if gone.is_empty() {
                return Err(ControlError::NotPinned(image));
            }
            gone
        } else {
            let seen = self.seen(&image, &namespace).await?;
            for pin in &seen {
                self.lazy.pin(pin.clone()).await?;
            }
            seen
        };
        let devices = self.devices().await?;
        let cached = self.lazy.cached().await?;
        let pins = changed.into_iter();
        Ok(PinResponse {
            pins: pins.map(|pin| pinned(pin, &devices, &cached)).collect(),
        })
    }
}
