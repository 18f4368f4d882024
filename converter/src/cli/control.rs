// SPDX-License-Identifier: Apache-2.0
//! `sluice status`, `sluice why` and `sluice content complete`: questions to the daemon.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use sluice_proto::control::control_client::ControlClient;
use sluice_proto::control::{
    BootList, CompleteContentRequest, Image, Mirror, StatusRequest, StatusResponse, WhyRequest,
    WhyResponse,
};
use tonic::transport::Channel;

use super::show::{Table, bytes, printable, short};
use super::stuck;
use crate::grpc;

/// How long the daemon may take to answer what it knows by heart.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may be silent while it completes content: twice its own default deadline for a read
/// that no source answers, after which it would have said so.
const STALL_TIMEOUT: Duration = Duration::from_secs(600);

/// Where the daemon is.
#[derive(Debug, Clone, Args)]
pub(super) struct DaemonArguments {
    /// Control socket of sluiced.
    #[arg(
        long,
        env = "SLUICE_CONTROL_SOCKET",
        default_value = "/run/sluice/control.sock"
    )]
    pub(super) socket: PathBuf,
    /// One JSON object on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

impl DaemonArguments {
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn json(&self) -> bool {
        self.json
    }
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub(super) struct Status {
    /// Only images whose reference or digest contains this.
    #[arg(default_value = "")]
    image: String,
    /// Show layers and mounts as well.
    #[arg(long, short)]
    verbose: bool,
    #[command(flatten)]
    daemon: DaemonArguments,
}

/// Arguments of `why`.
#[derive(Debug, Args)]
pub(super) struct Why {
    /// Reference, manifest digest or config digest.
    image: String,
    /// containerd namespace. Default: all.
    #[arg(long, short, default_value = "")]
    namespace: String,
    #[command(flatten)]
    daemon: DaemonArguments,
}

/// What can be done with content.
#[derive(Debug, Subcommand)]
pub(super) enum Content {
    /// Put the blobs of layers that were never downloaded into containerd's content store, for tools
    /// that push, save or export.
    Complete(Complete),
}

/// Arguments of `content complete`.
#[derive(Debug, Args)]
pub(super) struct Complete {
    /// Reference, manifest digest or config digest.
    image: String,
    /// containerd namespace.
    #[arg(long, short, default_value = "default")]
    namespace: String,
    #[command(flatten)]
    daemon: DaemonArguments,
}

pub(super) async fn connect(socket: &Path) -> anyhow::Result<ControlClient<Channel>> {
    let channel = grpc::connect(socket).await.with_context(|| {
        format!(
            "connect to sluiced at {} (is it running?)",
            socket.display()
        )
    })?;
    Ok(ControlClient::new(channel))
}

/// Waits for the daemon, but not for ever: one that hangs would hang its user as well.
pub(super) async fn within<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, tonic::Status>>,
) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(limit, answer).await;
    let silent = || format!("sluiced says nothing for {} s", limit.as_secs());
    answer.with_context(silent)?.map_err(refused)
}

/// The daemon's own words, without gRPC's.
fn refused(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("sluiced: {}", status.message())
}

pub(super) async fn status(arguments: Status) -> anyhow::Result<()> {
    let mut client = connect(&arguments.daemon.socket).await?;
    let request = StatusRequest {
        r#match: arguments.image.clone(),
    };
    let status = within(CALL_TIMEOUT, client.status(request))
        .await?
        .into_inner();
    let mut out = io::stdout().lock();
    if arguments.daemon.json {
        writeln!(out, "{}", status_json(&status))?;
        return Ok(());
    }
    write_status(&mut out, &status, arguments.verbose)?;
    Ok(())
}

fn progress(present: u64, total: u64, sealed: bool) -> String {
    // An image may be empty; that is complete.
    let percent = present
        .saturating_mul(100)
        .checked_div(total)
        .unwrap_or(100);
    let sealed = if sealed { ", sealed" } else { "" };
    format!(
        "{} / {} ({percent} %{sealed})",
        bytes(present),
        bytes(total)
    )
}

/// What is known of an image's boot list, in words.
fn boot_list(list: &BootList) -> String {
    let mut text = match list.origin.as_str() {
        "" => "none".to_owned(),
        "learned" => format!(
            "{} chunks, learned from {} starts",
            list.chunks, list.starts
        ),
        origin => format!("{} chunks, {origin}", list.chunks),
    };
    if !list.off.is_empty() {
        text = format!("off because {}", list.off);
    } else if let Some(percent) = list
        .read_bytes
        .saturating_mul(100)
        .checked_div(list.loaded_bytes)
    {
        text.push_str(&format!(", {percent} % of what it loaded was read"));
    }
    text
}

