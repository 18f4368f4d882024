// SPDX-License-Identifier: Apache-2.0
//! The shim on the real kernel: content, waits, ends. Needs root; deaths are in `deaths`.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

#[path = "shim_mounts/deaths.rs"]
mod deaths;
#[path = "shim_mounts/image.rs"]
mod image;
#[path = "shim_mounts/privileges.rs"]
mod privileges;
#[path = "shim_mounts/reader.rs"]
mod reader;
#[path = "shim_mounts/watches.rs"]
mod watches;
#[path = "shim_mounts/world.rs"]
mod world;

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use image::Xattrs;
use reader::{Reader, Report, Task};
use sluice_blockindex::extent::Extent;
use sluice_snapshotter::mount::errno::FillErrno;
use sluice_snapshotter::mount::fuse::FuseMount;
use sluice_snapshotter::mount::{
    FirstReads, ImageMount, MountError, MountSpec, MountState, UnmountMode, UnmountOutcome,
};
use sluice_snapshotter::shim::client::{FillRequest, FillService as _};
use sluice_snapshotter::sys::mountpoint;
use world::{Behaviour, World, can_run};

/// Longest time for a reader in these tests; far above what they take.
const LONG: Duration = Duration::from_secs(60);

/// In a reader's process this is the reader.
#[test]
fn a_reader_does_its_task() {
    reader::run_if_asked();
}

fn compare(world: &World, mount: &std::path::Path) -> Report {
    let task = Task::Compare {
        mount: mount.to_owned(),
        expected: world.expected.clone(),
    };
    Reader::start(&task).finish(LONG)
}

fn read_all(world: &World, mount: &std::path::Path, paths: &[&str]) -> Reader {
    Reader::start(&Task::ReadAll {
        mount: mount.to_owned(),
        expected: world.expected.clone(),
        paths: paths.iter().map(|path| (*path).to_owned()).collect(),
    })
}

fn unmount(world: &World, key: &str, mode: UnmountMode) -> UnmountOutcome {
    let client = world.client();
    world
        .run(async { client.unmount(key, mode).await })
        .unwrap()
}

#[test]
fn a_mount_shows_the_tree_and_fetches_what_is_read() {
    if !can_run() {
        return;
    }
    let world = World::new(1);
    let mount = world.mount("a");
    let cold = compare(&world, &mount);
    assert_eq!(cold.faults, [""; 0]);
    assert!(cold.done > 3100);
    let asked = world.asked();
    assert!(asked > 50, "{asked}");
    let warm = compare(&world, &mount);
    assert_eq!((warm.faults, world.asked()), (vec![], asked));
    world.watchdog_slept();
}

#[test]
fn trees_without_xattrs_and_with_acls() {
    if !can_run() {
        return;
    }
    let world = World::with_image(|whole| image::build(8, whole, Xattrs::None));
    let mount = world.mount("a");
    assert_eq!(compare(&world, &mount).faults, [""; 0]);
    world.kill_worker();
    assert_eq!(compare(&world, &mount).faults, [""; 0]);
    world.watchdog_slept();

    let world = World::with_image(|whole| image::build(9, whole, Xattrs::Acl));
    let mount = world.mount("a");
    assert_eq!(compare(&world, &mount).faults, [""; 0]);
    let cat = |name: &str| {
        let mut command = Command::new("cat");
        command
            .uid(4141)
            .gid(4242)
            .arg(mount.join(name))
            .stderr(Stdio::null());
        command.output().unwrap().stdout
    };
    assert_eq!(cat("no acl"), b"plain");
    assert_eq!(cat("acl"), b"");
    world.watchdog_slept();
}

