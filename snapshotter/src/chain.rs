// SPDX-License-Identifier: Apache-2.0
//! A parent chain cut into maximal runs of lazy layers and the ordinary directories between them.
//!
//! Each run becomes one merged tree and one mount. A run's key names its tree and its mount: it
//! digests everything the tree depends on, so equal keys mean equal trees, in any namespace. That is
//! the layer indexes of the run, lowest first, and, when something lies below the run, what that is,
//! because directories that the tar only implies take the attributes of those below.
//! Pure: records in, keys out.

use std::fmt;

use sha2::{Digest as _, Sha256};
use sluice_blockindex::digest::{DiffId, IndexDigest};

use crate::snapshots::{LazyLayerRecord, SnapshotId, SnapshotRecord};

/// Changes when the merger or the tree format changes, so that old trees are not found.
const TREE_VERSION: u32 = 1;

/// Names a merged tree and its mount.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunKey([u8; 32]);

impl RunKey {
    /// Reads 64 lower-case hex digits: names of files and directories.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut key = [0; 32];
        hex::decode_to_slice(text, &mut key).ok()?;
        let key = Self(key);
        (key.to_string() == text).then_some(key)
    }
}

impl fmt::Display for RunKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for RunKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RunKey({self})")
    }
}

/// Lazy layers that lie directly upon each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Names the run.
    pub key: RunKey,
    /// Lowest first; never empty. Device `i + 1` of the tree is the device of layer `i`.
    pub layers: Vec<LazyLayerRecord>,
    /// Whether anything lies below the run.
    pub above: bool,
}

/// A part of a chain that becomes one lower directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// A mount of a merged tree.
    Run(Run),
    /// The directory of an ordinary snapshot.
    Directory(SnapshotId),
}

/// Cuts a chain.
///
/// **Shape** `chain` nearest parent first, the result lowest first.
#[must_use]
pub fn segments(chain: &[SnapshotRecord]) -> Vec<Segment> {
    let mut out: Vec<Segment> = Vec::new();
    let mut open: Vec<LazyLayerRecord> = Vec::new();
    let mut below = Below::default();
    for record in chain.iter().rev() {
        if let Some(layer) = &record.layer {
            open.push(layer.clone());
            continue;
        }
        close(&mut open, &mut below, &mut out);
        below.directory(record.id);
        out.push(Segment::Directory(record.id));
    }
    close(&mut open, &mut below, &mut out);
    out
}

/// The keys of all runs of a chain.
#[must_use]
pub fn run_keys(chain: &[SnapshotRecord]) -> Vec<RunKey> {
    segments(chain)
        .into_iter()
        .filter_map(|segment| match segment {
            Segment::Run(run) => Some(run.key),
            Segment::Directory(_) => None,
        })
        .collect()
}

fn close(open: &mut Vec<LazyLayerRecord>, below: &mut Below, out: &mut Vec<Segment>) {
    if open.is_empty() {
        return;
    }
    let layers = std::mem::take(open);
    let above = !out.is_empty();
    let key = below.run(
        layers
            .iter()
            .map(|layer| (layer.diff_id, layer.index_digest)),
    );
    out.push(Segment::Run(Run { key, layers, above }));
}

/// A running digest of all that lies below a place in the chain.
#[derive(Default)]
struct Below(Option<[u8; 32]>);

impl Below {
    fn start(&self, tag: &[u8; 4]) -> Sha256 {
        let mut hasher = Sha256::new();
        hasher.update(b"sluice run");
        hasher.update(TREE_VERSION.to_le_bytes());
        hasher.update(tag);
        match &self.0 {
            Some(digest) => {
                hasher.update([1]);
                hasher.update(digest);
            }
            None => hasher.update([0]),
        }
        hasher
    }

    /// An ordinary directory: named by its number, which this node never uses twice. Its chain ID
    /// would not do: nobody here has verified what containerd unpacked under that name.
    fn directory(&mut self, id: SnapshotId) {
        let mut hasher = self.start(b"dir\0");
        hasher.update(id.0.to_le_bytes());
        self.0 = Some(hasher.finalize().into());
    }

