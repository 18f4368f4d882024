// SPDX-License-Identifier: Apache-2.0
//! `sluice optimize`: attaches what this node has learnt of an image's starts to the image.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;
use sluice_blockindex::boot::BootList;
use sluice_proto::control::control_client::ControlClient;
use sluice_proto::control::{BootRun, LearnedBootListsRequest};
use tonic::transport::Channel;

use super::control::{CALL_TIMEOUT, DaemonArguments, connect, within};
use super::open::{ContainerdArguments, RegistryArguments, destination};
use crate::image::{ImageReader, Location};
use crate::optimize::{Attached, Run, annotate, read_tree, replace, runs, write};

/// How often the daemon is asked while a start is waited for.
const PAUSE: Duration = Duration::from_secs(1);

/// Arguments of `optimize`.
#[derive(Debug, Args)]
pub(super) struct Optimize {
    /// A converted image: docker://HOST/REPOSITORY:TAG, a bare reference, oci:PATH[:TAG],
    /// oci-archive:PATH[:TAG], or containerd:NAME.
    #[arg(value_parser = destination)]
    image: Location,
    /// Name the result by this tag; the image that was read keeps its own. Default: the same.
    #[arg(long)]
    tag: Option<String>,
    /// Wait so many seconds for a start to be recorded, if none was.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    #[command(flatten)]
    daemon: DaemonArguments,
    #[command(flatten)]
    containerd: ContainerdArguments,
    #[command(flatten)]
    registry: RegistryArguments,
}

/// A run's list, and how many starts it was learnt from.
#[derive(Debug)]
struct Learned {
    run: Run,
    list: BootList,
    starts: u32,
}

/// What the daemon knows of the runs of one manifest; why not, where it knows nothing.
#[derive(Debug, Default)]
struct Answer {
    learned: Vec<Learned>,
    off: Option<String>,
    window: Duration,
}

async fn ask(client: &mut ControlClient<Channel>, runs: &[Run]) -> anyhow::Result<Answer> {
    let request = LearnedBootListsRequest {
        runs: runs
            .iter()
            .map(|run| BootRun {
                index_digests: run.indexes.iter().map(ToString::to_string).collect(),
            })
            .collect(),
    };
    let response = within(CALL_TIMEOUT, client.learned_boot_lists(request)).await?;
    let response = response.into_inner();
    if !response.off.is_empty() {
        bail!("sluiced learns nothing: {}", response.off);
    }
    let mut answer = Answer {
        window: Duration::from_millis(response.window_ms),
        ..Answer::default()
    };
    for (run, learned) in runs.iter().zip(response.lists) {
        if !learned.off.is_empty() {
            answer.off = Some(learned.off);
        }
        if learned.list.is_empty() {
            continue;
        }
        let list = BootList::decode(&learned.list).context("read the daemon's boot list")?;
        answer.learned.push(Learned {
            run: run.clone(),
            list,
            starts: learned.starts,
        });
    }
    Ok(answer)
}

/// The image under another tag.
fn tagged(image: &Location, tag: &str) -> anyhow::Result<Location> {
    Ok(match image {
        Location::Registry(reference) => Location::Registry(reference.place().tagged(tag)?),
        Location::Layout { path, .. } => Location::Layout {
            path: path.clone(),
            tag: Some(tag.to_owned()),
        },
        Location::OciArchive { path, .. } => Location::OciArchive {
            path: path.clone(),
            tag: Some(tag.to_owned()),
        },
        Location::DockerArchive { .. } | Location::Containerd(_) => {
            bail!("{image} has no tags to write")
        }
    })
}

/// What became of one manifest.
#[derive(Debug)]
struct Done {
    platform: String,
    starts: u32,
    attached: Vec<Attached>,
}

