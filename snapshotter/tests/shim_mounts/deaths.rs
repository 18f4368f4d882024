// SPDX-License-Identifier: Apache-2.0
//! Deaths under readers: of worker, daemon and holder, one at a time.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use sluice_snapshotter::mount::{UnmountMode, UnmountOutcome};

use super::LONG;
use super::reader::{Reader, Task};
use super::world::{Behaviour, World, can_run};

/// How long readers read while somebody dies every now and then.
pub const STORM: Duration = Duration::from_secs(8);

pub fn storm(world: &World, mount: &std::path::Path, readers: u64) -> Vec<Reader> {
    let millis = u64::try_from(STORM.as_millis()).unwrap();
    let task = |seed| Task::Storm {
        mount: mount.to_owned(),
        expected: world.expected.clone(),
        millis,
        seed,
    };
    (0..readers)
        .map(|seed| Reader::start(&task(seed)))
        .collect()
}

pub fn finish(world: &World, readers: Vec<Reader>, wait_limit: Duration, least: u64) {
    for reader in readers {
        let report = reader.finish(LONG);
        println!(
            "{} operations, the longest took {} ms",
            report.done, report.worst_ms
        );
        assert_eq!(report.faults, [""; 0]);
        assert!(report.done > least, "{report:?}");
        assert!(
            u128::from(report.worst_ms) < wait_limit.as_millis(),
            "{report:?}"
        );
    }
    world.watchdog_slept();
}

#[test]
fn no_read_fails_when_workers_die() {
    if can_run() {
        workers_die(&World::new(11));
    }
}

#[test]
fn no_read_fails_when_workers_die_on_kernels_that_do_not_resend() {
    if can_run() {
        let world = World::journaled(14);
        workers_die(&world);
        let log = world.log();
        assert!(log.contains("answer what a dead worker had read"), "{log}");
    }
}

fn workers_die(world: &World) {
    world.behave(Behaviour::Slow(Duration::from_millis(20)));
    let mount = world.mount("a");
    let readers = storm(world, &mount, 4);
    let begun = Instant::now();
    let mut deaths = 0;
    while begun.elapsed() < STORM {
        std::thread::sleep(Duration::from_millis(400));
        world.kill_worker();
        deaths += 1;
    }
    assert!(deaths >= 5, "{deaths}");
    finish(world, readers, Duration::from_secs(20), 50);
    assert!(world.client().peer().unwrap().mounts == 1);
}

#[test]
fn no_read_fails_when_the_daemon_is_replaced() {
    if !can_run() {
        return;
    }
    let mut world = World::new(12);
    world.behave(Behaviour::Slow(Duration::from_millis(20)));
    let mount = world.mount("a");
    let worker = world.client().peer().unwrap().worker_pid;
    let readers = storm(&world, &mount, 4);
    let begun = Instant::now();
    while begun.elapsed() < STORM {
        std::thread::sleep(Duration::from_millis(500));
        world.kill_daemon();
        std::thread::sleep(Duration::from_millis(500));
        world.start_daemon();
    }
    finish(&world, readers, Duration::from_secs(20), 50);
    let peer = world.client().peer().unwrap();
    assert_eq!((peer.worker_pid, peer.mounts), (worker, 1));
}

#[test]
fn no_read_fails_when_the_holder_dies_and_then_the_worker() {
    if !can_run() {
        return;
    }
    let world = World::new(13);
    let mount = world.mount("a");
    let readers = storm(&world, &mount, 2);
    for _ in 0..3 {
        world.kill_holder();
        world.kill_worker();
    }
    finish(&world, readers, Duration::from_secs(20), 50);
}

#[test]
fn no_read_fails_when_worker_and_holder_die_at_once() {
    if !can_run() {
        return;
    }
    for world in [World::new(15), World::journaled(16)] {
        world.behave(Behaviour::Slow(Duration::from_millis(20)));
        let mount = world.mount("a");
        let readers = storm(&world, &mount, 4);
        let begun = Instant::now();
        let mut deaths = 0;
        while begun.elapsed() < STORM {
            std::thread::sleep(Duration::from_millis(700));
            world.kill_shim();
            deaths += 1;
        }
        assert!(deaths >= 3, "{deaths}");
        finish(&world, readers, Duration::from_secs(20), 50);
        assert_eq!(world.client().peer().unwrap().mounts, 1);
        let unmounted =
            world.run(async { world.client().unmount("a", UnmountMode::IfUnused).await });
        assert_eq!(unmounted, Ok(UnmountOutcome::Done));
        world.nothing_is_kept();
    }
}

/// What worker and holder run; `None` while one of them is being replaced.
fn programs(world: &World) -> Option<[PathBuf; 2]> {
    let peer = world.client().peer()?;
    let of = |pid: u32| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    Some([of(peer.worker_pid)?, of(peer.holder_pid)?])
}

/// A new version is installed and the daemon started again, while readers read.
#[test]
fn no_read_fails_when_the_shim_is_upgraded() {
    if !can_run() {
        return;
    }
    for mut world in [World::new(17), World::journaled(18)] {
        world.behave(Behaviour::Slow(Duration::from_millis(20)));
        let mount = world.mount("a");
        let readers = storm(&world, &mount, 4);
        for version in 0..4 {
            let new = world.dir.path().join(format!("shim-{version}"));
            std::fs::copy(env!("CARGO_BIN_EXE_sluice-shim"), &new).unwrap();
            world.kill_daemon();
            world.shim = new.clone();
            world.start_daemon();
            let client = world.client();
            assert_eq!(world.run(async { client.upgrade().await }), Ok(true));
            let deadline = Instant::now() + Duration::from_secs(20);
            while programs(&world) != Some([new.clone(), new.clone()]) {
                assert!(
                    Instant::now() < deadline,
                    "{:?} {}",
                    programs(&world),
                    world.log()
                );
                std::thread::sleep(Duration::from_millis(20));
            }
            assert_eq!(world.run(async { client.upgrade().await }), Ok(false));
            std::thread::sleep(Duration::from_millis(500));
        }
        // What cannot run takes nothing over.
        let broken = world.dir.path().join("broken");
        std::fs::write(&broken, "no program").unwrap();
        world.kill_daemon();
        world.shim = broken;
        world.start_daemon();
        let client = world.client();
        let before = programs(&world);
        assert!(before.is_some());
        let refused = world.run(async { client.upgrade().await });
        assert!(refused.is_err(), "{refused:?}");
        assert_eq!(programs(&world), before);
        world.kill_holder();
        world.kill_worker();
        finish(&world, readers, Duration::from_secs(20), 50);
        assert_eq!(programs(&world), before);
    }
}
