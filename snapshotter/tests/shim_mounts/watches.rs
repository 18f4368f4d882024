// SPDX-License-Identifier: Apache-2.0
//! Mounts of the kernel over devices that are filled while they are read: content, waits, errors, ends,
//! and deaths under readers. SKIPPED where the kernel does not ask before it reads.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use sluice_proto::shim as wire;
use sluice_snapshotter::mount::errno::FillErrno;
use sluice_snapshotter::mount::{MountSpec, UnmountMode, UnmountOutcome};
use sluice_snapshotter::shim::record::{Record, RecordState};
use sluice_snapshotter::sys::fanotify::{self, EventSlots};
use sluice_snapshotter::sys::mountpoint::Unmounted;

use super::deaths::{STORM, finish, storm};
use super::reader::{Reader, Task};
use super::world::{Behaviour, World, can_run};
use super::{LONG, compare, read_all};

fn world(seed: u64) -> Option<World> {
    can_run().then(|| World::watched(seed)).flatten()
}

#[test]
fn the_kernel_shows_what_is_filled_while_it_is_read() {
    let Some(world) = world(101) else { return };
    let mount = world.mount("a");
    assert_eq!(compare(&world, &mount).faults, [""; 0]);
    assert!(world.asked() > 0);
    assert_eq!(world.watches(), ["a"]);
    // Again, of present data, past the page cache: nobody is asked.
    let asked = world.asked();
    assert_eq!(compare(&world, &mount).faults, [""; 0]);
    assert_eq!(world.asked(), asked);
    // A second mount of the same devices has a watch of its own.
    let second = world.mount("b");
    assert_eq!(compare(&world, &second).faults, [""; 0]);
    for key in ["a", "b"] {
        let ended = world.unmount_watched(key, UnmountMode::IfUnused);
        // The tree is the same file: the first stays watched while the second has it open.
        println!("{key}: {ended:?}");
        assert_eq!(ended.0, Unmounted::Done);
    }
    let deadline = Instant::now() + LONG;
    while !world.watches().is_empty() {
        assert!(
            Instant::now() < deadline,
            "{:?}\n{}",
            world.watches(),
            world.log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    world.watchdog_slept();
}

#[test]
fn a_failed_fill_a_lie_and_a_deadline_are_errors_and_never_zeros() {
    let Some(world) = world(102) else { return };
    let spec = MountSpec {
        read_deadline: Some(Duration::from_millis(1500)),
        ..world.spec("a")
    };
    world.mount_spec(&spec);
    let mount = &spec.mountpoint;
    for failure in [FillErrno::Io, FillErrno::NoSpace, FillErrno::Stale] {
        world.behave(Behaviour::Failing(failure));
        let report = read_all(&world, mount, &["data/f001"]).finish(LONG);
        assert_eq!(
            (report.faults.len(), report.errnos.len()),
            (1, 1),
            "{report:?}"
        );
    }
    world.behave(Behaviour::Lying);
    let report = read_all(&world, mount, &["data/f001"]).finish(LONG);
    assert_eq!(report.errnos, [libc::EIO].into());
    world.behave(Behaviour::Held(1));
    let late = read_all(&world, mount, &["data/f001", "data/f003"]).finish(LONG);
    assert_eq!(late.errnos, [libc::EIO].into());
    assert_eq!(late.faults.len(), 2, "{late:?}");
    assert!((1400..10_000).contains(&late.worst_ms), "{late:?}");
    // Without any daemon it is the same, and all is well when it is back.
    let mut world = world;
    world.kill_daemon();
    let late = read_all(&world, mount, &["data/f001"]).finish(LONG);
    assert_eq!(late.errnos, [libc::EIO].into());
    world.behave(Behaviour::Prompt);
    world.start_daemon();
    assert_eq!(compare(&world, mount).faults, [""; 0]);
    world.watchdog_slept();
}

#[test]
fn readers_of_present_data_pass_those_who_wait_for_the_kernel() {
    let Some(mut world) = world(103) else { return };
    let mount = world.mount("a");
    let numbers = |odd| {
        (0..48)
            .filter(move |n| n % 2 == odd)
            .map(|n| format!("data/f{n:03}"))
    };
    let (present, missing): (Vec<_>, Vec<_>) = (numbers(0).collect(), numbers(1).collect());
    let present: Vec<&str> = present.iter().map(String::as_str).collect();
    let missing: Vec<&str> = missing.iter().map(String::as_str).collect();
    assert_eq!(
        read_all(&world, &mount, &present).finish(LONG).faults,
        [""; 0]
    );
    world.behave(Behaviour::Held(1));
    let mut stuck = [0; 3].map(|_| read_all(&world, &mount, &missing));
    let deadline = Instant::now() + LONG;
    while world.asked() < 40 {
        assert!(Instant::now() < deadline, "{}", world.asked());
        std::thread::sleep(Duration::from_millis(10));
    }
    let report = read_all(&world, &mount, &present).finish(LONG);
    assert_eq!(report.faults, [""; 0]);
    assert!(report.worst_ms < 3000, "{report:?}");
    assert!(stuck.iter_mut().all(Reader::is_running));
    // The worker dies with all of them waiting; then the daemon is another.
    world.kill_worker();
    assert!(stuck.iter_mut().all(Reader::is_running));
    world.behave(Behaviour::Prompt);
    world.kill_daemon();
    world.start_daemon();
    for reader in stuck {
        assert_eq!(reader.finish(LONG).faults, [""; 0]);
    }
    world.watchdog_slept();
}

#[test]
fn a_sealed_device_is_not_watched_any_more() {
    let Some(world) = world(104) else { return };
    let mount = world.mount("a");
    let some = read_all(&world, &mount, &["data/f000", "data/f001"]).finish(LONG);
    assert_eq!(some.faults, [""; 0]);
    world.complete_and_seal();
    let deadline = Instant::now() + LONG;
    while !world.watches().is_empty() {
        assert!(Instant::now() < deadline, "{}", world.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    // From now on no process of ours is needed.
    world.behave(Behaviour::Failing(FillErrno::Io));
    let asked = world.asked();
    world.nothing_is_kept();
    world.kill_shim_now();
    assert_eq!(compare(&world, &mount).faults, [""; 0]);
    assert_eq!(world.asked(), asked);
    let ended = world.unmount_watched("a", UnmountMode::IfUnused);
    assert_eq!(ended, (Unmounted::Done, UnmountOutcome::Done));
    world.watchdog_slept();
}

#[test]
fn what_is_used_is_watched_until_it_is_not() {
    let Some(mut world) = world(105) else { return };
    let mount = world.mount("a");
    let mut user = Reader::start(&Task::Stay {
        directory: mount.join("data"),
    });
    user.wait_ready();
    let busy = world.unmount_watched("a", UnmountMode::Detach);
    assert_eq!(busy, (Unmounted::Done, UnmountOutcome::Busy));
    for death in 0..2 {
        match death {
            0 => world.kill_worker(),
            _ => {
                world.kill_daemon();
                world.start_daemon();
            }
        }
        assert_eq!(world.watches(), ["a"]);
        let again = world.unmount_watched("a", UnmountMode::IfUnused);
        assert_eq!(again, (Unmounted::Absent, UnmountOutcome::Busy));
    }
    user.finish(LONG);
    let deadline = Instant::now() + LONG;
    while world.unmount_watched("a", UnmountMode::IfUnused).1 == UnmountOutcome::Busy {
        assert!(Instant::now() < deadline, "{}", world.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(world.watches().is_empty());
    world.watchdog_slept();
}

#[test]
fn an_event_of_which_nobody_noted_the_device_waits_for_its_range_on_all() {
    let Some(mut world) = world(106) else { return };
    world.kill_all();
    let spec = world.spec("a");
    // A worker that dies just when the kernel has given it an event.
    let group = fanotify::group().unwrap();
    let slots = EventSlots::create(8).unwrap();
    for device in &spec.devices {
        let data = File::open(device.directory.join("data")).unwrap();
        fanotify::mark(group.as_fd(), &data).unwrap();
    }
    let mount = Some((&spec).into());
    let record = Record::create(&wire::MountRecord {
        mount,
        connection: 0,
    })
    .unwrap();
    record.set_state(RecordState::Serving).unwrap();
    world.mount_by_kernel(&spec);
    let mut reader = read_all(&world, &spec.mountpoint, &["data/f001"]);
    while !slots.receive(group.as_fd(), 3).unwrap() {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(slots.take(3).unwrap());
    assert_eq!(slots.event(3).unwrap().device, None);
    world.start_holder(
        "watch/a#1.1",
        &[group.as_fd(), slots.as_fd(), record.as_fd()],
    );
    drop((group, slots, record));
    std::thread::sleep(Duration::from_millis(300));
    assert!(reader.is_running());
    world.start_daemon();
    assert_eq!(reader.finish(LONG).faults, [""; 0]);
    assert_eq!(taken_over(&world), 1);
    // Once for each device, and more for the rest of the file.
    assert!(world.asked() >= 2, "{}", world.asked());
    assert_eq!(world.watches(), ["a"]);
    assert_eq!(compare(&world, &spec.mountpoint).faults, [""; 0]);
    world.watchdog_slept();
}

/// Readers while somebody dies every now and then.
fn deaths(seed: u64, readers: u64, mut death: impl FnMut(&mut World)) {
    let Some(mut world) = world(seed) else { return };
    // So slow that data is missing to the end.
    world.behave(Behaviour::Slow(Duration::from_millis(80)));
    let mount = world.mount("a");
    let readers = storm(&world, &mount, readers);
    let (begun, mut deaths) = (Instant::now(), 0);
    while begun.elapsed() < STORM {
        std::thread::sleep(Duration::from_millis(400));
        death(&mut world);
        deaths += 1;
    }
    println!(
        "{deaths} deaths, {} fills, {} events taken over",
        world.asked(),
        taken_over(&world)
    );
    assert!(deaths >= 3, "{deaths}");
    // Few: what they read is missing nearly every time.
    finish(&world, readers, Duration::from_secs(20), 2);
    assert_eq!(compare(&world, &mount).faults, [""; 0]);
    world.watchdog_slept();
}

/// How many events all workers together found unanswered.
fn taken_over(world: &World) -> u64 {
    let log = world.log();
    let counts = log.lines().filter(|line| line.contains("watch taken over"));
    let count = |line: &str| {
        let rest = line.split("events=").nth(1)?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    };
    counts.filter_map(count).sum()
}

#[test]
fn no_read_fails_when_workers_die_under_the_kernels_mount() {
    deaths(111, 8, |world| world.kill_worker());
}

#[test]
fn no_read_fails_when_the_daemon_is_replaced_under_the_kernels_mount() {
    deaths(112, 8, |world| {
        world.kill_daemon();
        std::thread::sleep(Duration::from_millis(400));
        world.start_daemon();
    });
}

#[test]
fn no_read_fails_when_holder_and_worker_die_in_turn_under_the_kernels_mount() {
    deaths(113, 8, |world| {
        world.kill_holder();
        world.kill_worker();
    });
}

#[test]
fn no_read_fails_when_holder_and_worker_die_at_once_under_the_kernels_mount() {
    deaths(114, 8, |world| world.kill_shim());
}

#[test]
fn no_read_fails_when_worker_and_daemon_die_at_once_under_the_kernels_mount() {
    deaths(115, 8, |world| {
        let worker = world
            .client()
            .peer()
            .expect("a worker is attached")
            .worker_pid;
        super::world::kill_pid(worker);
        world.kill_daemon();
        world.start_daemon();
    });
}