    fn run(&mut self, layers: impl Iterator<Item = (DiffId, IndexDigest)>) -> RunKey {
        let mut hasher = self.start(b"run\0");
        for (diff_id, index) in layers {
            hasher.update(diff_id.as_bytes());
            hasher.update(index.as_bytes());
        }
        let digest = hasher.finalize().into();
        self.0 = Some(digest);
        RunKey(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshots::{SnapshotKind, Usage};
    use sluice_blockindex::digest::{BlobDigest, ChainId};
    use std::time::SystemTime;

    fn layer(n: u8) -> LazyLayerRecord {
        let diff_id = DiffId::of(&[n]);
        LazyLayerRecord {
            chain_id: ChainId::child(None, diff_id),
            diff_id,
            index_digest: IndexDigest::of(&[n]),
            blob_digest: BlobDigest::of(&[n]),
            blob_bytes: 1,
            index_source: crate::snapshots::IndexSource::Blob,
            device_bytes: 1,
            sources: Vec::new(),
        }
    }

    /// Nearest parent first: `L<n>` lazy, `D<n>` ordinary.
    fn chain(text: &str) -> Vec<SnapshotRecord> {
        text.split_whitespace()
            .enumerate()
            .map(|(i, word)| {
                let n: u8 = word[1..].parse().unwrap();
                SnapshotRecord {
                    id: SnapshotId(u64::from(n)),
                    name: format!("ns/{i}/x"),
                    kind: SnapshotKind::Committed,
                    parent: None,
                    labels: Default::default(),
                    created: SystemTime::UNIX_EPOCH,
                    updated: SystemTime::UNIX_EPOCH,
                    usage: Usage::default(),
                    layer: word.starts_with('L').then(|| layer(n)),
                }
            })
            .collect()
    }

    fn shape(text: &str) -> String {
        let words: Vec<String> = segments(&chain(text))
            .into_iter()
            .map(|segment| match segment {
                Segment::Directory(id) => format!("D{id}"),
                Segment::Run(run) => format!(
                    "{}{}",
                    if run.above { "^" } else { "_" },
                    run.layers
                        .iter()
                        .map(|l| (1..9).find(|n| layer(*n) == *l).unwrap().to_string())
                        .collect::<String>()
                ),
            })
            .collect();
        words.join(" ")
    }

    #[test]
    fn runs_are_maximal_and_lowest_first() {
        for (chain, segments) in [
            ("L3 L2 L1", "_123"),
            ("D3 L2 L1", "_12 D3"),
            ("L3 D2 L1", "_1 D2 ^3"),
            ("L4 L3 D2 D1", "D1 D2 ^34"),
            ("D1", "D1"),
            ("", ""),
        ] {
            assert_eq!(shape(chain), segments, "{chain}");
        }
    }

    #[test]
    fn keys_depend_on_all_that_the_tree_depends_on() {
        let key = |text: &str| run_keys(&chain(text)).last().copied().unwrap();
        assert_eq!(key("L2 L1"), key("L2 L1"));
        assert_eq!(
            key("D3 L2 L1"),
            key("D4 L2 L1"),
            "what is above does not matter"
        );
        let all = [
            "L2 L1", "L1 L2", "L2", "L2 D1", "L2 D3", "L2 D1 L3", "L2 D1 D3", "L2 D1 L4",
        ];
        for (i, a) in all.iter().enumerate() {
            for b in &all[i + 1..] {
                assert_ne!(key(a), key(b), "{a} / {b}");
            }
        }
    }

    #[test]
    fn keys_are_names() {
        let key = run_keys(&chain("L1"))[0];
        assert_eq!(RunKey::from_hex(&key.to_string()), Some(key));
        for bad in [
            "",
            "xx",
            &key.to_string().to_uppercase(),
            &format!("{key}0"),
        ] {
            assert_eq!(RunKey::from_hex(bad), None, "{bad}");
        }
    }
}
