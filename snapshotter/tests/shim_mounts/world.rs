// SPDX-License-Identifier: Apache-2.0
//! A shim with its store below a temporary directory, a daemon side that can be killed and replaced,
//! and a watchdog that ends hanging connections.

use std::collections::HashMap;
use std::fs::Permissions;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message as _;
use sluice_blockindex::chunkmap::{ChunkMap, ChunkRecord, write_chunk_map};
use sluice_blockindex::digest::{ChunkDigest, DiffId, IndexDigest, StrongAlgorithm};
use sluice_fetcher::scheduler::Filled;
use sluice_fetcher::store::{Device, DeviceKey, SealStep, Store, StoreOptions};
use sluice_proto::shim as wire;
use sluice_proto::shim::holder_packet::Body;
use sluice_snapshotter::mount::erofs::{self, KernelMounts};
use sluice_snapshotter::mount::errno::FillErrno;
use sluice_snapshotter::mount::{DeviceSpec, MountSpec, UnmountMode, UnmountOutcome, selftest};
use sluice_snapshotter::shim::client::reserve::Reserve;
use sluice_snapshotter::shim::client::{
    FillRequest, FillService, ShimClient, ShimError, ShimOptions, ShimPeer,
};
use sluice_snapshotter::sys::fdpass::PacketSocket;
use sluice_snapshotter::sys::mountpoint::{self, Unmounted};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::image::{self, Image, Xattrs};

/// Chunk size of the test's devices: small, so that most files have several.
const CHUNK: usize = 32 * 1024;

/// Far above what a test takes, even on a busy machine.
const WATCHDOG: Duration = Duration::from_secs(120);

/// Fills from memory, as slowly and as badly as a test wants.
#[derive(Debug, Default)]
pub struct Fills {
    devices: HashMap<(DiffId, IndexDigest), (Arc<Device>, Vec<u8>)>,
    pub asked: AtomicU64,
    pub behaviour: Mutex<Behaviour>,
}

/// How fills go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Behaviour {
    #[default]
    Prompt,
    Slow(Duration),
    /// Those of this device (0 or 1) never end.
    Held(usize),
    Failing(FillErrno),
    /// Says that it is done and does nothing.
    Lying,
    /// Keeps nothing and passes the bytes to who takes them.
    Passing,
    /// All but one of them.
    PassingTooFew,
}

#[async_trait]
impl FillService for Fills {
    async fn fill(&self, request: FillRequest) -> Result<Filled, FillErrno> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let (device, bytes) = &self.devices[&(request.diff_id, request.index_digest)];
        let behaviour = *self.behaviour.lock().unwrap();
        match behaviour {
            Behaviour::Prompt => {}
            Behaviour::Slow(pause) => tokio::time::sleep(pause).await,
            Behaviour::Held(number) if request.index_digest == index_digest(number) => {
                std::future::pending::<()>().await;
            }
            Behaviour::Held(_) => {}
            Behaviour::Failing(failure) => return Err(failure),
            Behaviour::Lying => return Ok(Filled::Present),
            Behaviour::Passing | Behaviour::PassingTooFew => {
                assert!(request.takes_bytes);
                let end = request.extent.end() - u64::from(behaviour == Behaviour::PassingTooFew);
                let range = request.extent.start().try_into().unwrap()..end.try_into().unwrap();
                return Ok(Filled::Passed(bytes[range].to_vec().into()));
            }
        }
        for chunk in device.chunks().covering(request.extent) {
            let extent = device.chunks().chunk(chunk).unwrap().device;
            let range =
                usize::try_from(extent.start()).unwrap()..usize::try_from(extent.end()).unwrap();
            device.commit(chunk, &bytes[range]).unwrap();
        }
        Ok(Filled::Present)
    }
}

fn index_digest(number: usize) -> IndexDigest {
    IndexDigest::of(&[u8::try_from(number).unwrap()])
}

/// What serves the mounts of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    Fuse,
    /// The kernel, over devices that the shim watches.
    Erofs,
}

/// Everything that a test needs; cleaned up when dropped.
pub struct World {
    served: Served,
    kernel: Arc<KernelMounts>,
    pub dir: TempDir,
    pub expected: PathBuf,
    pub fills: Arc<Fills>,
    daemon: Option<(Runtime, Arc<ShimClient>)>,
    journal: bool,
    /// The program of the next daemon's shim.
    pub shim: PathBuf,
    /// The daemon's.
    reserve: Arc<Reserve>,
    specs: Vec<DeviceSpec>,
    watchdog: Watchdog,
    _store: Store,
}

/// Says whether the test can run here, and says so when not.
pub fn can_run() -> bool {
    let able = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !able {
        println!("skipped: needs root and /dev/fuse");
    }
    able
}

