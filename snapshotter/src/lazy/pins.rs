// SPDX-License-Identifier: Apache-2.0
//! Pins: images whose layers are never evicted.
//!
//! A pin is a durable document that names the chain IDs of an image's layers, so it holds as well for layers
//! that are evicted or not fetched yet, and needs neither containerd nor the manifest later. It keeps bytes
//! from eviction and from nothing else: an image that containerd removes goes, and its pin stays until it is
//! taken away.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sluice_fetcher::store::DeviceKey;

use super::decisions::{ImageDocument, now};
use super::{Inner, Lazy};
use crate::layers::device_key;
use crate::store::{DocumentTable, StoreError};

/// A pin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinDocument {
    /// The image as it was named.
    pub image: String,
    /// containerd namespace.
    pub namespace: String,
    /// Its manifest.
    pub manifest: String,
    /// Of all its layers, lowest first.
    pub chain_ids: Vec<String>,
    /// Seconds since 1970.
    pub at: u64,
}

impl PinDocument {
    fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.manifest)
    }
}

impl Inner {
    /// The devices of pinned images, and which images these are.
    pub(super) fn pinned_by(&self) -> Result<BTreeMap<DeviceKey, BTreeSet<String>>, StoreError> {
        let metadata = &self.parts.metadata;
        let pins = metadata.documents::<PinDocument>(DocumentTable::Pins)?;
        let mut devices: BTreeMap<DeviceKey, BTreeSet<String>> = BTreeMap::new();
        if pins.is_empty() {
            return Ok(devices);
        }
        for (_, layer) in metadata.layers()? {
            let chain_id = layer.chain_id.to_string();
            let images = pins
                .iter()
                .filter(|(_, pin)| pin.chain_ids.contains(&chain_id));
            for (_, pin) in images {
                let key = device_key(&layer);
                devices.entry(key).or_default().insert(pin.image.clone());
            }
        }
        Ok(devices)
    }
}

impl Lazy {
    /// All pins.
    pub async fn pins(&self) -> Result<Vec<PinDocument>, StoreError> {
        let pins = self.0.blocking(|inner| {
            let metadata = &inner.parts.metadata;
            metadata.documents::<PinDocument>(DocumentTable::Pins)
        });
        Ok(pins.await?.into_iter().map(|(_, pin)| pin).collect())
    }

    /// The image with this manifest as a pin would name it; `None` when no lazy pull of it was seen.
    pub async fn seen(
        &self,
        image: &str,
        namespace: &str,
        manifest: &str,
    ) -> Result<Option<PinDocument>, StoreError> {
        let key = format!("{namespace}/{manifest}");
        let (image, namespace) = (image.to_owned(), namespace.to_owned());
        let manifest = manifest.to_owned();
        self.0
            .blocking(move |inner| {
                let metadata = &inner.parts.metadata;
                let seen = metadata.document::<ImageDocument>(DocumentTable::Images, &key)?;
                Ok(seen.map(|seen| PinDocument {
                    image,
                    namespace,
                    manifest,
                    chain_ids: seen.layers.into_iter().map(|it| it.chain_id).collect(),
                    at: now(),
                }))
            })
            .await
    }

    /// Pins an image, durably; fine when it is pinned.
    pub async fn pin(&self, pin: PinDocument) -> Result<(), StoreError> {
        self.0
            .blocking(move |inner| {
                let metadata = &inner.parts.metadata;
                metadata.put_document(DocumentTable::Pins, &pin.key(), &pin)
            })
            .await
    }

    /// Takes away the pins that `chosen` wants gone, and returns them.
    pub async fn unpin(
        &self,
        chosen: impl Fn(&PinDocument) -> bool + Send + 'static,
    ) -> Result<Vec<PinDocument>, StoreError> {
        self.0
            .blocking(move |inner| {
                let metadata = &inner.parts.metadata;
                let mut gone = Vec::new();
                for (key, pin) in metadata.documents::<PinDocument>(DocumentTable::Pins)? {
                    if chosen(&pin) && metadata.remove_document(DocumentTable::Pins, &key)? {
                        gone.push(pin);
                    }
                }
                Ok(gone)
            })
            .await
    }
}
