// SPDX-License-Identifier: Apache-2.0
//! Blobs of a layout, one by one, and images made of them: images that share layers share their blobs.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::Coding;

/// A layer's blob that stands in a layout.
#[derive(Debug, Clone)]
pub struct Blob {
    /// What a manifest says of it.
    pub descriptor: Value,
    /// Digest of its tar, in hex.
    pub diff_id: String,
}

impl Blob {
    /// Writes the blob of this tar below `directory`.
    pub fn write(directory: &Path, tar: &[u8], coding: Coding) -> Result<Self> {
        let bytes = coding.encode(tar)?;
        Ok(Self {
            descriptor: put(&blobs(directory)?, &bytes, coding.media_type())?,
            diff_id: hex::encode(Sha256::digest(tar)),
        })
    }

    /// Writes a gzip blob that memory need not hold: `write` writes it and gives the digest of its tar, in hex.
    pub fn stream(
        directory: &Path,
        write: impl FnOnce(&mut dyn Write) -> Result<String>,
    ) -> Result<Self> {
        let blobs = blobs(directory)?;
        let unnamed = tempfile::NamedTempFile::new_in(&blobs)?;
        let mut out = Hashed::new(BufWriter::new(unnamed));
        let diff_id = write(&mut out)?;
        let (file, digest, bytes) = out.finish();
        let file = file.into_inner().map_err(|error| error.into_error())?;
        file.persist(blobs.join(&digest))?;
        let media_type = Coding::Gzip.media_type();
        Ok(Self {
            descriptor: descriptor(&digest, bytes, media_type),
            diff_id,
        })
    }
}

/// Makes an image of blobs of the layout, the lowest first, and tags it `latest`; one that had the tag loses it.
pub fn assemble(directory: &Path, layers: &[Blob], command: &[&str]) -> Result<PathBuf> {
    let blobs = blobs(directory)?;
    let diff_ids = layers.iter().map(|it| format!("sha256:{}", it.diff_id));
    let diff_ids: Vec<String> = diff_ids.collect();
    let descriptors: Vec<&Value> = layers.iter().map(|it| &it.descriptor).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": command, "Env": ["PATH=/bin:/usr/bin"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": [],
    });
    let config = put(
        &blobs,
        config.to_string().as_bytes(),
        "application/vnd.oci.image.config.v1+json",
    )?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": descriptors,
    });
    let mut manifest = put(
        &blobs,
        manifest.to_string().as_bytes(),
        "application/vnd.oci.image.manifest.v1+json",
    )?;
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
    manifest["platform"] = json!({"architecture": "amd64", "os": "linux"});
    std::fs::write(
        directory.join("index.json"),
        json!({"schemaVersion": 2, "manifests": [manifest]}).to_string(),
    )?;
    std::fs::write(
        directory.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    Ok(directory.to_owned())
}

/// Writes on, and knows the digest and the number of the bytes.
#[derive(Debug)]
pub struct Hashed<W> {
    inner: W,
    digest: Sha256,
    bytes: u64,
}

impl<W> Hashed<W> {
    /// Nothing is written yet.
    pub fn new(inner: W) -> Self {
        let digest = Sha256::new();
        Self {
            inner,
            digest,
            bytes: 0,
        }
    }

    /// What was written to, the digest in hex, and how many bytes it was.
    pub fn finish(self) -> (W, String, u64) {
        (self.inner, hex::encode(self.digest.finalize()), self.bytes)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.digest.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

fn blobs(directory: &Path) -> Result<PathBuf> {
    let blobs = directory.join("blobs/sha256");
    std::fs::create_dir_all(&blobs)?;
    Ok(blobs)
}

/// Writes a blob to this directory of blobs; gives what names it.
pub fn put(blobs: &Path, bytes: &[u8], media_type: &str) -> Result<Value> {
    let digest = hex::encode(Sha256::digest(bytes));
    std::fs::write(blobs.join(&digest), bytes).with_context(|| format!("write blob {digest}"))?;
    Ok(descriptor(&digest, bytes.len() as u64, media_type))
}

fn descriptor(digest: &str, bytes: u64, media_type: &str) -> Value {
    json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes})
}