impl World {
    pub fn new(seed: u64) -> World {
        println!("seed {seed}");
        World::with_image(|whole| image::build(seed, whole, Xattrs::Usual))
    }

    /// As on a kernel that cannot hand requests out again.
    pub fn journaled(seed: u64) -> World {
        println!("seed {seed}, with a journal");
        let build = |whole: &Path| image::build(seed, whole, Xattrs::Usual);
        World::served_by(Served::Fuse, true, build)
    }

    /// As [`World::new`], served by the kernel; `None` where that cannot.
    pub fn watched(seed: u64) -> Option<World> {
        println!("seed {seed}");
        let scratch = tempfile::tempdir().unwrap();
        if let Err(reason) = selftest::kernel_asks_first(scratch.path()) {
            println!("SKIPPED: {reason}");
            return None;
        }
        let build = |whole: &Path| image::build(seed, whole, Xattrs::Usual);
        Some(World::served_by(Served::Erofs, false, build))
    }

    pub fn with_image(build: impl FnOnce(&Path) -> Image) -> World {
        World::served_by(Served::Fuse, false, build)
    }

    fn served_by(served: Served, journal: bool, build: impl FnOnce(&Path) -> Image) -> World {
        let dir = tempfile::Builder::new()
            .prefix("shim-test-")
            .tempdir()
            .unwrap();
        // Users other than root reach the mounts.
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        for name in ["run", "whole", "trees", "mnt"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::fs::set_permissions(dir.path().join("run"), Permissions::from_mode(0o700)).unwrap();
        let image = build(&dir.path().join("whole"));
        let expected = dir.path().join("expected.json");
        std::fs::write(&expected, serde_json::to_vec(&image.expected).unwrap()).unwrap();
        std::fs::write(dir.path().join("trees/tree"), &image.tree).unwrap();
        let store = Store::open(&dir.path().join("devices"), StoreOptions::default()).unwrap();
        let (fills, specs) = devices(&store, image);
        let watchdog = Watchdog::start(dir.path().to_owned(), WATCHDOG);
        let kernel = Arc::new(KernelMounts::open(&dir.path().join("run/mounts")).unwrap());
        let mut world = World {
            served,
            kernel,
            dir,
            expected,
            fills: Arc::new(fills),
            daemon: None,
            journal,
            shim: PathBuf::from(env!("CARGO_BIN_EXE_sluice-shim")),
            reserve: Arc::default(),
            specs,
            watchdog,
            _store: store,
        };
        world.start_daemon();
        world
    }

    pub fn start_daemon(&mut self) {
        if let Err(error) = self.try_start_daemon() {
            panic!("{error}: {}", self.log());
        }
    }

    fn try_start_daemon(&mut self) -> Result<(), ShimError> {
        let runtime = Runtime::new().unwrap();
        self.reserve = Arc::default();
        let options = ShimOptions {
            journal: self.journal,
            reserve: Arc::clone(&self.reserve),
            ..ShimOptions::new(self.dir.path().join("run"), self.shim.clone())
        };
        let client = runtime.block_on(ShimClient::start_or_attach(options, self.fills.clone()));
        self.daemon = Some((runtime, Arc::new(client?)));
        Ok(())
    }

    /// As SIGKILL would: everything of the daemon's side is gone at once.
    pub fn kill_daemon(&mut self) {
        if let Some((runtime, client)) = self.daemon.take() {
            drop(client);
            runtime.shutdown_background();
        }
    }

    pub fn client(&self) -> Arc<ShimClient> {
        self.daemon.as_ref().unwrap().1.clone()
    }

    pub fn run<F: Future>(&self, future: F) -> F::Output {
        self.daemon.as_ref().unwrap().0.block_on(future)
    }

    pub fn spec(&self, key: &str) -> MountSpec {
        let mountpoint = self.dir.path().join("mnt").join(key);
        if mountpoint::mount_at(&mountpoint).unwrap().is_none() {
            std::fs::create_dir_all(&mountpoint).unwrap();
        }
        MountSpec {
            key: key.to_owned(),
            mountpoint,
            tree: self.dir.path().join("trees/tree"),
            devices: self.specs.clone(),
            read_deadline: Some(Duration::from_secs(60)),
            record: None,
        }
    }

    /// Mounts under a name; gives the mountpoint.
    pub fn mount(&self, key: &str) -> PathBuf {
        let spec = self.spec(key);
        self.mount_spec(&spec);
        spec.mountpoint
    }

    pub fn mount_spec(&self, spec: &MountSpec) {
        let client = self.client();
        match self.served {
            Served::Fuse => self.run(async { client.mount(spec).await }).unwrap(),
            Served::Erofs => {
                self.run(async { client.watch(spec).await }).unwrap();
                self.mount_by_kernel(spec);
            }
        }
    }

    /// Takes away a mount of the kernel; says what is left of its watch.
    pub fn unmount_watched(&self, key: &str, mode: UnmountMode) -> (Unmounted, UnmountOutcome) {
        let unmounted = self.kernel.unmount(key, mode).unwrap();
        let client = self.client();
        (
            unmounted,
            self.run(async { client.unwatch(key).await }).unwrap(),
        )
    }

    /// The runs that the worker watches.
    pub fn watches(&self) -> Vec<String> {
        let client = self.client();
        self.run(async { client.watched().await }).unwrap()
    }

    /// Ends daemon, worker and holder; nothing starts again.
    pub fn kill_all(&mut self) {
        let peer = self.client().peer().expect("a worker is attached");
        self.kill_daemon();
        let holder = Pid::from_raw(i32::try_from(peer.holder_pid).unwrap());
        kill(holder, Signal::SIGSTOP).unwrap();
        kill_pid(peer.worker_pid);
        kill_pid(peer.holder_pid);
        let alive = |pid: u32| Path::new(&format!("/proc/{pid}/exe")).read_link().is_ok();
        while alive(peer.worker_pid) || alive(peer.holder_pid) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts a holder as the daemon does when it has something for it.
    pub fn start_holder(&self, entry: &str, fds: &[BorrowedFd<'_>]) {
        let (ours, theirs) = PacketSocket::pair().unwrap();
        let run = self.dir.path().join("run");
        let log = std::fs::File::options()
            .append(true)
            .open(run.join("shim.log"))
            .unwrap();
        let mut holder = Command::new(env!("CARGO_BIN_EXE_sluice-shim"))
            .args(["holder", "--restore", "--run-dir"])
            .arg(&run)
            .stdin(theirs.into_owned())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        std::thread::spawn(move || holder.wait());
        let packet = |body| wire::HolderPacket { body: Some(body) }.encode_to_vec();
        let inherit = Body::Inherit(wire::Inherit {
            name: entry.to_owned(),
        });
        ours.send(&packet(inherit), fds).unwrap();
        ours.send(&packet(Body::InheritEnd(wire::InheritEnd::default())), &[])
            .unwrap();
    }

    /// Has the kernel mount a run, whoever watches it.
    pub fn mount_by_kernel(&self, spec: &MountSpec) {
        self.kernel
            .mount(
                spec,
                &erofs::open_devices(spec).unwrap(),
                erofs::Devices::Store,
            )
            .unwrap();
    }

    /// All of a device, as the daemon's completion does it.
    pub fn complete_and_seal(&self) {
        for (device, bytes) in self.fills.devices.values() {
            for (ordinal, chunk) in (0u32..).zip(bytes.chunks(CHUNK)) {
                device.commit(ordinal, chunk).unwrap();
            }
            device.seal(&mut || SealStep::Continue).unwrap();
        }
    }

    pub fn behave(&self, behaviour: Behaviour) {
        *self.fills.behaviour.lock().unwrap() = behaviour;
    }

    pub fn asked(&self) -> u64 {
        self.fills.asked.load(Ordering::SeqCst)
    }

    /// Kills the worker and waits until another is attached.
    pub fn kill_worker(&self) {
        let before = self
            .client()
            .peer()
            .expect("a worker is attached")
            .worker_pid;
        kill_pid(before);
        let deadline = Instant::now() + Duration::from_secs(20);
        while self
            .client()
            .peer()
            .is_none_or(|peer| peer.worker_pid == before)
        {
            assert!(Instant::now() < deadline, "no new worker\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills worker and holder at once, when the daemon keeps what they have, and waits until another shim is
    /// attached.
    pub fn kill_shim(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.reserve.is_empty() {
            assert!(Instant::now() < deadline, "nothing is kept\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill_shim_now();
    }

    /// The same, whether anything is kept or not.
    pub fn kill_shim_now(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let before = self.client().peer().expect("a worker is attached");
        // A holder that runs on would start another worker.
        let holder = Pid::from_raw(i32::try_from(before.holder_pid).unwrap());
        kill(holder, Signal::SIGSTOP).unwrap();
        kill_pid(before.worker_pid);
        kill_pid(before.holder_pid);
        let replaced = |peer: ShimPeer| {
            peer.worker_pid != before.worker_pid && peer.holder_pid != before.holder_pid
        };
        while !self.client().peer().is_some_and(replaced) {
            assert!(Instant::now() < deadline, "no new shim\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the daemon keeps no descriptor any more.
    pub fn nothing_is_kept(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.reserve.is_empty() {
            assert!(Instant::now() < deadline, "still kept\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills the holder and waits until there is another.
    pub fn kill_holder(&self) {
        let replaced = || self.log().matches("a new holder keeps all").count();
        let before = replaced();
        kill_pid(
            self.client()
                .peer()
                .expect("a worker is attached")
                .holder_pid,
        );
        let deadline = Instant::now() + Duration::from_secs(20);
        while replaced() == before {
            assert!(Instant::now() < deadline, "no new holder\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("run/shim.log")).unwrap_or_default()
    }

    /// How many mounts are below the test's directory.
    pub fn mounted(&self) -> usize {
        below(self.dir.path()).len()
    }

    pub fn watchdog_slept(&self) {
        assert!(
            !self.watchdog.fired(),
            "the watchdog had to end connections\n{}",
            self.log()
        );
    }
}

pub fn kill_pid(pid: u32) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
}

fn devices(store: &Store, image: Image) -> (Fills, Vec<DeviceSpec>) {
    let (mut fills, mut specs) = (Fills::default(), Vec::new());
    for (number, bytes) in image.devices.into_iter().enumerate() {
        let records: Vec<ChunkRecord> = (0u32..)
            .zip(bytes.chunks(CHUNK))
            .map(|(ordinal, chunk)| ChunkRecord {
                ordinal,
                device_bytes: u32::try_from(chunk.len()).unwrap(),
                frame_bytes: 1,
                crc32: crc32fast::hash(chunk),
                digest: ChunkDigest::of(StrongAlgorithm::Blake3, chunk),
            })
            .collect();
        let section = write_chunk_map(StrongAlgorithm::Blake3, &records).unwrap();
        let chunks = ChunkMap::parse(section).unwrap();
        let index_digest = index_digest(number);
        let key = DeviceKey {
            diff_id: DiffId::of(&bytes),
            index: index_digest,
        };
        let device = store.device(key, &chunks).unwrap();
        let directory = store
            .device_paths(&key)
            .unwrap()
            .data
            .parent()
            .unwrap()
            .to_owned();
        specs.push(DeviceSpec {
            diff_id: key.diff_id,
            index_digest,
            directory,
        });
        fills
            .devices
            .insert((key.diff_id, index_digest), (device, bytes));
    }
    (fills, specs)
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.log());
        }
        // A shim that a test has started for nobody is known to whom it attaches to.
        if self.daemon.is_none() && std::thread::panicking() {
            let _none = self.try_start_daemon();
        }
        let pids = self.daemon.as_ref().and_then(|(_, client)| client.peer());
        for (mountpoint, connection) in below(self.dir.path()) {
            abort(&mountpoint, connection);
        }
        if let Some(peer) = pids {
            // The holder first to a stop: it would start another worker, and a worker another holder.
            let holder = Pid::from_raw(i32::try_from(peer.holder_pid).unwrap());
            let _gone = kill(holder, Signal::SIGSTOP);
            for pid in [peer.worker_pid, peer.holder_pid] {
                let _gone = kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL);
            }
        }
        self.kill_daemon();
    }
}

/// Ends the connections of a test that takes too long.
struct Watchdog {
    _cancel: Sender<()>,
    thread: JoinHandle<()>,
}

impl Watchdog {
    fn start(dir: PathBuf, after: Duration) -> Watchdog {
        if !Path::new("/sys/fs/fuse/connections/")
            .read_dir()
            .is_ok_and(|mut d| d.next().is_some())
        {
            let target = "/sys/fs/fuse/connections";
            let _mounted = mount(
                Some("fusectl"),
                target,
                Some("fusectl"),
                MsFlags::empty(),
                None::<&str>,
            );
        }
        let (cancel, cancelled) = channel();
        let thread = std::thread::spawn(move || {
            if cancelled.recv_timeout(after) == Err(RecvTimeoutError::Timeout) {
                println!("watchdog: ends the connections below {}", dir.display());
                for (mountpoint, connection) in below(&dir) {
                    abort(&mountpoint, connection);
                }
            }
        });
        Watchdog {
            _cancel: cancel,
            thread,
        }
    }

    /// Its thread ends before it is cancelled only when it has had to act.
    fn fired(&self) -> bool {
        self.thread.is_finished()
    }
}

fn below(dir: &Path) -> Vec<(PathBuf, u32)> {
    let lines = mountpoint::mounts().unwrap().into_iter();
    let ours = lines.filter(|line| line.mountpoint.starts_with(dir));
    ours.map(|line| (line.mountpoint, line.device.1)).collect()
}

fn abort(mountpoint: &Path, connection: u32) {
    let _aborted = std::fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1");
    let _gone = umount2(mountpoint, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
}
