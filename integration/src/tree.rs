// SPDX-License-Identifier: Apache-2.0
//! Lists a directory tree as comparable lines: everything a container can see of each file.
//!
//! Runs inside the `treewalk` program, a child with a deadline, because it reads mounts.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

/// What to include.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Hash the content of regular files.
    pub content: bool,
    /// Modification times (directories that an unpacker touches after the fact differ by design).
    pub directory_times: bool,
}

/// Writes one line per file below `root`, sorted by path: escaped path, type, mode, owner, size,
/// mtime, rdev, number of its names, the first of them if there are several, xattrs, sha256. A link count
/// that is not the number of names is shown too: overlayfs counts the names that a layer above hides.
pub fn list(root: &Path, options: Options, out: &mut dyn Write) -> Result<()> {
    let mut paths = Vec::new();
    collect(root, &mut paths)?;
    paths.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    let mut files = Vec::new();
    let mut names: BTreeMap<(u64, u64), (u64, PathBuf)> = BTreeMap::new();
    for path in paths {
        let meta =
            fs::symlink_metadata(&path).with_context(|| format!("stat {}", path.display()))?;
        let relative = path.strip_prefix(root)?.to_owned();
        let first = || (0, relative.clone());
        names
            .entry((meta.dev(), meta.ino()))
            .or_insert_with(first)
            .0 += 1;
        files.push((path, relative, meta));
    }
    for (path, relative, meta) in files {
        let kind = meta.file_type();
        let mut line = format!(
            "{} mode={:o} owner={}:{}",
            escape(relative.as_os_str().as_bytes()),
            meta.mode(),
            meta.uid(),
            meta.gid()
        );
        if kind.is_file() {
            line += &format!(" size={}", meta.size());
        }
        if !kind.is_dir() || options.directory_times {
            line += &format!(" mtime={}.{:09}", meta.mtime(), meta.mtime_nsec());
        }
        if kind.is_char_device() || kind.is_block_device() {
            line += &format!(" rdev={}", meta.rdev());
        }
        if !kind.is_dir() {
            let (count, first) = &names[&(meta.dev(), meta.ino())];
            line += &format!(" names={count}");
            if *count > 1 {
                line += &format!(" first={}", escape(first.as_os_str().as_bytes()));
            }
            if meta.nlink() != *count {
                line += &format!(" nlink={}", meta.nlink());
            }
        }
        if kind.is_symlink() {
            line += &format!(
                " target={}",
                escape(fs::read_link(&path)?.as_os_str().as_bytes())
            );
        }
        line += &xattrs(&path)?;
        if kind.is_file() && options.content {
            line += &format!(" sha256={}", hash(&path)?);
        }
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// Whether two lists are equal, line by line: one of what containerd unpacked for overlayfs, and one of what Sluice
/// shows. A directory's time may differ only where the unpacker itself touched it after `started`.
pub fn same_but_touched(unpacked: &[String], shown: &[String], started: SystemTime) -> Result<()> {
    let started = started.duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let without = |line: &str, field: &str| {
        let fields = line.split(' ').filter(|it| !it.starts_with(field));
        fields.collect::<Vec<_>>().join(" ")
    };
    for (theirs, ours) in unpacked.iter().zip(shown) {
        // overlayfs counts hidden names as links, Sluice does not.
        let (theirs, ours) = (without(theirs, "nlink="), without(ours, "nlink="));
        if theirs == ours {
            continue;
        }
        let strip = |line: &str| without(line, "mtime=");
        let seconds: u64 = theirs
            .split(' ')
            .find_map(|it| it.strip_prefix("mtime="))
            .and_then(|time| time.split('.').next()?.parse().ok())
            .with_context(|| format!("mtime in {theirs}"))?;
        let touched = theirs.contains(" mode=4") && seconds >= started;
        ensure!(
            touched && strip(&theirs) == strip(&ours),
            "unpacked is\n  {theirs}\nshown is\n  {ours}"
        );
    }
    ensure!(
        unpacked.len() == shown.len(),
        "{} files are unpacked, {} shown",
        unpacked.len(),
        shown.len()
    );
    Ok(())
}

fn collect(directory: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))? {
        let entry = entry?;
        paths.push(entry.path());
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), paths)?;
        }
    }
    Ok(())
}

fn xattrs(path: &Path) -> Result<String> {
    let mut names: Vec<OsString> = xattr::list(path)
        .with_context(|| format!("list xattrs of {}", path.display()))?
        .collect();
    names.sort();
    let mut text = String::new();
    for name in names {
        // overlayfs' own marks are not part of the image.
        if name.as_bytes().starts_with(b"trusted.overlay.") {
            continue;
        }
        let value = xattr::get(path, &name)?.unwrap_or_default();
        text += &format!(" xattr:{}={}", escape(&name.into_vec()), hex::encode(value));
    }
    Ok(text)
}

fn hash(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 17];
    loop {
        let n = file
            .read(&mut buffer)
            .with_context(|| format!("read {}", path.display()))?;
        if n == 0 {
            return Ok(hex::encode(hasher.finalize()));
        }
        hasher.update(&buffer[..n]);
    }
}

fn escape(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string().replace(' ', "\\x20")
}
