// SPDX-License-Identifier: Apache-2.0
//! Many daemons on one machine, each in a network of its own, and one registry: what a cluster costs
//! the registry and its nodes, measured on the real programs.
//!
//! ```text
//!   namespace slc-PID-n0            slc-PID-sw              slc-PID-registry
//!   containerd, sluiced, shim,                              line (latency, counts by client)
//!   containers ── eth0 ─tbf── ──tbf─ n0 ┐                     │
//!                                       ├ br0 ─ registry ─tbf── ──tbf─ eth0 ─ docker-registry
//!   slc-PID-n1 ── eth0 ─tbf── ──tbf─ n1 ┘
//! ```
//!
//! Bandwidth is shaped on both ends of each link by tbf. Latency is added by the line in front of the
//! registry alone: nodes of a zone are near each other. The mount namespace is everybody's, so unix
//! sockets and mounts are where they are in all other tests.
//!
//! Everything is bounded in time: each wait by a deadline, the whole by a [`watchdog`]. Namespaces
//! carry the process ID of their test; those of a test that was killed are removed by the next one.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::harness::mounts;
use crate::harness::proxy::Line;
use crate::harness::root::Root;

pub mod burst;
pub mod cpu;
pub mod fabric;
pub mod image;
pub mod membership;
pub mod node;
pub mod origin;
pub mod report;
pub mod watchdog;

use cpu::Account;
use fabric::{Fabric, Port};
use image::{Image, Published};
use membership::Membership;
use node::Node;
use origin::Origin;
use watchdog::Watchdog;

/// A set-up with all its runs must be over by then.
const WATCHDOG: Duration = Duration::from_secs(1500);
/// So many nodes boot at once: containerd takes a core for half a second.
const BOOT_AT_ONCE: usize = 4;

/// The speeds of the links, each the same both ways, and how far the registry is.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// A word for reports.
    pub name: &'static str,
    /// Of the registry's link.
    pub registry_bits_per_second: u64,
    /// Of each node's link.
    pub node_bits_per_second: u64,
    /// Round trip to the registry.
    pub latency: Duration,
}

impl Shape {
    /// A zone: nodes near each other, the registry far away on a line that one node fills.
    pub const ZONE: Self = Self {
        name: "zone",
        registry_bits_per_second: 20_000_000,
        node_bits_per_second: 60_000_000,
        latency: Duration::from_millis(20),
    };
    /// The same, slower: for more nodes than two cores could start at the speed of [`Self::ZONE`].
    pub const SLOW_ZONE: Self = Self {
        name: "slow-zone",
        registry_bits_per_second: 12_000_000,
        node_bits_per_second: 36_000_000,
        latency: Duration::from_millis(20),
    };
    /// A registry that serves sixteen nodes as fast as one: what is left is what the machine costs.
    pub const PLENTY: Self = Self {
        name: "plenty",
        registry_bits_per_second: 240_000_000,
        node_bits_per_second: 12_000_000,
        latency: Duration::from_millis(20),
    };
    /// Slower again, so that a start takes several times as long as the faults that befall it: how much of
    /// the registry's line these take is what is measured then, and not how long a line that is full anyway
    /// takes for three seconds' worth of it.
    pub const NARROW: Self = Self {
        name: "narrow",
        registry_bits_per_second: 6_000_000,
        node_bits_per_second: 24_000_000,
        latency: Duration::from_millis(20),
    };
    /// Hard for a cluster: a lone node is held up by its own link, which has nothing to spare for others.
    pub const EVEN: Self = Self {
        name: "even",
        registry_bits_per_second: 40_000_000,
        node_bits_per_second: 20_000_000,
        latency: Duration::from_millis(20),
    };
}

/// What the daemons are told.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whether they form a cluster.
    pub membership: Membership,
    /// When the background completion begins: later than the last first output, so that the bytes of
    /// starting and those of completing can be told apart.
    pub prefetch_delay: Duration,
    /// The first nodes are supernodes.
    pub supernodes: usize,
    /// Nodes are dealt to so many zones in turn.
    pub zones: usize,
    /// Seeds beside the first nodes: peers that a test plays itself, see [`Cluster::plug`].
    pub further_seeds: Vec<SocketAddr>,
    /// Appended to every daemon's configuration.
    pub config: String,
}

impl Options {
    /// Daemons that know nothing of each other.
    #[must_use]
    pub fn alone(prefetch_delay: Duration) -> Self {
        Self {
            membership: Membership::Off,
            prefetch_delay,
            supernodes: 0,
            zones: 1,
            further_seeds: Vec::new(),
            config: String::new(),
        }
    }

