// SPDX-License-Identifier: Apache-2.0
//! A registry in this process, and stores that are filled from it.

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flate2::read::MultiGzDecoder;
use nix::unistd::Pid;
use sluice_blockindex::chunkmap::ChunkMap;
use sluice_blockindex::digest::{BlobDigest, DiffId, IndexDigest};
use sluice_blockindex::encode::{EncodeOptions, encode_layer};
use sluice_blockindex::frames::{decode_chunk, verify_chunk};
use sluice_blockindex::index::{INDEX_FILE_MAX_BYTES, UncheckedIndex, decompress_index};
use sluice_fetcher::metrics::Metrics;
use sluice_fetcher::registry::fake::FakeRegistry;
use sluice_fetcher::registry::{NoCredentials, RegistryClient, RegistryOptions};
use sluice_fetcher::scheduler::{Fetcher, FetcherOptions, LayerHandle, LayerSpec};
use sluice_fetcher::source::{OriginSet, RegistryBlobSource};
use sluice_fetcher::store::{DeviceKey, SealStep, Store, StoreOptions};
use tokio::runtime::{Builder, Runtime};

use super::figures::{Round, Stages};
use crate::bench::conversion::source::Source;
use crate::bench::flame::{Frames, Recording};

/// Names of threads, as /proc has them.
const OURS: &str = "fill";
const REGISTRY: &str = "registry";
const REPOSITORY: &str = "bench/image";
/// The longest that a round may take.
const DEADLINE: Duration = Duration::from_secs(300);
/// A profile of less says little.
const SAMPLED: Duration = Duration::from_secs(4);

/// A layer in our own format.
#[derive(Debug)]
pub struct Layer {
    key: DeviceKey,
    blob: Vec<u8>,
    digest: BlobDigest,
    chunks: ChunkMap,
}

/// The image, and the registry that serves it.
#[derive(Debug)]
pub struct Works {
    /// The image's name.
    pub image: String,
    /// Its layers.
    pub layers: Vec<Layer>,
    _registry: Runtime,
    fake: FakeRegistry,
}

impl Works {
    /// Converts an image in memory and serves it.
    pub fn open(source: &Source) -> Result<Self> {
        let layers = source.layers.iter().map(|path| Layer::of(path));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let registry = runtime(REGISTRY)?;
        let fake = registry.block_on(FakeRegistry::start());
        for layer in &layers {
            fake.add_blob(REPOSITORY, layer.blob.clone());
        }
        Ok(Self {
            image: source.name.clone(),
            layers,
            _registry: registry,
            fake,
        })
    }

