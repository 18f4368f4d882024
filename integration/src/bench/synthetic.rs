// SPDX-License-Identifier: Apache-2.0
//! Images with the counts of real ones, made quickly. Everything follows from a seed.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

use crate::harness::layout::{self, Attributes, Layer};

/// Files of the layers of an image, lowest first: a distribution, its packages, a language's packages, an
/// application. 4880 together.
pub const FILES_PER_LAYER: [usize; 10] = [2000, 1000, 600, 400, 300, 200, 150, 100, 80, 50];

/// Files of one directory.
const DIRECTORY_FILES: usize = 24;
/// File sizes: as many between 100 and 200 bytes as between any of these and its double, up to 12,800.
const FILE_BYTES: usize = 100;
const FILE_DOUBLINGS: u32 = 7;
/// What repeats in a file: it costs time to make, to compress and to transfer, and takes no memory of whoever
/// serves it.
const PATTERN_BYTES: usize = 64;

/// Writes image `number` below `directory`: ten layers that no other number has.
pub fn many_files(directory: &Path, number: u64) -> Result<PathBuf> {
    let mut random = StdRng::seed_from_u64(number);
    let mut layers = Vec::with_capacity(FILES_PER_LAYER.len());
    for (i, files) in FILES_PER_LAYER.into_iter().enumerate() {
        layers.push(packages(&mut random, i, files)?);
    }
    layout::write(directory, &mut layers, &["/none"])
}

fn packages(random: &mut StdRng, number: usize, files: usize) -> Result<Layer> {
    let mut layer = Layer::new();
    for file in 0..files {
        let directory = format!("usr/lib/layer{number}/package{:04}", file / DIRECTORY_FILES);
        if file % DIRECTORY_FILES == 0 {
            layer.directory(&directory, Attributes::root(0o755))?;
        }
        let least = FILE_BYTES << random.random_range(0..FILE_DOUBLINGS);
        let bytes = random.random_range(least..2 * least);
        let mut pattern = [0; PATTERN_BYTES];
        random.fill_bytes(&mut pattern);
        let content: Vec<u8> = pattern.iter().copied().cycle().take(bytes).collect();
        let path = format!("{directory}/module_{file:05}.so");
        layer.file(&path, Attributes::root(0o644), &content)?;
    }
    Ok(layer)
}

/// Files of a group of [`groups`]: together about what a chunk holds.
pub const GROUP_FILES: usize = 16;
/// Bytes of each.
pub const GROUP_FILE_BYTES: usize = 8 << 10;
/// Between two groups, more than is read ahead of a reader that nothing is known of. A multiple of what chunks are
/// cut to, so that the next group begins one.
const GAP_BYTES: usize = 2 << 20;

/// The path of a file of a group.
#[must_use]
pub fn group_file(group: usize, file: usize) -> String {
    format!("group{group:03}/file{file:02}")
}

/// Writes an image of one layer below `directory`, with groups of small files far from each other. Half of each byte
/// is random.
pub fn groups(directory: &Path, groups: usize) -> Result<PathBuf> {
    let mut random = StdRng::seed_from_u64(1);
    let mut half_random = |bytes: usize| {
        let mut content = vec![0; bytes];
        random.fill_bytes(&mut content);
        content.iter_mut().for_each(|byte| *byte &= 0xf);
        content
    };
    let (directories, files) = (Attributes::root(0o755), Attributes::root(0o644));
    let mut layer = Layer::new();
    layer.directory("gap", directories)?;
    for group in 0..groups {
        layer.directory(&format!("group{group:03}"), directories)?;
    }
    for group in 0..groups {
        layer.file(&format!("gap/{group:03}"), files, &half_random(GAP_BYTES))?;
        for file in 0..GROUP_FILES {
            let content = half_random(GROUP_FILE_BYTES);
            layer.file(&group_file(group, file), files, &content)?;
        }
    }
    layer.file("gap/last", files, &half_random(GAP_BYTES))?;
    layout::write(directory, &mut [layer], &["/none"])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digests(layout: &Path) -> Vec<String> {
        let index = std::fs::read(layout.join("index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let digest = index["manifests"][0]["digest"].as_str().unwrap();
        let hex = digest.strip_prefix("sha256:").unwrap();
        let manifest = std::fs::read(layout.join("blobs/sha256").join(hex)).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let layers = manifest["layers"].as_array().unwrap();
        let digest = |layer: &serde_json::Value| layer["digest"].as_str().unwrap().to_owned();
        layers.iter().map(digest).collect()
    }

    #[test]
    fn images_share_no_layer_and_are_the_same_again() {
        let image = |number| {
            let directory = tempfile::tempdir().unwrap();
            let layout = many_files(directory.path(), number).unwrap();
            digests(&layout)
        };
        let (one, two) = (image(1), image(2));
        let mut all = [one.clone(), two].concat();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 2 * FILES_PER_LAYER.len());
        assert_eq!(image(1), one);
    }
}