#[test]
fn two_mounts_share_devices_and_end_alone() {
    if !can_run() {
        return;
    }
    let world = World::new(2);
    let backend = FuseMount::new(world.client());
    let (a, b) = (world.mount("a"), world.mount("b"));
    assert_eq!(compare(&world, &a).faults, [""; 0]);
    let asked = world.asked();
    assert_eq!(compare(&world, &b).faults, [""; 0]);
    assert_eq!(world.asked(), asked);
    let again = world.spec("a");
    world.run(backend.mount(&again)).unwrap();
    assert_eq!(world.mounted(), 2);
    let elsewhere = MountSpec {
        mountpoint: b,
        ..again
    };
    assert!(world.run(backend.mount(&elsewhere)).is_err());
    for _ in 0..2 {
        let done = world
            .run(backend.unmount("a", UnmountMode::IfUnused))
            .unwrap();
        assert_eq!(done, UnmountOutcome::Done);
        assert_eq!(world.run(backend.check("a")).unwrap(), MountState::Absent);
        assert_eq!(world.run(backend.check("b")).unwrap(), MountState::Serving);
    }
    assert_eq!(world.mounted(), 1);
    assert_eq!(compare(&world, &world.spec("b").mountpoint).faults, [""; 0]);
    world.watchdog_slept();
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

#[test]
fn a_failed_mount_leaves_no_trace() {
    if !can_run() {
        return;
    }
    let world = World::new(3);
    let peer = world.client().peer().unwrap();
    world.mount("first");
    unmount(&world, "first", UnmountMode::IfUnused);
    // What a mount leaves is closed on threads of its own, a moment later.
    let files = || {
        let count = || (open_files(peer.holder_pid), open_files(peer.worker_pid));
        let (mut counted, mut since) = (count(), Instant::now());
        while since.elapsed() < Duration::from_millis(300) {
            std::thread::sleep(Duration::from_millis(20));
            let now = count();
            if now != counted {
                (counted, since) = (now, Instant::now());
            }
        }
        counted
    };
    let before = files();
    let good = world.spec("a");
    let garbage = world.dir.path().join("garbage");
    std::fs::write(&garbage, vec![0xa5; 100_000]).unwrap();
    let cut = world.dir.path().join("cut");
    std::fs::write(&cut, &std::fs::read(&good.tree).unwrap()[..5000]).unwrap();
    let mut absent_device = good.devices.clone();
    absent_device[0].directory = world.dir.path().join("nowhere");
    let missing = |name: &str| world.dir.path().join(name);
    let bad = [
        MountSpec {
            tree: missing("no-tree"),
            ..good.clone()
        },
        MountSpec {
            tree: garbage,
            ..good.clone()
        },
        MountSpec {
            tree: cut,
            ..good.clone()
        },
        MountSpec {
            devices: absent_device,
            ..good.clone()
        },
        MountSpec {
            devices: good.devices[..1].to_vec(),
            ..good.clone()
        },
        MountSpec {
            devices: good.devices.iter().rev().cloned().collect(),
            ..good.clone()
        },
        MountSpec {
            mountpoint: missing("no/where"),
            ..good.clone()
        },
        MountSpec {
            mountpoint: missing("nowhere"),
            ..good.clone()
        },
        MountSpec {
            mountpoint: missing("cut"),
            ..good.clone()
        },
    ];
    for spec in bad {
        let client = world.client();
        let result = world.run(async { client.mount(&spec).await });
        assert!(
            matches!(result, Err(MountError::Refused { .. })),
            "{spec:?}: {result:?}"
        );
        assert_eq!(world.mounted(), 0, "{spec:?}");
    }
    assert_eq!(files(), before);
    assert_eq!(compare(&world, &world.mount("a")).faults, [""; 0]);
    world.watchdog_slept();
}

#[test]
fn readers_of_present_data_pass_those_who_wait() {
    if !can_run() {
        return;
    }
    let world = World::new(4);
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
    // More readers than the shim has threads, several times over.
    let mut stuck = [0; 3].map(|_| read_all(&world, &mount, &missing));
    let deadline = Instant::now() + LONG;
    while world.asked() < 60 {
        assert!(Instant::now() < deadline, "{}", world.asked());
        std::thread::sleep(Duration::from_millis(10));
    }
    let report = read_all(&world, &mount, &present).finish(LONG);
    assert_eq!(report.faults, [""; 0]);
    assert!(report.worst_ms < 3000, "{report:?}");
    assert!(stuck.iter_mut().all(Reader::is_running));
    // The held ones are never answered; a new connection asks again for all that waits.
    world.behave(Behaviour::Prompt);
    let mut world = world;
    world.kill_daemon();
    world.start_daemon();
    for reader in stuck {
        assert_eq!(reader.finish(LONG).faults, [""; 0]);
    }
    world.watchdog_slept();
}

#[test]
fn the_deadline_gives_an_error_and_never_zeros() {
    if !can_run() {
        return;
    }
    let mut world = World::new(5);
    let spec = MountSpec {
        read_deadline: Some(Duration::from_millis(1500)),
        ..world.spec("a")
    };
    let client = world.client();
    world.run(async { client.mount(&spec).await }).unwrap();
    drop(client);
    world.behave(Behaviour::Held(1));
    let late = read_all(&world, &spec.mountpoint, &["data/f001", "data/f003"]).finish(LONG);
    assert_eq!(late.errnos, [libc::EIO].into());
    assert_eq!(late.faults.len(), 2, "{late:?}");
    // The kernel asks again for a page that could not be read ahead, and its reader does not wait twice.
    assert!((1400..2900).contains(&late.worst_ms), "{late:?}");
    // Without any daemon it is the same.
    world.kill_daemon();
    std::thread::sleep(Duration::from_millis(200));
    let late = read_all(&world, &spec.mountpoint, &["data/f001"]).finish(LONG);
    assert_eq!(late.errnos, [libc::EIO].into());
    world.behave(Behaviour::Prompt);
    world.start_daemon();
    std::thread::sleep(Duration::from_millis(200));
    let report = read_all(&world, &spec.mountpoint, &["data/f001", "data/f003"]).finish(LONG);
    assert_eq!(report.faults, [""; 0]);
    world.watchdog_slept();
}

#[test]
fn a_failed_fill_reaches_the_reader_as_its_error() {
    if !can_run() {
        return;
    }
    let world = World::new(6);
    let mount = world.mount("a");
    for (failure, number) in [
        (FillErrno::Io, libc::EIO),
        (FillErrno::NoSpace, libc::ENOSPC),
        (FillErrno::Stale, libc::ESTALE),
    ] {
        world.behave(Behaviour::Failing(failure));
        let report = read_all(&world, &mount, &["data/f001"]).finish(LONG);
        // The page cache has but one error to give for a page that could not be read.
        assert!(report.errnos == [number].into() || report.errnos == [libc::EIO].into());
        assert_eq!(report.faults.len(), 1, "{report:?}");
    }
    world.behave(Behaviour::Lying);
    let report = read_all(&world, &mount, &["data/f001"]).finish(LONG);
    assert_eq!(report.errnos, [libc::EIO].into());
    world.behave(Behaviour::Prompt);
    assert_eq!(
        read_all(&world, &mount, &["data/f001"]).finish(LONG).faults,
        [""; 0]
    );
    world.watchdog_slept();
}

#[test]
fn bytes_that_the_store_does_not_keep_reach_the_reader() {
    if !can_run() {
        return;
    }
    let world = World::new(14);
    let mount = world.mount("a");
    let files = ["data/f001", "data/f003", "data/f005"];
    world.behave(Behaviour::Passing);
    let report = read_all(&world, &mount, &files).finish(LONG);
    assert_eq!(report.faults, [""; 0]);
    // Nothing of it was kept: a reader who comes later and finds nobody to ask waits.
    world.behave(Behaviour::Failing(FillErrno::Io));
    let late = read_all(&world, &mount, &["data/f007"]).finish(LONG);
    assert_eq!(late.errnos, [libc::EIO].into());
    // Fewer bytes than were asked for are none.
    world.behave(Behaviour::PassingTooFew);
    let late = read_all(&world, &mount, &["data/f007"]).finish(LONG);
    assert_eq!(late.errnos, [libc::EIO].into());
    world.watchdog_slept();
}

#[test]
fn what_is_read_first_is_recorded_once_and_in_its_order() {
    if !can_run() {
        return;
    }
    let world = World::new(16);
    let window = Duration::from_secs(3);
    let spec = MountSpec {
        record: Some(window),
        ..world.spec("a")
    };
    let client = world.client();
    world.run(async { client.mount(&spec).await }).unwrap();
    let ask = |key: &str, from: u32, forget: bool| {
        let client = world.client();
        let page = world.run(async { client.first_reads(key, from, forget).await });
        page.unwrap()
    };
    let read = |path: &str| {
        let report = read_all(&world, &spec.mountpoint, &[path]).finish(LONG);
        assert_eq!(report.faults, [""; 0]);
    };
    // Nothing begins before somebody reads.
    std::thread::sleep(Duration::from_millis(100));
    let page = ask("a", 0, false);
    assert_eq!(
        (page.recorded, page.complete, page.reads.len()),
        (true, false, 0)
    );
    // What is brought without being read does not count.
    let bring = FillRequest {
        diff_id: spec.devices[1].diff_id,
        index_digest: spec.devices[1].index_digest,
        extent: Extent::new(0, 1).unwrap(),
        deadline: None,
        takes_bytes: false,
    };
    world.run(world.fills.fill(bring)).unwrap();
    read("data/f001");
    let first = ask("a", 0, false);
    assert!(
        !first.reads.is_empty() && first.reads[0].after.is_zero(),
        "{first:?}"
    );
    // Present data counts as well as missing data, in another mount too, and each chunk once.
    let again = MountSpec {
        record: Some(window),
        ..world.spec("b")
    };
    world.run(async { client.mount(&again).await }).unwrap();
    let report = read_all(&world, &again.mountpoint, &["data/f001"]).finish(LONG);
    assert_eq!(report.faults, [""; 0]);
    let chunks = |page: &FirstReads| -> Vec<(u16, u32)> {
        page.reads.iter().map(|it| (it.device, it.chunk)).collect()
    };
    let other = ask("b", 0, false);
    let sorted = |page: &FirstReads| {
        let mut chunks = chunks(page);
        chunks.sort_unstable();
        chunks
    };
    assert_eq!(sorted(&other), sorted(&first));
    read("data/f003");
    let both = ask("a", 0, false);
    let count = first.reads.len();
    assert_eq!(both.reads[..count], first.reads);
    assert!(both.reads.len() > count);
    let from = u32::try_from(count).unwrap();
    assert_eq!(ask("a", from, false).reads, both.reads[count..]);
    let mut unique = chunks(&both);
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), both.reads.len());
    // It ends by itself.
    std::thread::sleep(window);
    read("data/f005");
    let end = ask("a", 0, false);
    assert_eq!((end.complete, &end.reads), (true, &both.reads));
    assert!(!ask("a", 0, true).recorded && !ask("a", 0, false).recorded);
    // Nobody asked for a recording, the mount is not there, or its worker did not see it begin.
    world.mount("c");
    assert!(!ask("c", 0, false).recorded && !ask("none", 0, false).recorded);
    assert!(ask("b", 0, false).recorded);
    world.kill_worker();
    assert!(!ask("b", 0, false).recorded);
    assert_eq!(compare(&world, &spec.mountpoint).faults, [""; 0]);
    world.watchdog_slept();
}