    /// Chunks of all layers.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.layers
            .iter()
            .map(|it| u64::from(it.chunks.count()))
            .sum()
    }

    /// Bytes of all chunks as they come.
    #[must_use]
    pub fn blob_bytes(&self) -> u64 {
        let chunks = self.layers.iter().flat_map(|it| it.chunks.chunks());
        chunks.flatten().map(|it| it.blob.len()).sum()
    }

    /// Bytes of all devices.
    #[must_use]
    pub fn device_bytes(&self) -> u64 {
        let chunks = self.layers.iter().flat_map(|it| it.chunks.chunks());
        chunks.flatten().map(|it| it.device.len()).sum()
    }

    /// Completes the image in a new store in `directory`.
    pub fn round(&self, directory: &Path) -> Result<Round> {
        nix::unistd::sync();
        let runtime = runtime(OURS)?;
        let round = runtime
            .block_on(async { tokio::time::timeout(DEADLINE, self.complete(directory)).await });
        runtime.shutdown_timeout(DEADLINE);
        std::fs::remove_dir_all(directory)?;
        round.context("the image is not completed in time")?
    }

    async fn complete(&self, directory: &Path) -> Result<Round> {
        let store = Arc::new(Store::open(directory, StoreOptions::default())?);
        let fetcher = Fetcher::new(FetcherOptions::default(), store, Metrics::new());
        let options = RegistryOptions::default();
        let client = RegistryClient::new(options, Arc::new(NoCredentials))?;
        let mut handles: Vec<Arc<LayerHandle>> = Vec::new();
        for layer in &self.layers {
            let origins = OriginSet::new([self.fake.place(REPOSITORY)]);
            handles.push(fetcher.add_layer(layer.spec(&client, origins)).await?);
        }
        let began = Instant::now();
        let before = [cpu_seconds(OURS)?, cpu_seconds(REGISTRY)?];
        let job = fetcher.prefetch(handles);
        let mut progress = job.progress();
        while progress.borrow_and_update().present_bytes < self.device_bytes() {
            progress.changed().await.context("the job ends early")?;
        }
        let present_s = began.elapsed().as_secs_f64();
        let after = [cpu_seconds(OURS)?, cpu_seconds(REGISTRY)?];
        let last = job.join().await;
        let sealed_s = began.elapsed().as_secs_f64();
        ensure!(last.sealed_layers == self.layers.len(), "{last:?}");
        fetcher.shutdown().await;
        Ok(Round {
            present_s,
            sealed_s,
            ours_cpu_s: after[0] - before[0],
            registry_cpu_s: after[1] - before[1],
        })
    }

    /// What each stage takes on this thread alone.
    pub fn stages(&self, directory: &Path) -> Result<Stages> {
        nix::unistd::sync();
        let store = Store::open(directory, StoreOptions::default())?;
        let mut stages = Stages {
            decode_s: 0.0,
            verify_s: 0.0,
            commit_s: 0.0,
            seal_s: 0.0,
        };
        for layer in &self.layers {
            let device = store.device(layer.key, &layer.chunks)?;
            for chunk in layer.chunks.chunks().flatten() {
                let range = chunk.blob.range();
                let frame = &layer.blob[usize::try_from(range.start)?..usize::try_from(range.end)?];
                let began = Instant::now();
                let bytes = decode_chunk(frame, &chunk)?;
                let decoded = Instant::now();
                verify_chunk(&bytes, &chunk)?;
                let verified = Instant::now();
                device.commit(chunk.ordinal, &bytes)?;
                stages.commit_s += verified.elapsed().as_secs_f64();
                stages.verify_s += (verified - decoded).as_secs_f64();
                stages.decode_s += (decoded - began).as_secs_f64();
            }
            let began = Instant::now();
            device.seal(&mut || SealStep::Continue)?;
            stages.seal_s += began.elapsed().as_secs_f64();
        }
        Ok(stages)
    }

    /// Rounds while this process is sampled.
    pub fn sampled(&self, directory: &Path) -> Result<Option<Frames>> {
        let into = directory.join("perf.data");
        let Some(recording) = Recording::of(Pid::this(), &into)? else {
            return Ok(None);
        };
        let began = Instant::now();
        while began.elapsed() < SAMPLED {
            self.round(&directory.join("store"))?;
        }
        recording.end(&into).map(Some)
    }
}

impl Layer {
    fn of(gzip: &Path) -> Result<Self> {
        let file = std::fs::File::open(gzip)?;
        let mut tar = Vec::new();
        MultiGzDecoder::new(std::io::BufReader::new(file)).read_to_end(&mut tar)?;
        let (blob, trailer) = encode_layer(&tar, EncodeOptions::default())?;
        let pin = trailer.index.map_err(anyhow::Error::msg)?;
        let range = pin.extent.range();
        let payload = &blob[usize::try_from(range.start)?..usize::try_from(range.end)?];
        let file = decompress_index(payload, INDEX_FILE_MAX_BYTES)?;
        let index = UncheckedIndex::parse(file)?.validate()?;
        let key = DeviceKey {
            diff_id: DiffId::of(&tar),
            index: IndexDigest::of(payload),
        };
        let (digest, chunks) = (BlobDigest::of(&blob), index.chunk_map().clone());
        Ok(Self {
            key,
            digest,
            chunks,
            blob,
        })
    }

    fn spec(&self, client: &RegistryClient, origins: OriginSet) -> LayerSpec {
        let bytes = self.blob.len() as u64;
        let source = RegistryBlobSource::once(client.clone(), self.digest, bytes, origins.clone());
        LayerSpec {
            key: self.key,
            chunks: self.chunks.clone(),
            blob: self.digest,
            blob_bytes: bytes,
            sources: vec![Arc::new(source)],
            origins,
            windows: None,
            witnesses: None,
        }
    }
}

fn runtime(name: &str) -> Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    Ok(builder.enable_all().thread_name(name).build()?)
}

/// Processor time of the threads of this name, those that have ended aside.
fn cpu_seconds(name: &str) -> Result<f64> {
    let mut nanoseconds = 0;
    for thread in std::fs::read_dir("/proc/self/task")? {
        let thread = thread?.path();
        let read = |file: &str| std::fs::read_to_string(thread.join(file));
        // A thread may end meanwhile.
        let (Ok(comm), Ok(stat)) = (read("comm"), read("schedstat")) else {
            continue;
        };
        if comm.trim() == name {
            let first = stat.split_whitespace().next().context("schedstat")?;
            nanoseconds += first.parse::<u64>()?;
        }
    }
    Ok(Duration::from_nanos(nanoseconds).as_secs_f64())
}
