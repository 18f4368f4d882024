// SPDX-License-Identifier: Apache-2.0
//! The nodes, and the loop.
//!
//! A *key* is what is asked for in one request: first the requests of a start, then what is left of each
//! piece for the background. A node has each key at most once in flight, whoever wants it.

use std::time::Duration;

use sluice_blockindex::digest::IndexDigest;
use sluice_fetcher::clock;
use sluice_fetcher::cluster::bucket::{TokenBucket, share};
use sluice_fetcher::cluster::choice::Scores;
use sluice_fetcher::cluster::hedge::HedgeBudget;
use sluice_fetcher::cluster::holders::Holders;
use sluice_fetcher::cluster::home::{HomeLimit, PieceKey, homes};
use sluice_fetcher::cluster::node::{Distance, Node, NodeId, Role, View};
use sluice_fetcher::cluster::uploads::{UploadLimits, Uploads};
use tokio::time::Instant;

use super::events::{Event, Events, Time};
use super::fetching::Fetch;
use super::figures::{Counts, Figures, Percentiles};
use super::network::{Network, Owner};
use super::random::Random;
use super::scenario::{BackgroundOrder, Image, Scenario};
use super::serving::Upload;
use super::slab::{Handle, Slab};

/// In how many parts a piece is sent in the background: fewer than it has chunks, and so fewer events.
const BACKGROUND_PARTS: u64 = 2;
/// Nodes that a node remembers scores of; fewer than the daemon does, to bound the memory of 10,000.
const SCORES: usize = 64;
/// How often nodes hear each other's load.
const GOSSIP: Time = 1_000_000_000;
/// Homes that are known of a piece: one, and who takes over, and one more.
const HOMES: usize = 3;

/// Nanoseconds of so many milliseconds.
pub(super) fn ms(milliseconds: f64) -> Time {
    u64::try_from(Duration::from_secs_f64(milliseconds.max(0.0) / 1e3).as_nanos())
        .unwrap_or(Time::MAX)
}

/// Something that can be asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) piece: u32,
    pub(super) bytes: u64,
    pub(super) chunks: u32,
}

impl Key {
    /// Bytes of one chunk; the last takes what is left over.
    pub(super) fn chunk(&self, number: u32) -> u64 {
        let each = self.bytes / u64::from(self.chunks);
        if number + 1 == self.chunks {
            self.bytes - each * u64::from(self.chunks - 1)
        } else {
            each
        }
    }
}

/// A set of small numbers.
#[derive(Clone, Debug, Default)]
pub(super) struct Bits(Vec<u64>);

impl Bits {
    pub(super) fn has(&self, number: u32) -> bool {
        let word = self.0.get(number as usize / 64);
        word.is_some_and(|word| word & (1 << (number % 64)) != 0)
    }

    pub(super) fn set(&mut self, number: u32) {
        let word = number as usize / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (number % 64);
    }
}

/// A container that starts.
#[derive(Clone, Debug, Default)]
struct Container {
    /// Requests that it has used.
    used: u32,
    started: Option<Time>,
}

/// A node.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) alive: bool,
    pub(super) slow: bool,
    expelled: bool,
    present: Bits,
    /// How far from the registry it got each key.
    pub(super) hops: Vec<u8>,
    /// What it fetches, by key.
    pub(super) fetches: Vec<(u32, Handle)>,
    /// What it sends.
    pub(super) sending: Vec<Handle>,
    pub(super) uploads: Uploads<u32>,
    pub(super) scores: Scores,
    pub(super) hedges: HedgeBudget,
    pub(super) origin: TokenBucket,
    pub(super) upload: TokenBucket,
    /// Whom it talked to.
    pub(super) connected: Bits,
    pub(super) sent: u64,
    containers: Vec<Container>,
    /// What is left to fetch in the background, the next last.
    background: Vec<u32>,
    missing: u32,
    complete: Option<Time>,
    /// Its load as the others know it, and since when.
    told: (u8, u16),
    told_at: Time,
}

impl Host {
    pub(super) fn has(&self, key: u32) -> bool {
        self.present.has(key)
    }

    pub(super) fn fetch_of(&self, key: u32) -> Option<Handle> {
        let found = self.fetches.iter().find(|(it, _)| *it == key);
        found.map(|(_, handle)| *handle)
    }

    /// To be called before its uploads change, and before its load is looked at by others.
    pub(super) fn tell(&mut self, now: Time) -> (u8, u16) {
        if now / GOSSIP > self.told_at / GOSSIP {
            self.told = (self.uploads.load(), self.uploads.free_slots());
            self.told_at = now;
        }
        self.told
    }
}

