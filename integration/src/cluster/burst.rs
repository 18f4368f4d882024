// SPDX-License-Identifier: Apache-2.0
//! All nodes start one image at the same moment, while some are hurt; then they complete it.
//!
//! A node's *start time* runs from the moment at which all begin to pull until its program has read
//! what it needs and says so. Faults begin when the node's container runs: a daemon that dies under
//! containerd's own calls would fail those calls, and containerd's caller would have to ask again.

use std::sync::Barrier;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Cluster;
use super::cpu::{Account, Cpu, Load};
use super::fabric::Fabric;
use super::image::Published;
use super::node::Node;
use super::origin::Origin;
use super::report::{NodeStart, PIECE_BYTES, Run};
use crate::harness::proxy::tally::Traffic;

const START_DEADLINE: Duration = Duration::from_secs(280);

/// What is done to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// SIGKILL to its daemon, which is started again later.
    Kill,
    /// Its packets to and from other nodes vanish; the registry stays in reach.
    CutOff,
}

/// Harm to one node.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// Which node.
    pub node: usize,
    /// What happens to it.
    pub harm: Harm,
    /// How long its container runs before.
    pub after: Duration,
    /// How long it lasts.
    pub lasts: Duration,
}

/// What the line and the CPU had done when the last node was ready.
#[derive(Debug, Clone, Copy)]
struct AllReady {
    at: Instant,
    egress: Traffic,
    load: Load,
}

/// What all threads of a burst share.
struct Stage<'a> {
    image: &'a Published,
    fabric: &'a Fabric,
    origin: &'a Origin,
    account: &'a Account,
    begin: Barrier,
    /// Set by the thread that passes the barrier first.
    began: Mutex<Option<(Instant, Cpu)>>,
    /// How many are not ready yet, and what was found when the last one was.
    left: Mutex<(usize, Option<AllReady>)>,
    egress_before: Traffic,
}

impl Stage<'_> {
    fn begin(&self) -> Result<Instant> {
        self.begin.wait();
        let mut began = self.began.lock().expect("no holder panics");
        match *began {
            Some((at, _)) => Ok(at),
            None => {
                let at = Instant::now();
                *began = Some((at, self.account.look()?));
                Ok(at)
            }
        }
    }

    fn ready(&self) -> Result<()> {
        let mut left = self.left.lock().expect("no holder panics");
        left.0 -= 1;
        if left.0 == 0 {
            let began = self.began.lock().expect("no holder panics");
            let (_, cpu) = began.context("the burst has begun")?;
            left.1 = Some(AllReady {
                at: Instant::now(),
                egress: self.origin.egress().since(self.egress_before),
                load: self.account.look()?.since(cpu),
            });
        }
        Ok(())
    }
}

impl Cluster {
    /// Has all nodes pull and run `image` at once; see [`Self::start_on`].
    pub fn start_everywhere(&mut self, image: &Published, faults: &[Fault]) -> Result<Run> {
        let all: Vec<usize> = (0..self.nodes.len()).collect();
        self.start_on(&all, image, faults)
    }

