// SPDX-License-Identifier: Apache-2.0
//! Links and the flows on them.
//!
//! A flow crosses two links, the sender's and the receiver's, and gets the smaller of its equal shares of
//! them. What one link's share leaves unused on the other is not given to anybody else: a little
//! pessimistic, and cheap, because a flow that comes or goes changes only the flows on its own two links.
//!
//! The end of a flow is an event. When a flow becomes faster an earlier event is planned; when it becomes
//! slower the planned one finds it unfinished and plans the rest. So most changes plan nothing.

use super::events::{Event, Events, Time};
use super::slab::{Handle, Slab};

/// Bytes per nanosecond of a megabit per second.
const PER_MBIT: f64 = 1e6 / 8.0 / 1e9;

/// Less than this is nothing: a rounding error.
const NOTHING: f64 = 0.5;

#[derive(Debug)]
struct Link {
    /// Bytes per nanosecond.
    capacity: f64,
    flows: Vec<Handle>,
}

/// What a flow is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// An upload from node to node.
    Upload(Handle),
    /// A fetch from the registry.
    Fetch(Handle),
}

#[derive(Debug)]
struct Flow {
    owner: Owner,
    links: [usize; 2],
    left: f64,
    rate: f64,
    since: Time,
    planned: Time,
}

/// All links and flows.
#[derive(Debug, Default)]
pub struct Network {
    links: Vec<Link>,
    flows: Slab<Flow>,
}

impl Network {
    /// Adds a link of so many megabits per second; returns its number.
    pub fn add_link(&mut self, mbit: f64) -> usize {
        self.links.push(Link {
            capacity: mbit * PER_MBIT,
            flows: Vec::new(),
        });
        self.links.len() - 1
    }

    /// How many flows are on a link.
    #[must_use]
    pub fn flows_on(&self, link: usize) -> usize {
        self.links[link].flows.len()
    }

    /// Begins a flow; [`Event::Flow`] will ask [`Network::ended`] about it.
    pub fn begin(
        &mut self,
        events: &mut Events,
        owner: Owner,
        [from, to]: [usize; 2],
        bytes: u64,
    ) -> Handle {
        let flow = self.flows.insert(Flow {
            owner,
            links: [from, to],
            left: bytes as f64,
            rate: 0.0,
            since: events.now(),
            planned: Time::MAX,
        });
        for link in [from, to] {
            self.links[link].flows.push(flow);
        }
        self.share_anew(events, [from, to]);
        flow
    }

    /// Whose flow has ended; then it is gone. Otherwise it is asked about again later.
    pub fn ended(&mut self, events: &mut Events, handle: Handle) -> Option<Owner> {
        let now = events.now();
        let flow = self.flows.get_mut(handle)?;
        if flow.planned != now {
            // An earlier plan has replaced this one.
            return None;
        }
        flow.left -= flow.rate * (now - flow.since) as f64;
        flow.since = now;
        if flow.left > NOTHING {
            let rest = wait(flow.left, flow.rate);
            flow.planned = now + rest;
            events.after(rest, Event::Flow(handle));
            return None;
        }
        let owner = flow.owner;
        self.take_off(events, handle);
        Some(owner)
    }

    /// Ends a flow early; returns the bytes that did not arrive.
    pub fn cut(&mut self, events: &mut Events, handle: Handle) -> u64 {
        let Some(flow) = self.flows.get(handle) else {
            return 0;
        };
        let left = flow.left - flow.rate * (events.now() - flow.since) as f64;
        self.take_off(events, handle);
        whole(left)
    }

    fn take_off(&mut self, events: &mut Events, handle: Handle) {
        let Some(flow) = self.flows.remove(handle) else {
            return;
        };
        for link in flow.links {
            let flows = &mut self.links[link].flows;
            if let Some(at) = flows.iter().position(|it| *it == handle) {
                flows.swap_remove(at);
            }
        }
        self.share_anew(events, flow.links);
    }

