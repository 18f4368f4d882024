// SPDX-License-Identifier: Apache-2.0
//! Merged trees on disk: `trees/<run key>.erofs`, one per run, built once and kept.
//!
//! Building reads the mapped indexes of the run and, when something lies below, the directories
//! there; no network. The key names all inputs, so a file that exists is the right one; opening it
//! checks its superblock. A crash leaves a whole file or none. All calls block: run them off the
//! runtime.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sluice_blockindex::digest::DiffId;
use sluice_blockindex::erofs::{BLOCK_BYTES, DeviceSlot, TreeReader, WriteError, write_tree};
use sluice_blockindex::merge::{MergeBase, MergeError, merge};

use crate::below::{Below, Lower, open_directory};
use crate::chain::RunKey;
use crate::indexes::LayerIndex;
use crate::{durable, sys};

/// Ends the name of a tree file.
const SUFFIX: &str = ".erofs";

/// Why a merged tree cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeBuildError {
    /// The layers cannot be merged.
    #[error("merge trees: {0}")]
    Merge(#[from] MergeError),
    /// The merged tree cannot be written.
    #[error("write merged tree: {0}")]
    Write(#[from] WriteError),
    /// A layer's tree, or a tree below, is damaged.
    #[error("read tree: {0}")]
    Tree(#[from] sluice_blockindex::erofs::TreeError),
    /// The file system failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// In the present tense.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
}

/// What lies below a run, as a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BelowPath {
    /// The merged tree of a lower run.
    Tree(PathBuf),
    /// The directory of an ordinary snapshot.
    Directory(PathBuf),
}

/// What a tree is made of.
#[derive(Clone, Debug)]
pub struct TreeInputs {
    /// Names the tree.
    pub key: RunKey,
    /// Lowest first.
    pub layers: Vec<Arc<LayerIndex>>,
    /// Highest first; empty when the run is the bottom one.
    pub below: Vec<BelowPath>,
}

/// The directory of merged trees.
#[derive(Debug)]
pub struct TreeFiles {
    directory: PathBuf,
}

impl TreeFiles {
    /// Opens the directory, which is created if need be, and sweeps leftovers.
    pub fn open(directory: &Path) -> io::Result<Self> {
        durable::create_private_directory(directory)?;
        durable::sweep_temporary(directory)?;
        Ok(Self {
            directory: directory.to_owned(),
        })
    }

    /// Where the tree of a run is or would be.
    #[must_use]
    pub fn path(&self, key: RunKey) -> PathBuf {
        self.directory.join(format!("{key}{SUFFIX}"))
    }

    /// The tree's path, after building it if it is not there.
    pub fn ensure(&self, inputs: &TreeInputs) -> Result<PathBuf, TreeBuildError> {
        let path = self.path(inputs.key);
        match sys::map::read_only(&path) {
            Ok(map) if has_devices(&map, inputs.layers.len()) => return Ok(path),
            Ok(_) => {
                tracing::error!(path = %path.display(), "tree file is damaged, build it again")
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(TreeBuildError::Io {
                    what: "map tree",
                    path,
                    source,
                });
            }
        }
        let bytes = build(inputs)?;
        for layer in &inputs.layers {
            layer.source().release_pages();
        }
        durable::write(&self.directory, &format!("{}{SUFFIX}", inputs.key), &bytes).map_err(
            |source| TreeBuildError::Io {
                what: "write tree",
                path: path.clone(),
                source,
            },
        )?;
        tracing::debug!(run = %inputs.key, bytes = bytes.len(), "built a merged tree");
        Ok(path)
    }

    /// The keys of all trees that were written at least `age` ago.
    pub fn older_than(&self, age: Duration) -> io::Result<Vec<RunKey>> {
        let mut keys = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let key = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
            let Some(key) = key.and_then(RunKey::from_hex) else {
                continue;
            };
            let written = entry.metadata()?.modified()?;
            // A clock that was set back makes a tree look young, which only keeps it longer.
            if written.elapsed().is_ok_and(|elapsed| elapsed >= age) {
                keys.push(key);
            }
        }
        Ok(keys)
    }

    /// Deletes a tree.
    pub fn remove(&self, key: RunKey) -> io::Result<()> {
        match std::fs::remove_file(self.path(key)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn has_devices(bytes: &[u8], layers: usize) -> bool {
    TreeReader::open(bytes).is_ok_and(|tree| tree.devices().len() == layers)
}

/// The device table's name of a layer device.
fn tag(diff_id: DiffId) -> [u8; 64] {
    let mut tag = [0; 64];
    tag.copy_from_slice(diff_id.hex().as_bytes());
    tag
}

fn build(inputs: &TreeInputs) -> Result<Vec<u8>, TreeBuildError> {
    let readers: Vec<TreeReader<'_>> = inputs
        .layers
        .iter()
        .map(|layer| layer.tree())
        .collect::<Result<_, _>>()?;
    let devices: Vec<DeviceSlot> = inputs
        .layers
        .iter()
        .map(|layer| DeviceSlot {
            tag: tag(layer.diff_id()),
            blocks: layer.device_bytes().div_ceil(BLOCK_BYTES),
        })
        .collect();
    let maps = inputs
        .below
        .iter()
        .filter_map(|below| match below {
            BelowPath::Tree(path) => Some(path),
            BelowPath::Directory(_) => None,
        })
        .map(|path| {
            sys::map::read_only(path).map_err(|source| TreeBuildError::Io {
                what: "map tree",
                path: path.clone(),
                source,
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut maps = maps.iter();
    let mut lowers = Vec::new();
    for below in &inputs.below {
        lowers.push(match below {
            BelowPath::Tree(_) => {
                let map: &[u8] = maps.next().map_or(&[], |map| map);
                Lower::Tree(TreeReader::open(map)?)
            }
            BelowPath::Directory(path) => {
                Lower::Directory(open_directory(path).map_err(|source| TreeBuildError::Io {
                    what: "open snapshot directory",
                    path: path.clone(),
                    source,
                })?)
            }
        });
    }
    let below = Below::new(lowers);
    let base = if inputs.below.is_empty() {
        MergeBase::Bottom
    } else {
        MergeBase::Above(&below)
    };
    Ok(write_tree(&merge(&readers, base)?, &devices)?)
}