/// Most images have one list: one run of lazy layers.
fn boot_lists(lists: &[BootList]) -> String {
    let lists: Vec<String> = lists.iter().map(boot_list).collect();
    lists.join("; ")
}

fn boot_json(lists: &[BootList]) -> Value {
    let list = |list: &BootList| {
        json!({
            "chunks": list.chunks,
            "origin": list.origin,
            "starts": list.starts,
            "off": list.off,
            "loaded_bytes": list.loaded_bytes,
            "read_bytes": list.read_bytes,
        })
    };
    lists.iter().map(list).collect()
}

fn name(image: &Image) -> String {
    match image.references.as_slice() {
        [] => short(&image.manifest_digest).to_owned(),
        references => references.join(" "),
    }
}

/// The mirror in one line.
fn mirror_line(mirror: &Mirror) -> String {
    let state = match mirror.listening {
        true => "serving pulls".to_owned(),
        false => format!("not serving: {}", mirror.problem),
    };
    format!(
        "mirror {}: {state}; holds {} of {}; given from cache {}, nodes {}, registries {}; \
         {} stale answers, {} denied",
        mirror.address,
        bytes(mirror.held_bytes),
        bytes(mirror.budget_bytes),
        bytes(mirror.cache_bytes),
        bytes(mirror.peer_bytes),
        bytes(mirror.origin_bytes),
        mirror.stale_served,
        mirror.access_denied,
    )
}

/// What serves images, and why not something better.
fn backends(status: &StatusResponse) -> String {
    let (backend, sealed) = (&status.backend, &status.sealed_backend);
    let mut text = format!("backend {backend}");
    // A daemon of before it could be told apart says nothing.
    if !sealed.is_empty() && sealed != backend {
        text += &format!(", {sealed} once complete");
    }
    if !status.backend_reason.is_empty() {
        text += &format!(" ({})", status.backend_reason);
    }
    text
}

fn write_status(out: &mut impl Write, status: &StatusResponse, verbose: bool) -> io::Result<()> {
    writeln!(
        out,
        "sluiced {}, {}, root {}",
        status.version,
        backends(status),
        status.root
    )?;
    writeln!(out, "store: {}", bytes(status.store_present_bytes))?;
    if let Some(mirror) = &status.mirror {
        writeln!(out, "{}", mirror_line(mirror))?;
    }
    stuck::write(out, &status.stuck)?;
    let mut images = Table::new(&["NAMESPACE", "IMAGE", "LAYERS", "PRESENT", "BOOT LIST"]);
    for image in &status.images {
        images.row([
            image.namespace.clone(),
            name(image),
            image.diff_ids.len().to_string(),
            progress(image.present_bytes, image.total_bytes, image.sealed),
            boot_lists(&image.boot_lists),
        ]);
    }
    writeln!(out)?;
    images.write(out)?;
    if !status.bytes_by_source.is_empty() {
        let mut sources = Table::new(&["SOURCE", "PRIORITY", "FETCHED"]);
        for source in &status.bytes_by_source {
            sources.row([
                source.source.clone(),
                source.priority.clone(),
                bytes(source.bytes),
            ]);
        }
        writeln!(out)?;
        sources.write(out)?;
    }
    if verbose {
        let mut layers = Table::new(&["DIFF ID", "INDEX", "BLOB", "PRESENT", "FAILURE"]);
        for layer in &status.layers {
            layers.row([
                short(&layer.diff_id).to_owned(),
                short(&layer.index_digest).to_owned(),
                short(&layer.blob_digest).to_owned(),
                progress(layer.present_bytes, layer.device_bytes, layer.sealed),
                layer.failure.clone(),
            ]);
        }
        writeln!(out)?;
        layers.write(out)?;
        let mut mounts = Table::new(&["MOUNTPOINT", "BACKEND", "LAYERS", "USERS"]);
        for mount in &status.mounts {
            mounts.row([
                mount.mountpoint.clone(),
                mount.backend.clone(),
                mount.layers.to_string(),
                mount.users.to_string(),
            ]);
        }
        writeln!(out)?;
        mounts.write(out)?;
    }
    Ok(())
}

