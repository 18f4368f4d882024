// SPDX-License-Identifier: Apache-2.0
//! The little HTTP that tests need to edit manifests in the registry.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn exchange(host: &str, head: &str, body: &[u8]) -> Result<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(
        stream,
        "{head}\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let split = answer
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .context("HTTP head")?;
    let status = std::str::from_utf8(&answer[..split])?
        .split(' ')
        .nth(1)
        .context("HTTP status")?
        .parse()?;
    Ok((status, answer[split + 4..].to_vec()))
}

/// The manifest `repository:tag` of the registry at `host`.
pub fn manifest(host: &str, repository: &str, tag: &str) -> Result<Value> {
    let (status, body) = exchange(
        host,
        &format!("GET /v2/{repository}/manifests/{tag} HTTP/1.0\r\nAccept: {MANIFEST}"),
        b"",
    )?;
    ensure!(
        status == 200,
        "manifest {repository}:{tag}: {status} {}",
        String::from_utf8_lossy(&body)
    );
    Ok(serde_json::from_slice(&body)?)
}

/// The answer to a request for a blob, or for a range of it (`bytes=0-9`): its status and its body.
pub fn blob(
    host: &str,
    repository: &str,
    digest: &str,
    range: Option<&str>,
) -> Result<(u16, Vec<u8>)> {
    let range = range.map_or_else(String::new, |range| format!("\r\nRange: {range}"));
    let head = format!("GET /v2/{repository}/blobs/{digest} HTTP/1.0{range}");
    exchange(host, &head, b"")
}

/// What a registry says of a manifest.
#[derive(Debug, Clone)]
pub struct Descriptor {
    /// Its media type.
    pub media_type: String,
    /// Its digest, `sha256:…`.
    pub digest: String,
    /// Its size.
    pub bytes: usize,
}

/// The descriptor of the manifest `repository:tag`.
pub fn descriptor(host: &str, repository: &str, tag: &str) -> Result<Descriptor> {
    let head = format!("GET /v2/{repository}/manifests/{tag} HTTP/1.0\r\nAccept: {MANIFEST}");
    let (status, body) = exchange(host, &head, b"")?;
    ensure!(status == 200, "manifest {repository}:{tag}: {status}");
    Ok(Descriptor {
        media_type: MANIFEST.to_owned(),
        digest: format!("sha256:{}", hex::encode(Sha256::digest(&body))),
        bytes: body.len(),
    })
}

/// Puts `manifest` as `repository:tag`.
pub fn put_manifest(host: &str, repository: &str, tag: &str, manifest: &Value) -> Result<()> {
    put(host, repository, tag, MANIFEST, manifest)
}

/// Puts an image index as `repository:tag`.
pub fn put_index(host: &str, repository: &str, tag: &str, index: &Value) -> Result<()> {
    put(host, repository, tag, INDEX, index)
}

fn put(host: &str, repository: &str, tag: &str, media_type: &str, document: &Value) -> Result<()> {
    let head =
        format!("PUT /v2/{repository}/manifests/{tag} HTTP/1.0\r\nContent-Type: {media_type}");
    let (status, body) = exchange(host, &head, document.to_string().as_bytes())?;
    ensure!(
        status == 201,
        "put {repository}:{tag}: {status} {}",
        String::from_utf8_lossy(&body)
    );
    Ok(())
}

/// Removes Sluice's annotations from some layers of `repository:tag`, as a tool that drops
/// annotations would, and puts the result as `repository:new_tag`.
pub fn strip_annotations(
    host: &str,
    repository: &str,
    tag: &str,
    new_tag: &str,
    layers: &[usize],
) -> Result<()> {
    let mut manifest = manifest(host, repository, tag)?;
    for layer in layers {
        manifest["layers"][*layer]
            .as_object_mut()
            .context("a layer")?
            .remove("annotations");
    }
    put_manifest(host, repository, new_tag, &manifest)
}

/// The chain ID of the image `repository:tag`: the name of its topmost snapshot.
pub fn chain_id(host: &str, repository: &str, tag: &str) -> Result<String> {
    let manifest = manifest(host, repository, tag)?;
    let digest = manifest["config"]["digest"].as_str().context("config")?;
    let head = format!("GET /v2/{repository}/blobs/{digest} HTTP/1.0");
    let (status, body) = exchange(host, &head, b"")?;
    ensure!(status == 200, "config {digest}: {status}");
    let config: Value = serde_json::from_slice(&body)?;
    let diff_ids = config["rootfs"]["diff_ids"]
        .as_array()
        .context("diff IDs")?;
    let mut diff_ids = diff_ids.iter().filter_map(Value::as_str);
    let lowest = diff_ids.next().context("a layer")?.to_owned();
    Ok(diff_ids.fold(lowest, |below, diff_id| {
        let both = format!("{below} {diff_id}");
        format!("sha256:{}", hex::encode(Sha256::digest(both)))
    }))
}
