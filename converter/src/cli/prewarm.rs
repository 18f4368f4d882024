// SPDX-License-Identifier: Apache-2.0
//! `sluice prewarm`: has the daemon bring an image before anybody asks for it.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use serde_json::{Value, json};
use sluice_proto::control::{PrewarmProgress, PrewarmRequest};

use super::control::{CALL_TIMEOUT, DaemonArguments, connect, within};
use super::show::{bytes, printable, short};

/// How long it may take to begin: the registry is asked what a tag stands for where several nodes are meant.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Arguments of `prewarm`.
#[derive(Debug, Args)]
pub(super) struct Prewarm {
    /// Image in a registry, with or without docker://.
    image: String,
    /// Only what containers of it read while they start, as far as that is known.
    #[arg(long, conflicts_with = "full")]
    boot: bool,
    /// All of it. This is the default.
    #[arg(long)]
    full: bool,
    /// On these nodes of the cluster, by name. Default: on this one.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    nodes: Vec<String>,
    /// On all nodes of this node's zone.
    #[arg(long)]
    zone: bool,
    /// On the supernodes of this node's zone.
    #[arg(long)]
    supernodes: bool,
    /// Do not wait for the end; the daemon goes on.
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    daemon: DaemonArguments,
}

impl Prewarm {
    fn request(&self) -> PrewarmRequest {
        PrewarmRequest {
            image: self.image.clone(),
            scope: if self.boot { "boot" } else { "full" }.to_owned(),
            detach: self.detach,
            nodes: self.nodes.clone(),
            zone: self.zone,
            supernodes: self.supernodes,
        }
    }
}

/// Whether nothing comes after it.
fn is_last(report: &PrewarmProgress) -> bool {
    matches!(report.phase.as_str(), "done" | "failed")
}

fn sums(report: &PrewarmProgress) -> (u64, u64) {
    let layers = report.layers.iter();
    layers.fold((0, 0), |(present, total), layer| {
        let sum = |sum: u64, more: u64| sum.saturating_add(more);
        (
            sum(present, layer.present_bytes),
            sum(total, layer.total_bytes),
        )
    })
}

/// How far it is, on one line.
fn line(image: &str, report: &PrewarmProgress) -> String {
    let mut text = printable(image).into_owned();
    if !report.node.is_empty() {
        text.push_str(&format!(" on {}", printable(&report.node)));
    }
    text.push_str(&format!(": {}", printable(&report.phase)));
    let (present, total) = sums(report);
    if let Some(percent) = present.saturating_mul(100).checked_div(total) {
        let (present, total) = (bytes(present), bytes(total));
        text.push_str(&format!(", {present} / {total} ({percent} %)"));
    }
    for more in [&report.note, &report.error] {
        if !more.is_empty() {
            text.push_str(&format!(", {}", printable(more)));
        }
    }
    text
}

/// What is wrong with its layers, a line each.
fn layer_errors(report: &PrewarmProgress) -> Vec<String> {
    let layers = report.layers.iter().filter(|it| !it.error.is_empty());
    layers
        .map(|layer| {
            let diff_id = printable(short(&layer.diff_id)).into_owned();
            let (phase, error) = (printable(&layer.phase), printable(&layer.error));
            format!("  layer {diff_id} {phase}: {error}")
        })
        .collect()
}

fn report_json(report: &PrewarmProgress) -> Value {
    let (present, total) = sums(report);
    json!({
        "event": "progress",
        "node": report.node,
        "phase": report.phase,
        "manifest_digest": report.manifest_digest,
        "present_bytes": present,
        "total_bytes": total,
        "error": report.error,
        "note": report.note,
        "layers": report.layers.iter().map(|layer| json!({
            "diff_id": layer.diff_id,
            "blob_digest": layer.blob_digest,
            "present_bytes": layer.present_bytes,
            "total_bytes": layer.total_bytes,
            "phase": layer.phase,
            "error": layer.error,
        })).collect::<Vec<_>>(),
    })
}

/// What was heard of each node last.
#[derive(Debug, Default)]
struct Heard(BTreeMap<String, PrewarmProgress>);

impl Heard {
    /// Whether the phase of its node is another one now.
    fn note(&mut self, report: PrewarmProgress) -> bool {
        let phase = report.phase.clone();
        let before = self.0.insert(report.node.clone(), report);
        before.is_none_or(|before| before.phase != phase)
    }

    /// Nodes that did not come to a good end.
    fn failed(&self) -> usize {
        let failed = self.0.values().filter(|it| it.phase != "done");
        failed.count()
    }

