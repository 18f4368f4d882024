// SPDX-License-Identifier: Apache-2.0
//! The asking side: a node fetches a key from a peer or from the registry.

use std::time::Duration;

use sluice_fetcher::cluster::choice::Outcome;
use sluice_fetcher::cluster::search::{Search, Step};

use super::events::{Answer, Event, Time};
use super::network::Owner;
use super::slab::Handle;
use super::world::{World, ms, number};

/// Where a fetch gets its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Feeder {
    /// Nowhere yet.
    Nobody,
    /// From a node.
    Node(Handle),
    /// From the registry, by this flow once it has begun.
    Registry(Option<Handle>),
    /// All was sent.
    Done,
}

/// A key on its way to a node.
#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) node: u32,
    pub(super) key: u32,
    pub(super) background: bool,
    pub(super) feeder: Feeder,
    /// Chunks that were sent, and those that were also checked and kept.
    pub(super) arrived: u32,
    pub(super) landed: u32,
    search: Search,
    /// Who was asked and has not answered, and when.
    pending: Vec<(u32, Time)>,
    /// Who serves, and how long it took to answer.
    server: Option<(u32, Time)>,
    /// Containers that wait for it.
    waiters: Vec<u32>,
}

impl World {
    /// A node wants a key that it does not have; a container may wait for it.
    pub(super) fn want(&mut self, node: u32, key: u32, background: bool, waiter: Option<u32>) {
        if let Some(handle) = self.hosts[node as usize].fetch_of(key) {
            if let Some(fetch) = self.fetches.get_mut(handle) {
                fetch.waiters.extend(waiter);
            }
            return;
        }
        let homes = self.homes_of(node, key);
        let handle = self.begin_fetch(node, key, background, Search::new(homes));
        if let Some(fetch) = self.fetches.get_mut(handle) {
            fetch.waiters.extend(waiter);
        }
        self.advance(handle);
    }

    fn begin_fetch(&mut self, node: u32, key: u32, background: bool, search: Search) -> Handle {
        self.counts.fetches += 1;
        let handle = self.fetches.insert(Fetch {
            node,
            key,
            background,
            feeder: Feeder::Nobody,
            arrived: 0,
            landed: 0,
            search,
            pending: Vec::new(),
            server: None,
            waiters: Vec::new(),
        });
        self.hosts[node as usize].fetches.push((key, handle));
        handle
    }

    /// A home fetches for others.
    pub(super) fn fetch_as_home(&mut self, node: u32, key: u32, background: bool) -> Handle {
        let me = self.nodes[node as usize].id.clone();
        let handle = self.begin_fetch(node, key, background, Search::new(vec![me]));
        self.advance(handle);
        handle
    }

    fn advance(&mut self, handle: Handle) {
        let now = self.instant();
        let Some(fetch) = self.fetches.get_mut(handle) else {
            return;
        };
        if !fetch.pending.is_empty() || fetch.feeder != Feeder::Nobody {
            return;
        }
        let node = fetch.node as usize;
        let scores = &self.hosts[node].scores;
        match fetch.search.step(&self.nodes[node].id, scores, now) {
            Step::Ask { node, fetch } => self.ask(handle, number(&node), fetch),
            Step::Origin => self.ask_registry(handle),
            Step::Wait(wait) => {
                self.counts.waits += 1;
                let wait = wait.mul_f64(0.5 + self.random.unit());
                let wait = u64::try_from(wait.as_nanos()).unwrap_or(Time::MAX);
                self.events.after(wait, Event::Again(handle));
            }
        }
    }

    fn ask(&mut self, handle: Handle, server: u32, may_fetch: bool) {
        let (now, instant) = (self.events.now(), self.instant());
        let Some(fetch) = self.fetches.get_mut(handle) else {
            return;
        };
        fetch.pending.push((server, now));
        let node = fetch.node;
        self.counts.asked += 1;
        let one_way = self.one_way(node, server);
        let host = &mut self.hosts[node as usize];
        host.hedges.requested();
        let after = host
            .scores
            .hedge_after(&self.nodes[server as usize].id, instant);
        let after = u64::try_from(after.as_nanos()).unwrap_or(Time::MAX);
        let mut arrives = one_way;
        if !host.connected.has(server) {
            host.connected.set(server);
            let trips = Duration::from_nanos(2 * one_way).mul_f64(self.scenario.links.handshakes);
            arrives += u64::try_from(trips.as_nanos()).unwrap_or(Time::MAX);
        }
        if self.hosts[server as usize].alive {
            self.events.after(
                arrives,
                Event::Ask {
                    fetch: handle,
                    server,
                    may_fetch,
                },
            );
        } else {
            self.no_answer(handle, server, one_way);
        }
        // The time of an answer is known here: most timers need not be planned.
        let answer = arrives + self.answer_time(server) + one_way;
        if answer > after || !self.hosts[server as usize].alive {
            let event = Event::Late {
                fetch: handle,
                server,
                give_up: false,
            };
            self.events.after(after, event);
        }
    }

