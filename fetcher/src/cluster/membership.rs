// SPDX-License-Identifier: Apache-2.0
//! Who is there.
//!
//! A [`Membership`] keeps a [`View`] of the nodes that live: by gossip (`cluster/gossip.rs`), by asking
//! the nodes of a static list, or of this node alone. Whoever needs the view watches it. It is kept by
//! one task, with one beside it that looks seeds up; both end with [`Membership::stop`].
//!
//! Nothing here stops a start: an address that cannot be listened at, a network that is not up, names
//! that do not resolve are tried again, and the node is alone meanwhile. Partitions heal by gossip with
//! nodes that are believed dead, and with the seeds. A daemon that is started anew begins with the nodes
//! that it was told to remember: one that believed itself alone would fetch from the origin what its
//! neighbours have.
//!
//! ```text
//! seeds, names, seed file --lookup--> addresses --+
//!                                                 v
//! gossip session or poll --claims--> roster --> view
//! ```

mod lookup;
mod poll;
mod roster;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chitchat::transport::{Transport, UdpTransport};
use futures::future::BoxFuture;
use rand::seq::IndexedRandom as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::lookup::{Lookup, Seeds};
use self::poll::{ASK_EVERY, Poll};
use self::roster::Roster;
pub(super) use self::roster::{Claim, NODES_MAX};
use super::allow::Allow;
use super::gossip::{GOSSIP_EVERY, Session};
use super::metrics::ClusterMetrics;
use super::node::{InvalidName, Node, NodeId, View, check_name};
use super::route;
use super::seed::Seed;
use crate::clock;

/// How long to wait before what did not work is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// How often a seed is gossiped with while others are known, so that halves of a cluster meet again.
const SEED_EVERY: Duration = Duration::from_secs(15);
/// How many seeds a node that is alone gossips with, each [`GOSSIP_EVERY`].
const SEEDS_AT_ONCE: usize = 3;
/// How often this machine's address is looked up, where it was not said.
const ROUTE_EVERY: Duration = Duration::from_secs(30);
/// How often this node's load may be told.
const LOAD_EVERY: Duration = Duration::from_secs(1);
/// How long a view stays as it is after gossip had to begin anew: until the others are heard again.
const SETTLE: Duration = Duration::from_secs(10);
/// How long a stop may take: telling some nodes, and ending two tasks.
const STOP_DEADLINE: Duration = Duration::from_secs(4);

/// A load that differs by so many percent is worth telling.
const LOAD_STEP: u8 = 10;

/// What a node can still do for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Load {
    percent: u8,
    free_slots: u16,
}

impl Load {
    fn of(node: &Node) -> Self {
        Load {
            percent: node.load,
            free_slots: node.free_slots,
        }
    }

    /// Whether it is worth telling, to who knows `other`: ten percent, a quarter of the slots, or that
    /// there are none, or some again.
    fn differs(self, other: Load) -> bool {
        let slots = self.free_slots.abs_diff(other.free_slots);
        let quarter = self.free_slots.max(other.free_slots) / 4;
        self.percent.abs_diff(other.percent) >= LOAD_STEP
            || slots > quarter
            || (self.free_slots == 0) != (other.free_slots == 0)
    }
}

/// Whom to ask for a Hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Its address.
    pub address: SocketAddr,
    /// The DNS name that led there, if one did: what its certificate may name.
    pub name: Option<String>,
}

/// Asks a node who it is; `None` when it does not answer. Ended after 2 s.
pub type Hello = Arc<dyn Fn(Asked) -> BoxFuture<'static, Option<Node>> + Send + Sync>;

/// How nodes are found.
#[derive(Clone)]
pub enum Discovery {
    /// By gossip, which begins at the seeds.
    Gossip,
    /// The seeds are the nodes, asked for their Hello every 3 s; one that fails three times is left out
    /// until it answers again.
    Static(Hello),
}

