// SPDX-License-Identifier: Apache-2.0
//! Small converted images, pushed to a registry and known to containerd as a pull leaves them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sluice_blockindex::annotations::{LayerAnnotations, LayerMark};
use sluice_blockindex::digest::{BlobDigest, ChainId, ConfigDigest, DiffId, IndexDigest};
use sluice_blockindex::encode::{EncodeOptions, encode_layer};
use sluice_blockindex::extent::Extent;
use sluice_fetcher::registry::{NoCredentials, RegistryClient, RegistryOptions, Repository};
use sluice_fetcher::source::memory::MemorySource;
use sluice_fetcher::source::{Priority, ReadContext};
use sluice_snapshotter::control::ingest::{Ingest, Lease};
use sluice_snapshotter::resolve::{CONFIG_LABEL, Containerd, SOURCE_LABEL_PREFIX};

use super::forge::forge;

/// A file of a layer; a content of `None` is a directory, a name `.wh.…` a whiteout.
pub type File<'a> = (&'a str, Option<&'a [u8]>);

pub fn tar(files: &[File<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_mtime(1_700_000_000);
        match content {
            Some(bytes) => {
                header.set_entry_type(tar::EntryType::Regular);
                header.set_mode(0o644);
                header.set_size(bytes.len() as u64);
                builder.append_data(&mut header, path, *bytes).unwrap();
            }
            None => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(0o755);
                header.set_size(0);
                builder.append_data(&mut header, path, &[][..]).unwrap();
            }
        }
    }
    builder.into_inner().unwrap()
}

pub struct Layer {
    pub chain_id: ChainId,
    pub blob: BlobDigest,
    pub annotations: BTreeMap<String, String>,
}

pub struct Image {
    pub layers: Vec<Layer>,
    pub manifest: String,
    pub manifest_bytes: Vec<u8>,
    pub config: ConfigDigest,
    config_bytes: Vec<u8>,
    repository: String,
}

impl Image {
    pub fn top(&self) -> String {
        self.layers.last().unwrap().chain_id.to_string()
    }
}

/// Converts these tars and pushes the result; layers named in `not_lazy` are marked so.
pub async fn push(port: u16, repository: &str, tars: &[Vec<u8>], not_lazy: &[usize]) -> Image {
    push_claiming(port, repository, tars, not_lazy, &[]).await
}

/// The same; the layers in `claims` say that they are others.
pub async fn push_claiming(
    port: u16,
    repository: &str,
    tars: &[Vec<u8>],
    not_lazy: &[usize],
    claims: &[(usize, DiffId)],
) -> Image {
    let host = format!("127.0.0.1:{port}");
    let client = RegistryClient::new(RegistryOptions::default(), Arc::new(NoCredentials)).unwrap();
    let place = Repository::new(&host, repository).unwrap();
    let context = ReadContext::new(Priority::Background).with_timeout(Duration::from_secs(30));
    let mut diff_ids: Vec<DiffId> = tars.iter().map(|tar| DiffId::of(tar)).collect();
    for (layer, claimed) in claims {
        diff_ids[*layer] = *claimed;
    }
    let config_bytes = serde_json::to_vec(&serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {
            "type": "layers",
            "diff_ids": diff_ids.iter().map(ToString::to_string).collect::<Vec<_>>(),
        },
    }))
    .unwrap();
    let config = ConfigDigest::of(&config_bytes);
    let mut layers = Vec::new();
    let mut descriptors = Vec::new();
    let mut parent = None;
    for (number, tar) in tars.iter().enumerate() {
        let (mut blob, trailer) = encode_layer(tar, EncodeOptions::default()).unwrap();
        let mut pin = trailer.index.map(|pin| (pin.extent, pin.digest)).ok();
        if trailer.diff_id != diff_ids[number] {
            let (extent, _) = pin.unwrap();
            let range =
                usize::try_from(extent.start()).unwrap()..usize::try_from(extent.end()).unwrap();
            let forged = forge(&blob[range], trailer.diff_id, diff_ids[number]);
            let extent = Extent::from_length(blob.len() as u64, forged.len() as u64).unwrap();
            pin = Some((extent, IndexDigest::of(&forged)));
            blob.extend(forged);
        }
        let digest = BlobDigest::of(&blob);
        let annotations = if not_lazy.contains(&number) {
            LayerMark::NotLazy("the test says so".into()).to_map()
        } else {
            let (index_extent, index_digest) = pin.unwrap();
            LayerAnnotations {
                index_extent,
                index_digest,
                blob: digest,
                blob_bytes: blob.len() as u64,
                diff_id: diff_ids[number],
                config,
                port: Some(port),
                boot: Vec::new(),
            }
            .to_map()
        };
        descriptors.push(serde_json::json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd",
            "digest": digest.to_string(), "size": blob.len(), "annotations": annotations,
        }));
        client
            .push_blob(&context, &place, digest, blob.into())
            .await
            .unwrap();
        let chain_id = ChainId::child(parent, diff_ids[number]);
        parent = Some(chain_id);
        layers.push(Layer {
            chain_id,
            blob: digest,
            annotations,
        });
    }
    let manifest_bytes = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config.to_string(), "size": config_bytes.len(),
        },
        "layers": descriptors,
    }))
    .unwrap();
    let manifest = BlobDigest::of(&manifest_bytes).to_string();
    let repository = repository.to_owned();
    Image {
        layers,
        manifest,
        manifest_bytes,
        config,
        config_bytes,
        repository,
    }
}

/// Leaves manifest and config in containerd's content store with the labels that a pull gives them.
pub async fn commit_to_containerd(image: &Image, containerd: &Containerd, namespace: &str) {
    let lease = Lease::take(containerd, namespace).await.unwrap();
    // containerd drops the registry's port from this label.
    let source = (
        format!("{SOURCE_LABEL_PREFIX}127.0.0.1"),
        image.repository.clone(),
    );
    let root = ("containerd.io/gc.root".to_owned(), "1".to_owned());
    let config = (CONFIG_LABEL.to_owned(), image.config.to_string());
    let contents = [
        (
            &image.manifest_bytes,
            HashMap::from([source.clone(), root, config]),
        ),
        (&image.config_bytes, HashMap::from([source])),
    ];
    for (bytes, labels) in contents {
        let ingest = Ingest {
            blob: BlobDigest::of(bytes),
            blob_bytes: bytes.len() as u64,
            labels,
        };
        let memory = MemorySource::new(Bytes::from(bytes.clone()));
        ingest.run(&lease, &memory, &mut |_| {}).await.unwrap();
    }
    lease.release().await.unwrap();
}
