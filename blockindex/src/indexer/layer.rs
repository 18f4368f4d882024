// SPDX-License-Identifier: Apache-2.0
//! What a layer's tar is made into, whatever blob it came from: its diff ID, tree and contents.

use crate::digest::{DiffId, FileDigest, Sha256Hasher, StrongAlgorithm, StrongHasher};
use crate::extent::{DeviceSpace, Extent};
use crate::index::FileContent;
use crate::tar::{ScanError, Scanner, TarSink};
use crate::tree::Tree;

/// Takes a tar from its first byte to its last.
#[derive(Debug)]
pub(super) struct Layer {
    diff: Sha256Hasher,
    /// Or why the layer cannot be lazy.
    scanner: Result<Scanner, ScanError>,
    contents: Contents,
    device_bytes: u64,
}

/// Digests of the contents.
#[derive(Debug)]
struct Contents {
    files: Vec<FileContent>,
    hasher: StrongHasher,
    current: Option<Extent<DeviceSpace>>,
}

impl TarSink for Contents {
    fn structure(&mut self, _bytes: &[u8]) {}

    fn content_start(&mut self, run: Extent<DeviceSpace>) {
        self.current = Some(run);
    }

    fn content(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    fn content_end(&mut self) {
        let digest = FileDigest(self.hasher.finish_reset());
        if let Some(run) = self.current.take() {
            self.files.push(FileContent { run, digest });
        }
    }
}

impl Layer {
    pub(super) fn new(algorithm: StrongAlgorithm) -> Self {
        Self {
            diff: Sha256Hasher::new(),
            scanner: Ok(Scanner::new()),
            contents: Contents {
                files: Vec::new(),
                hasher: algorithm.hasher(),
                current: None,
            },
            device_bytes: 0,
        }
    }

    /// Bytes of the tar taken so far.
    pub(super) fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// About how many bytes tree and contents take by now.
    pub(super) fn held_bytes(&self) -> u64 {
        let tree = self.scanner.as_ref().map_or(0, Scanner::held_bytes);
        tree + (self.contents.files.len() * size_of::<FileContent>()) as u64
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.diff.update(bytes);
        self.device_bytes += bytes.len() as u64;
        if let Ok(scanner) = &mut self.scanner
            && let Err(error) = scanner.push(bytes, &mut self.contents)
        {
            self.scanner = Err(error);
            self.contents.files = Vec::new();
        }
    }

    /// Diff ID, and tree with contents or why the layer cannot be lazy.
    pub(super) fn finish(self) -> (DiffId, Result<(Tree, Vec<FileContent>), ScanError>) {
        let tree = self.scanner.and_then(Scanner::finish);
        let diff_id = DiffId::from_bytes(self.diff.finish());
        (diff_id, tree.map(|tree| (tree, self.contents.files)))
    }
}
