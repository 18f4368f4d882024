// SPDX-License-Identifier: Apache-2.0
//! A stand-in for `systemctl` where no systemd runs: it runs what units of services say.
//!
//! One supervisor per unit, detached, holds the service's process and, by [`ServiceManager`], its readiness and its
//! descriptors, also over a restart. Calls speak to it over a socket below [`RUN`]: a word, then `ok` or what is wrong.
//! Of a unit count `ExecStartPre`, `ExecStart` and `Environment`, drop-ins included; every service is one of
//! `Type=notify`, `KillMode=process` and `Restart=always`, and others are refused.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::process::Process;
use super::service_manager::ServiceManager;

/// Where sockets of supervisors are.
const RUN: &str = "/run/units";
/// Where services' output goes.
const LOGS: &str = "/var/log";
/// Until a service has said that it is ready, and until a call has its answer.
const DEADLINE: Duration = Duration::from_secs(30);
/// Between looks at the process and the socket.
const PAUSE: Duration = Duration::from_millis(20);
/// Before a process that ended by itself is started again.
const BEFORE_RESTART: Duration = Duration::from_secs(1);

/// What one call of `systemctl` asks for.
///
/// **Errors**: what this stand-in does not know, and what the unit or its process has to say.
pub fn run(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["supervise", unit] => supervise(unit),
        ["daemon-reload"] => Ok(()),
        ["enable", unit] => Unit::read(unit).map(drop),
        ["enable", "--now", units @ ..] | ["start", units @ ..] => {
            units.iter().try_for_each(|unit| start(unit))
        }
        ["stop", units @ ..] => units.iter().try_for_each(|unit| stop(unit)),
        ["restart" | "reload-or-restart", units @ ..] => {
            units.iter().try_for_each(|unit| restart(unit))
        }
        ["is-active", unit] => {
            let said = ask(&name(unit), "state").unwrap_or(Err("inactive".to_owned()));
            println!("{}", if said.is_ok() { "active" } else { "inactive" });
            said.map_err(anyhow::Error::msg)
        }
        other => bail!("the stand-in for systemctl does not know {other:?}"),
    }
}

fn name(unit: &str) -> String {
    unit.trim_end_matches(".service").to_owned()
}

fn socket(name: &str) -> PathBuf {
    Path::new(RUN).join(format!("{name}.sock"))
}

/// The answer of a unit's supervisor; none when there is no supervisor.
fn ask(name: &str, word: &str) -> Option<std::result::Result<(), String>> {
    let mut stream = UnixStream::connect(socket(name)).ok()?;
    let mut exchange = || -> Result<String> {
        stream.set_read_timeout(Some(DEADLINE * 2))?;
        stream.write_all(word.as_bytes())?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    Some(match exchange() {
        Ok(answer) if answer == "ok" => Ok(()),
        Ok(answer) => Err(answer),
        Err(e) => Err(format!("{name}: {e:#}")),
    })
}

fn start(unit: &str) -> Result<()> {
    let name = name(unit);
    if let Some(answer) = ask(&name, "start") {
        return answer.map_err(anyhow::Error::msg);
    }
    Unit::read(&name)?;
    std::fs::create_dir_all(RUN)?;
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log(&name))?;
    Command::new(std::env::current_exe()?)
        .args(["supervise", &name])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()?;
    let since = Instant::now();
    loop {
        match ask(&name, "state") {
            Some(answer) => return answer.map_err(anyhow::Error::msg),
            None if since.elapsed() > DEADLINE => bail!("{name}: no supervisor"),
            None => std::thread::sleep(PAUSE),
        }
    }
}

fn stop(unit: &str) -> Result<()> {
    let name = name(unit);
    ask(&name, "stop")
        .unwrap_or(Ok(()))
        .map_err(anyhow::Error::msg)
}

fn restart(unit: &str) -> Result<()> {
    match ask(&name(unit), "restart") {
        Some(answer) => answer.map_err(anyhow::Error::msg),
        None => start(unit),
    }
}

fn log(name: &str) -> PathBuf {
    Path::new(LOGS).join(format!("{name}.log"))
}

/// What counts of a unit.
#[derive(Debug, Default, PartialEq, Eq)]
struct Unit {
    before: Vec<String>,
    command: String,
    environment: Vec<(String, String)>,
}

