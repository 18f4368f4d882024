// SPDX-License-Identifier: Apache-2.0
//! The next version of an image, as its next build would make it: everything installed anew, one package upgraded.
//!
//! Every modification time moves on by a day, those that Python keeps of its sources too, so that no layer, and no
//! header of a tar, is what it was. Files of the upgraded package are longer by a few bytes that nobody minds; all other
//! files are what they were.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::layout::blob::{Blob, Hashed, put};

/// A day.
const LATER_SECONDS: u64 = 86_400;
/// Nothing to any language, JSON among them, nor to a linker.
const UPGRADE: &[u8] = b"\n\n \n\n";

/// How much of an image is what it was.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Changes {
    /// Files whose content changed.
    pub files: u64,
    /// Their bytes, as they are now.
    pub bytes: u64,
    /// Bytes of all files.
    pub all_bytes: u64,
}

impl Changes {
    /// The share of changed files' bytes.
    #[must_use]
    pub fn percent(&self) -> f64 {
        self.bytes as f64 * 100.0 / self.all_bytes.max(1) as f64
    }
}

/// Writes the next version of the image in `layout` to `destination`, with those files upgraded whose paths have `package`
/// in them.
pub fn write(layout: &Path, destination: &Path, package: &str) -> Result<(PathBuf, Changes)> {
    let of = |root: &Path, digest: &Value| -> Result<PathBuf> {
        let hex = digest.as_str().and_then(|it| it.strip_prefix("sha256:"));
        Ok(root.join("blobs/sha256").join(hex.context("a digest")?))
    };
    let json =
        |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    let blobs = destination.join("blobs/sha256");
    std::fs::create_dir_all(&blobs)?;
    let mut index = json(layout.join("index.json"))?;
    let mut manifest = json(of(layout, &index["manifests"][0]["digest"])?)?;
    let mut config = json(of(layout, &manifest["config"]["digest"])?)?;
    let mut changes = Changes::default();
    let count = manifest["layers"].as_array().context("layers")?.len();
    for at in 0..count {
        let media_type = manifest["layers"][at]["mediaType"].as_str();
        ensure!(
            media_type.is_some_and(|it| it.ends_with("gzip")),
            "a layer in gzip"
        );
        let source = File::open(of(layout, &manifest["layers"][at]["digest"])?)?;
        let layer = Blob::stream(destination, |compressed| {
            let mut tar = Hashed::new(GzEncoder::new(compressed, Compression::new(6)));
            let before = GzDecoder::new(BufReader::new(source));
            rewrite(before, &mut tar, package, &mut changes)?;
            let (gzip, diff_id, _) = tar.finish();
            gzip.finish()?;
            Ok(diff_id)
        })?;
        config["rootfs"]["diff_ids"][at] = format!("sha256:{}", layer.diff_id).into();
        manifest["layers"][at] = layer.descriptor;
    }
    ensure!(
        changes.files > 0,
        "no path of the image has {package:?} in it"
    );
    let store = |value: &Value, kind: &Value| -> Result<Value> {
        let kind = kind.as_str().context("a media type")?;
        put(&blobs, value.to_string().as_bytes(), kind)
    };
    manifest["config"] = store(&config, &manifest["config"]["mediaType"])?;
    let described = store(&manifest, &index["manifests"][0]["mediaType"])?;
    for field in ["digest", "size"] {
        index["manifests"][0][field] = described[field].clone();
    }
    std::fs::write(destination.join("index.json"), index.to_string())?;
    std::fs::copy(layout.join("oci-layout"), destination.join("oci-layout"))?;
    Ok((destination.to_owned(), changes))
}

fn rewrite(
    tar: impl Read,
    out: &mut dyn Write,
    package: &str,
    changes: &mut Changes,
) -> Result<()> {
    let mut archive = tar::Archive::new(tar);
    let mut builder = tar::Builder::new(out);
    // Of an entry's extended header, or long name, before it.
    let mut long_path = None;
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let mut header = entry.header().clone();
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        let kind = header.entry_type();
        if kind.is_pax_local_extensions() {
            content = later_records(&content)?;
            long_path = record(&content, "path").or(long_path);
        } else if kind.is_gnu_longname() {
            let end = content.iter().position(|it| *it == 0);
            let name = &content[..end.unwrap_or(content.len())];
            long_path = Some(String::from_utf8_lossy(name).into_owned());
        } else if !kind.is_gnu_longlink() && !kind.is_pax_global_extensions() {
            header.set_mtime(header.mtime()? + LATER_SECONDS);
            let path = long_path.take().unwrap_or(path);
            if kind.is_file() && !content.is_empty() {
                let changed = change(&path, &mut content, package);
                changes.files += u64::from(changed);
                changes.bytes += if changed { content.len() as u64 } else { 0 };
                changes.all_bytes += content.len() as u64;
            }
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content.as_slice())?;
    }
    builder.into_inner()?.flush()?;
    Ok(())
}

