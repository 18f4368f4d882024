// SPDX-License-Identifier: Apache-2.0
//! The images of the other scenes. Everything follows from seeds.
//!
//! All have busybox and a program `/srv/start`, which reads what `/srv/list` names, says so and stays. Half of each
//! byte of content is random: it compresses to about half, as programs do.

use std::path::Path;

use anyhow::Result;
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use tar::{EntryType, Header};

use super::run::{READY, STARTED};
use super::side_by_side::side_by_side;
use crate::harness::layout::blob::Blob;
use crate::harness::layout::{self, Attributes, Coding, Layer};

/// What each image runs.
pub const PROGRAM: &str = "/srv/start";
/// Programs of busybox that the scripts use.
const APPLETS: [&str; 8] = ["sh", "cat", "dd", "find", "sed", "sleep", "wc", "xargs"];
/// The first layer is as large as a small distribution: SOCI indexes no layer below 10 MiB, and no image without any.
const BASE_BYTES: usize = 28 << 20;
/// Files of the first layer beside busybox.
const BASE_FILES: usize = 700;

/// Images of the scene of many containers.
pub const MANY_IMAGES: u64 = 10;
/// Layers that all of them have above the first: a language and its packages.
const SHARED: [(usize, usize); 2] = [(24 << 20, 900), (12 << 20, 500)];
/// Layers that each has for itself, bytes and files.
const OWN: [(usize, usize); 5] = [
    (24 << 20, 600),
    (8 << 20, 300),
    (8 << 20, 300),
    (4 << 20, 200),
    (1 << 20, 40),
];
/// Files that are read of each layer.
const READ_OF_LAYER: usize = 8;

/// The most layers that are tried: images of more cannot be run by all.
pub const LAYERS: usize = 127;
/// Files of each of them.
const LAYER_FILES: usize = 20;
/// Bytes of each such file.
const LAYER_FILE_BYTES: usize = 4 << 10;

/// Files of the scene of many files.
pub const FILES: usize = 200_000;
/// Layers that they are in.
const FILES_LAYERS: usize = 2;
/// Files of a directory.
const DIRECTORY_FILES: usize = 100;
/// Bytes of each: from, to.
const SMALL_BYTES: [usize; 2] = [200, 1800];
/// How many of them are read.
pub const FILES_READ: usize = 1000;

/// An image in the making: its layers stand in a layout.
#[derive(Debug)]
pub struct Making {
    /// The lowest first.
    pub layers: Vec<Blob>,
    /// Entries that a walk must find at least.
    pub entries: Option<u64>,
}

/// A layer's tar that is to become a blob.
#[derive(Debug)]
pub struct Tar(Vec<u8>);

impl Tar {
    fn of(mut layer: Layer) -> Result<Self> {
        Ok(Self(layer.finish()?))
    }

    /// Its blob below `directory`.
    pub fn blob(&self, directory: &Path) -> Result<Blob> {
        Blob::write(directory, &self.0, Coding::Gzip)
    }
}

/// The ten images of the scene of many containers, of eight layers each, the first three of which are the same.
pub fn many(directory: &Path) -> Result<Vec<Making>> {
    let mut random = StdRng::seed_from_u64(1);
    // Which files are read stands in each image's last layer.
    let mut shared = vec![base("", "", &mut random)?];
    for (number, (bytes, files)) in SHARED.into_iter().enumerate() {
        let directory = format!("usr/lib/shared{number}");
        shared.push(Tar::of(content(&mut random, &directory, bytes, files)?)?);
    }
    let shared = side_by_side(&shared, |tar| tar.blob(directory))?;
    let images: Vec<u64> = (0..MANY_IMAGES).collect();
    side_by_side(&images, |number| {
        let mut random = StdRng::seed_from_u64(100 + number);
        let mut layers = shared.clone();
        let mut list = read_of(&mut random, "usr/share/base", BASE_FILES);
        for (layer, (_, files)) in SHARED.into_iter().enumerate() {
            list += &read_of(&mut random, &format!("usr/lib/shared{layer}"), files);
        }
        for (layer, (bytes, files)) in OWN.into_iter().enumerate() {
            let name = format!("srv/app{number}/part{layer}");
            list += &read_of(&mut random, &name, files);
            let mut tar = content(&mut random, &name, bytes, files)?;
            if layer + 1 == OWN.len() {
                program(&mut tar, "xargs cat </srv/list >/dev/null\n", &list)?;
            }
            layers.push(Tar::of(tar)?.blob(directory)?);
        }
        Ok(Making {
            layers,
            entries: None,
        })
    })
}

/// An image of 127 layers. Each adds a directory, changes a file that others have, and deletes one of two layers below.
pub fn many_layers(directory: &Path) -> Result<Making> {
    let mut random = StdRng::seed_from_u64(2);
    let mut tars = vec![base(&walk(), "", &mut random)?];
    for number in 1..LAYERS {
        let name = format!("layers/layer{number:03}");
        let bytes = LAYER_FILES * LAYER_FILE_BYTES;
        let mut layer = content(&mut random, &name, bytes, LAYER_FILES)?;
        let state = half_random(&mut random, LAYER_FILE_BYTES);
        layer.directory("var", Attributes::root(0o755))?;
        layer.directory("var/state", Attributes::root(0o755))?;
        layer.file("var/state/last", Attributes::root(0o644), &state)?;
        if number > 2 {
            let below = format!("layers/layer{:03}", number - 2);
            layer.directory(&below, Attributes::root(0o755))?;
            let whiteout = format!("{below}/.wh.file00000");
            layer.file(&whiteout, Attributes::root(0o644), b"")?;
        }
        tars.push(Tar::of(layer)?);
    }
    let layers = side_by_side(&tars, |tar| tar.blob(directory))?;
    // A directory and its files for each layer but the first, less what is deleted.
    let entries = (LAYERS - 1) * (1 + LAYER_FILES) - (LAYERS - 3) + BASE_FILES;
    Ok(Making {
        layers,
        entries: Some(u64::try_from(entries)?),
    })
}