fn status_json(status: &StatusResponse) -> Value {
    json!({
        "version": status.version,
        "backend": status.backend,
        "sealed_backend": status.sealed_backend,
        "backend_reason": status.backend_reason,
        "root": status.root,
        "store_present_bytes": status.store_present_bytes,
        "images": status.images.iter().map(|image| json!({
            "namespace": image.namespace,
            "references": image.references,
            "manifest_digest": image.manifest_digest,
            "config_digest": image.config_digest,
            "chain_ids": image.chain_ids,
            "diff_ids": image.diff_ids,
            "total_bytes": image.total_bytes,
            "present_bytes": image.present_bytes,
            "sealed": image.sealed,
            "boot_lists": boot_json(&image.boot_lists),
        })).collect::<Vec<_>>(),
        "layers": status.layers.iter().map(|layer| json!({
            "diff_id": layer.diff_id,
            "index_digest": layer.index_digest,
            "blob_digest": layer.blob_digest,
            "device_bytes": layer.device_bytes,
            "present_bytes": layer.present_bytes,
            "blob_bytes": layer.blob_bytes,
            "sealed": layer.sealed,
            "failure": layer.failure,
        })).collect::<Vec<_>>(),
        "bytes_by_source": status.bytes_by_source.iter().map(|source| json!({
            "source": source.source,
            "priority": source.priority,
            "bytes": source.bytes,
        })).collect::<Vec<_>>(),
        "mounts": status.mounts.iter().map(|mount| json!({
            "key": mount.key,
            "mountpoint": mount.mountpoint,
            "backend": mount.backend,
            "layers": mount.layers,
            "users": mount.users,
        })).collect::<Vec<_>>(),
        "stuck": stuck::to_json(&status.stuck),
        "mirror": status.mirror.as_ref().map(|mirror| json!({
            "address": mirror.address,
            "listening": mirror.listening,
            "problem": mirror.problem,
            "held_bytes": mirror.held_bytes,
            "budget_bytes": mirror.budget_bytes,
            "cache_bytes": mirror.cache_bytes,
            "peer_bytes": mirror.peer_bytes,
            "origin_bytes": mirror.origin_bytes,
            "stale_served": mirror.stale_served,
            "access_denied": mirror.access_denied,
        })),
    })
}

pub(super) async fn why(arguments: Why) -> anyhow::Result<()> {
    let mut client = connect(&arguments.daemon.socket).await?;
    let Why {
        image, namespace, ..
    } = arguments;
    let request = WhyRequest { image, namespace };
    let answer = within(CALL_TIMEOUT, client.why(request))
        .await?
        .into_inner();
    let mut out = io::stdout().lock();
    if arguments.daemon.json {
        writeln!(out, "{}", why_json(&answer))?;
        return Ok(());
    }
    let mut table = Table::new(&[
        "NAMESPACE",
        "CHAIN ID",
        "DIFF ID",
        "SNAPSHOT",
        "LAZY",
        "PLACE",
        "REASON",
    ]);
    for layer in &answer.layers {
        table.row([
            layer.namespace.clone(),
            short(&layer.chain_id).to_owned(),
            short(&layer.diff_id).to_owned(),
            layer.snapshot.clone(),
            if layer.lazy { "yes" } else { "no" }.to_owned(),
            layer.place.clone(),
            layer.reason.clone(),
        ]);
    }
    writeln!(out, "{}", printable(&answer.summary))?;
    if !answer.boot_lists.is_empty() {
        let lists = boot_lists(&answer.boot_lists);
        writeln!(out, "boot list: {}", printable(&lists))?;
    }
    table.write(&mut out)?;
    Ok(())
}

fn why_json(answer: &WhyResponse) -> Value {
    json!({
        "lazy": answer.lazy,
        "summary": answer.summary,
        "boot_lists": boot_json(&answer.boot_lists),
        "layers": answer.layers.iter().map(|layer| json!({
            "namespace": layer.namespace,
            "chain_id": layer.chain_id,
            "diff_id": layer.diff_id,
            "snapshot": layer.snapshot,
            "lazy": layer.lazy,
            "place": layer.place,
            "reason": layer.reason,
        })).collect::<Vec<_>>(),
    })
}

