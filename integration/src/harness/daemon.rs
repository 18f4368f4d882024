// SPDX-License-Identifier: Apache-2.0
//! A private `sluiced`, with its shim.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command::{self, Output};
use super::process::{Process, tail};
use super::registry::free_address;
use super::root::Root;
use super::service_manager::ServiceManager;
use super::tools;

/// How much of a log explains a failure.
const TAIL_LINES: usize = 30;
/// Config that frees unused mounts and data after a second instead of minutes.
pub const QUICK_REAPER: &str = "[mount]\ngrace = \"1s\"\n\n[store]\ngrace = \"1s\"\n";

/// [`QUICK_REAPER`] with what serves mounts: `auto`, `fuse` or `erofs`.
#[must_use]
pub fn quick_reaper_with(backend: &str) -> String {
    QUICK_REAPER.replace("[mount]\n", &format!("[mount]\nbackend = \"{backend}\"\n"))
}

/// A running daemon and the shim it started.
#[derive(Debug)]
pub struct Daemon {
    process: Option<Process>,
    config: PathBuf,
    run_dir: PathBuf,
    state: PathBuf,
    log: PathBuf,
    telemetry: std::net::SocketAddr,
    surroundings: Surroundings,
}

/// What is around a daemon.
#[derive(Debug, Default)]
pub struct Surroundings {
    /// Whose service it is.
    pub manager: Option<ServiceManager>,
    /// Added to its environment.
    pub environment: Vec<(String, OsString)>,
    /// The control group of it and of what it starts: a file to write process IDs to.
    pub group: Option<PathBuf>,
}

impl Daemon {
    /// Writes a config below `root` and starts the daemon. `extra` is TOML appended to the config.
    pub fn start(root: &Root, containerd_socket: &Path, extra: &str) -> Result<Self> {
        Self::start_within(Surroundings::default(), root, containerd_socket, extra)
    }

    /// As [`Self::start`], in these surroundings.
    pub fn start_within(
        surroundings: Surroundings,
        root: &Root,
        containerd_socket: &Path,
        extra: &str,
    ) -> Result<Self> {
        let run_dir = root.directory("run")?;
        let state = root.directory("sluice")?;
        let telemetry = free_address()?;
        let config = root.join("sluice.toml")?;
        std::fs::write(
            &config,
            format!(
                "[paths]\nroot = \"{}\"\nrun = \"{}\"\n\n[containerd]\naddress = \"{}\"\n\n[telemetry]\naddress = \"{telemetry}\"\n\n[log]\nlevel = \"info\"\nformat = \"text\"\n{extra}",
                state.display(),
                run_dir.display(),
                containerd_socket.display(),
            ),
        )?;
        let log = root.join("sluiced.log")?;
        let mut daemon = Self {
            process: None,
            config,
            run_dir,
            state,
            log,
            telemetry,
            surroundings,
        };
        daemon.start_again()?;
        Ok(daemon)
    }