/// The whole simulation.
#[derive(Debug)]
pub struct World {
    pub(super) scenario: Scenario,
    pub(super) events: Events,
    pub(super) network: Network,
    pub(super) fetches: Slab<Fetch>,
    pub(super) uploads: Slab<Upload>,
    pub(super) hosts: Vec<Host>,
    pub(super) nodes: Vec<Node>,
    pub(super) keys: Vec<Key>,
    pub(super) counts: Counts,
    pub(super) egress: u64,
    egress_start: u64,
    /// Who believes whom to live; all believe the same.
    view: View,
    pub(super) scratch: Option<View>,
    homes: Vec<Option<Vec<NodeId>>>,
    pieces: u32,
    pub(super) random: Random,
    /// Where the simulated time begins on the clock that the policy is given.
    began: Instant,
}

/// The number of a node, from its name.
pub(super) fn number(id: &NodeId) -> u32 {
    id.as_str()[1..].parse().unwrap_or(u32::MAX)
}

impl World {
    /// Sets a scenario up.
    #[must_use]
    pub fn new(scenario: Scenario) -> Self {
        let mut random = Random::new(scenario.seed);
        let nodes = nodes_of(&scenario);
        let keys = keys_of(&scenario);
        let pieces = pieces_of(&scenario.image);
        let mut network = Network::default();
        network.add_link(scenario.links.registry_mbit);
        let began = clock::now();
        let mut hosts = Vec::new();
        for node in &nodes {
            let supernode = node.role == Role::Supernode;
            let links = &scenario.links;
            let wide = supernode.then_some(links.supernode_mbit);
            network.add_link(wide.unwrap_or(links.up_mbit));
            network.add_link(wide.unwrap_or(links.down_mbit));
            let containers = if supernode { 0 } else { scenario.containers };
            hosts.push(host(&scenario, &keys, containers, &mut random, began));
        }
        let view = View {
            me: nodes[0].clone(),
            others: nodes[1..].to_vec(),
        };
        let mut world = World {
            scenario,
            events: Events::default(),
            network,
            fetches: Slab::default(),
            uploads: Slab::default(),
            hosts,
            nodes,
            keys,
            counts: Counts::default(),
            egress: 0,
            egress_start: 0,
            view,
            scratch: None,
            homes: Vec::new(),
            pieces,
            random,
            began,
        };
        world.views_changed();
        world.plan();
        world
    }

    /// Runs it to its end.
    #[must_use]
    pub fn run(mut self) -> Figures {
        while let Some(event) = self.events.next_event() {
            self.happen(event);
        }
        self.figures()
    }

    fn plan(&mut self) {
        for node in 0..self.scenario.nodes {
            for container in 0..self.scenario.containers {
                let late = ms(self.scenario.stagger_ms * self.random.unit());
                self.events.after(late, Event::Read { node, container });
            }
        }
        let failures = self.scenario.failures.clone();
        for node in part_of(self.scenario.nodes, failures.killed, &mut self.random) {
            let at = ms(failures.within_ms * self.random.unit());
            self.events.after(at, Event::Kill(node));
            let noticed = at + ms(failures.expelled_ms);
            self.events.after(noticed, Event::Expel(node));
        }
        for node in part_of(self.scenario.nodes, failures.slow, &mut self.random) {
            self.hosts[node as usize].slow = true;
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Read { node, container } => self.read(node, container),
            Event::Ask {
                fetch,
                server,
                may_fetch,
            } => self.asked(fetch, server, may_fetch),
            Event::Answered {
                fetch,
                server,
                answer,
            } => self.answered(fetch, server, answer),
            Event::Late {
                fetch,
                server,
                give_up,
            } => self.late(fetch, server, give_up),
            Event::Again(fetch) => self.again(fetch),
            Event::Origin(fetch) => self.next_from_registry(fetch),
            Event::Landed(fetch) => self.landed(fetch),
            Event::Send(upload) => self.send(upload),
            Event::Lost {
                fetch,
                upload,
                server,
            } => self.lost(fetch, upload, server),
            Event::Stalled {
                fetch,
                upload,
                server,
                arrived,
            } => self.stalled(fetch, upload, server, arrived),
            Event::Grace(upload) => self.grace_over(upload),
            Event::Kill(node) => self.kill(node),
            Event::Expel(node) => {
                self.hosts[node as usize].expelled = true;
                self.views_changed();
            }
            Event::Flow(flow) => match self.network.ended(&mut self.events, flow) {
                Some(Owner::Upload(upload)) => self.chunk_sent(upload),
                Some(Owner::Fetch(fetch)) => self.chunk_from_registry(fetch),
                None => {}
            },
        }
    }

