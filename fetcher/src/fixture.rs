// SPDX-License-Identifier: Apache-2.0
//! A layer made for tests: its tar, its blob and its chunk map.

pub(crate) mod contents;
pub(crate) mod line;
pub(crate) mod unmodified;

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use sluice_blockindex::chunkmap::{ChunkMap, write_chunk_map};
use sluice_blockindex::digest::{BlobDigest, DiffId, IndexDigest, StrongAlgorithm};
use sluice_blockindex::frames::encode_chunk;

use crate::scheduler::LayerSpec;
use crate::source::{BlobSource, OriginSet};
use crate::store::DeviceKey;

/// A layer with everything that the store and the scheduler need to know of it.
#[derive(Clone, Debug)]
pub(crate) struct TestLayer {
    pub(crate) tar: Vec<u8>,
    pub(crate) blob: Vec<u8>,
    pub(crate) chunks: ChunkMap,
    pub(crate) key: DeviceKey,
}

impl TestLayer {
    /// A layer of chunks of these lengths with random content, from a seed.
    pub(crate) fn new(seed: u64, lengths: &[usize]) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut tar, mut blob, mut records) = (Vec::new(), Vec::new(), Vec::new());
        for (ordinal, length) in (0..).zip(lengths) {
            let mut bytes = vec![0; *length];
            random.fill_bytes(&mut bytes);
            let chunk = encode_chunk(ordinal, &bytes, 1, StrongAlgorithm::Blake3).unwrap();
            tar.extend_from_slice(&bytes);
            blob.extend_from_slice(&chunk.frame);
            records.push(chunk.record);
        }
        let section = write_chunk_map(StrongAlgorithm::Blake3, &records).unwrap();
        let index = IndexDigest::of(&section);
        let chunks = ChunkMap::parse(section).unwrap();
        let key = DeviceKey {
            diff_id: DiffId::of(&tar),
            index,
        };
        // What follows the frames in a real blob.
        blob.extend_from_slice(&[0; 100]);
        Self {
            tar,
            blob,
            chunks,
            key,
        }
    }

    /// A layer of `count` chunks of `length` bytes.
    pub(crate) fn even(seed: u64, count: usize, length: usize) -> Self {
        Self::new(seed, &vec![length; count])
    }

    /// The same bytes under an index of another digest.
    pub(crate) fn under_another_index(&self) -> Self {
        let key = DeviceKey {
            index: IndexDigest::of(b"another index"),
            ..self.key
        };
        Self {
            key,
            ..self.clone()
        }
    }

    /// What the scheduler is told of it.
    pub(crate) fn spec(&self, sources: Vec<Arc<dyn BlobSource>>) -> LayerSpec {
        LayerSpec {
            key: self.key,
            chunks: self.chunks.clone(),
            blob: BlobDigest::of(&self.blob),
            blob_bytes: self.blob.len() as u64,
            sources,
            origins: OriginSet::default(),
            windows: None,
            witnesses: None,
        }
    }

    /// The device bytes of a chunk.
    pub(crate) fn bytes_of(&self, chunk: u32) -> &[u8] {
        let device = self.chunks.chunk(chunk).unwrap().device;
        &self.tar[usize::try_from(device.start()).unwrap()..usize::try_from(device.end()).unwrap()]
    }
}
