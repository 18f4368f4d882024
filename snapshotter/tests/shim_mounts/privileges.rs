// SPDX-License-Identifier: Apache-2.0
//! What the shim may do: mount and watch, and nothing else that root may.

use std::path::Path;

use super::compare;
use super::world::{World, can_run};

/// CAP_SYS_ADMIN, as the kernel writes sets.
const SYS_ADMIN: &str = "0000000000200000";
/// With CAP_NET_ADMIN.
const NET_ADMIN_TOO: &str = "0000000000201000";
/// With CAP_SETPCAP as well.
const HOLDER: &str = "0000000000201100";
const NONE: &str = "0000000000000000";

/// A line of a thread's status.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().to_owned()
}

/// All threads of a process: a capability is a thread's.
fn assert_bare(what: &str, pid: u32, kept: &str) {
    let tasks = Path::new("/proc").join(pid.to_string()).join("task");
    let mut seen = 0;
    for task in std::fs::read_dir(tasks).unwrap() {
        // A thread may end meanwhile.
        let Ok(status) = std::fs::read_to_string(task.unwrap().path().join("status")) else {
            continue;
        };
        seen += 1;
        for (set, expected) in [
            ("CapEff:", kept),
            ("CapPrm:", kept),
            ("CapBnd:", kept),
            ("CapInh:", NONE),
            ("CapAmb:", NONE),
            ("NoNewPrivs:", "1"),
        ] {
            assert_eq!(field(&status, set), expected, "{what}: {set}\n{status}");
        }
    }
    assert!(seen > 0, "{what} has threads");
}

fn assert_shim_is_bare(world: &World, what: &str, worker: &str, holder: &str) {
    let peer = world.client().peer().unwrap();
    assert_bare(&format!("worker {what}"), peer.worker_pid, worker);
    assert_bare(&format!("holder {what}"), peer.holder_pid, holder);
}

#[test]
fn the_shim_keeps_what_mounting_needs_and_nothing_else() {
    if !can_run() {
        return;
    }
    let worlds = [
        (World::new(61), SYS_ADMIN),
        (World::journaled(62), NET_ADMIN_TOO),
    ];
    for (world, kept) in worlds {
        let mount = world.mount("first");
        assert_shim_is_bare(&world, "at first", kept, HOLDER);
        compare(&world, &mount);
        // Whoever is started by one that has less has no more, and it is enough.
        world.kill_holder();
        world.kill_worker();
        let second = world.mount("second");
        assert_shim_is_bare(&world, "after deaths", kept, kept);
        compare(&world, &mount);
        compare(&world, &second);
    }
}