#[test]
fn what_is_used_is_not_unmounted() {
    if !can_run() {
        return;
    }
    let world = World::new(7);
    let mount = world.mount("a");
    let mut user = Reader::start(&Task::Stay {
        directory: mount.join("data"),
    });
    user.wait_ready();
    assert_eq!(
        unmount(&world, "a", UnmountMode::IfUnused),
        UnmountOutcome::Busy
    );
    assert_eq!(world.mounted(), 1);
    assert_eq!(compare(&world, &mount).faults, [""; 0]);
    assert_eq!(
        unmount(&world, "a", UnmountMode::Detach),
        UnmountOutcome::Busy
    );
    assert_eq!(world.mounted(), 0);
    // The key is free again, while the old user keeps what he has.
    world.mount("a");
    assert_eq!(compare(&world, &mount).faults, [""; 0]);
    assert_eq!(
        unmount(&world, "a", UnmountMode::IfUnused),
        UnmountOutcome::Busy
    );
    user.finish(LONG);
    let deadline = Instant::now() + LONG;
    while unmount(&world, "a", UnmountMode::IfUnused) == UnmountOutcome::Busy {
        assert!(Instant::now() < deadline);
    }
    let client = world.client();
    assert_eq!(
        world.run(async { client.shutdown().await }).unwrap(),
        UnmountOutcome::Done
    );
    world.watchdog_slept();
}