impl Unit {
    /// The unit of this name, with its drop-ins.
    fn read(unit: &str) -> Result<Self> {
        let name = name(unit);
        let file = format!("{name}.service");
        let places = ["/etc/systemd/system", "/usr/lib/systemd/system"];
        let mut found = places.iter().map(|place| Path::new(place).join(&file));
        let found = found.find(|path| path.is_file());
        let path = found.with_context(|| format!("Unit {file} not found"))?;
        let mut texts = vec![std::fs::read_to_string(&path)?];
        let dropped = Path::new(places[0]).join(format!("{file}.d"));
        let mut drop_ins: Vec<PathBuf> = std::fs::read_dir(dropped)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|it| it == "conf"))
            .collect();
        drop_ins.sort();
        for path in drop_ins {
            texts.push(std::fs::read_to_string(path)?);
        }
        Self::parse(&texts.join("\n")).with_context(|| format!("{}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut unit = Self::default();
        let mut section = "";
        for line in text.lines().map(str::trim) {
            if line.starts_with('[') {
                section = line;
                continue;
            }
            if section != "[Service]" || line.starts_with(['#', ';']) {
                continue;
            }
            match line.split_once('=') {
                Some(("ExecStart", "")) => unit.command.clear(),
                Some(("ExecStart", command)) => command.clone_into(&mut unit.command),
                Some(("ExecStartPre", command)) => unit.before.push(command.to_owned()),
                Some(("Environment", pair)) => {
                    let (key, value) = pair.split_once('=').context("Environment=NAME=VALUE")?;
                    ensure!(!pair.contains(['"', ' ']), "Environment with quotes");
                    unit.environment.push((key.to_owned(), value.to_owned()));
                }
                Some(("Type", kind)) => ensure!(kind == "notify", "Type={kind}"),
                Some(("KillMode", mode)) => ensure!(mode == "process", "KillMode={mode}"),
                _ => {}
            }
        }
        ensure!(!unit.command.is_empty(), "no ExecStart");
        Ok(unit)
    }

    /// Starts its process, and waits until that says that it is ready.
    fn start(&self, name: &str, manager: &ServiceManager) -> Result<Process> {
        for command in &self.before {
            let words: Vec<&str> = command.trim_start_matches('-').split(' ').collect();
            let ran = Command::new(words[0]).args(&words[1..]).status();
            let ran = ran.is_ok_and(|status| status.success());
            ensure!(ran || command.starts_with('-'), "ExecStartPre={command}");
        }
        let words: Vec<&str> = self.command.split(' ').collect();
        let mut command = manager.command(Path::new(words[0]))?;
        // As a service it has neither a home nor what its caller exported.
        for variable in ["HOME", "XDG_CACHE_HOME", "DOCKER_CONFIG"] {
            command.env_remove(variable);
        }
        command
            .args(&words[1..])
            .envs(self.environment.iter().cloned());
        manager.forget_ready();
        let mut process = Process::start(name, &mut command, &log(name))?;
        process.wait_ready(DEADLINE, || manager.is_ready())?;
        Ok(process)
    }
}

/// Runs a unit until it is told to stop.
fn supervise(name: &str) -> Result<()> {
    let (path, notify) = (socket(name), Path::new(RUN).join(format!("{name}.notify")));
    // Of a supervisor before; both are bound again by one that was asked to start and found none.
    std::fs::remove_file(&path).ok();
    std::fs::remove_file(&notify).ok();
    let listener = UnixListener::bind(&path)?;
    listener.set_nonblocking(true)?;
    let manager = ServiceManager::listen(&notify)?;
    let start = || Unit::read(name).and_then(|unit| unit.start(name, &manager));
    let mut process = start();
    loop {
        if let Ok(running) = &mut process
            && running.wait(Duration::ZERO).is_ok()
        {
            eprintln!("{name} ended by itself");
            std::thread::sleep(BEFORE_RESTART);
            process = start();
        }
        let Ok((mut stream, _)) = listener.accept() else {
            std::thread::sleep(PAUSE);
            continue;
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut word = String::new();
        stream.read_to_string(&mut word)?;
        match word.as_str() {
            "stop" => {
                std::fs::remove_file(&path)?;
                let ended = process.and_then(|mut running| running.stop());
                answer(&mut stream, &ended);
                return ended;
            }
            "restart" => {
                // Its end first: its successor wants the same sockets.
                if let Ok(mut running) = process {
                    running.stop()?;
                }
                process = start();
            }
            "start" if process.is_err() => process = start(),
            _ => {}
        }
        answer(&mut stream, &process);
    }
}

fn answer<T>(stream: &mut UnixStream, state: &Result<T>) {
    let text = match state {
        Ok(_) => "ok".to_owned(),
        Err(e) => format!("{e:#}"),
    };
    // Who asked may be gone.
    stream.write_all(text.as_bytes()).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_of_a_unit() {
        let text = "[Unit]\nAfter=x\n[Service]\n# ExecStart=/no\nType=notify\nKillMode=process\n\
                    ExecStartPre=-/sbin/modprobe overlay\nExecStart=/usr/bin/sluiced\n[Install]\nExecStart=/no\n\
                    [Service]\nEnvironment=HTTPS_PROXY=http://p:1\n";
        let unit = Unit::parse(text).unwrap();
        assert_eq!(unit.command, "/usr/bin/sluiced");
        assert_eq!(unit.before, ["-/sbin/modprobe overlay"]);
        let pair = ("HTTPS_PROXY".to_owned(), "http://p:1".to_owned());
        assert_eq!(unit.environment, [pair]);
        for bad in [
            "[Service]\nType=notify\n",
            "[Service]\nExecStart=/x\nType=simple\n",
            "[Service]\nExecStart=/x\nKillMode=control-group\n",
            "[Service]\nExecStart=/x\nEnvironment=\"A=b c\"\n",
        ] {
            assert!(Unit::parse(bad).is_err(), "{bad}");
        }
    }
}