    fn share_anew(&mut self, events: &mut Events, changed: [usize; 2]) {
        let now = events.now();
        for link in changed {
            for at in 0..self.links[link].flows.len() {
                let handle = self.links[link].flows[at];
                let Some(flow) = self.flows.get_mut(handle) else {
                    continue;
                };
                let share = |link: usize| {
                    let link = &self.links[link];
                    link.capacity / link.flows.len() as f64
                };
                let rate = share(flow.links[0]).min(share(flow.links[1]));
                if rate == flow.rate {
                    continue;
                }
                flow.left -= flow.rate * (now - flow.since) as f64;
                flow.since = now;
                flow.rate = rate;
                let end = now + wait(flow.left, rate);
                if end < flow.planned {
                    flow.planned = end;
                    events.after(end - now, Event::Flow(handle));
                }
            }
        }
    }
}

/// Nanoseconds for so many bytes, at least one so that time goes on.
fn wait(bytes: f64, rate: f64) -> Time {
    whole((bytes / rate).ceil()).max(1)
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "saturates, and negative rounding errors become 0"
)]
#[allow(clippy::cast_sign_loss, reason = "the same")]
fn whole(number: f64) -> u64 {
    number.max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: Owner = Owner::Fetch(Handle::NONE);

    /// Runs flows that begin at given milliseconds; returns the milliseconds at which they end.
    fn ends(links: &[f64], flows: &[(u64, usize, usize, u64)]) -> Vec<u64> {
        let mut network = Network::default();
        for mbit in links {
            network.add_link(*mbit);
        }
        let mut events = Events::default();
        for (at, ..) in flows {
            // Any event will do to move time.
            events.after(at * 1_000_000, Event::Kill(0));
        }
        let mut ends = vec![0; flows.len()];
        let (mut begun, mut handles) = (0, Vec::new());
        while let Some(event) = events.next_event() {
            match event {
                Event::Flow(handle) => {
                    if network.ended(&mut events, handle).is_some() {
                        let at = handles.iter().position(|it| *it == handle).unwrap();
                        ends[at] = events.now().div_ceil(1_000_000);
                    }
                }
                _ => {
                    let (_, from, to, bytes) = flows[begun];
                    handles.push(network.begin(&mut events, NOBODY, [from, to], bytes));
                    begun += 1;
                }
            }
        }
        assert!(network.flows.is_empty());
        ends
    }

    #[test]
    fn a_link_is_shared_and_given_back() {
        // 8 Mbit/s are 1000 bytes per millisecond.
        let links = [8.0, 80.0, 80.0, 4.0];
        type Case = (&'static [(u64, usize, usize, u64)], &'static [u64]);
        let cases: [Case; 4] = [
            (&[(0, 0, 1, 10_000)], &[10]),
            (&[(0, 0, 1, 10_000), (0, 0, 2, 10_000)], &[20, 20]),
            // Alone for 5 ms, then half, then alone again.
            (&[(0, 0, 1, 10_000), (5, 0, 2, 2_000)], &[12, 9]),
            // The receiver is the narrow one: its sender's other flow gets half all the same.
            (&[(0, 0, 3, 5_000), (0, 0, 2, 5_000)], &[10, 10]),
        ];
        for (flows, expected) in cases {
            assert_eq!(ends(&links, flows), expected, "{flows:?}");
        }
    }

    #[test]
    fn a_cut_flow_says_what_is_missing() {
        let mut network = Network::default();
        let [a, b] = [network.add_link(8.0), network.add_link(8.0)];
        let mut events = Events::default();
        events.after(4_000_000, Event::Kill(0));
        let flow = network.begin(&mut events, NOBODY, [a, b], 10_000);
        events.next_event();
        assert_eq!(network.cut(&mut events, flow), 6_000);
        assert_eq!((network.flows_on(a), network.flows_on(b)), (0, 0));
        assert_eq!(network.cut(&mut events, flow), 0);
    }
}