    /// The moment on the clock that the policy is given.
    pub(super) fn instant(&self) -> Instant {
        self.began + Duration::from_nanos(self.events.now())
    }

    /// Half a round trip between two nodes.
    pub(super) fn one_way(&self, a: u32, b: u32) -> Time {
        let [a, b] = [a, b].map(|node| &self.nodes[node as usize]);
        let links = &self.scenario.links;
        ms(match distance(a, b) {
            Distance::Rack => links.rack_ms,
            Distance::Zone => links.zone_ms,
            Distance::Elsewhere => links.elsewhere_ms,
        } / 2.0)
    }

    /// The links of a node: from it, and to it.
    pub(super) fn links(node: u32) -> [usize; 2] {
        let node = node as usize;
        [1 + 2 * node, 2 + 2 * node]
    }

    /// What holders and the degree of the tree are counted by.
    pub(super) fn name_of(&self, key: u32) -> u32 {
        if self.scenario.policy.holders_by_piece {
            self.keys[key as usize].piece
        } else {
            key
        }
    }

    /// The homes of a key's piece in a node's zone.
    pub(super) fn homes_of(&mut self, node: u32, key: u32) -> Vec<NodeId> {
        let zone = node % self.scenario.zones;
        let piece = self.keys[key as usize].piece;
        let place = (zone * self.pieces + piece) as usize;
        let known = &mut self.homes[place];
        let found = known.get_or_insert_with(|| {
            let key = PieceKey {
                index: IndexDigest::of(b"the image"),
                number: piece,
            };
            let zone = &self.nodes[node as usize].zone;
            let found = homes(&self.view, zone, &key, HomeLimit::NONE, HOMES);
            found.into_iter().map(|node| node.id.clone()).collect()
        });
        found.clone()
    }

    /// A node's view, as far as it matters for an order of these candidates. To be put back into `scratch`.
    pub(super) fn view_of(&mut self, node: u32, candidates: &[NodeId]) -> View {
        let now = self.events.now();
        let mut view = self.scratch.take().unwrap_or_else(|| self.view.clone());
        become_like(&mut view.me, &self.nodes[node as usize]);
        let mut count = 0;
        for id in candidates {
            let at = number(id) as usize;
            let Some(host) = self.hosts.get_mut(at).filter(|host| !host.expelled) else {
                continue;
            };
            if view.others.len() == count {
                view.others.push(self.nodes[at].clone());
            }
            let other = &mut view.others[count];
            become_like(other, &self.nodes[at]);
            (other.load, other.free_slots) = host.tell(now);
            count += 1;
        }
        view.others.truncate(count);
        view
    }

    fn views_changed(&mut self) {
        let believed = self.nodes.iter().zip(&self.hosts);
        let mut believed: Vec<Node> = believed
            .filter(|(_, host)| !host.expelled)
            .map(|(node, _)| node.clone())
            .collect();
        if believed.is_empty() {
            return;
        }
        let me = believed.remove(0);
        self.view = View {
            me,
            others: believed,
        };
        self.homes = vec![None; (self.scenario.zones * self.pieces) as usize];
        if self.scenario.policy.origin > 0 {
            self.share_origin();
        }
    }

    fn share_origin(&mut self) {
        let now = self.instant();
        let mut known: Vec<(String, Role, u64)> = Vec::new();
        for (host, node) in self.hosts.iter_mut().zip(&self.nodes) {
            let alike = known
                .iter()
                .find(|(zone, role, _)| *zone == node.zone && *role == node.role);
            let rate = alike.map_or_else(
                || {
                    // All of a role have the same share: once for each is enough.
                    let mut view = self.view.clone();
                    let last = std::mem::replace(&mut view.me, node.clone());
                    view.others.retain(|other| other.id != node.id);
                    view.others.extend((last.id != node.id).then_some(last));
                    share(self.scenario.policy.origin, &view, HomeLimit::NONE)
                },
                |(.., rate)| *rate,
            );
            known.push((node.zone.clone(), node.role, rate));
            known.dedup();
            host.origin.set_rate(rate, now);
        }
    }

