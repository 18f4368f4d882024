// SPDX-License-Identifier: Apache-2.0
//! Gives each layer of an OCI layout entries for all directories above its files, as most builders do.
//!
//! umoci leaves them out where a lower layer has them, and the optimizer of stargz-snapshotter then passes over whatever
//! stands below: without this it would be measured at its worst.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use flate2::read::MultiGzDecoder;
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Archive, Builder, EntryType, Header};

/// Does so for the only image of a layout of gzip layers.
pub fn complete(layout: &Path) -> Result<()> {
    let index_path = layout.join("index.json");
    let mut index: Value = serde_json::from_slice(&std::fs::read(&index_path)?)?;
    let mut manifest: Value = serde_json::from_slice(&read(layout, &index["manifests"][0])?)?;
    let mut config: Value = serde_json::from_slice(&read(layout, &manifest["config"])?)?;
    let mut known = BTreeMap::new();
    let layers = manifest["layers"].as_array_mut().context("layers")?;
    for (number, layer) in layers.iter_mut().enumerate() {
        let mut tar = Vec::new();
        MultiGzDecoder::new(&read(layout, layer)?[..]).read_to_end(&mut tar)?;
        let first = missing(&tar, &mut known)?;
        if first.is_empty() {
            continue;
        }
        let tar = [first, tar].concat();
        config["rootfs"]["diff_ids"][number] = json!(digest(&tar));
        let mut gzip = GzBuilder::new()
            .mtime(0)
            .write(Vec::new(), Compression::new(6));
        gzip.write_all(&tar)?;
        replace(layout, layer, &gzip.finish()?)?;
    }
    replace(
        layout,
        &mut manifest["config"],
        &serde_json::to_vec(&config)?,
    )?;
    let manifest = serde_json::to_vec(&manifest)?;
    replace(layout, &mut index["manifests"][0], &manifest)?;
    std::fs::write(index_path, serde_json::to_vec(&index)?)?;
    Ok(())
}

/// Entries of the directories that a tar has none for, with what layers below said of them. Adds the tar's own.
fn missing(tar: &[u8], known: &mut BTreeMap<PathBuf, Header>) -> Result<Vec<u8>> {
    let (mut present, mut wanted) = (BTreeSet::new(), BTreeSet::new());
    let mut own = Vec::new();
    for entry in Archive::new(tar).entries()? {
        let entry = entry?;
        let path = normal(&entry.path()?);
        wanted.extend(path.ancestors().skip(1).map(Path::to_path_buf));
        if entry.header().entry_type() == EntryType::Directory {
            own.push((path.clone(), entry.header().clone()));
        }
        present.insert(path);
    }
    let mut builder = Builder::new(Vec::new());
    for path in wanted.difference(&present) {
        if path.as_os_str().is_empty() {
            continue;
        }
        let mut header = known.get(path).cloned().unwrap_or_else(plain);
        builder.append_data(&mut header, path, std::io::empty())?;
    }
    known.extend(own);
    // Without the blocks that end a tar.
    Ok(builder.get_ref().clone())
}

fn plain() -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Directory);
    header.set_mode(0o755);
    header.set_size(0);
    header
}

fn normal(path: &Path) -> PathBuf {
    let parts = path.components();
    parts
        .filter(|part| matches!(part, Component::Normal(_)))
        .collect()
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn blob(layout: &Path, descriptor: &Value) -> Result<PathBuf> {
    let digest = descriptor["digest"].as_str().context("a digest")?;
    let hex = digest.strip_prefix("sha256:").context("a sha256 digest")?;
    Ok(layout.join("blobs/sha256").join(hex))
}

fn read(layout: &Path, descriptor: &Value) -> Result<Vec<u8>> {
    let path = blob(layout, descriptor)?;
    std::fs::read(&path).with_context(|| format!("read {}", path.display()))
}

fn replace(layout: &Path, descriptor: &mut Value, bytes: &[u8]) -> Result<()> {
    let before = blob(layout, descriptor)?;
    descriptor["digest"] = json!(digest(bytes));
    descriptor["size"] = json!(bytes.len());
    let after = blob(layout, descriptor)?;
    if after != before {
        std::fs::write(after, bytes)?;
        std::fs::remove_file(before)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::layout::{Coding, write_tars};

    fn tar(entries: &[(&str, Option<u32>)]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (path, mode) in entries {
            let mut header = plain();
            match mode {
                Some(mode) => header.set_mode(*mode),
                None => header.set_entry_type(EntryType::Regular),
            }
            builder
                .append_data(&mut header, path, std::io::empty())
                .unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn directories_that_a_layer_leaves_out_come_first_and_are_those_below() {
        let directory = tempfile::tempdir().unwrap();
        let layout = directory.path();
        let below = tar(&[("./a", Some(0o700)), ("./a/b", Some(0o711))]);
        let above = tar(&[("a/b/c/file", None), ("a/b/other", None)]);
        let command = ["/bin/true"];
        write_tars(layout, &[below.clone(), above], Coding::Gzip, &command).unwrap();
        complete(layout).unwrap();

        let index: Value =
            serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
        let manifest: Value =
            serde_json::from_slice(&read(layout, &index["manifests"][0]).unwrap()).unwrap();
        let config: Value =
            serde_json::from_slice(&read(layout, &manifest["config"]).unwrap()).unwrap();
        let layer = |number: usize| {
            let blob = read(layout, &manifest["layers"][number]).unwrap();
            assert_eq!(manifest["layers"][number]["digest"], digest(&blob));
            let mut tar = Vec::new();
            MultiGzDecoder::new(&blob[..])
                .read_to_end(&mut tar)
                .unwrap();
            assert_eq!(config["rootfs"]["diff_ids"][number], digest(&tar));
            tar
        };
        assert_eq!(layer(0), below, "a layer that lacks none stays as it is");
        let found: Vec<(PathBuf, u32)> = Archive::new(&layer(1)[..])
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let mode = entry.header().mode().unwrap();
                (entry.path().unwrap().into_owned(), mode)
            })
            .collect();
        let expected = [
            ("a", 0o700),
            ("a/b", 0o711),
            ("a/b/c", 0o755),
            ("a/b/c/file", 0o755),
            ("a/b/other", 0o755),
        ];
        assert_eq!(found, expected.map(|(path, mode)| (path.into(), mode)));
    }
}
