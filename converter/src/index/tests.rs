// SPDX-License-Identifier: Apache-2.0
use std::io::Write;

use serde_json::json;
use sluice_blockindex::annotations::LayerAnnotations;
use sluice_blockindex::digest::{ConfigDigest, IndexDigest};
use sluice_blockindex::extent::Extent;
use sluice_fetcher::index_artifact::{FoundArtifact, find_index_artifact};
use sluice_fetcher::registry::fake::{FakeRegistry, Misbehaviour, ReferrersApi};
use sluice_fetcher::registry::{NoCredentials, RegistryOptions, fallback_tag};

use super::*;
use crate::fixture::sparse_tar;
use crate::image::document::{
    DOCKER_CONFIG, DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_LAYER_GZIP, OCI_LAYER_TAR,
    OCI_LAYER_ZSTD, OCI_MANIFEST,
};
use crate::image::{Descriptor, Document};
use crate::report::Silent;

const NAME: &str = "team/app";

fn tar_of(seed: u32, bytes: u32) -> Vec<u8> {
    let mut state = u64::from(seed);
    let mut next = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40).to_le_bytes()[0] & 0x0f
    };
    let content: Vec<u8> = (0..bytes).map(|_| next()).collect();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    let path = format!("d{seed}/file");
    builder
        .append_data(&mut header, path, content.as_slice())
        .unwrap();
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A registry with images in it.
struct Rig {
    fake: FakeRegistry,
}

type Layer = (Descriptor, DiffId);

impl Rig {
    async fn new(api: bool) -> Self {
        let fake = FakeRegistry::start().await;
        fake.set_referrers(api.then(ReferrersApi::default));
        Self { fake }
    }

    fn blob(&self, media_type: &str, bytes: Vec<u8>) -> Descriptor {
        let count = bytes.len() as u64;
        Descriptor::new(media_type, self.fake.add_blob(NAME, bytes), count)
    }

    fn layer(&self, media_type: &str, blob: Vec<u8>, tar: &[u8]) -> Layer {
        (self.blob(media_type, blob), DiffId::of(tar))
    }

    /// gzip with windows, zstd, plain, not lazy, elsewhere, and the first once more.
    fn ordinary(&self) -> Vec<Layer> {
        // Above 512 KiB of device, so that there is a second restart point with a window.
        let tars = [
            tar_of(1, 1_500_000),
            tar_of(2, 30_000),
            tar_of(3, 20_000),
            sparse_tar(),
        ];
        let first = self.layer(OCI_LAYER_GZIP, gzip(&tars[0]), &tars[0]);
        let zstd = zstd::encode_all(tars[1].as_slice(), 3).unwrap();
        let foreign = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
        let elsewhere = Descriptor::new(foreign, BlobDigest::of(b"elsewhere"), 77);
        vec![
            first.clone(),
            self.layer(OCI_LAYER_ZSTD, zstd, &tars[1]),
            self.layer(OCI_LAYER_TAR, tars[2].clone(), &tars[2]),
            self.layer(OCI_LAYER_GZIP, gzip(&tars[3]), &tars[3]),
            (elsewhere, DiffId::of(b"elsewhere")),
            first,
        ]
    }

    fn image(&self, media_type: &str, arch: &str, layers: &[Layer]) -> Document {
        let diff_ids: Vec<String> = layers.iter().map(|(_, id)| id.to_string()).collect();
        let config = json!({
            "architecture": arch, "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config_type = match media_type {
            DOCKER_MANIFEST => DOCKER_CONFIG,
            _ => OCI_CONFIG,
        };
        let config = self.blob(config_type, config.to_string().into_bytes());
        let layers: Vec<&Descriptor> = layers.iter().map(|(layer, _)| layer).collect();
        let value = json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers});
        self.named(Document::of_value(media_type, value))
    }

    /// Gives a document the tag.
    fn named(&self, document: Document) -> Document {
        let bytes = document.bytes.clone();
        self.fake
            .add_manifest(NAME, "v1", &document.media_type, bytes);
        document
    }

    fn client(&self) -> RegistryClient {
        let mut options = RegistryOptions::default();
        options.retry.base = Duration::from_millis(2);
        options.retry.max_attempts = 2;
        RegistryClient::new(options, Arc::new(NoCredentials)).unwrap()
    }

    async fn index(&self, options: Options) -> Result<IndexSummary, IndexError> {
        let reference = self.fake.place(NAME).tagged("v1").unwrap();
        index(self.client(), reference, options, Arc::new(Silent)).await
    }

    async fn found(&self, manifest: &Document) -> Option<FoundArtifact> {
        let digest = ManifestDigest::from_bytes(*manifest.digest.as_bytes());
        let (client, place) = (self.client(), self.fake.place(NAME));
        let context = Indexing::context();
        let found = find_index_artifact(&client, &place, digest, &context).await;
        found.unwrap()
    }

    /// Whole blobs read, and requests that change something, since the last call.
    fn counts(&self, layers: &[Layer]) -> (usize, usize) {
        let seen = self.fake.take_seen();
        let read = |path: &str| {
            let blob = path.rsplit('/').next().unwrap();
            layers
                .iter()
                .any(|(layer, _)| layer.digest.to_string() == blob)
        };
        let reads = seen
            .iter()
            .filter(|it| it.method == "GET" && read(&it.path));
        let writes = seen
            .iter()
            .filter(|it| matches!(it.method.as_str(), "PUT" | "POST" | "PATCH"));
        (reads.count(), writes.count())
    }
}

