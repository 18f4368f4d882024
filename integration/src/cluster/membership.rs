// SPDX-License-Identifier: Apache-2.0
//! What makes daemons a cluster: the one place that knows the keys of `[cluster]`.

use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::node::Node;
use super::{Options, fabric, registry_address};

/// The peer API's port, TCP, and gossip's, UDP.
pub const PEER_PORT: u16 = 9641;
/// More are not needed: whoever knows one node hears of all.
const SEEDS: usize = 3;
const JOIN_DEADLINE: Duration = Duration::from_secs(30);

/// Whether daemons know each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// Each is on its own: no `[cluster]` section.
    Off,
    /// Gossip, with the first nodes as seeds.
    On,
}

impl Membership {
    /// A word for reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "alone",
            Self::On => "cluster",
        }
    }
}

/// The part of its configuration that the node `me` of `nodes` does not get from everybody's.
#[must_use]
pub fn config(options: &Options, me: usize, nodes: &[IpAddr]) -> String {
    format!(
        "\n[prefetch]\nbeside_readers = false\ndelay = \"{}ms\"\n\n[registry.hosts.\"{}\"]\nplain_http = true\n{}{}",
        options.prefetch_delay.as_millis(),
        registry_address(),
        section(options, me, nodes),
        options.config,
    )
}

fn section(options: &Options, me: usize, nodes: &[IpAddr]) -> String {
    if options.membership == Membership::Off {
        return String::new();
    }
    let first = nodes
        .iter()
        .take(SEEDS)
        .map(|address| SocketAddr::new(*address, PEER_PORT));
    let seeds: Vec<String> = first
        .chain(options.further_seeds.iter().copied())
        .map(|seed| format!("\"{seed}\""))
        .collect();
    let role = if me < options.supernodes {
        "supernode"
    } else {
        "node"
    };
    let mut text = String::from("\n[cluster]\nenabled = true\n");
    // Writing to a String does not fail.
    let _ = write!(
        text,
        "name = \"n{me}\"\nzone = \"{}\"\nrole = \"{role}\"\nlisten = \"{}:{PEER_PORT}\"\nseeds = [{}]\nallow = [\"{}\"]\n",
        zone(options, me),
        nodes[me],
        seeds.join(", "),
        fabric::SUBNET,
    );
    text
}

/// Waits until every daemon knows every other one, of all zones.
pub fn wait_joined(options: &Options, nodes: &[Node]) -> Result<()> {
    if options.membership == Membership::Off {
        return Ok(());
    }
    let start = Instant::now();
    for node in nodes {
        loop {
            let known = node.metric("sluice_cluster_nodes", &[])?;
            if known >= nodes.len() as f64 {
                break;
            }
            ensure!(
                start.elapsed() < JOIN_DEADLINE,
                "{} knows {known} of {} nodes after {JOIN_DEADLINE:?}:\n{}",
                node.name(),
                nodes.len(),
                node.log_tail()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    Ok(())
}

fn zone(options: &Options, me: usize) -> String {
    format!("z{}", me % options.zones.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_millis(2500);

    fn nodes() -> Vec<IpAddr> {
        (0..5)
            .map(|i| fabric::node_address(i).unwrap().into())
            .collect()
    }

    #[test]
    fn without_membership_there_is_no_section() {
        let text = config(&Options::alone(DELAY), 0, &nodes());
        assert!(text.contains("delay = \"2500ms\""), "{text}");
        assert!(!text.contains("[cluster]"), "{text}");
    }

    #[test]
    fn with_membership_nodes_are_told_apart() {
        let options = Options {
            supernodes: 1,
            zones: 2,
            further_seeds: vec!["198.18.0.99:1".parse().unwrap()],
            config: "[mount]\ngrace = \"5s\"\n".to_owned(),
            ..Options::cluster(DELAY)
        };
        let [first, last] = [0, 3].map(|me| config(&options, me, &nodes()));
        for text in [&first, &last] {
            assert!(text.contains(
                "seeds = [\"198.18.0.10:9641\", \"198.18.0.11:9641\", \"198.18.0.12:9641\", \"198.18.0.99:1\"]"
            ));
            assert!(text.ends_with("[mount]\ngrace = \"5s\"\n"), "{text}");
        }
        assert!(first.contains("name = \"n0\"\nzone = \"z0\"\nrole = \"supernode\""));
        assert!(last.contains("name = \"n3\"\nzone = \"z1\"\nrole = \"node\""));
        assert!(last.contains("listen = \"198.18.0.13:9641\""));
    }
}
