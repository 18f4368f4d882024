// SPDX-License-Identifier: Apache-2.0
//! The nodes of a static list: each seed is asked who it is, again and again.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt as _;

use super::lookup::SeedAddress;
use super::roster::Claim;
use super::{Asked, Hello};
use crate::cluster::node::Node;

/// How often a node is asked.
pub(super) const ASK_EVERY: Duration = Duration::from_secs(3);
/// How long it may take to answer.
const ASK_DEADLINE: Duration = Duration::from_secs(2);
/// After how many failures in a row a node is left out until it answers again.
const FAILURES_MAX: u32 = 3;
/// Nodes asked at a time.
const ASKED_AT_ONCE: usize = 64;

/// What is known of a seed.
#[derive(Debug)]
struct Known {
    /// What it said last.
    node: Node,
    /// How often in a row it said nothing since.
    failures: u32,
}

/// What the seeds said of themselves.
#[derive(Debug, Default)]
pub(super) struct Poll {
    known: BTreeMap<SeedAddress, Known>,
}

impl Poll {
    /// Asks them all once.
    ///
    /// **Cancel**: safe; who was not asked keeps what it said.
    pub(super) async fn ask(&mut self, hello: &Hello, seeds: &[SeedAddress]) {
        let asking = seeds.iter().cloned().map(|seed| async move {
            let asked = Asked {
                address: seed.address,
                name: seed.name.clone(),
            };
            let answer = tokio::time::timeout(ASK_DEADLINE, hello(asked)).await;
            (seed, answer.ok().flatten())
        });
        let answers: Vec<_> = futures::stream::iter(asking)
            .buffer_unordered(ASKED_AT_ONCE)
            .collect()
            .await;
        self.known.retain(|seed, _| seeds.contains(seed));
        for (seed, answer) in answers {
            match answer {
                Some(node) => {
                    let failures = 0;
                    self.known.insert(seed, Known { node, failures });
                }
                None => {
                    if let Some(known) = self.known.get_mut(&seed) {
                        known.failures = known.failures.saturating_add(1);
                    }
                }
            }
        }
    }

    /// The nodes that answered of late. One that is not us is reached where it was asked, whatever it
    /// says of its address.
    pub(super) fn claims(&self, me: &Node) -> Vec<Claim> {
        let live = self
            .known
            .iter()
            .filter(|(_, it)| it.failures < FAILURES_MAX);
        let claims = live.map(|(seed, known)| {
            let mut node = known.node.clone();
            if node.id != me.id {
                node.address = seed.address;
            }
            Claim {
                node,
                generation: 0,
            }
        });
        claims.collect()
    }
}