    /// A dead node was asked.
    pub(super) fn no_answer(&mut self, fetch: Handle, server: u32, one_way: Time) {
        let failures = &self.scenario.failures;
        if failures.silent {
            let event = Event::Late {
                fetch,
                server,
                give_up: true,
            };
            self.events.after(ms(failures.silence_ms), event);
        } else {
            let answer = Answer::Refused;
            let event = Event::Answered {
                fetch,
                server,
                answer,
            };
            self.events.after(2 * one_way, event);
        }
    }

    /// An answer arrives.
    pub(super) fn answered(&mut self, handle: Handle, server: u32, answer: Answer) {
        let (now, instant) = (self.events.now(), self.instant());
        let pending = self.fetches.get_mut(handle).and_then(|fetch| {
            let at = fetch.pending.iter().position(|it| it.0 == server)?;
            Some(fetch.pending.swap_remove(at).1)
        });
        let (Some(asked_at), Some(fetch)) = (pending, self.fetches.get_mut(handle)) else {
            // It was given up, or is here already.
            if let Answer::Accepted(upload) = answer {
                self.end_upload(upload, false);
            }
            return;
        };
        let node = fetch.node as usize;
        let id = &self.nodes[server as usize].id;
        match answer {
            Answer::Accepted(upload) => {
                if fetch.feeder != Feeder::Nobody || self.uploads.get(upload).is_none() {
                    // Another was sooner, or this one died meanwhile.
                    self.end_upload(upload, false);
                } else {
                    fetch.feeder = Feeder::Node(upload);
                    fetch.server = Some((server, now - asked_at));
                    let (arrived, key) = (fetch.arrived, fetch.key);
                    self.watch(handle, upload, server, arrived);
                    self.fed(u32::try_from(node).unwrap_or(0), key);
                }
            }
            Answer::Busy(names) => {
                self.counts.busy += 1;
                self.hosts[node].scores.observe(id, Outcome::Busy, instant);
                let view = self.view_of(u32::try_from(node).unwrap_or(0), &names);
                let scores = &self.hosts[node].scores;
                if let Some(fetch) = self.fetches.get_mut(handle) {
                    fetch.search.busy(&view, scores, &names, instant);
                }
                self.scratch = Some(view);
            }
            Answer::Lacked => {
                self.counts.lacked += 1;
                self.hosts[node]
                    .scores
                    .observe(id, Outcome::Lacked, instant);
            }
            Answer::Refused => {
                fetch.search.failed(id);
                self.hosts[node]
                    .scores
                    .observe(id, Outcome::Failed, instant);
            }
        }
        self.advance(handle);
    }

    /// An answer is late: a second one is asked, or the first given up.
    pub(super) fn late(&mut self, handle: Handle, server: u32, give_up: bool) {
        let now = self.instant();
        let Some(fetch) = self.fetches.get_mut(handle) else {
            return;
        };
        let Some(at) = fetch.pending.iter().position(|it| it.0 == server) else {
            return;
        };
        let host = &mut self.hosts[fetch.node as usize];
        if give_up {
            fetch.pending.swap_remove(at);
            let id = &self.nodes[server as usize].id;
            fetch.search.failed(id);
            host.scores.observe(id, Outcome::Slow, now);
            self.advance(handle);
            return;
        }
        let alone = fetch.pending.len() == 1 && fetch.feeder == Feeder::Nobody;
        if !alone || !self.scenario.policy.hedge {
            return;
        }
        let me = &self.nodes[fetch.node as usize].id;
        if let Some(other) = fetch.search.hedge(me, &host.scores, now)
            && host.hedges.try_hedge()
        {
            self.counts.hedged += 1;
            self.ask(handle, number(&other), false);
        }
    }

    /// A wait is over.
    pub(super) fn again(&mut self, handle: Handle) {
        let Some(fetch) = self.fetches.get(handle) else {
            return;
        };
        let homes = self.homes_of(fetch.node, fetch.key);
        if let Some(fetch) = self.fetches.get_mut(handle) {
            fetch.search.again(homes);
        }
        self.advance(handle);
    }

    /// Plans to leave a feeder that sends nothing. Only where nodes die: then some may come to wait for each
    /// other, or for one whose own feeder is silent.
    fn watch(&mut self, fetch: Handle, upload: Handle, server: u32, arrived: u32) {
        let failures = &self.scenario.failures;
        if failures.killed > 0.0 {
            let event = Event::Stalled {
                fetch,
                upload,
                server,
                arrived,
            };
            self.events.after(ms(failures.silence_ms), event);
        }
    }

    /// Leaves a feeder from which nothing came since.
    pub(super) fn stalled(&mut self, handle: Handle, upload: Handle, server: u32, arrived: u32) {
        let Some(fetch) = self.fetches.get(handle) else {
            return;
        };
        if fetch.feeder != Feeder::Node(upload) {
            return;
        }
        if fetch.arrived > arrived {
            self.watch(handle, upload, server, fetch.arrived);
            return;
        }
        self.counts.stalled += 1;
        self.end_upload(upload, false);
        self.lost(handle, upload, server);
    }

