// SPDX-License-Identifier: Apache-2.0
//! What is going to happen, in order of time.
//!
//! Of two events at the same moment the one that was planned first happens first: a run never depends on
//! how a heap breaks ties.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use sluice_fetcher::cluster::node::NodeId;

use super::slab::Handle;

/// Nanoseconds since the beginning.
pub type Time = u64;

/// What a node says to a request.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It serves: the upload that began.
    Accepted(Handle),
    /// Ask these.
    Busy(Vec<NodeId>),
    /// It has nothing.
    Lacked,
    /// It is dead, and its host said so.
    Refused,
}

/// What happens.
#[derive(Debug)]
pub enum Event {
    /// A container goes on reading.
    Read {
        /// Its node.
        node: u32,
        /// Which of the node's containers.
        container: u32,
    },
    /// A request arrives.
    Ask {
        /// On behalf of which fetch.
        fetch: Handle,
        /// Whom it asks.
        server: u32,
        /// Whether the server is to fetch what it lacks.
        may_fetch: bool,
    },
    /// The answer arrives.
    Answered {
        /// Whose.
        fetch: Handle,
        /// Who answers.
        server: u32,
        /// What.
        answer: Answer,
    },
    /// An answer is late.
    Late {
        /// Whose.
        fetch: Handle,
        /// Who does not answer.
        server: u32,
        /// To give it up; otherwise to ask a second one.
        give_up: bool,
    },
    /// A wait is over.
    Again(Handle),
    /// A flow may have ended.
    Flow(Handle),
    /// The registry begins to answer.
    Origin(Handle),
    /// A chunk was checked and kept.
    Landed(Handle),
    /// An upload may go on.
    Send(Handle),
    /// A feeder is known to be dead.
    Lost {
        /// Whose.
        fetch: Handle,
        /// The upload that ended.
        upload: Handle,
        /// Who died.
        server: u32,
    },
    /// An asker has been kept for long enough.
    Grace(Handle),
    /// A feeder may have sent nothing for too long.
    Stalled {
        /// Whose.
        fetch: Handle,
        /// The upload.
        upload: Handle,
        /// Who feeds.
        server: u32,
        /// The chunks that had arrived.
        arrived: u32,
    },
    /// A node dies.
    Kill(u32),
    /// The others have noticed.
    Expel(u32),
}

#[derive(Debug)]
struct Planned {
    at: Time,
    order: u64,
    event: Event,
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Planned {}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Planned {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// The queue.
#[derive(Debug, Default)]
pub struct Events {
    planned: BinaryHeap<Reverse<Planned>>,
    order: u64,
    now: Time,
}

impl Events {
    /// The time of the event that happens.
    #[must_use]
    pub fn now(&self) -> Time {
        self.now
    }

    /// How many were planned so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.order
    }

    /// Plans an event in so many nanoseconds.
    pub fn after(&mut self, delay: Time, event: Event) {
        self.order += 1;
        self.planned.push(Reverse(Planned {
            at: self.now.saturating_add(delay),
            order: self.order,
            event,
        }));
    }

    /// The next event; time moves to it.
    pub fn next_event(&mut self) -> Option<Event> {
        let Reverse(next) = self.planned.pop()?;
        self.now = next.at;
        Some(next.event)
    }
}