pub(super) async fn content(content: Content) -> anyhow::Result<()> {
    let Content::Complete(arguments) = content;
    let mut client = connect(&arguments.daemon.socket).await?;
    let Complete {
        image,
        namespace,
        daemon,
    } = arguments;
    let request = CompleteContentRequest {
        image: image.clone(),
        namespace,
    };
    let mut progress = within(STALL_TIMEOUT, client.complete_content(request))
        .await?
        .into_inner();
    let terminal = io::stderr().is_terminal() && !daemon.json;
    let (mut blobs, mut total_bytes) = (0_u64, 0_u64);
    // Whether anybody sees it or not, the work goes on.
    while let Some(step) = within(STALL_TIMEOUT, progress.message()).await? {
        let blob = short(&step.blob_digest);
        if daemon.json {
            let line = json!({
                "event": "blob",
                "blob_digest": step.blob_digest,
                "offset": step.offset,
                "total": step.total,
                "done": step.done,
            });
            let _ = writeln!(io::stdout().lock(), "{line}");
        } else if step.done {
            let _ = writeln!(
                io::stderr().lock(),
                "\rblob {blob}: {}      ",
                bytes(step.total)
            );
        } else if terminal {
            let (offset, total) = (bytes(step.offset), bytes(step.total));
            let _ = write!(
                io::stderr().lock(),
                "\rblob {blob}: {offset} / {total}      "
            );
        }
        if step.done {
            blobs += 1;
            total_bytes += step.total;
            if step.offset != step.total {
                bail!(
                    "blob {blob} of {image} ended at {} of {} bytes",
                    step.offset,
                    step.total
                );
            }
        }
    }
    let mut out = io::stdout().lock();
    let line = match daemon.json {
        true => json!({"event": "summary", "image": image, "blobs": blobs, "bytes": total_bytes})
            .to_string(),
        false => format!("{image}: {blobs} blobs completed, {}", bytes(total_bytes)),
    };
    let _ = writeln!(out, "{line}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_proto::control::{Layer, SourceBytes};

    #[test]
    fn status_reads_well() {
        let status = StatusResponse {
            version: "0.1.0".into(),
            backend: "fuse".into(),
            sealed_backend: "erofs".into(),
            backend_reason: String::new(),
            root: "/var/lib/sluice".into(),
            store_present_bytes: 1024,
            images: vec![Image {
                namespace: "default".into(),
                references: vec!["a.test/b:1".into()],
                total_bytes: 2048,
                present_bytes: 1024,
                diff_ids: vec!["sha256:00".into()],
                boot_lists: vec![BootList {
                    chunks: 212,
                    origin: "learned".into(),
                    starts: 3,
                    loaded_bytes: 200,
                    read_bytes: 150,
                    ..BootList::default()
                }],
                ..Image::default()
            }],
            layers: vec![Layer {
                diff_id: "sha256:0123456789abcdef".into(),
                ..Layer::default()
            }],
            bytes_by_source: vec![SourceBytes {
                source: "origin".into(),
                priority: "foreground".into(),
                bytes: 7,
            }],
            mounts: Vec::new(),
            stuck: Vec::new(),
            mirror: Some(Mirror {
                address: "127.0.0.1:9642".into(),
                problem: "the port is taken".into(),
                held_bytes: 1024,
                budget_bytes: 2048,
                stale_served: 3,
                ..Mirror::default()
            }),
        };
        let fallen = StatusResponse {
            backend: "fuse".into(),
            sealed_backend: "fuse".into(),
            backend_reason: "no EROFS".into(),
            ..StatusResponse::default()
        };
        assert_eq!(backends(&fallen), "backend fuse (no EROFS)");
        let mut out = Vec::new();
        write_status(&mut out, &status, true).unwrap();
        let text = String::from_utf8(out).unwrap();
        for expected in [
            "sluiced 0.1.0, backend fuse, erofs once complete, root /var/lib/sluice",
            "default    a.test/b:1  1       1.00 KiB / 2.00 KiB (50 %)",
            "212 chunks, learned from 3 starts, 75 % of what it loaded was read",
            "origin  foreground  7 B",
            "0123456789ab",
            "mirror 127.0.0.1:9642: not serving: the port is taken; holds 1.00 KiB of 2.00 KiB",
            "3 stale answers, 0 denied",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
        let json = status_json(&status);
        assert_eq!(json["images"][0]["present_bytes"], 1024);
        assert_eq!(json["images"][0]["boot_lists"][0]["chunks"], 212);
    }

    #[tokio::test]
    async fn a_daemon_that_hangs_does_not_hang_its_user() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        // Takes connections and says nothing.
        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let mut client = connect(&socket).await.unwrap();
        let limit = Duration::from_millis(50);
        let error = within(limit, client.status(StatusRequest::default()))
            .await
            .expect_err("silence");
        assert!(error.to_string().contains("says nothing"), "{error:#}");
    }

    #[test]
    fn boot_lists_are_said_in_words() {
        let list = |chunks, origin: &str, off: &str| BootList {
            chunks,
            origin: origin.into(),
            off: off.into(),
            ..BootList::default()
        };
        for (lists, expected) in [
            (vec![], ""),
            (vec![list(0, "", "")], "none"),
            (vec![list(9, "attached", "")], "9 chunks, attached"),
            (
                vec![list(1, "received", ""), list(2, "learned", "of that")],
                "1 chunks, received; off because of that",
            ),
        ] {
            assert_eq!(boot_lists(&lists), expected);
        }
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_there_is_named() {
        let error = connect(Path::new("/nonexistent/control.sock"))
            .await
            .expect_err("no daemon");
        assert!(
            error.to_string().contains("/nonexistent/control.sock"),
            "{error}"
        );
    }
}