/// An image of 200,000 small files.
pub fn many_files(directory: &Path) -> Result<Making> {
    let mut random = StdRng::seed_from_u64(3);
    let path = |file: usize| {
        let (directory, layer) = (file / DIRECTORY_FILES, file / (FILES / FILES_LAYERS));
        format!("files/layer{layer}/directory{directory:04}/file{file:06}")
    };
    let read = (0..FILES_READ).map(|_| format!("/{}\n", path(random.random_range(0..FILES))));
    let list: String = read.collect();
    let script = walk() + "xargs cat </srv/list >/dev/null\n";
    let mut tars = vec![base(&script, &list, &mut random)?];
    for first in (0..FILES).step_by(FILES / FILES_LAYERS) {
        let mut layer = Layer::new();
        for file in first..first + FILES / FILES_LAYERS {
            let path = path(file);
            if file % DIRECTORY_FILES == 0 {
                parents(&mut layer, &path, file == first)?;
            }
            let bytes = random.random_range(SMALL_BYTES[0]..SMALL_BYTES[1]);
            let content = half_random(&mut random, bytes);
            layer.file(&path, Attributes::root(0o644), &content)?;
        }
        tars.push(Tar::of(layer)?);
    }
    let layers = side_by_side(&tars, |tar| tar.blob(directory))?;
    let entries = FILES + FILES / DIRECTORY_FILES + FILES_LAYERS + BASE_FILES;
    Ok(Making {
        layers,
        entries: Some(u64::try_from(entries)?),
    })
}

/// The first layer: busybox, some content, and the program with what it reads if it does anything.
pub fn base(script: &str, list: &str, random: &mut StdRng) -> Result<Tar> {
    let mut layer = content(random, "usr/share/base", BASE_BYTES, BASE_FILES)?;
    layer.directory("bin", Attributes::root(0o755))?;
    let busybox = layout::busybox()?;
    layer.file("bin/busybox", Attributes::root(0o755), &busybox)?;
    for applet in APPLETS {
        layer.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    // Mount points, so that no container makes them first.
    for directory in ["dev", "etc", "proc", "sys", "tmp"] {
        layer.directory(directory, Attributes::root(0o755))?;
    }
    if !script.is_empty() {
        program(&mut layer, script, list)?;
    }
    Tar::of(layer)
}

/// A tar's header as [`Layer`] writes it.
pub fn tar_header(path: &str, kind: EntryType, size: u64) -> Result<Header> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_path(path)?;
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(size);
    header.set_cksum();
    Ok(header)
}

fn walk() -> String {
    "find / -xdev | wc -l | sed 's/^/scale: listed /'\n".to_owned()
}

/// The program: what the script does, between two lines that say where it is. Then it stays, to be looked at.
fn program(layer: &mut Layer, script: &str, list: &str) -> Result<()> {
    let text = format!(
        "#!/bin/sh\necho '{}'\n{script}echo '{READY}'\nexec sleep 100000\n",
        STARTED
    );
    layer.directory("srv", Attributes::root(0o755))?;
    layer.file("srv/list", Attributes::root(0o644), list.as_bytes())?;
    layer.file("srv/start", Attributes::root(0o755), text.as_bytes())?;
    Ok(())
}

/// A directory of so many bytes in files, half as large to twice as large as their mean.
fn content(random: &mut StdRng, directory: &str, bytes: usize, files: usize) -> Result<Layer> {
    let mut layer = Layer::new();
    parents(&mut layer, &format!("{directory}/file"), true)?;
    let mean = bytes / files;
    for file in 0..files {
        // Of these factors the mean is 1.
        let bytes = mean * [2, 3, 3, 8][random.random_range(0..4)] / 4;
        let content = half_random(random, bytes);
        let path = format!("{directory}/file{file:05}");
        layer.file(&path, Attributes::root(0o644), &content)?;
    }
    Ok(layer)
}

/// Some files of such a directory.
fn read_of(random: &mut StdRng, directory: &str, files: usize) -> String {
    let file = |_| format!("/{directory}/file{:05}\n", random.random_range(0..files));
    (0..READ_OF_LAYER).map(file).collect()
}

/// The directories above a path; only the last one if the others are there.
fn parents(layer: &mut Layer, path: &str, all: bool) -> Result<()> {
    let ends: Vec<usize> = path.match_indices('/').map(|(end, _)| end).collect();
    let skipped = if all { 0 } else { ends.len() - 1 };
    for end in ends.into_iter().skip(skipped) {
        layer.directory(&path[..end], Attributes::root(0o755))?;
    }
    Ok(())
}

fn half_random(random: &mut StdRng, bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    random.fill_bytes(&mut content);
    content.iter_mut().for_each(|byte| *byte &= 0xf);
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_is_in_them() {
        let mut layer = Layer::new();
        parents(&mut layer, "a/b/c", true).unwrap();
        parents(&mut layer, "a/d/e", false).unwrap();
        let tar = layer.finish().unwrap();
        let mut archive = tar::Archive::new(&tar[..]);
        let paths: Vec<String> = archive
            .entries()
            .unwrap()
            .map(|it| it.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(paths, ["a", "a/b", "a/d"]);
    }
}
