// SPDX-License-Identifier: Apache-2.0
//! What was measured, as it is kept.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::reader::{Operation, Reader};
use crate::bench::report::Times;

/// By how much two medians differ that say the same: the ratio as it is printed counts.
pub const SAME: f64 = 1.005;

/// All of a run, or of several: by name of the image.
pub type Figures = BTreeMap<String, Scene>;

/// One image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scene {
    /// Its entries.
    pub files: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// The file of which pages are read at random, its path.
    pub large_file: String,
    /// Its bytes.
    pub large_file_bytes: u64,
    /// How often each is done.
    pub rounds: usize,
    /// Readers of all files at once.
    pub readers: usize,
    /// Pages that are read at random in one go.
    pub random_reads: usize,
    /// The machine's average load in the last minute, by all that ran.
    pub load: f64,
    /// Who served them.
    pub outcomes: BTreeMap<Reader, Outcome>,
    /// Who could not, and why.
    pub absent: BTreeMap<Reader, String>,
}

/// One contender.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// Its version.
    pub version: String,
    /// What serves Sluice's mount, as `sluice status` says it.
    pub served_by: Option<String>,
    /// What each operation took.
    pub times: BTreeMap<Operation, Times>,
    /// What the line carried meanwhile: the image is here, so it should be nothing but questions whether the registry is
    /// there.
    pub line_bytes: u64,
    /// The most memory of the snapshotter's processes, added up, from the pull on.
    pub peak_rss_bytes: u64,
}

impl Scene {
    /// A contender's median by overlayfs's.
    #[must_use]
    pub fn ratio(&self, reader: Reader, operation: Operation) -> Option<f64> {
        let overlayfs = self.median_s(Reader::Overlayfs, operation)?;
        Some(self.median_s(reader, operation)? / overlayfs)
    }

    /// Seconds.
    #[must_use]
    pub fn median_s(&self, reader: Reader, operation: Operation) -> Option<f64> {
        let times = self.outcomes.get(&reader)?.times.get(&operation)?;
        Some(times.median_s)
    }

    /// Where the kernel's mount of Sluice is slower than overlayfs or than a peer, each with the ratio of the times.
    #[must_use]
    pub fn slower(&self) -> Vec<(Operation, Reader, f64)> {
        let ours = Reader::SluiceErofs;
        let others = self.outcomes.keys().filter(|it| !it.is_ours());
        let pairs = others.flat_map(|other| Operation::ALL.map(|operation| (operation, *other)));
        let compared = pairs.filter_map(|(operation, other)| {
            let ratio = self.median_s(ours, operation)? / self.median_s(other, operation)?;
            Some((operation, other, ratio))
        });
        let mut slower: Vec<_> = compared.filter(|it| it.2 >= SAME).collect();
        slower.sort_by_key(|(operation, other, _)| (*operation, *other));
        slower
    }
}

/// An image of which each contender took these seconds for each operation.
#[cfg(test)]
pub(super) fn sketch(seconds: &[(Reader, f64)]) -> Scene {
    let outcome = |reader: Reader, seconds: f64| {
        let times = Operation::ALL.map(|operation| {
            let times = Times::of(vec![seconds]).unwrap();
            (operation, times)
        });
        Outcome {
            version: "1.2".to_owned(),
            served_by: reader.is_ours().then(|| "erofs".to_owned()),
            times: BTreeMap::from(times),
            line_bytes: 0,
            peak_rss_bytes: 50 << 20,
        }
    };
    let outcomes = seconds
        .iter()
        .map(|(reader, seconds)| (*reader, outcome(*reader, *seconds)));
    Scene {
        files: 3000,
        bytes: 200_000_000,
        large_file: "usr/bin/node".to_owned(),
        large_file_bytes: 90_000_000,
        rounds: 1,
        readers: 4,
        random_reads: 100_000,
        load: 0.5,
        outcomes: outcomes.collect(),
        absent: BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slower_is_what_is_printed_as_more_than_one() {
        let seconds = [
            (Reader::Overlayfs, 1.0),
            (Reader::SluiceErofs, 1.004),
            (Reader::SluiceFuse, 0.5),
            (Reader::Stargz, 3.0),
        ];
        let scene = sketch(&seconds);
        assert!(scene.slower().is_empty(), "{:?}", scene.slower());
        assert_eq!(scene.ratio(Reader::Stargz, Operation::WarmStat), Some(3.0));
        assert_eq!(scene.ratio(Reader::Soci, Operation::WarmStat), None);
        let scene = sketch(&[(Reader::Overlayfs, 1.0), (Reader::SluiceErofs, 1.1)]);
        let slower = scene.slower();
        assert_eq!(slower.len(), Operation::ALL.len());
        assert_eq!(
            (slower[0].0, slower[0].1),
            (Operation::ColdRead, Reader::Overlayfs)
        );
    }
}