    /// A container wants its next request, or is done.
    fn read(&mut self, node: u32, container: u32) {
        if !self.hosts[node as usize].alive {
            return;
        }
        let host = &mut self.hosts[node as usize];
        let reader = &mut host.containers[container as usize];
        let wanted = reader.used;
        if wanted == self.scenario.image.requests {
            reader.started = Some(self.events.now());
            if host.containers.iter().all(|it| it.started.is_some()) {
                self.background(node);
            }
            return;
        }
        if self.hosts[node as usize].has(wanted) {
            self.used(node, container);
        } else {
            self.want(node, wanted, false, Some(container));
        }
        let image = &self.scenario.image;
        let boot = wanted + 1 + image.boot_window.min(image.requests - wanted - 1);
        let ahead = u32::from(self.is_read_ahead(wanted + 1));
        for next in wanted + 1..boot.max(wanted + 1 + ahead) {
            if !self.hosts[node as usize].has(next) {
                self.want(node, next, false, None);
            }
        }
    }

    /// Whether this request is asked together with the one before it.
    fn is_read_ahead(&self, request: u32) -> bool {
        let image = &self.scenario.image;
        let so_far = |request: u32| (f64::from(request) * image.read_ahead).floor();
        request < image.requests && so_far(request) > so_far(request - 1)
    }

    /// A container has what it waited for, and computes.
    pub(super) fn used(&mut self, node: u32, container: u32) {
        let image = &self.scenario.image;
        let spread = 1.0 + image.compute_spread * (2.0 * self.random.unit() - 1.0);
        self.hosts[node as usize].containers[container as usize].used += 1;
        let compute = ms(image.compute_ms * spread);
        self.events.after(compute, Event::Read { node, container });
    }

    fn background(&mut self, node: u32) {
        if self.scenario.image.background {
            for _ in 0..self.scenario.policy.background_window {
                self.background_next(node);
            }
        }
    }

    /// Fetches the next of the background.
    pub(super) fn background_next(&mut self, node: u32) {
        while let Some(key) = self.hosts[node as usize].background.pop() {
            let host = &self.hosts[node as usize];
            if !host.has(key) && host.fetch_of(key).is_none() {
                self.want(node, key, true, None);
                return;
            }
        }
    }

    /// A node has a key.
    pub(super) fn keep(&mut self, node: u32, key: u32) {
        let now = self.events.now();
        let host = &mut self.hosts[node as usize];
        host.present.set(key);
        host.missing -= 1;
        if host.missing == 0 {
            host.complete = Some(now);
        }
    }

    /// Bytes left the registry.
    pub(super) fn left_registry(&mut self, key: u32, bytes: u64) {
        self.egress += bytes;
        if key < self.scenario.image.requests {
            self.egress_start += bytes;
        }
    }

    fn figures(&self) -> Figures {
        let scenario = &self.scenario;
        let seconds = |time: Time| Duration::from_nanos(time).as_secs_f64();
        let living = || {
            self.hosts
                .iter()
                .filter(|host| host.alive && !host.containers.is_empty())
        };
        let times = |all: Vec<Option<Time>>| -> (Vec<f64>, u64) {
            let known: Vec<f64> = all.iter().flatten().map(|time| seconds(*time)).collect();
            let unknown = all.len() - known.len();
            (known, u64::try_from(unknown).unwrap_or(u64::MAX))
        };
        let (started, not_started) = times(
            living()
                .flat_map(|host| host.containers.iter().map(|it| it.started))
                .collect(),
        );
        let (complete, not_complete) = times(living().map(|host| host.complete).collect());
        let sent = || self.hosts.iter().map(|host| host.sent);
        let per_image = |bytes: u64, of: u64| bytes as f64 / of.max(1) as f64;
        let whole = scenario.image.background;
        Figures {
            nodes: scenario.nodes,
            containers: scenario.containers,
            zones: scenario.zones,
            egress_start: self.egress_start,
            egress: self.egress,
            starts: per_image(self.egress_start, scenario.image.start_bytes),
            images: if whole {
                per_image(self.egress, scenario.image.bytes)
            } else {
                0.0
            },
            start: Percentiles::of(started),
            complete: Percentiles::of(complete),
            sent_max: sent().max().unwrap_or(0),
            sent_mean: sent().sum::<u64>() / u64::from(scenario.nodes.max(1)),
            counts: self.counts,
            unfinished: not_started + if whole { not_complete } else { 0 },
            events: self.events.count(),
        }
    }
}

/// As `clone_from`, without new strings: this happens for every busy answer.
fn become_like(node: &mut Node, other: &Node) {
    node.id.clone_from(&other.id);
    node.zone.clone_from(&other.zone);
    node.rack.clone_from(&other.rack);
    node.role = other.role;
    node.load = other.load;
    node.free_slots = other.free_slots;
}

fn distance(a: &Node, b: &Node) -> Distance {
    if a.zone != b.zone {
        Distance::Elsewhere
    } else if a.rack == b.rack {
        Distance::Rack
    } else {
        Distance::Zone
    }
}