    /// Starts it after [`Self::kill`] or [`Self::stop`].
    pub fn start_again(&mut self) -> Result<()> {
        let program = tools::binary("sluiced")?;
        let mut command = match &self.surroundings.manager {
            Some(manager) => manager.command(&program)?,
            None => match &self.surroundings.group {
                None => Command::new(program),
                // It must be in its group before it allocates anything; 0 is whoever writes.
                Some(group) => {
                    let mut shell = Command::new("sh");
                    let enter = "echo 0 > \"$0\" && exec \"$@\"";
                    shell.args(["-c", enter]).arg(group).arg(program);
                    shell
                }
            },
        };
        let command = command.arg("--config").arg(&self.config);
        command.envs(self.surroundings.environment.iter().cloned());
        let mut process = Process::start("sluiced", command, &self.log)?;
        let telemetry = self.telemetry;
        let socket = self.snapshots_socket();
        process.wait_ready(Duration::from_secs(20), || {
            socket.exists()
                && http_get(telemetry, "/healthz").is_ok_and(|body| body.starts_with("200"))
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the daemon runs")?.kill()
    }

    /// SIGTERM and a clean end.
    pub fn stop(&mut self) -> Result<()> {
        self.process.take().context("the daemon runs")?.stop()
    }

    /// Waits until it has ended by itself; false when it still runs at the deadline.
    pub fn ends_within(&mut self, deadline: Duration) -> bool {
        let ended = |process: &mut Process| process.wait(deadline).is_ok();
        self.process.as_mut().is_none_or(ended)
    }

    /// Its process.
    pub fn pid(&self) -> Result<Pid> {
        Ok(self.process.as_ref().context("the daemon runs")?.pid())
    }

    /// Where containerd connects.
    #[must_use]
    pub fn snapshots_socket(&self) -> PathBuf {
        self.run_dir.join("snapshots.sock")
    }

    /// The persistent root.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The log file.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The last lines of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log, TAIL_LINES)
    }

    /// The last lines of the shim's log.
    #[must_use]
    pub fn shim_log_tail(&self) -> String {
        tail(&self.run_dir.join("shim.log"), TAIL_LINES)
    }

    /// Where its sockets are.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Whether the daemon has duplicates of the shim's descriptors, and its manager too.
    #[must_use]
    pub fn keeps_descriptors(&self) -> bool {
        let kept = self.metric("sluice_shim_kept_entries", &[]);
        let stored = self
            .surroundings
            .manager
            .as_ref()
            .is_none_or(|it| it.stored() > 0);
        kept.is_ok_and(|kept| kept > 0.0) && stored
    }

    /// A `sluice` command that talks to this daemon.
    pub fn sluice(&self) -> Result<Command> {
        let mut command = Command::new(tools::binary("sluice")?);
        command.env("SLUICE_CONTROL_SOCKET", self.run_dir.join("control.sock"));
        command.env("SLUICE_STATE", self.run_dir.join("converted"));
        Ok(command)
    }

    /// Runs `sluice ARGS`; a failure is an error.
    pub fn sluice_ok(&self, args: &[&str]) -> Result<Output> {
        command::run_ok(self.sluice()?.args(args), Duration::from_secs(300))
    }

    /// `sluice status --json`.
    pub fn status(&self) -> Result<serde_json::Value> {
        let output = self.sluice_ok(&["status", "--json"])?;
        serde_json::from_str(&output.stdout).context("read `sluice status --json`")
    }

    /// Whether the store holds at least one layer and every layer is sealed.
    pub fn is_sealed(&self) -> Result<bool> {
        let status = self.status()?;
        let layers = status["layers"].as_array().cloned().unwrap_or_default();
        Ok(!layers.is_empty() && layers.iter().all(|l| l["sealed"].as_bool() == Some(true)))
    }

    /// All its metrics, as Prometheus reads them.
    pub fn metrics(&self) -> Result<String> {
        http_get(self.telemetry, "/metrics")
    }

    /// The value of the metric's samples whose line contains all of `labels`, added up.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        Ok(self
            .metrics()?
            .lines()
            .filter(|l| l.starts_with(name) && l[name.len()..].starts_with(['{', ' ']))
            .filter(|l| labels.iter().all(|label| l.contains(label)))
            .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
            .sum())
    }

    /// Ends the shim: its mounts are dead afterwards, so unmount them next.
    pub fn kill_shim(&self) {
        // Holder and worker start each other again: until neither is left.
        for _ in 0..100 {
            let shims = shim_pids(&self.run_dir);
            if shims.is_empty() {
                return;
            }
            for pid in shims {
                kill(pid, Signal::SIGKILL).ok();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The processes of the shim that serves `run_dir`.
#[must_use]
pub fn shim_pids(run_dir: &Path) -> Vec<Pid> {
    shims(run_dir).into_iter().map(|(pid, _)| pid).collect()
}

/// The same, each with what it is: `holder` or `worker`. They are those whose arguments name the directory. Only
/// of processes with the shim's name are the arguments read: to read those of one that hangs in a mount would
/// hang too.
#[must_use]
pub fn shims(run_dir: &Path) -> Vec<(Pid, String)> {
    let role_of = |pid: Pid| {
        let process = Path::new("/proc").join(pid.to_string());
        let comm = std::fs::read(process.join("comm")).ok()?;
        if comm != b"sluice-shim\n" {
            return None;
        }
        let arguments = std::fs::read(process.join("cmdline")).ok()?;
        let arguments: Vec<&[u8]> = arguments.split(|byte| *byte == 0).collect();
        let ours = arguments.contains(&run_dir.as_os_str().as_encoded_bytes());
        let role = String::from_utf8_lossy(arguments.get(1)?).into_owned();
        ours.then_some((pid, role))
    };
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .filter_map(role_of)
        .collect()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.process.take();
        self.kill_shim();
    }
}

/// A plain HTTP GET; the answer's status and body as `STATUS\nBODY`.
pub fn http_get(address: std::net::SocketAddr, path: &str) -> Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let status = text.split(' ').nth(1).context("HTTP status")?.to_owned();
    let body = text.split_once("\r\n\r\n").map_or("", |(_, b)| b);
    Ok(format!("{status}\n{body}"))
}
