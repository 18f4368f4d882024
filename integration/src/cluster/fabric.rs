// SPDX-License-Identifier: Apache-2.0
//! The networks: a bridge in a namespace of its own, and a shaped link from it to each other namespace.
//!
//! Nothing is made in the machine's own network. Names begin with `slc-PID-`, PID being the test's, so
//! that [`remove_leftovers`] knows whose test is dead. Addresses are of 198.18.0.0/24, the network that
//! RFC 2544 sets aside for measurements.
//!
//! A node is cut off by rules of the bridge, as a failed switch would do it: its peers' packets vanish
//! and nobody is told. The registry stays in reach.

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::cpu;
use crate::harness::network::{self, Network, ip};
use crate::harness::root;
use crate::harness::{command, mounts, tools};

/// The registry's address.
pub const REGISTRY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// What all addresses are in.
pub const SUBNET: &str = "198.18.0.0/24";
const REGISTRY_PORT: &str = "registry";
const FIRST_NODE: u8 = 10;
/// The largest segment that the kernel hands to a link. Its usual 64 KiB would be half of a slow link's
/// queue: a fifth of all segments was lost, again and again until a connection stood still for seconds.
const SEGMENT_BYTES: &str = "16384";
/// What passes at once on an idle link: a segment and a little more.
const BURST_BYTES: &str = "20000";
/// How long a packet may wait in front of a link before it is dropped.
const QUEUE: &str = "100ms";
const DEADLINE: Duration = Duration::from_secs(20);

/// The address of the node `index`.
pub fn node_address(index: usize) -> Result<Ipv4Addr> {
    let host = u8::try_from(index)
        .ok()
        .and_then(|i| i.checked_add(FIRST_NODE))
        .filter(|host| *host < u8::MAX);
    let host = host.with_context(|| format!("the network has no room for node {index}"))?;
    Ok(Ipv4Addr::new(198, 18, 0, host))
}

/// What the names of a test's namespaces begin with.
#[must_use]
pub fn prefix_of(pid: u32) -> String {
    format!("slc-{pid}-")
}

/// The name of a test's account of CPU time.
#[must_use]
pub fn account_of(pid: u32) -> String {
    format!("slc-{pid}")
}

/// The bridge.
#[derive(Debug)]
pub struct Fabric {
    prefix: String,
    switch: Network,
    /// Held while rules change: two changes at once would refuse each other.
    rules: Mutex<()>,
}

impl Fabric {
    /// Makes the bridge.
    pub fn build() -> Result<Self> {
        let prefix = prefix_of(std::process::id());
        let switch = Network::create(&format!("{prefix}sw"))?;
        let in_switch = |args: &[&str]| ip(&[&["-n", switch.name()], args].concat());
        in_switch(&[
            "link",
            "add",
            "name",
            "br0",
            "type",
            "bridge",
            "stp_state",
            "0",
            "forward_delay",
            "0",
        ])?;
        in_switch(&["link", "set", "dev", "br0", "up"])?;
        Ok(Self {
            prefix,
            switch,
            rules: Mutex::new(()),
        })
    }

    /// What the names of its namespaces begin with.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A namespace `name` with a link to the bridge, shaped both ways.
    pub fn plug(&self, name: &str, address: Ipv4Addr, bits_per_second: u64) -> Result<Port> {
        let switch = self.switch.name();
        let network = Network::create(&format!("{}{name}", self.prefix))?;
        let inside = network.name().to_owned();
        ip(&[
            "-n", switch, "link", "add", "name", name, "type", "veth", "peer", "name", "eth0",
            "netns", &inside,
        ])?;
        let port = Port {
            network,
            name: name.to_owned(),
            switch: switch.to_owned(),
            address,
        };
        ip(&[
            "-n", switch, "link", "set", "dev", name, "master", "br0", "up",
        ])?;
        let with_length = format!("{address}/24");
        ip(&["-n", &inside, "addr", "add", &with_length, "dev", "eth0"])?;
        ip(&["-n", &inside, "link", "set", "dev", "eth0", "up"])?;
        // Nothing is behind it; but a host has a default route, and its address is found by it.
        ip(&["-n", &inside, "route", "add", "default", "dev", "eth0"])?;
        for (namespace, device) in [(switch, name), (&inside, "eth0")] {
            shape(namespace, device, bits_per_second)?;
        }
        Ok(port)
    }