/// The nodes that start the image, then the supernodes.
fn nodes_of(scenario: &Scenario) -> Vec<Node> {
    let supernodes = scenario.zones * scenario.supernodes;
    let node = |number: u32| {
        let zone = number % scenario.zones;
        let rack = number / scenario.zones / scenario.rack.max(1);
        Node {
            id: NodeId::parse(&format!("n{number}")).expect("a plain name"),
            zone: format!("z{zone}"),
            rack: format!("r{rack}"),
            role: if number < scenario.nodes {
                Role::Node
            } else {
                Role::Supernode
            },
            address: ([127, 0, 0, 1], 9641).into(),
            version: String::new(),
            protocol: 1,
            load: 0,
            free_slots: u16::try_from(scenario.policy.slots).unwrap_or(u16::MAX),
        }
    };
    (0..scenario.nodes + supernodes).map(node).collect()
}

fn pieces_of(image: &Image) -> u32 {
    u32::try_from(image.bytes.div_ceil(image.piece_bytes)).unwrap_or(u32::MAX)
}

/// The requests of a start, spread over the pieces; then what is left of each piece.
fn keys_of(scenario: &Scenario) -> Vec<Key> {
    let image = &scenario.image;
    let pieces = pieces_of(image);
    let requests = u64::from(image.requests);
    let start_pieces = u64::from(image.start_pieces.clamp(1, pieces.max(1)));
    let mut left: Vec<u64> = (0..u64::from(pieces))
        .map(|piece| {
            image
                .piece_bytes
                .min(image.bytes - piece * image.piece_bytes)
        })
        .collect();
    let mut keys = Vec::new();
    for request in 0..requests {
        let piece = request * start_pieces / requests * u64::from(pieces) / start_pieces;
        let piece = u32::try_from(piece).unwrap_or(0);
        let bytes = image.start_bytes / requests;
        let place = &mut left[piece as usize];
        *place = place.saturating_sub(bytes);
        keys.push(Key {
            piece,
            bytes,
            chunks: image.chunks.max(1),
        });
    }
    let rest = left.into_iter().zip(0..).map(|(bytes, piece)| Key {
        piece,
        bytes,
        chunks: u32::try_from((bytes * BACKGROUND_PARTS).div_ceil(image.piece_bytes))
            .unwrap_or(1)
            .max(1),
    });
    keys.extend(rest);
    keys
}

fn host(
    scenario: &Scenario,
    keys: &[Key],
    containers: u32,
    random: &mut Random,
    now: Instant,
) -> Host {
    let policy = &scenario.policy;
    let limits = UploadLimits {
        slots: policy.slots,
        background: policy.background_slots,
        fanout: policy.fanout,
        named: policy.named,
    };
    let all = u32::try_from(keys.len()).unwrap_or(u32::MAX);
    let mut background: Vec<u32> = (scenario.image.requests..all)
        .filter(|key| keys[*key as usize].bytes > 0)
        .collect();
    let missing = scenario.image.requests + u32::try_from(background.len()).unwrap_or(0);
    match policy.background_order {
        BackgroundOrder::Same => {}
        BackgroundOrder::Rotated => {
            let end = u32::try_from(background.len()).unwrap_or(0).max(1);
            let by = random.below(end) as usize;
            background.rotate_left(by);
        }
        BackgroundOrder::Shuffled => random.shuffle(&mut background),
    }
    background.reverse();
    Host {
        alive: true,
        slow: false,
        expelled: false,
        present: Bits::default(),
        hops: vec![0; keys.len()],
        fetches: Vec::new(),
        sending: Vec::new(),
        uploads: Uploads::new(limits, Holders::default()),
        scores: Scores::with_capacity(SCORES),
        hedges: HedgeBudget::default(),
        origin: TokenBucket::new(0, policy.origin_burst, now),
        upload: TokenBucket::new(policy.upload, 1 << 20, now),
        connected: Bits::default(),
        sent: 0,
        containers: vec![Container::default(); containers as usize],
        background,
        missing,
        complete: None,
        told: (0, u16::try_from(policy.slots).unwrap_or(u16::MAX)),
        told_at: 0,
    }
}

/// A random part of the nodes.
fn part_of(nodes: u32, part: f64, random: &mut Random) -> Vec<u32> {
    let mut all: Vec<u32> = (0..nodes).collect();
    random.shuffle(&mut all);
    let count = (f64::from(nodes) * part.clamp(0.0, 1.0)).round();
    all.into_iter()
        .zip(0u32..)
        .take_while(|(_, at)| f64::from(*at) < count)
        .map(|(node, _)| node)
        .collect()
}
