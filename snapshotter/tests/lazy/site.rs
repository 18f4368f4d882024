// SPDX-License-Identifier: Apache-2.0
//! A private containerd, registry and daemon below a temporary root, and their end.
//!
//! Everything is taken away by `Drop`, also when a test fails: mounts are detached, processes that
//! were started (the shim by the daemon) are ended by their ids. A watchdog thread does the same and
//! ends the test process when a test hangs, which a test over FUSE can do.

use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A test takes seconds; a machine under load takes some of them longer.
const WATCHDOG: Duration = Duration::from_secs(240);

/// A process that ends with its guard.
pub struct Process(Child);

impl Process {
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let file = std::fs::File::create(log).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file);
        Self(command.spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), signal).unwrap();
    }
}

/// The daemon.
pub struct Daemon(Process);

impl Daemon {
    /// Asks it to stop and waits until it has.
    pub async fn stop(mut self) {
        self.0.signal(Signal::SIGTERM);
        let mut code = None;
        until("the daemon stops", async || {
            code = self.0.0.try_wait().unwrap();
            code.is_some()
        })
        .await;
        assert!(code.unwrap().success(), "{code:?}");
    }

    /// Ends it as a crash does.
    pub fn kill(self) {
        drop(self);
    }
}

/// The directory below which all is.
pub struct Root {
    pub path: PathBuf,
    done: Arc<AtomicBool>,
}

impl Root {
    pub fn new() -> Self {
        let path = tempfile::Builder::new()
            .prefix("lazy-")
            .tempdir_in("/tmp")
            .unwrap()
            .keep();
        let done = Arc::new(AtomicBool::new(false));
        let (watched, ended) = (path.clone(), Arc::clone(&done));
        std::thread::spawn(move || {
            let begun = Instant::now();
            while begun.elapsed() < WATCHDOG {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(200));
            }
            eprintln!("the test hangs: ending it");
            abort_fuse(&watched);
            clean(&watched);
            std::process::exit(101);
        });
        Self { path, done }
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        clean(&self.path);
        self.done.store(true, Ordering::SeqCst);
        if std::thread::panicking() {
            for log in ["sluiced.log", "containerd.log", "run/shim.log"] {
                let text = std::fs::read_to_string(self.path.join(log)).unwrap_or_default();
                let tail: Vec<&str> = text.lines().rev().take(30).collect();
                for line in tail.into_iter().rev() {
                    eprintln!("{log}: {line}");
                }
            }
        }
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Mount points below a path, innermost first, with their device numbers.
pub fn mounts_below(path: &Path) -> Vec<(PathBuf, String)> {
    let prefix = format!("{}/", path.display());
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut found: Vec<_> = table
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            Some((PathBuf::from(fields.get(4)?), (*fields.get(2)?).to_owned()))
        })
        .filter(|(point, _)| point.to_string_lossy().starts_with(&prefix))
        .collect();
    found.reverse();
    found
}

fn abort_fuse(path: &Path) {
    for (_, device) in mounts_below(path) {
        if let Some(minor) = device.strip_prefix("0:") {
            let _ = std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1");
        }
    }
}

/// Processes whose command line names the path: the shim that our daemon started.
fn processes_of(path: &Path) -> Vec<i32> {
    let needle = path.to_string_lossy().into_owned();
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if name != own && String::from_utf8_lossy(&line).contains(&needle) {
            found.extend(name.parse::<i32>());
        }
    }
    found
}

fn clean(path: &Path) {
    for (point, _) in mounts_below(path) {
        let _ = umount2(&point, MntFlags::MNT_DETACH);
    }
    // Each of the shim's processes starts the other again, so look until none is left.
    for _ in 0..100 {
        let left = processes_of(path);
        if left.is_empty() {
            break;
        }
        for pid in left {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// Waits until `ready` says so.
pub async fn until(what: &str, mut ready: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !ready().await {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "waited in vain: {what}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub fn start_registry(root: &Root, port: u16) -> Process {
    let config = root.join("registry.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
         http: {{addr: '127.0.0.1:{port}'}}\n",
        root.join("registry").display()
    );
    std::fs::write(&config, text).unwrap();
    Process::start(
        Command::new("docker-registry").arg("serve").arg(&config),
        &root.join("registry.log"),
    )
}

pub fn start_containerd(root: &Root) -> Process {
    let config = root.join("containerd.toml");
    let at = |name: &str| root.join(name).display().to_string();
    let text = format!(
        "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\naddress = \"{}\"\n[proxy_plugins.sluice]\ntype = \"snapshot\"\naddress = \"{}\"\n",
        at("containerd"),
        at("containerd-state"),
        at("containerd.sock"),
        at("run/snapshots.sock")
    );
    std::fs::write(&config, text).unwrap();
    Process::start(
        Command::new("containerd").arg("-c").arg(&config),
        &root.join("containerd.log"),
    )
}

/// Starts the daemon with quick reapers and prefetch as wanted. Its shim's program lies beside it.
pub async fn start_daemon(root: &Root, extra: &str) -> Daemon {
    let text = format!(
        "[paths]\nroot = \"{}\"\nrun = \"{}\"\n[containerd]\naddress = \"{}\"\n[telemetry]\naddress = \"\"\n\
         [mount]\ngrace = \"1s\"\n[store]\ngrace = \"1s\"\n{extra}",
        root.join("sluice").display(),
        root.join("run").display(),
        root.join("containerd.sock").display(),
    );
    let config = root.join("sluice.toml");
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluiced"));
    let daemon = Daemon(Process::start(
        command.arg("--config").arg(&config),
        &root.join("sluiced.log"),
    ));
    let socket = root.join("run/snapshots.sock");
    until("the daemon listens", async || {
        UnixStream::connect(&socket).is_ok()
    })
    .await;
    daemon
}
