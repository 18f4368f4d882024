// SPDX-License-Identifier: Apache-2.0
//! The image that nodes start: small enough for slow links, and started as real applications start.
//!
//! Four layers: a base system of many small files, libraries, large data files, the application.
//! The program is a shell script of the static busybox. It follows a *walk*: the first line of each
//! file names the next file and how many blocks of this one are read, so no read can begin before the
//! one before it has ended, as with a linker and an interpreter. Libraries are read in part or whole,
//! most files never. It prints `begun` when the container runs and `read DIGEST` when the walk is over;
//! the digest is over all bytes read, so one wrong byte anywhere shows.
//!
//! Content is made from a seed: every byte string differs, and compresses to three quarters.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::harness::layout::{self, Attributes, Layer};

/// Unit in which the program reads.
const BLOCK_BYTES: usize = 64 * 1024;
/// Last name of a walk.
const END: &str = "end";

const SCRIPT: &str = r#"#!/bin/sh
# Follows the walk; see integration/src/cluster/image.rs.
echo begun
walk() {
  f=/srv/app/entry
  while [ "$f" != end ]; do
    read -r next blocks <"$f"
    dd if="$f" bs=65536 count="$blocks" 2>/dev/null
    f=$next
  done
}
set -- $(walk | sha256sum)
echo "read $1"
"#;

/// An image as an OCI layout.
#[derive(Debug)]
pub struct Image {
    name: String,
    layout: PathBuf,
    digest: String,
    walk_bytes: u64,
}

/// An image in the registry.
#[derive(Debug, Clone)]
pub struct Published {
    /// What nodes pull.
    pub reference: String,
    /// What its program prints.
    pub digest: String,
    /// Of all its layer blobs.
    pub bytes: u64,
}

/// A group of files of one kind.
#[derive(Debug, Clone, Copy)]
struct Kind {
    directory: &'static str,
    files: usize,
    /// Smallest and largest size, in KiB.
    sizes: (u64, u64),
    /// Every so manieth file is on the walk.
    walk_one_in: usize,
    /// Only the first block is read of a file on the walk.
    head_only: bool,
}

// Read-ahead ends where a layer ends, and spills over the files between where few are read. Here it
// takes nearly all of the first, second and last layer, and two windows of the third, whatever the
// timing: two starts fetch the same bytes, so the bytes of several can be compared with those of one.
const SYSTEM: Kind = Kind {
    directory: "usr/share",
    files: 240,
    sizes: (1, 30),
    walk_one_in: 8,
    head_only: false,
};
const LIBRARIES: Kind = Kind {
    directory: "usr/lib",
    files: 24,
    sizes: (100, 700),
    walk_one_in: 1,
    head_only: false,
};
const DATA: Kind = Kind {
    directory: "srv/data",
    files: 2,
    sizes: (15_000, 15_000),
    walk_one_in: 2,
    head_only: true,
};
const MODULES: Kind = Kind {
    directory: "srv/app/lib",
    files: 40,
    sizes: (20, 80),
    walk_one_in: 1,
    head_only: false,
};

/// From the lowest.
const LAYERS: [Kind; 4] = [SYSTEM, LIBRARIES, DATA, MODULES];

struct File {
    path: String,
    content: Vec<u8>,
    /// Blocks that the program reads, if it is on the walk.
    read: Option<usize>,
}

impl Image {
    /// Makes the image `name` below `directory`. Images of different seeds share no chunk.
    pub fn build(directory: &Path, name: &str, seed: u64) -> Result<Self> {
        let mut random = Random(seed);
        let mut layers = LAYERS.map(|kind| files(&mut random, kind));
        let (entry, digest, walk_bytes) = lay_walk(&mut random, &mut layers);
        let root = Attributes::root;
        let mut tars = Vec::new();
        for (i, files) in layers.iter().enumerate() {
            let mut tar = Layer::new();
            if i == 0 {
                tar.directory("bin", root(0o755))?.file(
                    "bin/busybox",
                    root(0o755),
                    &layout::busybox()?,
                )?;
                for program in ["sh", "dd", "sha256sum"] {
                    tar.symlink(&format!("bin/{program}"), "busybox")?;
                }
            }
            if i + 1 == layers.len() {
                tar.file("srv/app/start", root(0o755), SCRIPT.as_bytes())?
                    .file("srv/app/entry", root(0o644), &entry)?;
            }
            for file in files {
                tar.file(&file.path, root(0o644), &file.content)?;
            }
            tars.push(tar);
        }
        let layout = layout::write(&directory.join(name), &mut tars, &["/srv/app/start"])
            .with_context(|| format!("write image {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            layout,
            digest,
            walk_bytes,
        })
    }

