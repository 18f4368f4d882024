// SPDX-License-Identifier: Apache-2.0
//! Whole prewarms from a registry in this process.

use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use serde_json::json;
use sluice_blockindex::annotations::LayerAnnotations;
use sluice_blockindex::boot::{BootChunk, BootList};
use sluice_blockindex::digest::{BlobDigest, ChainId, ConfigDigest, DiffId};
use sluice_blockindex::encode::{EncodeOptions, encode_layer};
use sluice_fetcher::registry::fake::{FakeRegistry, Misbehaviour};
use sluice_fetcher::registry::{NoCredentials, RegistryOptions};
use sluice_fetcher::store::DeviceKey;
use tempfile::TempDir;
use tokio::time::Instant;

use super::*;
use crate::lazy::tests::lazy_in;
use crate::snapshots::{LazyDecision, LazyLayers as _, PrepareRequest};

const PATIENCE: Duration = Duration::from_secs(60);
const NAME: &str = "team/app";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A converted image in a registry.
struct Image {
    manifest: Vec<u8>,
    layers: Vec<LayerAnnotations>,
}

impl Image {
    fn key(&self, layer: usize) -> DeviceKey {
        DeviceKey {
            diff_id: self.layers[layer].diff_id,
            index: self.layers[layer].index_digest,
        }
    }
}

fn tar(seed: u64, bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    StdRng::seed_from_u64(seed).fill_bytes(&mut content);
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes as u64);
    header.set_mode(0o644);
    let name = format!("file-{seed}");
    builder
        .append_data(&mut header, name, &content[..])
        .unwrap();
    builder.into_inner().unwrap()
}

/// Pushes an image of layers with files of these sizes; the layer `plain` is not converted.
fn push(registry: &FakeRegistry, tag: &str, sizes: &[usize], plain: Option<usize>) -> Image {
    let tars = (1..).zip(sizes).map(|(seed, bytes)| tar(seed, *bytes));
    let tars: Vec<Vec<u8>> = tars.collect();
    let diff_ids: Vec<String> = tars.iter().map(|it| DiffId::of(it).to_string()).collect();
    let config = json!({"rootfs": {"type": "layers", "diff_ids": diff_ids}}).to_string();
    let config_digest = ConfigDigest::of(config.as_bytes());
    let config_bytes = config.len();
    registry.add_blob(NAME, config);
    let (mut layers, mut descriptors) = (Vec::new(), Vec::new());
    for (at, tar) in tars.iter().enumerate() {
        let (blob, trailer) = encode_layer(tar, EncodeOptions::default()).unwrap();
        let pin = trailer.index.unwrap();
        let annotations = LayerAnnotations {
            index_extent: pin.extent,
            index_digest: pin.digest,
            blob: BlobDigest::of(&blob),
            blob_bytes: blob.len() as u64,
            diff_id: trailer.diff_id,
            config: config_digest,
            port: None,
            boot: Vec::new(),
        };
        let mut descriptor = json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd",
            "digest": annotations.blob.to_string(),
            "size": blob.len(),
        });
        if plain != Some(at) {
            descriptor["annotations"] = json!(annotations.to_map());
        }
        registry.add_blob(NAME, blob);
        layers.push(annotations);
        descriptors.push(descriptor);
    }
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config_digest.to_string(),
            "size": config_bytes,
        },
        "layers": descriptors,
    });
    let manifest = manifest.to_string().into_bytes();
    registry.add_manifest(NAME, tag, MANIFEST, manifest.clone());
    Image { manifest, layers }
}

struct Site {
    registry: FakeRegistry,
    lazy: Lazy,
    prewarms: Prewarms,
    dir: TempDir,
}

impl Site {
    async fn new(grace: Duration) -> Self {
        Self::with(grace, PATIENCE).await
    }

    async fn with(grace: Duration, deadline: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = RegistryOptions::default();
        let client = RegistryClient::new(options, Arc::new(NoCredentials)).unwrap();
        let lazy = lazy_in(dir.path(), client.clone(), Duration::ZERO);
        lazy.parts().mounts.adopt(&[]);
        let options = PrewarmOptions { grace, deadline };
        Self {
            registry: FakeRegistry::start().await,
            prewarms: Prewarms::new(lazy.clone(), client, options),
            lazy,
            dir,
        }
    }

    fn reference(&self, tag: &str) -> ImageReference {
        let name = format!("{}/{NAME}:{tag}", self.registry.host());
        name.parse().unwrap()
    }

    fn start(&self, tag: &str, scope: Scope) -> Watching {
        let started = self.prewarms.start(self.reference(tag), scope, false);
        started.unwrap()
    }

    async fn prewarm(&self, tag: &str, scope: Scope) -> Progress {
        ended(&mut self.start(tag, scope)).await
    }