impl std::fmt::Debug for Discovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Discovery::Gossip => "Gossip",
            Discovery::Static(_) => "Static",
        })
    }
}

/// What a membership needs to know.
#[derive(Clone, Debug)]
pub struct MembershipOptions {
    /// Where gossip listens (UDP).
    pub listen: SocketAddr,
    /// How nodes are found.
    pub discovery: Discovery,
    /// Where nodes may be found.
    pub seeds: Vec<Seed>,
    /// A file with further seeds, read again and again.
    pub seed_file: Option<PathBuf>,
    /// Nodes that lived when this one was here last. Until the cluster is heard, for 10 s at most, they are
    /// believed to live still. Without effect on a static list.
    pub remembered: Vec<Node>,
    /// Networks of peers.
    pub allow: Allow,
    /// What is counted.
    pub metrics: ClusterMetrics,
}

/// A membership that cannot begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MembershipError {
    /// The node's zone or rack is no name.
    #[error("{what} {name:?}: {source}")]
    Name {
        /// Which of them.
        what: &'static str,
        /// What it is.
        name: String,
        /// Why it is none.
        #[source]
        source: InvalidName,
    },
}

/// Keeps a view of who is there.
#[derive(Debug)]
pub struct Membership {
    view: watch::Receiver<Arc<View>>,
    /// Kept so that who watches the view of a node by itself does not find it closed.
    _alone: Option<watch::Sender<Arc<View>>>,
    load: watch::Sender<Load>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Membership {
    /// A node by itself: no network, no task.
    #[must_use]
    pub fn alone(me: Node) -> Self {
        let load = watch::Sender::new(Load::of(&me));
        let (sender, view) = watch::channel(Arc::new(View::alone(me)));
        Membership {
            view,
            _alone: Some(sender),
            load,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// Begins, and returns at once. Where the address of `me` is not specified (`0.0.0.0`, `[::]`), it
    /// is that of the default route, or of the route to a seed, as soon as there is one.
    ///
    /// Ends with `stop` too, but only [`stop`](Self::stop) waits for it.
    ///
    /// **Errors**: a zone or rack that is no name.
    pub fn start(
        options: MembershipOptions,
        me: Node,
        stop: &CancellationToken,
    ) -> Result<Self, MembershipError> {
        Self::start_over(Arc::new(UdpTransport), options, me, stop)
    }

    fn start_over(
        transport: Arc<dyn Transport>,
        options: MembershipOptions,
        me: Node,
        stop: &CancellationToken,
    ) -> Result<Self, MembershipError> {
        let names = [("zone", &me.zone), ("rack", &me.rack)];
        for (what, name) in names {
            if what == "rack" && name.is_empty() {
                continue;
            }
            check_name(name).map_err(|source| MembershipError::Name {
                what,
                name: name.clone(),
                source,
            })?;
        }
        let stop = stop.child_token();
        let tasks = TaskTracker::new();
        let load = watch::Sender::new(Load::of(&me));
        let (lookup, seeds) = Lookup::new(options.seeds, options.seed_file);
        tasks.spawn(lookup.run(stop.clone()));
        let metrics = options.metrics;
        let mut roster = Roster::new(me.clone(), options.allow.clone(), metrics.clone());
        if matches!(options.discovery, Discovery::Gossip) {
            let remembered = options.remembered.into_iter().map(Claim::old).collect();
            roster.update(remembered, me.clone(), clock::now());
        }
        let (sender, view) = watch::channel(Arc::clone(roster.view()));
        let keeper = Keeper {
            transport,
            listen: options.listen,
            given: me.address,
            me,
            allow: options.allow,
            seeds,
            load: load.subscribe(),
            roster,
            view: sender,
            generation: 0,
            unsettled: None,
            metrics,
            stop: stop.clone(),
        };
        tasks.spawn(keeper.run(options.discovery));
        tasks.close();
        Ok(Membership {
            view,
            _alone: None,
            load,
            tasks,
            stop,
        })
    }

    /// The view. It changes when nodes come or go, when something else than their load changes, and when
    /// a load changes noticeably.
    #[must_use]
    pub fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    /// How much of the upload is taken (in percent), and how many uploads could begin now. Told to others
    /// once a second at most, and only when it differs noticeably from what they know.
    pub fn set_load(&self, percent: u8, free_slots: u16) {
        let now = Load {
            percent: percent.min(100),
            free_slots,
        };
        self.load.send_if_modified(|load| {
            let changed = *load != now;
            *load = now;
            changed
        });
    }

    /// Leaves the cluster: some nodes are told, and tell the others. Takes 4 s at most.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        let ended = tokio::time::timeout(STOP_DEADLINE, self.tasks.wait()).await;
        if ended.is_err() {
            tracing::warn!("the membership did not end in time");
        }
    }
}

/// Milliseconds since 1970: what makes a restarted node newer than itself.
fn generation_now() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH);
    elapsed.map_or(0, |elapsed| {
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
    })
}