    fn summary(&self, image: &str) -> Value {
        let (present, total) = self
            .0
            .values()
            .map(sums)
            .fold((0, 0), |sum: (u64, u64), it| {
                (sum.0.saturating_add(it.0), sum.1.saturating_add(it.1))
            });
        json!({
            "event": "summary",
            "image": image,
            "nodes": self.0.len(),
            "failed": self.failed(),
            "present_bytes": present,
            "total_bytes": total,
        })
    }
}

pub(super) async fn run(arguments: Prewarm) -> anyhow::Result<()> {
    let (image, json) = (&arguments.image, arguments.daemon.json());
    let mut client = connect(arguments.daemon.socket()).await?;
    let begun = within(BEGIN_TIMEOUT, client.prewarm(arguments.request())).await?;
    let mut reports = begun.into_inner();
    let terminal = io::stderr().is_terminal() && !json;
    let mut heard = Heard::default();
    // The daemon says something every ten seconds at least.
    while let Some(report) = within(CALL_TIMEOUT, reports.message()).await? {
        if json {
            let _ = writeln!(io::stdout().lock(), "{}", report_json(&report));
        }
        let (text, errors) = (line(image, &report), layer_errors(&report));
        let (ended, is_new) = (is_last(&report), heard.note(report));
        let mut out = io::stderr().lock();
        if ended && !json {
            let start = if terminal { "\r" } else { "" };
            let _ = writeln!(out, "{start}{text}      ");
            for error in errors {
                let _ = writeln!(out, "{error}");
            }
        } else if terminal {
            let _ = write!(out, "\r{text}      ");
        } else if is_new && !json {
            let _ = writeln!(out, "{text}");
        }
        if arguments.detach {
            return Ok(());
        }
    }
    if json {
        let _ = writeln!(io::stdout().lock(), "{}", heard.summary(image));
    }
    match (heard.0.len(), heard.failed()) {
        (0, _) => bail!("sluiced ended without a word about {image}"),
        (_, 0) => Ok(()),
        (1, _) => {
            let error = heard.0.values().map(|it| it.error.as_str()).next();
            bail!("{image} is not prewarmed: {}", error.unwrap_or_default())
        }
        (nodes, failed) => bail!("{image} is not prewarmed on {failed} of {nodes} nodes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_proto::control::PrewarmLayer;

    fn report(node: &str, phase: &str, layers: &[(u64, u64, &str)]) -> PrewarmProgress {
        let layer = |layer: &(u64, u64, &str)| PrewarmLayer {
            diff_id: "sha256:0123456789abcdef".into(),
            present_bytes: layer.0,
            total_bytes: layer.1,
            phase: "fetching".into(),
            error: layer.2.into(),
            ..PrewarmLayer::default()
        };
        PrewarmProgress {
            node: node.into(),
            phase: phase.into(),
            layers: layers.iter().map(layer).collect(),
            ..PrewarmProgress::default()
        }
    }

    #[test]
    fn progress_reads_well() {
        let fetching = report("", "fetching", &[(1024, 2048, ""), (0, 2048, "")]);
        assert_eq!(
            line("r/a:1", &fetching),
            "r/a:1: fetching, 1.00 KiB / 4.00 KiB (25 %)"
        );
        let failed = PrewarmProgress {
            error: "not\x1b[found".into(),
            ..report("n", "failed", &[(0, 0, "it has no index")])
        };
        let text = line("r/a:1", &failed);
        assert!(text.starts_with("r/a:1 on n: failed, not"), "{text}");
        assert!(!text.contains('\x1b'), "{text}");
        assert_eq!(
            layer_errors(&failed),
            ["  layer 0123456789ab fetching: it has no index"]
        );
        let json = report_json(&fetching);
        assert_eq!(
            (&json["present_bytes"], &json["total_bytes"]),
            (&json!(1024), &json!(4096))
        );
    }

    #[test]
    fn every_node_must_come_to_a_good_end() {
        let mut heard = Heard::default();
        assert!(heard.note(report("a", "fetching", &[])));
        assert!(!heard.note(report("a", "fetching", &[])));
        assert!(heard.note(report("b", "done", &[(3, 3, "")])));
        assert_eq!(heard.failed(), 1, "a did not end");
        assert!(heard.note(report("a", "done", &[(4, 4, "")])));
        assert_eq!(heard.failed(), 0);
        let summary = heard.summary("i");
        assert_eq!(
            (&summary["nodes"], &summary["present_bytes"]),
            (&json!(2), &json!(7))
        );
    }
}
