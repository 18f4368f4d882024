// SPDX-License-Identifier: Apache-2.0
//! The giving side: a node serves, sends on, or dies.

use sluice_fetcher::cluster::uploads::{Admission, Asker};

use super::events::{Answer, Event, Time};
use super::fetching::Feeder;
use super::network::Owner;
use super::slab::Handle;
use super::world::{World, ms};

/// A key on its way from a node.
#[derive(Debug)]
pub(super) struct Upload {
    server: u32,
    fetch: Handle,
    client: u32,
    key: u32,
    /// The chunk that is sent, or waited for.
    next: u32,
    flow: Option<Handle>,
    /// From when on the upload budget lets the next chunk go.
    paid_until: Option<Time>,
    /// The asker was told that it is served.
    accepted: bool,
}

impl World {
    /// What a node takes to answer a request.
    pub(super) fn answer_time(&self, server: u32) -> Time {
        ms(if self.hosts[server as usize].slow {
            self.scenario.failures.slow_answer_ms
        } else {
            self.scenario.links.answer_ms
        })
    }

    /// A request arrives.
    pub(super) fn asked(&mut self, handle: Handle, server: u32, may_fetch: bool) {
        let Some(fetch) = self.fetches.get(handle) else {
            return;
        };
        let (client, key, background) = (fetch.node, fetch.key, fetch.background);
        if !self.hosts[server as usize].alive {
            let one_way = self.one_way(client, server);
            self.no_answer(handle, server, one_way / 2);
            return;
        }
        let host = &self.hosts[server as usize];
        if !host.has(key) && host.fetch_of(key).is_none() {
            if !may_fetch {
                self.answer(handle, client, server, Answer::Lacked);
                return;
            }
            self.fetch_as_home(server, key, background);
        }
        let name = self.name_of(key);
        let asker = Asker {
            node: &self.nodes[client as usize].id,
            background,
            gives: self.scenario.policy.name_receiving,
            as_home: may_fetch,
        };
        let now = self.events.now();
        let host = &mut self.hosts[server as usize];
        host.tell(now);
        match host.uploads.admit(&name, asker) {
            Admission::Busy(names) => self.answer(handle, client, server, Answer::Busy(names)),
            Admission::Serve => self.serve(handle, server, may_fetch),
        }
    }

    fn answer(&mut self, fetch: Handle, client: u32, server: u32, answer: Answer) {
        let takes = self.answer_time(server);
        let event = Event::Answered {
            fetch,
            server,
            answer,
        };
        let one_way = self.one_way(client, server);
        self.events.after(takes + one_way, event);
    }

    /// Begins an upload. Who is not being fed itself keeps the asker for a while and says nothing: two that
    /// told each other to wait would wait for ever.
    fn serve(&mut self, handle: Handle, server: u32, may_fetch: bool) {
        let Some(fetch) = self.fetches.get(handle) else {
            return;
        };
        let (client, key) = (fetch.node, fetch.key);
        let upload = self.uploads.insert(Upload {
            server,
            fetch: handle,
            client,
            key,
            next: fetch.arrived,
            flow: None,
            paid_until: None,
            accepted: false,
        });
        let host = &mut self.hosts[server as usize];
        host.sending.push(upload);
        let fed = host.has(key) || {
            let fetch = host.fetch_of(key).and_then(|it| self.fetches.get(it));
            fetch.is_some_and(|fetch| fetch.feeder != Feeder::Nobody)
        };
        if fed || may_fetch {
            self.accept(upload);
        } else {
            let grace = ms(self.scenario.policy.grace_ms);
            self.events.after(grace, Event::Grace(upload));
        }
    }

    fn accept(&mut self, handle: Handle) {
        let Some(upload) = self.uploads.get_mut(handle) else {
            return;
        };
        if upload.accepted {
            return;
        }
        upload.accepted = true;
        let (fetch, client, server) = (upload.fetch, upload.client, upload.server);
        let takes = self.answer_time(server);
        self.events.after(takes, Event::Send(handle));
        self.answer(fetch, client, server, Answer::Accepted(handle));
    }

    /// A node is being fed: those that it keeps may wait.
    pub(super) fn fed(&mut self, server: u32, key: u32) {
        for at in 0..self.hosts[server as usize].sending.len() {
            let handle = self.hosts[server as usize].sending[at];
            if self.uploads.get(handle).is_some_and(|it| it.key == key) {
                self.accept(handle);
            }
        }
    }