/// The task that keeps the view.
struct Keeper {
    transport: Arc<dyn Transport>,
    listen: SocketAddr,
    /// The address that was given for this node; may be unspecified.
    given: SocketAddr,
    me: Node,
    allow: Allow,
    seeds: Seeds,
    load: watch::Receiver<Load>,
    roster: Roster,
    view: watch::Sender<Arc<View>>,
    generation: u64,
    /// Until when nodes that are not heard are not missed.
    unsettled: Option<Instant>,
    metrics: ClusterMetrics,
    stop: CancellationToken,
}

impl Keeper {
    async fn run(mut self, discovery: Discovery) {
        let stop = self.stop.clone();
        match discovery {
            Discovery::Static(hello) => {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = self.poll(hello) => {}
                }
            }
            Discovery::Gossip => {
                let mut said = String::new();
                while !stop.is_cancelled() {
                    let failure = self.gossip().await;
                    if let Some(failure) = failure {
                        self.metrics.gossip_failed();
                        if failure != said {
                            tracing::warn!(failure, "gossip, trying again");
                        }
                        said = failure;
                    }
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = tokio::time::sleep(RETRY_AFTER) => {}
                    }
                }
            }
        }
    }

    /// Takes what a session hears; while it has just begun anew, besides what was known.
    fn hear(&mut self, session: &mut Session) {
        let mut claims = session.claims();
        if let Some(until) = self.unsettled {
            let heard: BTreeSet<NodeId> = claims.iter().map(|it| it.node.id.clone()).collect();
            let missed = self.known().filter(|known| !heard.contains(&known.node.id));
            let missed: Vec<Claim> = missed.collect();
            if missed.is_empty() || clock::now() >= until {
                self.unsettled = None;
            } else {
                claims.extend(missed);
            }
        }
        self.update(claims);
    }

    /// The nodes of the view, as claims that anything newer replaces.
    fn known(&self) -> impl Iterator<Item = Claim> {
        self.roster.view().others.iter().cloned().map(Claim::old)
    }

    fn update(&mut self, claims: Vec<Claim>) {
        if let Some(view) = self.roster.update(claims, self.me.clone(), clock::now()) {
            self.view.send_replace(view);
        }
    }

    /// Where this node is now, if the network is up.
    fn locate(&self) -> Option<SocketAddr> {
        let seeds = self.seeds.borrow();
        let seeds: Vec<SocketAddr> = seeds.iter().map(|seed| seed.address).collect();
        route::advertised(self.given, &seeds)
    }

    /// Asks the nodes of the static list, for ever.
    async fn poll(&mut self, hello: Hello) {
        let mut poll = Poll::default();
        let mut next = clock::now();
        loop {
            self.me.address = self.locate().unwrap_or(self.given);
            let seeds = Arc::clone(&self.seeds.borrow_and_update());
            poll.ask(&hello, &seeds).await;
            self.take_load();
            self.update(poll.claims(&self.me));
            next = (next + ASK_EVERY).max(clock::now());
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                // Names have just been resolved: why wait.
                Ok(()) = self.seeds.changed() => {}
            }
        }
    }

    /// Gossips until the stop (`None`), or until it cannot go on, and why.
    async fn gossip(&mut self) -> Option<String> {
        let Some(address) = self.locate() else {
            return Some("this machine has no address yet; is there a default route?".to_owned());
        };
        self.me.address = address;
        self.take_load();
        let known: Vec<Claim> = self.known().collect();
        if !known.is_empty() {
            self.unsettled = Some(clock::now() + SETTLE);
        }
        // The address may be known only now.
        self.update(known);
        self.generation = generation_now().max(self.generation + 1);
        let opened = Session::open(
            &self.transport,
            self.listen,
            &self.allow,
            &self.me,
            self.generation,
        );
        let mut session = match opened.await {
            Ok(session) => session,
            Err(error) => return Some(format!("{error:#}")),
        };
        tracing::info!(name = %self.me.id, %address, "gossiping");
        let failure = self.attend(&mut session).await;
        session.close(failure.is_none()).await;
        failure
    }

    async fn attend(&mut self, session: &mut Session) -> Option<String> {
        let stop = self.stop.clone();
        let mut tick = tokio::time::interval(GOSSIP_EVERY);
        let (mut seeded, mut located) = (None, clock::now());
        let mut told: Option<Instant> = None;
        let due = |last: Option<Instant>, every: Duration| {
            last.is_none_or(|last| clock::now().duration_since(last) >= every)
        };
        loop {
            tokio::select! {
                () = stop.cancelled() => return None,
                changed = session.changed() => {
                    if let Err(failure) = changed {
                        return Some(failure);
                    }
                    self.hear(session);
                }
                _ = tick.tick() => {
                    let alone = self.roster.view().others.is_empty();
                    if alone || self.unsettled.is_some() || due(seeded, SEED_EVERY) {
                        seeded = Some(clock::now());
                        self.tell_seeds(session, if alone { SEEDS_AT_ONCE } else { 1 });
                    }
                    if self.unsettled.is_some() {
                        self.tell_known(session);
                    }
                    let news = due(told, LOAD_EVERY) && self.take_load();
                    if news {
                        told = Some(clock::now());
                    }
                    if news || self.unsettled.is_some() {
                        self.hear(session);
                    }
                    // Also when nothing changed here: others may have written in our name.
                    if let Err(failure) = session.publish(&self.me).await {
                        return Some(failure);
                    }
                    if due(Some(located), ROUTE_EVERY) {
                        located = clock::now();
                        if self.locate().is_some_and(|address| address != self.me.address) {
                            return Some("this machine's address changed".to_owned());
                        }
                    }
                }
            }
        }
    }

    fn tell_seeds(&self, session: &Session, most: usize) {
        let seeds = self.seeds.borrow();
        let others = seeds.iter().map(|seed| seed.address);
        let others: Vec<_> = others.filter(|it| *it != self.me.address).collect();
        for seed in others.choose_multiple(&mut rand::rng(), most) {
            session.tell(*seed);
        }
    }

    /// Gossips with nodes that are believed to live and were not heard yet: the seeds may all be dead.
    fn tell_known(&self, session: &Session) {
        let others = &self.roster.view().others;
        for node in others.choose_multiple(&mut rand::rng(), SEEDS_AT_ONCE) {
            session.tell(node.address);
        }
    }

    /// Takes the load that was set last, if it is worth telling.
    fn take_load(&mut self) -> bool {
        let load = *self.load.borrow();
        let worth = load.differs(Load::of(&self.me));
        if worth {
            (self.me.load, self.me.free_slots) = (load.percent, load.free_slots);
        }
        worth
    }
}

#[cfg(test)]
mod tests;