    /// Its repository.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The OCI layout, tagged `latest`.
    #[must_use]
    pub fn layout(&self) -> &Path {
        &self.layout
    }

    /// What its program prints after `read `.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Uncompressed bytes that its program reads.
    #[must_use]
    pub fn walk_bytes(&self) -> u64 {
        self.walk_bytes
    }
}

fn files(random: &mut Random, kind: Kind) -> Vec<File> {
    let (least, most) = kind.sizes;
    let file = |i: usize| {
        let kib = least + random.below(most - least + 1);
        let content = random.text(usize::try_from(kib * 1024).expect("some megabytes"));
        let blocks = if kind.head_only {
            1
        } else {
            content.len().div_ceil(BLOCK_BYTES)
        };
        File {
            path: format!("{}/f{i:03}", kind.directory),
            content,
            read: i.is_multiple_of(kind.walk_one_in).then_some(blocks),
        }
    };
    (0..kind.files).map(file).collect()
}

/// Orders the files of the walk, writes into each where it goes on, and returns the entry's content,
/// the digest of all that is read, and how much that is.
fn lay_walk(random: &mut Random, layers: &mut [Vec<File>]) -> (Vec<u8>, String, u64) {
    let mut walk: Vec<&mut File> = layers
        .iter_mut()
        .flatten()
        .filter(|file| file.read.is_some())
        .collect();
    for i in (1..walk.len()).rev() {
        let other = random.below(i as u64 + 1);
        walk.swap(i, usize::try_from(other).expect("below the length"));
    }
    let mut next = END.to_owned();
    for file in walk.iter_mut().rev() {
        let line = format!("{next} {}\n", file.read.unwrap_or(0));
        file.content[..line.len()].copy_from_slice(line.as_bytes());
        next = format!("/{}", file.path);
    }
    let entry = format!("{next} 1\n").into_bytes();
    let mut whole = Sha256::new_with_prefix(&entry);
    let mut bytes = entry.len() as u64;
    for file in walk {
        let read = (file.read.unwrap_or(0) * BLOCK_BYTES).min(file.content.len());
        whole.update(&file.content[..read]);
        bytes += read as u64;
    }
    (entry, hex::encode(whole.finalize()), bytes)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Text of 64 different letters: six bits a byte.
    fn text(&mut self, bytes: usize) -> Vec<u8> {
        let mut text = Vec::with_capacity(bytes + 8);
        while text.len() < bytes {
            let word = (self.next() & 0x3f3f_3f3f_3f3f_3f3f) + 0x3030_3030_3030_3030;
            text.extend_from_slice(&word.to_le_bytes());
        }
        text.truncate(bytes);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_walk_reads_what_the_digest_says() {
        let directory = tempfile::tempdir().unwrap();
        let image = Image::build(directory.path(), "walk", 7).unwrap();
        // Follow it as the script does, in files made from the same seed.
        let mut random = Random(7);
        let mut layers = LAYERS.map(|kind| files(&mut random, kind));
        let (entry, _, bytes) = lay_walk(&mut random, &mut layers);
        let mut whole = Sha256::new();
        let (mut content, mut steps) = (&entry, 0);
        loop {
            let line = content.split(|byte| *byte == b'\n').next().unwrap();
            let (next, blocks) = std::str::from_utf8(line).unwrap().split_once(' ').unwrap();
            let read = blocks.parse::<usize>().unwrap() * BLOCK_BYTES;
            whole.update(&content[..read.min(content.len())]);
            steps += 1;
            if next == END {
                break;
            }
            content = &layers
                .iter()
                .flatten()
                .find(|file| file.path == next[1..])
                .unwrap()
                .content;
        }
        assert_eq!(hex::encode(whole.finalize()), image.digest());
        assert_eq!(steps, 1 + 30 + 24 + 1 + 40);
        assert_eq!(image.walk_bytes(), bytes);
    }
}