/// Keys of what the shim has, and whether it is only leaving.
fn listed(world: &World) -> Vec<(String, bool)> {
    let client = world.client();
    let mounts = world.run(async { client.mounts().await }).unwrap();
    let mut keys: Vec<_> = mounts
        .into_iter()
        .map(|mount| (mount.spec.key, mount.leaving))
        .collect();
    keys.sort();
    keys
}

#[test]
fn a_mount_that_was_taken_away_from_outside_is_made_again() {
    if !can_run() {
        return;
    }
    let world = World::new(14);
    let backend = FuseMount::new(world.client());
    let mount = world.mount("a");
    let check = || world.run(backend.check("a")).unwrap();
    assert_eq!(check(), MountState::Serving);
    assert_eq!(listed(&world), [("a".to_owned(), false)]);
    let mut user = Reader::start(&Task::Stay {
        directory: mount.join("data"),
    });
    user.wait_ready();
    let detached = mountpoint::detach(&mount, true).unwrap();
    assert_eq!(detached, mountpoint::Unmounted::Done);
    // Its user keeps the connection alive, but nobody else would find a file.
    assert_eq!(check(), MountState::Absent);
    assert_eq!(listed(&world), [("a".to_owned(), true)]);
    world.mount("a");
    assert_eq!(check(), MountState::Serving);
    assert_eq!(
        listed(&world),
        [("a".to_owned(), false), ("a".to_owned(), true)]
    );
    assert_eq!(compare(&world, &mount).faults, [""; 0]);
    user.finish(LONG);
    let deadline = Instant::now() + LONG;
    while unmount(&world, "a", UnmountMode::IfUnused) == UnmountOutcome::Busy {
        assert!(Instant::now() < deadline);
    }
    assert_eq!((listed(&world), world.mounted()), (vec![], 0));
    world.watchdog_slept();
}

#[test]
fn a_new_daemon_and_a_new_worker_know_what_is_leaving() {
    if !can_run() {
        return;
    }
    let mut world = World::new(15);
    let mount = world.mount("a");
    let mut user = Reader::start(&Task::Stay {
        directory: mount.join("data"),
    });
    user.wait_ready();
    assert_eq!(
        unmount(&world, "a", UnmountMode::Detach),
        UnmountOutcome::Busy
    );
    let leaving = [("a".to_owned(), true)];
    assert_eq!(listed(&world), leaving);
    world.kill_daemon();
    world.start_daemon();
    assert_eq!(listed(&world), leaving);
    world.kill_worker();
    assert_eq!(listed(&world), leaving);
    assert_eq!(
        unmount(&world, "a", UnmountMode::IfUnused),
        UnmountOutcome::Busy
    );
    user.finish(LONG);
    let deadline = Instant::now() + LONG;
    while unmount(&world, "a", UnmountMode::IfUnused) == UnmountOutcome::Busy {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(listed(&world), []);
    world.watchdog_slept();
}
