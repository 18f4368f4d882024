// SPDX-License-Identifier: Apache-2.0
//! What was measured.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::works::Works;
use crate::bench::flame::Frames;
use crate::bench::report::{Times, load};

/// An image completed once.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Round {
    /// From the start of the job until every chunk was present.
    pub present_s: f64,
    /// Until every layer was sealed.
    pub sealed_s: f64,
    /// Processor time until every chunk was present: of scheduler, client and store,
    pub ours_cpu_s: f64,
    /// and of the registry.
    pub registry_cpu_s: f64,
}

/// What one thread takes for all chunks of the image.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Stages {
    /// Decompress and verify them.
    pub decode_s: f64,
    /// Of this: crc32 and the strong digest.
    pub verify_s: f64,
    /// Write them into a new store.
    pub commit_s: f64,
    /// Hash the device as the diff ID does, and put it on the disk.
    pub seal_s: f64,
}

/// Which part of the samples of a profile is whose.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Profile {
    /// Samples.
    pub samples: u64,
    /// What is told apart, and its part.
    pub shares: BTreeMap<String, f64>,
}

/// All figures.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figures {
    /// The image.
    pub image: String,
    /// Its layers.
    pub layers: usize,
    /// Their chunks.
    pub chunks: u64,
    /// What comes over the line.
    pub blob_bytes: u64,
    /// What is written.
    pub device_bytes: u64,
    /// Until every chunk was present.
    pub present: Times,
    /// Until every layer was sealed.
    pub sealed: Times,
    /// Processor time, medians of the rounds.
    pub ours_cpu_s: f64,
    /// The registry's.
    pub registry_cpu_s: f64,
    /// One thread.
    pub stages: Stages,
    /// Load of the machine at the end.
    pub load: f64,
    /// What was sampled.
    #[serde(default)]
    pub profiles: BTreeMap<String, Profile>,
}

impl std::fmt::Display for Round {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "present after {:.3} s, sealed after {:.3} s; CPU: ours {:.2} s, the registry's {:.2} s",
            self.present_s, self.sealed_s, self.ours_cpu_s, self.registry_cpu_s
        )
    }
}

impl Figures {
    /// Of these rounds.
    pub fn of(works: &Works, rounds: Vec<Round>, stages: Stages) -> Result<Self> {
        let times = |of: &dyn Fn(&Round) -> f64| Times::of(rounds.iter().map(of).collect());
        Ok(Self {
            image: works.image.clone(),
            layers: works.layers.len(),
            chunks: works.chunks(),
            blob_bytes: works.blob_bytes(),
            device_bytes: works.device_bytes(),
            present: times(&|it| it.present_s)?,
            sealed: times(&|it| it.sealed_s)?,
            ours_cpu_s: times(&|it| it.ours_cpu_s)?.median_s,
            registry_cpu_s: times(&|it| it.registry_cpu_s)?.median_s,
            stages,
            load: load()?,
            profiles: BTreeMap::new(),
        })
    }

    /// What came over the line, Gbit/s.
    #[must_use]
    pub fn line_gbit(&self) -> f64 {
        self.blob_bytes as f64 * 8.0 / 1e9 / self.present.median_s
    }

    /// What was written, Gbit/s.
    #[must_use]
    pub fn device_gbit(&self) -> f64 {
        self.device_bytes as f64 * 8.0 / 1e9 / self.present.median_s
    }

    /// The least time in which `cores` can do what must be done, with nothing else: decode and write.
    #[must_use]
    pub fn bound_s(&self, cores: usize) -> f64 {
        (self.stages.decode_s + self.stages.commit_s) / cores.max(1) as f64
    }
}

impl Profile {
    /// Of what was sampled.
    #[must_use]
    pub fn of(frames: &Frames) -> Self {
        type Is = fn(&str) -> bool;
        let groups: [(&str, Is); 7] = [
            ("zstd, decompressing", |it| {
                it.starts_with("ZSTD_decompress") || it.starts_with("ZSTD_DCtx")
            }),
            ("zstd, compressing", |it| it.starts_with("ZSTD_compress")),
            ("inflate", |it| {
                it.contains("zlib_rs") || it.contains("inflate")
            }),
            ("sha256", |it| {
                it.contains("sha256") || it.contains("sha2::")
            }),
            ("blake3", |it| it.contains("blake3")),
            ("crc32", |it| it.contains("crc32")),
            ("in the kernel", |it| {
                it.starts_with("entry_SYSCALL") || it.starts_with("asm_")
            }),
        ];
        let shares = groups
            .into_iter()
            .map(|(name, is)| (name.to_owned(), frames.share(&is)));
        Self {
            samples: frames.samples,
            shares: shares.filter(|(_, share)| *share > 0.0).collect(),
        }
    }
}

#[cfg(test)]
pub(super) fn sketch() -> Figures {
    Figures {
        image: "python".to_owned(),
        layers: 5,
        chunks: 2000,
        blob_bytes: 125_000_000,
        device_bytes: 375_000_000,
        present: Times::of(vec![0.5]).unwrap(),
        sealed: Times::of(vec![0.75]).unwrap(),
        ours_cpu_s: 0.7,
        registry_cpu_s: 0.1,
        stages: Stages {
            decode_s: 0.4,
            verify_s: 0.1,
            commit_s: 0.2,
            seal_s: 0.3,
        },
        load: 1.0,
        profiles: BTreeMap::from([(
            "fill".to_owned(),
            Profile {
                samples: 1000,
                shares: BTreeMap::from([("blake3".to_owned(), 0.25)]),
            },
        )]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_of_what_came_and_of_what_was_written() {
        let figures = sketch();
        let near = |left: f64, right: f64| (left - right).abs() < 1e-9;
        assert!(near(figures.line_gbit(), 2.0));
        assert!(near(figures.device_gbit(), 6.0));
        assert!(near(figures.bound_s(2), 0.3));
    }
}