fn options() -> Options {
    Options {
        jobs: 2,
        ..Options::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_gets_an_artifact_and_stays_as_it_is() {
    for (api, media_type) in [(true, OCI_MANIFEST), (false, DOCKER_MANIFEST)] {
        let rig = Rig::new(api).await;
        let layers = rig.ordinary();
        let image = rig.image(media_type, "amd64", &layers);
        rig.fake.take_seen();
        let summary = rig.index(options()).await.unwrap();
        assert_eq!(
            (summary.images, summary.layers, summary.layers_indexed),
            (1, 5, 4)
        );
        assert_eq!((summary.layers_not_lazy, summary.artifacts_pushed), (2, 1));
        assert_eq!(summary.digest, image.digest.to_string());
        assert_eq!(rig.counts(&layers).0, 4, "each blob is read once");
        assert_eq!(rig.fake.manifest(NAME, "v1"), Some(image.bytes.clone()));

        let found = rig.found(&image).await.unwrap().artifact;
        assert_eq!((found.generation, found.recipe.as_str()), (1, RECIPE));
        let blobs: Vec<_> = found.layers.iter().map(|layer| layer.blob).collect();
        let expected: Vec<_> = layers.iter().map(|(layer, _)| layer.digest).collect();
        assert_eq!(blobs, expected[..5], "the repeated blob stands once");
        for (entry, (layer, diff_id)) in found.layers.iter().zip(&layers).take(3) {
            let same = found.layer(layer.digest, layer.size, *diff_id).unwrap();
            assert_eq!(same, Some(entry));
            let pin = entry.index.as_ref().unwrap();
            let digest = BlobDigest::from_bytes(*pin.digest.as_bytes());
            let payload = rig.fake.blob(NAME, digest).unwrap();
            entry.accept(&payload).unwrap();
            if let Some(windows) = pin.windows {
                let file = BlobDigest::from_bytes(windows.digest);
                let file = rig.fake.blob(NAME, file).unwrap();
                assert_eq!(file.len() as u64, windows.bytes);
                sluice_blockindex::windows::check_header(&file[..16]).unwrap();
            }
        }
        let windows = |at: usize| found.layers[at].index.as_ref().unwrap().windows;
        assert!(windows(0).is_some() && windows(1).is_none());
        let reason = |at: usize| found.layers[at].index.clone().unwrap_err();
        assert!(reason(3).contains("sparse"), "{}", reason(3));
        assert_eq!(reason(4), "its bytes live outside the registry");
        let tag = fallback_tag(found.subject.digest);
        assert_eq!(rig.fake.manifest(NAME, &tag).is_some(), !api);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_reads_and_pushes_nothing() {
    for api in [true, false] {
        let rig = Rig::new(api).await;
        let layers = rig.ordinary();
        let image = rig.image(OCI_MANIFEST, "amd64", &layers);
        rig.index(options()).await.unwrap();
        let first = rig.found(&image).await.unwrap();
        rig.fake.take_seen();
        let summary = rig.index(options()).await.unwrap();
        assert_eq!((summary.layers_reused, summary.layers_indexed), (4, 0));
        assert_eq!((summary.uploads, summary.artifacts_pushed), (0, 0));
        assert_eq!(rig.counts(&layers), (0, 0), "api: {api}");

        // By force all is read again, with the same outcome.
        let force = Options {
            force: true,
            ..options()
        };
        let summary = rig.index(force).await.unwrap();
        assert_eq!((summary.layers_indexed, summary.uploads), (4, 0));
        assert_eq!(rig.counts(&layers), (4, 0), "api: {api}");
        assert_eq!(rig.found(&image).await, Some(first));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_artifact_says_is_looked_at_before_it_is_believed() {
    let rig = Rig::new(false).await;
    let layers = rig.ordinary();
    let image = rig.image(OCI_MANIFEST, "amd64", &layers);
    rig.index(options()).await.unwrap();
    let mut artifact = rig.found(&image).await.unwrap().artifact;
    let put = async |artifact: &Artifact| {
        let new = NewReferrer {
            bytes: Bytes::from(artifact.to_json().unwrap()),
            media_type: MANIFEST_TYPE.to_owned(),
            artifact_type: ARTIFACT_TYPE.to_owned(),
            annotations: artifact.annotations(),
            subject: artifact.subject.digest,
        };
        let (client, context) = (rig.client(), Indexing::context());
        let place = rig.fake.place(NAME);
        let put = client.put_referrer(&context, &place, &new, |_| true).await;
        put.unwrap();
    };

    // Of another recipe: all is made anew, and takes the place of the old one.
    artifact.recipe = "0".to_owned();
    put(&artifact).await;
    rig.fake.take_seen();
    let summary = rig.index(options()).await.unwrap();
    assert_eq!((summary.layers_indexed, summary.layers_reused), (4, 0));
    assert_eq!(summary.artifacts_pushed, 1);
    let mut artifact = rig.found(&image).await.unwrap().artifact;
    assert_eq!((artifact.generation, artifact.recipe.as_str()), (2, RECIPE));
    let tag = fallback_tag(artifact.subject.digest);
    let list: serde_json::Value =
        serde_json::from_slice(&rig.fake.manifest(NAME, &tag).unwrap()).unwrap();
    assert_eq!(list["manifests"].as_array().unwrap().len(), 1);

    // One that gives a layer the index of another, and windows that nobody has.
    let stolen = artifact.layers[1].index.clone();
    artifact.layers[1].index = artifact.layers[2].index.clone();
    artifact.layers[2].index = stolen;
    let pin = artifact.layers[0].index.as_mut().unwrap();
    pin.windows.as_mut().unwrap().bytes += 1;
    artifact.generation = 7;
    put(&artifact).await;
    let summary = rig.index(options()).await.unwrap();
    assert_eq!((summary.layers_indexed, summary.layers_reused), (3, 1));
    let righted = rig.found(&image).await.unwrap().artifact;
    assert_eq!(righted.generation, 8);
    assert!(!righted.says_the_same(&artifact));
    let (layer, _) = &layers[1];
    let entry = righted.layers.iter().find(|it| it.blob == layer.digest);
    let entry = entry.unwrap();
    let digest = entry.index.as_ref().unwrap().digest;
    let payload = rig
        .fake
        .blob(NAME, BlobDigest::from_bytes(*digest.as_bytes()));
    entry.accept(&payload.unwrap()).unwrap();

    // Nothing can follow the last generation.
    artifact.generation = u32::MAX;
    put(&artifact).await;
    let error = rig.index(options()).await.unwrap_err();
    assert!(
        matches!(error, IndexError::LastGeneration { .. }),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_lies_gets_no_artifact() {
    let tar = tar_of(1, 50_000);
    for lie in ["diff ID", "blob", "short", "damaged", "bomb"] {
        let rig = Rig::new(true).await;
        let mut blob = gzip(&tar);
        if lie == "damaged" {
            blob.truncate(blob.len() - 9);
        }
        let mut layer = rig.layer(OCI_LAYER_GZIP, blob, &tar);
        let mut options = options();
        let expected = match lie {
            "diff ID" => {
                layer.1 = DiffId::of(b"another tar");
                "its tar has diff ID"
            }
            "blob" => {
                let fault = Misbehaviour::FlipByte;
                rig.fake.misbehave("GET", "/blobs/", 1, 9, fault);
                "is corrupt"
            }
            "short" => {
                layer.0.size += 1;
                ""
            }
            "bomb" => {
                options.caps.layer_bytes = 50_000;
                "more than 50000 bytes (--max-layer-bytes)"
            }
            _ => "gzip",
        };
        let good = tar_of(3, 5_000);
        let good = rig.layer(OCI_LAYER_TAR, good.clone(), &good);
        let image = rig.image(OCI_MANIFEST, "amd64", &[good, layer]);
        let error = rig.index(options).await.unwrap_err();
        let text = format!("{:#}", anyhow::Error::new(error));
        assert!(text.contains(expected), "{lie}: {text}");
        rig.fake.behave();
        assert_eq!(rig.found(&image).await, None, "{lie}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn platforms_share_what_they_share() {
    let rig = Rig::new(true).await;
    let shared = tar_of(9, 20_000);
    let shared = rig.layer(OCI_LAYER_GZIP, gzip(&shared), &shared);
    let (mut entries, mut images, mut all) = (Vec::new(), Vec::new(), vec![shared.clone()]);
    let host = Platform::host();
    for (arch, seed) in [(host.architecture.as_str(), 1), ("s390x", 2)] {
        let own = tar_of(seed, 10_000);
        let own = rig.layer(OCI_LAYER_GZIP, gzip(&own), &own);
        all.push(own.clone());
        let image = rig.image(OCI_MANIFEST, arch, &[shared.clone(), own]);
        let mut entry = image.descriptor();
        entry.platform = Some(Platform::parse(&format!("linux/{arch}")).unwrap());
        entries.push(entry);
        images.push(image);
    }
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
    rig.named(Document::of_value(OCI_INDEX, index));
    rig.fake.take_seen();

    // This machine's platform alone.
    let summary = rig.index(options()).await.unwrap();
    assert_eq!((summary.images, summary.layers), (1, 2));
    assert!(rig.found(&images[0]).await.is_some());
    assert_eq!(rig.found(&images[1]).await, None);
    assert_eq!(rig.counts(&all).0, 2);
    // All: what is known of the shared layer serves the other one too.
    let everything = Options {
        selection: Selection::All,
        ..options()
    };
    let summary = rig.index(everything.clone()).await.unwrap();
    assert_eq!((summary.images, summary.layers), (2, 3));
    assert_eq!((summary.layers_indexed, summary.artifacts_pushed), (1, 1));
    assert_eq!(rig.counts(&all).0, 1);
    let [first, second] = [rig.found(&images[0]).await, rig.found(&images[1]).await];
    let (first, second) = (first.unwrap().artifact, second.unwrap().artifact);
    assert_eq!(first.layers[0], second.layers[0]);
    assert_ne!(first.layers[1], second.layers[1]);
    // By force, at once: the shared layer is read once.
    let force = Options {
        force: true,
        ..everything
    };
    rig.index(force).await.unwrap();
    assert_eq!(rig.counts(&all).0, 3);

    let named = Options {
        selection: Selection::Platforms(vec![Platform::parse("linux/riscv64").unwrap()]),
        ..options()
    };
    let error = rig.index(named).await.unwrap_err();
    assert!(error.to_string().contains("linux/riscv64"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn converted_layers_are_left_alone() {
    let rig = Rig::new(true).await;
    let tar = tar_of(1, 10_000);
    let (mut converted, diff_id) =
        rig.layer(OCI_LAYER_ZSTD, zstd::encode_all(&tar[..], 3).unwrap(), &tar);
    let annotations = LayerAnnotations {
        index_extent: Extent::new(10, 20).unwrap(),
        index_digest: IndexDigest::of(b"index"),
        blob: converted.digest,
        blob_bytes: converted.size,
        diff_id,
        config: ConfigDigest::of(b"config"),
        port: None,
        boot: Vec::new(),
    };
    converted.annotations = annotations.to_map();
    let converted = (converted, diff_id);
    let image = rig.image(OCI_MANIFEST, "amd64", std::slice::from_ref(&converted));
    rig.fake.take_seen();
    let summary = rig.index(options()).await.unwrap();
    assert_eq!((summary.layers, summary.layers_not_lazy), (1, 0));
    assert_eq!(rig.counts(std::slice::from_ref(&converted)), (0, 0));
    assert_eq!(rig.found(&image).await, None);
    // Beside one of them the artifact speaks of the other alone.
    let other = tar_of(2, 10_000);
    let other = rig.layer(OCI_LAYER_GZIP, gzip(&other), &other);
    let image = rig.image(OCI_MANIFEST, "amd64", &[converted, other.clone()]);
    rig.index(options()).await.unwrap();
    let found = rig.found(&image).await.unwrap().artifact;
    assert_eq!(found.layers.len(), 1);
    assert_eq!(found.layers[0].blob, other.0.digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_fails_anywhere_is_made_good_by_the_next() {
    // The writes of a run: two blobs of the gzip layer and one of each other, the empty value, the manifest,
    // the index under the tag. Each is refused in turn, once and for all attempts.
    for k in 0..30 {
        let rig = Rig::new(false).await;
        let layers = rig.ordinary();
        let image = rig.image(OCI_MANIFEST, "amd64", &layers);
        rig.fake
            .misbehave("PUT", "", k, 1, Misbehaviour::Status(507, None));
        rig.fake
            .misbehave("PUT", "", 0, 1, Misbehaviour::Status(507, None));
        let outcome = rig
            .index(Options {
                jobs: 1,
                ..options()
            })
            .await;
        rig.fake.behave();
        let Err(error) = outcome else {
            assert!(k >= 7, "{k} failures");
            assert!(rig.found(&image).await.is_some());
            return;
        };
        assert!(matches!(error, IndexError::Registry(_)), "{error}");
        rig.index(options()).await.unwrap();
        let found = rig.found(&image).await.unwrap().artifact;
        assert_eq!(found.layers.len(), 5, "k = {k}");
        assert_eq!(rig.index(options()).await.unwrap().uploads, 0, "k = {k}");
    }
    panic!("a run has fewer writes than that");
}