    /// What becomes of a pull of the image's lowest layer, as containerd asks.
    async fn decide(&self, image: &Image) -> LazyDecision {
        let annotations = &image.layers[0];
        let mut labels = annotations.to_map();
        let reference = self.reference("v1").to_string();
        labels.insert(crate::labels::CRI_IMAGE_REFERENCE.to_owned(), reference);
        let request = PrepareRequest {
            key: "default/1/extract".into(),
            namespace: Some("default".into()),
            parent: None,
            chain: Vec::new(),
            parent_chain: None,
            chain_id: ChainId::child(None, annotations.diff_id),
            labels,
            deadline: Instant::now() + Duration::from_secs(20),
        };
        self.lazy.decide(&request).await
    }

    fn devices(&self) -> Vec<DeviceKey> {
        let layers = &self.lazy.parts().layers;
        layers.fetcher().store().keys().unwrap()
    }

    async fn stop(self) {
        self.prewarms.stop().await;
        self.lazy.stop().await;
    }
}

async fn ended(watching: &mut Watching) -> Progress {
    let ended = watching.progress().wait_for(|it| it.phase.is_last());
    let ended = tokio::time::timeout(PATIENCE, ended).await;
    ended.expect("in time").expect("a last word").clone()
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prewarmed_image_is_pulled_without_the_registry() {
    let site = Site::new(Duration::from_secs(3600)).await;
    let image = push(&site.registry, "v1", &[3_000_000, 100, 50_000], None);
    let progress = site.prewarm("v1", Scope::Full).await;
    assert_eq!(progress.phase, Phase::Done, "{progress:?}");
    let (present, total) = progress.bytes();
    assert!(present == total && total > 3_050_000, "{progress:?}");
    for layer in 0..3 {
        assert_eq!(progress.layers[layer].phase, LayerPhase::Done);
        let handle = site.lazy.parts().layers.by_key(image.key(layer)).await;
        assert!(handle.unwrap().unwrap().device().is_sealed());
    }
    let again = site.registry.take_lines();
    let index_reads = again.iter().filter(|line| line.contains("/blobs/"));
    assert!(index_reads.count() >= 7, "a config, indexes, frames");

    // Nobody has it, and a clean-up leaves it.
    site.lazy.cleanup().await;
    assert_eq!(site.devices().len(), 3);
    let decision = site.decide(&image).await;
    assert!(matches!(decision, LazyDecision::Lazy(_)), "{decision:?}");
    assert_eq!(site.registry.take_lines(), Vec::<String>::new());

    // A second one finds all of it there.
    let again = site.prewarm("v1", Scope::Full).await;
    assert_eq!((again.phase, again.bytes()), (Phase::Done, (total, total)));
    let asked = site.registry.take_lines();
    let host = format!("GET /v2/{NAME}");
    let config = format!("{host}/blobs/{}", image.layers[0].config);
    assert_eq!(asked, [format!("{host}/manifests/v1"), config]);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_pulls_goes_when_its_time_is_over() {
    let site = Site::new(Duration::from_millis(1)).await;
    push(&site.registry, "v1", &[100_000], None);
    let progress = site.prewarm("v1", Scope::Full).await;
    assert_eq!(progress.phase, Phase::Done, "{progress:?}");
    until("what was prewarmed goes", async || {
        site.lazy.cleanup().await;
        site.devices().is_empty()
    })
    .await;
    let indexes = std::fs::read_dir(site.dir.path().join("indexes")).unwrap();
    assert_eq!(indexes.count(), 0);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_without_an_index_gets_one_where_its_blob_is_wanted_anyway() {
    let site = Site::new(PATIENCE).await;
    push(&site.registry, "v1", &[1000, 2000, 3000], Some(1));
    // For a boot list nobody reads whole blobs.
    let progress = site.prewarm("v1", Scope::Boot).await;
    assert_eq!(progress.layers[1].phase, LayerPhase::Refused);
    let error = &progress.layers[1].error;
    assert!(error.contains("not converted"), "{error}");

    let progress = site.prewarm("v1", Scope::Full).await;
    assert_eq!(progress.phase, Phase::Done, "{progress:?}");
    let phases: Vec<LayerPhase> = progress.layers.iter().map(|it| it.phase).collect();
    assert_eq!(phases, [LayerPhase::Done; 3], "{progress:?}");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_known_or_it_is_said_why_not() {
    let site = Site::new(PATIENCE).await;
    let progress = site.prewarm("none", Scope::Full).await;
    assert_eq!(progress.phase, Phase::Failed);
    let name = format!("{NAME}:none");
    assert!(progress.error.contains(&name), "{progress:?}");
    assert!(progress.error.contains("not found"), "{progress:?}");

    let image = push(&site.registry, "v1", &[1000], None);
    let entry = |architecture: &str| {
        json!({
            "mediaType": MANIFEST,
            "digest": sluice_blockindex::digest::ManifestDigest::of(&image.manifest).to_string(),
            "size": image.manifest.len(),
            "platform": {"os": "linux", "architecture": architecture},
        })
    };
    let ours = if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    };
    for (tag, entries, done) in [
        ("both", vec![entry("s390x"), entry(ours)], true),
        ("other", vec![entry("s390x")], false),
    ] {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
        site.registry
            .add_manifest(NAME, tag, INDEX, index.to_string());
        let progress = site.prewarm(tag, Scope::Full).await;
        assert_eq!(progress.phase == Phase::Done, done, "{progress:?}");
        let platform = progress.error.contains("not for linux/");
        assert_eq!(platform, !done, "{progress:?}");
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boot_list_brings_its_chunks_alone() {
    let site = Site::new(PATIENCE).await;
    let image = push(&site.registry, "v1", &[4_000_000, 4_000_000], None);
    let progress = site.prewarm("v1", Scope::Boot).await;
    assert_eq!(progress.phase, Phase::Done, "{progress:?}");
    assert_eq!(progress.note, "no boot list is known");
    assert_eq!(progress.bytes(), (0, 0));

    let indexes = image.layers.iter().map(|it| it.index_digest).collect();
    let chunks = [(0, 1), (1, 2)].map(|(layer, chunk)| BootChunk { layer, chunk });
    let list = BootList::new(indexes, chunks.to_vec()).unwrap();
    let boot = &site.lazy.parts().boot;
    let offered = boot.offer(list.key(), "other", &list.encode()).await;
    offered.unwrap();
    let progress = site.prewarm("v1", Scope::Boot).await;
    assert_eq!(progress.phase, Phase::Done, "{progress:?}");
    assert_eq!(progress.note, "");
    for (layer, chunk) in [(0, 1), (1, 2)] {
        let handle = site.lazy.parts().layers.by_key(image.key(layer)).await;
        let handle = handle.unwrap().unwrap();
        let bytes = handle.chunks().chunk(chunk).unwrap().device.len();
        let shown = &progress.layers[layer];
        assert_eq!((shown.present_bytes, shown.total_bytes), (bytes, bytes));
        assert!(handle.device().is_present(chunk));
        assert!(!handle.device().is_complete());
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_with_its_last_watcher_unless_it_is_detached() {
    let site = Site::new(PATIENCE).await;
    let image = push(&site.registry, "v1", &[2_000_000], None);
    push(&site.registry, "v2", &[2_000_000, 10], None);
    let stalled = image.layers[0].blob.to_string();
    let config = image.layers[0].config.to_string();
    // The whole answer of v1 hangs on its config.
    let never = Misbehaviour::NoAnswer;
    site.registry.misbehave("GET", &config, 0, u32::MAX, never);
    let (first, mut second) = (site.start("v1", Scope::Full), site.start("v1", Scope::Full));
    assert_eq!(first.number, second.number, "they watch the same");
    drop(first);
    assert!(!second.progress().borrow().phase.is_last());
    let mut progress = second.progress().clone();
    drop(second);
    let last = progress.wait_for(|it| it.phase.is_last());
    let last = tokio::time::timeout(PATIENCE, last).await.unwrap();
    assert_eq!(last.unwrap().error, "cancelled");

    let started = site.prewarms.start(site.reference("v1"), Scope::Full, true);
    let mut progress = started.unwrap().progress().clone();
    site.registry.behave();
    // The request that hangs ends by its own deadline; another one joins what runs.
    let again = site.start("v1", Scope::Full);
    drop(again);
    let last = progress.wait_for(|it| it.phase.is_last());
    let last = tokio::time::timeout(2 * PATIENCE, last).await.unwrap();
    assert_eq!(last.unwrap().phase, Phase::Done, "{stalled}");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_bounded_and_waits_are_over_at_the_deadline() {
    let site = Site::with(PATIENCE, Duration::from_secs(2)).await;
    let never = Misbehaviour::NoAnswer;
    site.registry
        .misbehave("GET", "/manifests/", 0, u32::MAX, never);
    let tags: Vec<String> = (0..RUNNING + QUEUED).map(|it| format!("t{it}")).collect();
    let mut all: Vec<Watching> = tags.iter().map(|it| site.start(it, Scope::Full)).collect();
    let more = site
        .prewarms
        .start(site.reference("more"), Scope::Full, false);
    assert_eq!(more.err(), Some(PrewarmRefused::Full));
    // Two run out of time, and all that wait behind them sooner or later.
    let mut errors = Vec::new();
    for watching in &mut all {
        errors.push(ended(watching).await.error);
    }
    let count = |text: &str| errors.iter().filter(|it| it.contains(text)).count();
    assert!(count("not done within 2 s") >= RUNNING, "{errors:?}");
    assert!(count("its turn did not come") > 0, "{errors:?}");
    until("there is room again", async || {
        let more = site
            .prewarms
            .start(site.reference("more"), Scope::Full, false);
        more.is_ok()
    })
    .await;
    site.stop().await;
}