    /// Has the nodes `indices` pull and run `image` at once.
    ///
    /// **Errors**: when anything fails on any node, a digest is another than it must be, or the
    /// background completion began before the last node was ready, so that bytes cannot be told apart.
    pub fn start_on(
        &mut self,
        indices: &[usize],
        image: &Published,
        faults: &[Fault],
    ) -> Result<Run> {
        let (n, shape, options) = (indices.len(), self.shape, self.options.clone());
        if let Some(fault) = faults.iter().find(|it| !indices.contains(&it.node)) {
            bail!("node {} is to be hurt and does not take part", fault.node);
        }
        ensure!(
            n > 0 && indices.iter().all(|it| *it < self.nodes.len()),
            "no such nodes: {indices:?}"
        );
        self.origin.new_round();
        let stage = Stage {
            image,
            fabric: &self.fabric,
            origin: &self.origin,
            account: &self.account,
            begin: Barrier::new(n),
            began: Mutex::new(None),
            left: Mutex::new((n, None)),
            egress_before: self.origin.egress(),
        };
        let outcomes: Vec<Result<NodeStart>> = std::thread::scope(|scope| {
            let stage = &stage;
            let threads: Vec<_> = self
                .nodes
                .iter_mut()
                .enumerate()
                .filter(|(i, _)| indices.contains(i))
                .map(|(i, node)| {
                    let faults: Vec<Fault> =
                        faults.iter().filter(|it| it.node == i).copied().collect();
                    scope.spawn(move || {
                        start_one(node, stage, &faults).with_context(|| format!("node n{i}"))
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|it| it.join().expect("no thread panics"))
                .collect()
        });
        let nodes = outcomes.into_iter().collect::<Result<Vec<_>>>()?;
        let (began, cpu) = stage
            .began
            .into_inner()
            .expect("no holder panics")
            .context("the burst has begun")?;
        let all_ready = stage
            .left
            .into_inner()
            .expect("no holder panics")
            .1
            .context("all nodes are ready")?;
        let took = all_ready.at - began;
        ensure!(
            took < options.prefetch_delay,
            "the last node was ready after {took:?}, when the background completion had begun (after {:?})",
            options.prefetch_delay
        );
        Ok(Run {
            mode: options.membership.name(),
            shape: shape.into(),
            n,
            image_bytes: image.bytes,
            nodes,
            first_output: all_ready.egress.into(),
            cpu: all_ready.load,
            sealed: None,
            began: Some((began, cpu, stage.egress_before)),
        })
    }

    /// Waits until every node of the run has the whole image and has checked it, and notes what that took.
    pub fn wait_sealed(&self, run: &mut Run, deadline: Duration) -> Result<()> {
        let (began, cpu, egress_before) = run.began.context("this run was made here")?;
        let takes_part = |node: &&Node| run.nodes.iter().any(|it| it.name == node.name());
        let mut open: Vec<&Node> = self.nodes.iter().filter(takes_part).collect();
        loop {
            let mut still_open = Vec::new();
            for node in open {
                if node.is_sealed()? {
                    if let Some(start) = run.nodes.iter_mut().find(|it| it.name == node.name()) {
                        start.sealed_seconds = Some(began.elapsed().as_secs_f64());
                    }
                } else {
                    still_open.push(node);
                }
            }
            open = still_open;
            let Some(first) = open.first() else { break };
            ensure!(
                began.elapsed() < deadline,
                "{} nodes are not sealed after {deadline:?}, among them {}",
                open.len(),
                first.describe()
            );
            // Asking costs a process each time.
            std::thread::sleep(Duration::from_secs(1));
        }
        run.seal(
            self.origin.egress().since(egress_before),
            self.account.look()?.since(cpu),
        );
        Ok(())
    }
}

fn start_one(node: &mut Node, stage: &Stage<'_>, faults: &[Fault]) -> Result<NodeStart> {
    // Everybody waits for everybody, also for one that cannot begin.
    let entered = node.enter();
    let began = stage.begin()?;
    entered?;
    let before = stage.origin.egress_to(node.address());
    node.pull(stage.image)?;
    let pulled = Instant::now();
    let mut running = node.run(stage.image)?;
    let (begun, _) = running.expect("begun", START_DEADLINE)?;
    let mut outage = Duration::ZERO;
    let mut healed_bytes = 0;
    for fault in faults {
        std::thread::sleep((begun + fault.after).saturating_duration_since(Instant::now()));
        outage += harm(node, stage.fabric, fault)?;
        if fault.harm == Harm::CutOff {
            healed_bytes = stage.origin.egress_to(node.address()).since(before).bytes;
        }
    }
    let (ready, digest) = running
        .expect("read", START_DEADLINE)
        .with_context(|| node.log_tail())?;
    ensure!(
        digest == stage.image.digest,
        "read {digest}, not {}",
        stage.image.digest
    );
    stage.ready()?;
    running.finish(START_DEADLINE)?;
    let seconds = |at: Instant| (at - began).as_secs_f64();
    let killed = faults.iter().any(|it| it.harm == Harm::Kill);
    let traffic = stage.origin.egress_to(node.address()).since(before);
    Ok(NodeStart {
        name: node.name().to_owned(),
        pull_seconds: seconds(pulled),
        begun_seconds: seconds(begun),
        start_seconds: seconds(ready),
        outage_seconds: outage.as_secs_f64(),
        killed,
        cut_off: faults.iter().any(|it| it.harm == Harm::CutOff),
        explained_bytes: match killed {
            true => healed_bytes + traffic.cut_bytes + PIECE_BYTES,
            false => healed_bytes,
        },
        from_registry: traffic.into(),
        sealed_seconds: None,
    })
}

/// Hurts and heals; returns how long the node had no daemon.
fn harm(node: &mut Node, fabric: &Fabric, fault: &Fault) -> Result<Duration> {
    match fault.harm {
        Harm::Kill => {
            let start = Instant::now();
            node.kill_daemon()?;
            std::thread::sleep(fault.lasts);
            node.start_daemon()?;
            Ok(start.elapsed())
        }
        Harm::CutOff => {
            fabric.cut_off(node.name())?;
            std::thread::sleep(fault.lasts);
            fabric.heal(node.name())?;
            Ok(Duration::ZERO)
        }
    }
}