    /// The feeder died, or was left.
    pub(super) fn lost(&mut self, handle: Handle, upload: Handle, server: u32) {
        let now = self.instant();
        let Some(fetch) = self.fetches.get(handle) else {
            return;
        };
        if fetch.feeder != Feeder::Node(upload) {
            return;
        }
        self.counts.lost += 1;
        let node = fetch.node as usize;
        let id = &self.nodes[server as usize].id;
        self.hosts[node].scores.observe(id, Outcome::Failed, now);
        let homes = self.homes_of(fetch.node, fetch.key);
        if let Some(fetch) = self.fetches.get_mut(handle) {
            fetch.feeder = Feeder::Nobody;
            // What was sent and not yet kept will still land.
            fetch.search.anew(homes);
        }
        self.advance(handle);
    }

    fn ask_registry(&mut self, handle: Handle) {
        let now = self.instant();
        let Some(fetch) = self.fetches.get_mut(handle) else {
            return;
        };
        fetch.feeder = Feeder::Registry(None);
        let (node, key) = (fetch.node, self.keys[fetch.key as usize]);
        let left: u64 = (fetch.arrived..key.chunks).map(|at| key.chunk(at)).sum();
        let key = fetch.key;
        let me = self.nodes[node as usize].id.clone();
        if self.homes_of(node, key).contains(&me) {
            self.counts.origin += 1;
        } else {
            self.counts.fallbacks += 1;
        }
        let wait = self.hosts[node as usize].origin.take(left, now);
        let wait = u64::try_from(wait.as_nanos()).unwrap_or(Time::MAX);
        let first_byte = ms(self.scenario.links.registry_ms);
        self.events.after(wait + first_byte, Event::Origin(handle));
        self.fed(node, key);
    }

    /// The registry sends the next chunk.
    pub(super) fn next_from_registry(&mut self, handle: Handle) {
        let Some(fetch) = self.fetches.get_mut(handle) else {
            return;
        };
        let key = self.keys[fetch.key as usize];
        if fetch.arrived == key.chunks {
            fetch.feeder = Feeder::Done;
            return;
        }
        let [_, down] = World::links(fetch.node);
        let bytes = key.chunk(fetch.arrived);
        let owner = Owner::Fetch(handle);
        let flow = self
            .network
            .begin(&mut self.events, owner, [0, down], bytes);
        fetch.feeder = Feeder::Registry(Some(flow));
    }

    /// The registry has sent a chunk.
    pub(super) fn chunk_from_registry(&mut self, handle: Handle) {
        let Some(fetch) = self.fetches.get_mut(handle) else {
            return;
        };
        let key = fetch.key;
        let bytes = self.keys[key as usize].chunk(fetch.arrived);
        fetch.arrived += 1;
        fetch.feeder = Feeder::Registry(None);
        self.left_registry(key, bytes);
        let check = ms(self.scenario.links.chunk_ms);
        self.events.after(check, Event::Landed(handle));
        self.next_from_registry(handle);
    }

    /// A chunk was checked and kept.
    pub(super) fn landed(&mut self, handle: Handle) {
        let Some(fetch) = self.fetches.get_mut(handle) else {
            return;
        };
        fetch.landed += 1;
        let (node, key) = (fetch.node, fetch.key);
        if fetch.landed == self.keys[key as usize].chunks {
            self.fetched(handle);
        }
        self.feed(node, key);
    }

    fn fetched(&mut self, handle: Handle) {
        let instant = self.instant();
        let Some(fetch) = self.fetches.remove(handle) else {
            return;
        };
        let (node, key) = (fetch.node, fetch.key);
        self.hosts[node as usize].fetches.retain(|it| it.0 != key);
        self.keep(node, key);
        if let Some((server, first_byte)) = fetch.server {
            let hops = self.hosts[server as usize].hops[key as usize].saturating_add(1);
            self.hosts[node as usize].hops[key as usize] = hops;
            self.counts.hops = self.counts.hops.max(hops.into());
            let outcome = Outcome::Answered {
                first_byte: Duration::from_nanos(first_byte),
            };
            let id = &self.nodes[server as usize].id;
            self.hosts[node as usize]
                .scores
                .observe(id, outcome, instant);
        }
        for container in fetch.waiters {
            self.used(node, container);
        }
        if fetch.background {
            self.background_next(node);
        }
    }

    /// Drops a fetch of a node that died.
    pub(super) fn drop_fetch(&mut self, handle: Handle) {
        let Some(fetch) = self.fetches.remove(handle) else {
            return;
        };
        match fetch.feeder {
            Feeder::Node(upload) => self.end_upload(upload, false),
            Feeder::Registry(Some(flow)) => {
                let left = self.network.cut(&mut self.events, flow);
                let bytes = self.keys[fetch.key as usize].chunk(fetch.arrived);
                self.left_registry(fetch.key, bytes.saturating_sub(left));
            }
            Feeder::Registry(None) | Feeder::Nobody | Feeder::Done => {}
        }
    }
}