    /// One zone of equal nodes.
    #[must_use]
    pub fn cluster(prefetch_delay: Duration) -> Self {
        Self {
            membership: Membership::On,
            ..Self::alone(prefetch_delay)
        }
    }
}

/// A registry and nodes. Fields drop in order: nodes, registry, networks, files; the watchdog watches to the end.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    origin: Origin,
    fabric: Fabric,
    root: Root,
    shape: Shape,
    options: Options,
    account: Account,
    _watchdog: Watchdog,
}

impl Cluster {
    /// Makes the networks and starts the registry, empty, and `nodes` nodes with nothing in them.
    pub fn start(nodes: usize, shape: Shape, options: &Options) -> Result<Self> {
        let root = Root::new(&format!("cl{}", std::process::id()))?;
        fabric::remove_leftovers();
        let fabric = Fabric::build()?;
        let watchdog = Watchdog::start(WATCHDOG, root.path(), fabric.prefix());
        let account = Account::open(&fabric::account_of(std::process::id()));
        let line = Line {
            latency: shape.latency,
            ..Line::OPEN
        };
        let origin = Origin::start(&fabric, &root, shape.registry_bits_per_second, line)?;
        let mut cluster = Self {
            nodes: Vec::new(),
            origin,
            fabric,
            root,
            shape,
            options: options.clone(),
            account,
            _watchdog: watchdog,
        };
        cluster.grow(nodes)?;
        Ok(cluster)
    }

    /// Removes all nodes with what they have and starts `nodes` new ones; the registry keeps its images.
    pub fn regrow(&mut self, nodes: usize, options: &Options) -> Result<()> {
        // One after the other, with one core for each end of a daemon, this would take long.
        std::thread::scope(|scope| {
            for node in self.nodes.drain(..) {
                scope.spawn(move || drop(node));
            }
        });
        self.options = options.clone();
        self.grow(nodes)
    }

    fn grow(&mut self, nodes: usize) -> Result<()> {
        let ports = (0..nodes)
            .map(|i| {
                let address = fabric::node_address(i)?;
                self.fabric
                    .plug(&format!("n{i}"), address, self.shape.node_bits_per_second)
            })
            .collect::<Result<Vec<_>>>()?;
        let addresses: Vec<IpAddr> = ports.iter().map(|port| port.address().into()).collect();
        let mut ports = ports.into_iter().enumerate();
        loop {
            let wave: Vec<_> = ports.by_ref().take(BOOT_AT_ONCE).collect();
            if wave.is_empty() {
                break;
            }
            let (root, options) = (&self.root, &self.options);
            let addresses = &addresses;
            let started = std::thread::scope(|scope| {
                let threads: Vec<_> = wave
                    .into_iter()
                    .map(|(i, port)| {
                        scope.spawn(move || {
                            let config = membership::config(options, i, addresses);
                            Node::start(root, port, &config)
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().expect("no thread panics"))
                    .collect::<Vec<_>>()
            });
            for node in started {
                self.nodes.push(node?);
            }
        }
        membership::wait_joined(&self.options, &self.nodes)
    }

    /// Pushes an image and its conversion to the registry, past the line.
    pub fn publish(&self, image: &Image) -> Result<Published> {
        self.origin.publish(image)
    }

    /// A place on the bridge, shaped like a node's, for a program of the test's own, such as a peer that
    /// lies: what is started in [`fabric::Port::network`] is there. `index` counts as nodes do, which have
    /// the lowest. Drop it before the cluster.
    pub fn plug(&self, name: &str, index: usize) -> Result<Port> {
        let address = fabric::node_address(index)?;
        self.fabric
            .plug(name, address, self.shape.node_bits_per_second)
    }

    /// The nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node `index`, to ask it things.
    pub fn node(&self, index: usize) -> Result<&Node> {
        self.nodes.get(index).context("a node of the cluster")
    }

    /// The registry and its line.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// What all of it is shaped like.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Where files of the test can be made.
    #[must_use]
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Takes everything down and checks that nothing is left on this machine.
    pub fn end(self) -> Result<()> {
        let Self {
            nodes,
            origin,
            fabric,
            root,
            account,
            ..
        } = self;
        drop((nodes, origin));
        fabric.end()?;
        let mounts = mounts::below(root.path());
        ensure!(mounts.is_empty(), "mounts are left: {mounts:?}");
        drop(account);
        // With the lock of set-ups: last.
        drop(root);
        Ok(())
    }
}

/// Where the registry is for the nodes.
#[must_use]
pub fn registry_address() -> SocketAddr {
    SocketAddr::new(fabric::REGISTRY.into(), origin::PORT)
}