/// Changes the content of a file if the next build would; says whether it did.
fn change(path: &str, content: &mut Vec<u8>, package: &str) -> bool {
    let upgraded = path.contains(package);
    let compiled = path.ends_with(".pyc") && content.len() >= 16;
    if compiled && content[4..8] == [0; 4] {
        // Compiled Python names the modification time of its source, unless it goes by a hash of it.
        let seconds = u32::from_le_bytes([content[8], content[9], content[10], content[11]]);
        let later = seconds.wrapping_add(u32::try_from(LATER_SECONDS).unwrap_or(0));
        content[8..12].copy_from_slice(&later.to_le_bytes());
        return true;
    }
    if upgraded && !compiled {
        content.extend_from_slice(UPGRADE);
    }
    upgraded && !compiled
}

/// Extended headers with later modification times; they have as many digits.
fn later_records(records: &[u8]) -> Result<Vec<u8>> {
    let mut out = records.to_vec();
    let Some(at) = records.windows(7).position(|it| it == b" mtime=") else {
        return Ok(out);
    };
    let digits = records[at + 7..]
        .iter()
        .take_while(|it| it.is_ascii_digit());
    let digits = at + 7..at + 7 + digits.count();
    let seconds: u64 = std::str::from_utf8(&records[digits.clone()])?.parse()?;
    let later = (seconds + LATER_SECONDS).to_string();
    ensure!(
        later.len() == digits.len(),
        "a modification time of {seconds}"
    );
    out[digits].copy_from_slice(later.as_bytes());
    Ok(out)
}

fn record(records: &[u8], name: &str) -> Option<String> {
    let text = String::from_utf8_lossy(records);
    let wanted = format!(" {name}=");
    let mut lines = text.lines();
    lines.find_map(|line| Some(line.split_once(&wanted)?.1.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::layout::{self, Attributes, Layer};

    #[test]
    fn only_times_and_the_package_change() {
        let directory = tempfile::tempdir().unwrap();
        let mut layer = Layer::new();
        layer.directory("usr", Attributes::root(0o755)).unwrap();
        let long = format!("usr/{}/flask/x.py", "d".repeat(120));
        let mut compiled = vec![0; 40];
        compiled[8] = 1;
        for (path, content) in [
            ("usr/same", &b"same"[..]),
            (&long, b"import this"),
            ("usr/a.pyc", &compiled),
            ("usr/empty", b""),
        ] {
            layer.file(path, Attributes::root(0o644), content).unwrap();
        }
        let first = layout::write(&directory.path().join("1"), &mut [layer], &["/x"]).unwrap();
        let (second, changes) = write(&first, &directory.path().join("2"), "/flask/").unwrap();
        assert_eq!((changes.files, changes.bytes), (2, 16 + 40));
        let files = |layout: &Path| -> Vec<(String, u64, Vec<u8>)> {
            let read = |path: PathBuf| -> Value {
                serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
            };
            let blob = |digest: &Value| {
                let hex = &digest.as_str().unwrap()[7..];
                layout.join("blobs/sha256").join(hex)
            };
            let manifest = read(blob(
                &read(layout.join("index.json"))["manifests"][0]["digest"],
            ));
            let layer = File::open(blob(&manifest["layers"][0]["digest"])).unwrap();
            let mut archive = tar::Archive::new(GzDecoder::new(layer));
            let entries = archive.entries().unwrap().map(|entry| {
                let mut entry = entry.unwrap();
                let path = entry.path().unwrap().to_string_lossy().into_owned();
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                (path, entry.header().mtime().unwrap(), content)
            });
            entries.collect()
        };
        let (before, after) = (files(&first), files(&second));
        assert_eq!(before.len(), after.len());
        for (before, after) in before.iter().zip(&after) {
            assert_eq!((&before.0, before.1 + LATER_SECONDS), (&after.0, after.1));
            let changed = before.0 == long || before.0.ends_with("pyc");
            assert_eq!(before.2 != after.2, changed, "{}", before.0);
        }
    }

    #[test]
    fn extended_headers_get_later_times() {
        let records = b"30 mtime=1700000000.123456789\n12 path=abc\n";
        let later = later_records(records).unwrap();
        assert_eq!(later, b"30 mtime=1700086400.123456789\n12 path=abc\n");
        assert_eq!(record(&later, "path").as_deref(), Some("abc"));
        assert!(later_records(b"9 mtime=99999\n").is_err());
    }
}