pub(super) async fn run(arguments: Optimize) -> anyhow::Result<()> {
    let Optimize {
        image,
        tag,
        wait,
        daemon,
        containerd,
        registry,
    } = arguments;
    let destination = tag.map_or_else(|| Ok(image.clone()), |tag| tagged(&image, &tag))?;
    let source = registry.reader(&image, &containerd)?;
    let writer = registry.writer(&destination, &containerd)?;
    let mut client = connect(daemon.socket()).await?;
    wait_for_start(&mut client, &*source, Duration::from_secs(wait)).await?;
    // Read after the wait: what was pushed meanwhile is not to be undone.
    let tree = read_tree(&*source).await?;
    let (mut changed, mut done) = (Vec::new(), Vec::new());
    for (entry, manifest) in &tree.manifests {
        let learned = ask(&mut client, &runs(manifest)?).await?.learned;
        let starts = learned.iter().map(|it| it.starts).max().unwrap_or(0);
        let lists: Vec<(Run, BootList)> = learned.into_iter().map(|it| (it.run, it.list)).collect();
        let (document, attached) = annotate(manifest, &lists);
        changed.push(document);
        if !lists.is_empty() {
            let platform = entry.as_ref().and_then(|entry| entry.platform.as_ref());
            done.push(Done {
                platform: platform.map_or_else(String::new, ToString::to_string),
                starts,
                attached,
            });
        }
    }
    let (root, documents) = replace(&tree, changed);
    if root.digest != tree.root.digest || destination != image {
        let written = write(&writer, &root, &documents).await;
        writer.close().await;
        written?;
    }
    let (old, new) = (tree.root.digest.to_string(), root.digest.to_string());
    let mut out = io::stdout().lock();
    if daemon.json() {
        writeln!(out, "{}", to_json(&destination, &old, &new, &done))?;
        return Ok(());
    }
    for of_it in &done {
        writeln!(out, "{}", describe(of_it))?;
    }
    match old == new {
        true => writeln!(out, "{destination} = {new}: nothing changes")?,
        false => writeln!(out, "{destination} = {new}, before {old}")?,
    }
    Ok(())
}

/// Returns when the daemon has recorded a start of the image.
async fn wait_for_start(
    client: &mut ControlClient<Channel>,
    source: &dyn ImageReader,
    wait: Duration,
) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for (_, manifest) in &read_tree(source).await?.manifests {
        all.extend(runs(manifest)?);
    }
    if all.is_empty() {
        bail!("{} has no lazy layer: convert it first", source.label());
    }
    let began = Instant::now();
    loop {
        let answer = ask(client, &all).await?;
        if !answer.learned.is_empty() {
            return Ok(());
        }
        if began.elapsed() >= wait {
            let off = answer
                .off
                .map(|reason| format!("; its boot list is off: {reason}"));
            bail!(
                "no start of {} was recorded on this node{}: start a container of it, which is \
                 recorded for {} s, or wait for one with --wait",
                source.label(),
                off.unwrap_or_default(),
                answer.window.as_secs_f64()
            );
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn describe(done: &Done) -> String {
    let (listed, attached) = sums(&done.attached);
    let platform = match done.platform.is_empty() {
        true => String::new(),
        false => format!(" {}", done.platform),
    };
    let cut = match attached < listed {
        true => format!(" of {listed}, as many as fit,"),
        false => String::new(),
    };
    format!(
        "image{platform}: {attached}{cut} chunks in {} layers, learnt from {} starts",
        done.attached.len(),
        done.starts
    )
}

fn sums(attached: &[Attached]) -> (usize, usize) {
    let listed = attached.iter().map(|it| it.listed).sum();
    (listed, attached.iter().map(|it| it.attached).sum())
}

fn to_json(destination: &Location, old: &str, new: &str, done: &[Done]) -> serde_json::Value {
    json!({
        "image": destination.to_string(),
        "old_digest": old,
        "digest": new,
        "images": done.iter().map(|it| {
            let (listed, attached) = sums(&it.attached);
            json!({
                "platform": it.platform,
                "starts": it.starts,
                "listed_chunks": listed,
                "attached_chunks": attached,
                "layers": it.attached.len(),
            })
        }).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_read_well() {
        let mut done = Done {
            platform: "linux/amd64".to_owned(),
            starts: 3,
            attached: vec![
                Attached {
                    layer: 0,
                    listed: 5,
                    attached: 5,
                },
                Attached {
                    layer: 2,
                    listed: 10,
                    attached: 10,
                },
            ],
        };
        let line = "image linux/amd64: 15 chunks in 2 layers, learnt from 3 starts";
        assert_eq!(describe(&done), line);
        done.attached[1].attached = 7;
        done.platform.clear();
        let line = "image: 12 of 15, as many as fit, chunks in 2 layers, learnt from 3 starts";
        assert_eq!(describe(&done), line);
    }

    #[test]
    fn another_tag_names_another_image_of_the_same_place() {
        let parse = |text: &str| Location::parse(text).unwrap();
        for (image, expected) in [
            ("docker://r.example/a/b:v1", "docker://r.example/a/b:boot"),
            ("oci:/tmp/x:v1", "oci:/tmp/x:boot"),
        ] {
            assert_eq!(tagged(&parse(image), "boot").unwrap(), parse(expected));
        }
        assert!(tagged(&parse("docker://r.example/a/b:v1"), "a b").is_err());
    }
}