    /// The registry's place, plugged like any other.
    pub fn plug_registry(&self, bits_per_second: u64) -> Result<Port> {
        self.plug(REGISTRY_PORT, REGISTRY, bits_per_second)
    }

    /// From now on what the node and its peers send each other vanishes.
    pub fn cut_off(&self, port: &str) -> Result<()> {
        self.rule("-A", port)
    }

    /// Takes [`Self::cut_off`] back.
    pub fn heal(&self, port: &str) -> Result<()> {
        self.rule("-D", port)
    }

    /// Removes the bridge and checks that no namespace is left of those that were plugged.
    pub fn end(self) -> Result<()> {
        let prefix = self.prefix.clone();
        drop(self);
        let left = network::named(&prefix);
        ensure!(left.is_empty(), "namespaces are left: {left:?}");
        Ok(())
    }

    fn rule(&self, action: &str, port: &str) -> Result<()> {
        let _turn = self.rules.lock().expect("no holder panics");
        let ebtables = tools::on_path("ebtables")?;
        for rule in [
            ["-i", port, "-o", "!", REGISTRY_PORT],
            ["-i", "!", REGISTRY_PORT, "-o", port],
        ] {
            let mut command = Command::new(&ebtables);
            command
                .args([action, "FORWARD"])
                .args(rule)
                .args(["-j", "DROP"]);
            self.switch
                .inside(move || command::run_ok(&mut command, DEADLINE))?;
        }
        Ok(())
    }
}

fn shape(namespace: &str, device: &str, bits_per_second: u64) -> Result<()> {
    let set_segment = ["set", "dev", device, "gso_max_size", SEGMENT_BYTES];
    ip(&[&["-n", namespace, "link"][..], &set_segment].concat())?;
    let rate = format!("{bits_per_second}bit");
    command::run_ok(
        Command::new(tools::on_path("tc")?)
            .args(["-n", namespace, "qdisc", "replace", "dev", device, "root"])
            .args(["tbf", "rate", &rate, "burst", BURST_BYTES, "latency", QUEUE]),
        DEADLINE,
    )?;
    Ok(())
}

/// A namespace with its link; dropped, both are removed.
#[derive(Debug)]
pub struct Port {
    network: Network,
    name: String,
    switch: String,
    address: Ipv4Addr,
}

impl Port {
    /// Its network.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Its name on the bridge.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // The kernel removes what is in a namespace some time later; the name shall be free now.
        if let Err(e) = ip(&["-n", &self.switch, "link", "del", "dev", &self.name]) {
            eprintln!("harness: {e:#}");
        }
    }
}

/// Removes what tests that are dead left: processes, mounts, files and namespaces.
///
/// Called with the lock of set-ups held. A process ID that is in use again keeps its namespaces for longer.
pub fn remove_leftovers() {
    let mut dead: Vec<u32> = network::named("slc-")
        .iter()
        .filter_map(|name| name.split('-').nth(1)?.parse().ok())
        .filter(|pid: &u32| !is_alive(*pid))
        .collect();
    dead.sort_unstable();
    dead.dedup();
    for pid in dead {
        eprintln!("harness: removing what the test with process ID {pid} left");
        let names = network::named(&prefix_of(pid));
        names.iter().for_each(|name| network::end_processes(name));
        if let Err(e) = remove_root_of(pid) {
            eprintln!("harness: {e:#}");
        }
        names.iter().for_each(|name| network::remove(name));
        cpu::remove_leftover(&account_of(pid));
    }
}

/// One that has ended and that its parent does not know of yet has no program any more.
fn is_alive(pid: u32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

fn remove_root_of(pid: u32) -> Result<()> {
    let prefix = format!("sl-cl{pid}-");
    for entry in std::fs::read_dir(root::base())?.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        let path = entry.path();
        mounts::abort_fuse(&path);
        let left = mounts::unmount_all(&path);
        ensure!(left.is_empty(), "still mounted: {left:?}");
        std::fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_nodes() {
        assert_eq!(node_address(0).unwrap(), Ipv4Addr::new(198, 18, 0, 10));
        assert_eq!(node_address(244).unwrap(), Ipv4Addr::new(198, 18, 0, 254));
        assert!(node_address(245).is_err());
        assert!(node_address(1000).is_err());
    }
}
