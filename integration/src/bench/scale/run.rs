// SPDX-License-Identifier: Apache-2.0
//! One run of a scene on a node that has nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use super::figures::{Cost, Sample};
use super::scenes::{Scene, Stage};
use crate::bench::files::drop_caches;
use crate::bench::process::cpu_seconds;
use crate::bench::start::cold::{Node, Setting};
use crate::bench::start::contender::Contender;
use crate::bench::start::lab::Lab;

/// What a container prints first.
pub const STARTED: &str = "scale: started";
/// What it prints when it has done its work.
pub const READY: &str = "scale: ready";
/// Between two looks at what containers have printed.
const LOOK: Duration = Duration::from_millis(5);
/// The longest that a run may take.
const RUNS: Duration = Duration::from_secs(600);

/// Runs the scene once.
///
/// **Errors**: no container has done its work, or one did it wrongly.
pub fn once(lab: &Lab, contender: Contender, stage: &Stage) -> Result<Sample> {
    let mut node = Node::open(lab, contender, Setting::default())?;
    drop_caches()?;
    for image in &stage.images {
        // The registry's disk is another machine's.
        lab.warm(contender, image)?;
    }
    let line = &lab.registry.line;
    let carried = line.tally().total();
    let containerd = [node.containerd.pid()];
    let before = [cpu(&node.service.pids()?)?, cpu(&containerd)?];
    let begun = Instant::now();
    let (steps, failures) = if stage.scene == Scene::Many {
        many(lab, &mut node, contender, stage, begun)
    } else {
        single(lab, &mut node, contender, stage, begun)
    }
    .map_err(|error| node.explain(stage.scene.name(), error))?;
    let carried = line.tally().total().since(carried);
    let snapshotter = node.service.pids()?;
    Ok(Sample {
        steps,
        failures,
        bytes: carried.bytes,
        requests: carried.requests,
        snapshotter: match snapshotter.as_slice() {
            [] => None,
            pids => Some(Cost::of(pids, cpu(pids)? - before[0])?),
        },
        containerd: Cost::of(&containerd, cpu(&containerd)? - before[1])?,
    })
}

fn cpu(pids: &[Pid]) -> Result<f64> {
    pids.iter().copied().map(cpu_seconds).sum()
}

/// All containers at once, in turn of each image; each call pulls what it misses.
fn many(
    lab: &Lab,
    node: &mut Node,
    contender: Contender,
    stage: &Stage,
    begun: Instant,
) -> Result<(Vec<f64>, usize)> {
    for number in 0..stage.containers {
        let image = &stage.images[number % stage.images.len()];
        let reference = lab.reference(contender, image);
        let name = format!("c{number}");
        run(node, &name, &reference)?;
    }
    let seen = watch(node, &[READY], begun)?;
    let mut ready: Vec<f64> = seen.iter().filter_map(|it| it[0]).collect();
    ready.sort_by(f64::total_cmp);
    let failures = seen.len() - ready.len();
    if let Some(failed) = seen.iter().position(|it| it[0].is_none()) {
        let output = node.attached()[failed].output();
        println!("   a container did not get ready: {}", output.trim_end());
    }
    let first = *ready.first().context("no container got ready")?;
    let steps = [ready.get(ready.len() / 2), ready.last()];
    let steps = steps.into_iter().flatten().copied();
    Ok(([first].into_iter().chain(steps).collect(), failures))
}

/// A pull, and one container.
fn single(
    lab: &Lab,
    node: &mut Node,
    contender: Contender,
    stage: &Stage,
    begun: Instant,
) -> Result<(Vec<f64>, usize)> {
    let image = stage.images.first().context("an image")?;
    let reference = lab.reference(contender, image);
    let mut pull = node.nerdctl().command()?;
    pull.args(["pull", "--quiet", &reference]);
    crate::harness::command::run_ok(&mut pull, RUNS)?;
    let pulled = begun.elapsed().as_secs_f64();
    run(node, "scale", &reference)?;
    let seen = watch(node, stage.scene.marks(), begun)?;
    let output = node.attached()[0].output();
    let seen = seen.first().context("a container")?;
    let times: Option<Vec<f64>> = seen.iter().copied().collect();
    let times = times.with_context(|| format!("the container did not get ready: {output}"))?;
    if let Some((word, least)) = stage.expected {
        let number = printed(&output, word).with_context(|| format!("{word} in {output}"))?;
        ensure!(
            number >= least,
            "{word} {number}, at least {least} expected"
        );
    }
    Ok(([pulled].into_iter().chain(times).collect(), 0))
}

fn run(node: &mut Node, name: &str, reference: &str) -> Result<()> {
    node.attach(&["run", "--quiet", "--net", "none", "--name", name, reference])?;
    Ok(())
}

/// When each container had printed each mark; nothing where it ended before, or took too long.
fn watch(node: &mut Node, marks: &[&str], begun: Instant) -> Result<Vec<Vec<Option<f64>>>> {
    let mut seen = vec![vec![None; marks.len()]; node.attached().len()];
    let mut over = vec![false; seen.len()];
    while over.contains(&false) && begun.elapsed() < RUNS {
        for ((attached, seen), over) in node.attached().iter_mut().zip(&mut seen).zip(&mut over) {
            if *over {
                continue;
            }
            // Asked before the output is read: what was printed last is seen.
            let ended = attached.ended()?.is_some();
            if attached.has_more() || ended {
                let output = attached.output();
                let now = begun.elapsed().as_secs_f64();
                for (mark, at) in marks.iter().zip(seen.iter_mut()) {
                    if at.is_none() && has_line(&output, mark) {
                        *at = Some(now);
                    }
                }
            }
            *over = ended || seen.iter().all(Option::is_some);
        }
        std::thread::sleep(LOOK);
    }
    Ok(seen)
}

/// Whether there is a whole line that begins so.
fn has_line(output: &str, mark: &str) -> bool {
    let mut lines = output.split_inclusive('\n');
    lines.any(|line| line.starts_with(mark) && line.ends_with('\n'))
}

/// The number behind a word of the scripts.
fn printed(output: &str, word: &str) -> Option<u64> {
    let mut lines = output.lines();
    lines.find_map(|line| line.strip_prefix(word)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_count() {
        let output = "a warning\nscale: listed 12\nscale: rea";
        assert!(has_line(output, "scale: listed"));
        assert!(!has_line(output, READY));
        assert_eq!(printed(output, "scale: listed"), Some(12));
        assert_eq!(printed(output, "scale: read"), None);
    }
}