    /// A kept asker is sent away.
    pub(super) fn grace_over(&mut self, handle: Handle) {
        let Some(upload) = self.uploads.get(handle).filter(|it| !it.accepted) else {
            return;
        };
        let (fetch, client, server) = (upload.fetch, upload.client, upload.server);
        self.end_upload(handle, false);
        self.answer(fetch, client, server, Answer::Lacked);
    }

    /// Sends to all that wait for what a node has just got.
    pub(super) fn feed(&mut self, server: u32, key: u32) {
        for at in (0..self.hosts[server as usize].sending.len()).rev() {
            let handle = self.hosts[server as usize].sending[at];
            if self.uploads.get(handle).is_some_and(|it| it.key == key) {
                self.send(handle);
            }
        }
    }

    /// Sends the next chunk of an upload, if it is here and may go.
    pub(super) fn send(&mut self, handle: Handle) {
        let (now, instant) = (self.events.now(), self.instant());
        let Some(upload) = self.uploads.get_mut(handle) else {
            return;
        };
        let host = &mut self.hosts[upload.server as usize];
        let here = host.has(upload.key) || {
            let fetch = host.fetch_of(upload.key);
            let fetch = fetch.and_then(|fetch| self.fetches.get(fetch));
            fetch.is_some_and(|fetch| fetch.landed > upload.next)
        };
        if !here || !upload.accepted || upload.flow.is_some() {
            return;
        }
        let bytes = self.keys[upload.key as usize].chunk(upload.next);
        let until = *upload.paid_until.get_or_insert_with(|| {
            let wait = host.upload.take(bytes, instant);
            now + u64::try_from(wait.as_nanos()).unwrap_or(Time::MAX)
        });
        if until > now {
            self.events.after(until - now, Event::Send(handle));
            return;
        }
        upload.paid_until = None;
        let links = [
            World::links(upload.server)[0],
            World::links(upload.client)[1],
        ];
        let owner = Owner::Upload(handle);
        upload.flow = Some(self.network.begin(&mut self.events, owner, links, bytes));
    }

    /// A chunk was sent.
    pub(super) fn chunk_sent(&mut self, handle: Handle) {
        let Some(upload) = self.uploads.get_mut(handle) else {
            return;
        };
        let key = self.keys[upload.key as usize];
        self.hosts[upload.server as usize].sent += key.chunk(upload.next);
        upload.flow = None;
        upload.next += 1;
        let (fetch, ended) = (upload.fetch, upload.next == key.chunks);
        let (client, server) = (upload.client, upload.server);
        if let Some(fetch) = self.fetches.get_mut(fetch) {
            fetch.arrived += 1;
            if ended {
                fetch.feeder = Feeder::Done;
            }
        }
        let check = self.one_way(client, server) + ms(self.scenario.links.chunk_ms);
        self.events.after(check, Event::Landed(fetch));
        if ended {
            self.end_upload(handle, true);
        } else {
            self.send(handle);
        }
    }

    /// Ends an upload, complete or not.
    pub(super) fn end_upload(&mut self, handle: Handle, complete: bool) {
        let Some(upload) = self.uploads.remove(handle) else {
            return;
        };
        if let Some(flow) = upload.flow {
            self.network.cut(&mut self.events, flow);
        }
        let name = self.name_of(upload.key);
        let now = self.events.now();
        let host = &mut self.hosts[upload.server as usize];
        host.tell(now);
        host.sending.retain(|it| *it != handle);
        let client = &self.nodes[upload.client as usize].id;
        host.uploads.ended(&name, client, complete);
        if complete && !self.scenario.policy.name_receiving {
            host.uploads.holders().note(name, client);
        }
    }

    /// A node dies, with all that it fetches and sends.
    pub(super) fn kill(&mut self, node: u32) {
        self.hosts[node as usize].alive = false;
        for (_, fetch) in std::mem::take(&mut self.hosts[node as usize].fetches) {
            self.drop_fetch(fetch);
        }
        let failures = &self.scenario.failures;
        let silence = failures.silent.then(|| ms(failures.silence_ms));
        for upload in std::mem::take(&mut self.hosts[node as usize].sending) {
            let Some(Upload { fetch, client, .. }) = self.uploads.get(upload) else {
                continue;
            };
            let (fetch, client) = (*fetch, *client);
            let noticed = silence.unwrap_or_else(|| self.one_way(client, node));
            self.end_upload(upload, false);
            let event = Event::Lost {
                fetch,
                upload,
                server: node,
            };
            self.events.after(noticed, event);
        }
    }
}
