// SPDX-License-Identifier: Apache-2.0
//! `sluice doctor` and `sluice cache` on a real set-up: nothing is found where nothing is wrong, each thing
//! that is broken is found, and what can be repaired is.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, mounts, tools, wait};

/// Doctor never hangs: three times the time that all its own deadlines allow for on a machine like this.
const DEADLINE: Duration = Duration::from_secs(180);

/// Bytes that compress badly and are found again on the disk.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..bytes).map(step).collect()
}

fn image(site: &Site, name: &str) -> Result<String> {
    let mut base = Layer::new();
    base.file("bin/busybox", Attributes::root(0o755), &layout::busybox()?)?
        .symlink("bin/sh", "busybox")?;
    let mut top = Layer::new();
    top.file("data", Attributes::root(0o644), &noise(700_000))?;
    let directory = tempfile::tempdir()?;
    let run = ["/bin/sh", "-c", "md5sum /data"];
    let layout = layout::write(directory.path(), &mut [base, top], &run)?;
    let [_, reference] = site.push_and_convert(&layout, name)?;
    Ok(reference)
}

/// containerd's configuration as `sluice setup containerd` leaves it, in a file of its own.
fn configured(site: &Site) -> Result<PathBuf> {
    let path = site.root.join("doctor/config.toml")?;
    std::fs::copy(site.containerd.root().join("config.toml"), &path)?;
    let text = |path: &Path| path.display().to_string();
    let containerd = text(&tools::on_path("containerd")?);
    site.daemon.sluice_ok(&[
        "setup",
        "containerd",
        "--yes",
        "--config",
        &text(&path),
        "--address",
        &text(&site.daemon.snapshots_socket()),
        "--root",
        &text(site.daemon.state()),
        "--containerd",
        &containerd,
    ])?;
    Ok(path)
}

/// What doctor said.
#[derive(Debug)]
struct Examined {
    code: Option<i32>,
    document: Value,
}

impl Examined {
    /// The exit code that these findings ask for.
    fn asked<'a>(findings: impl Iterator<Item = &'a Value>) -> i32 {
        let codes = findings.filter(|it| it["repaired"] == false);
        let codes = codes.map(|it| match it["severity"].as_str() {
            Some("info") => 0,
            Some("warning") => 1,
            _ => 2,
        });
        codes.max().unwrap_or(0)
    }

    /// Fails unless doctor ended with the code that its findings ask for, and with this one but for what it says of
    /// the disk that the test itself lies on: how full that is differs from machine to machine.
    fn expect(self, code: i32) -> Result<Self> {
        let findings = || self.document["findings"].as_array().into_iter().flatten();
        let of_disk = |it: &&Value| {
            let problem = it["problem"].as_str().unwrap_or_default();
            it["check"] == "budget" && problem.starts_with("its disk has ")
        };
        ensure!(
            self.code == Some(Self::asked(findings())),
            "its code is not that of its findings: {self:#?}"
        );
        let asked = Self::asked(findings().filter(|it| !of_disk(it)));
        ensure!(asked == code, "want exit code {code}: {self:#?}");
        Ok(self)
    }

    /// The finding of this check whose problem has these words.
    fn finding(&self, check: &str, words: &str) -> Result<&Value> {
        let findings = self.document["findings"].as_array();
        findings
            .into_iter()
            .flatten()
            .find(|it| {
                it["check"] == check && it["problem"].as_str().is_some_and(|it| it.contains(words))
            })
            .with_context(|| format!("no finding of {check} with {words:?}: {self:#?}"))
    }

    fn ran(&self, check: &str) -> bool {
        let checks = self.document["checks"].as_array();
        checks.into_iter().flatten().any(|it| it["check"] == check)
    }
}

fn doctor(site: &Site, config: &Path, options: &[&str]) -> Result<Examined> {
    let mut command = site.daemon.sluice()?;
    command
        .args(["doctor", "--json", "--root"])
        .arg(site.daemon.state())
        .arg("--containerd-config")
        .arg(config)
        .arg("--containerd")
        .arg(tools::on_path("containerd")?)
        .args(options);
    let output = command::run(&mut command, DEADLINE)?;
    println!(
        "doctor {options:?}: {} in {:?}",
        output.status, output.elapsed
    );
    let document = serde_json::from_str(&output.stdout)
        .with_context(|| format!("read the output of doctor: {output:?}"))?;
    Ok(Examined {
        code: output.status.code(),
        document,
    })
}

/// Flips a bit of the file `data` of the image, in the chunk store.
fn rot(site: &Site) -> Result<PathBuf> {
    let needle = &noise(700_000)[300_000..300_064];
    let mut todo = vec![site.daemon.state().join("devices")];
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                todo.push(entry?.path());
            }
            continue;
        }
        if path.file_name().is_none_or(|name| name != "data") {
            continue;
        }
        let bytes = std::fs::read(&path)?;
        let at = bytes.windows(needle.len()).position(|it| it == needle);
        if let Some(at) = at {
            let file = std::fs::File::options().write(true).open(&path)?;
            file.write_all_at(&[bytes[at] ^ 1], u64::try_from(at)?)?;
            file.sync_all()?;
            return Ok(path);
        }
    }
    anyhow::bail!("the bytes of the image are not in the store")
}

fn eventually(what: &str, holds: impl FnMut() -> Result<bool>) -> Result<()> {
    wait::eventually(what, Duration::from_secs(60), holds)
}

#[test]
fn each_fault_is_found_and_repaired_where_it_can_be() -> Result<()> {
    let mut site = Site::start("doctor", Release::V1, Line::OPEN, "")?;
    let config = configured(&site)?;
    let reference = image(&site, "doctor")?;
    let nerdctl = site.nerdctl("doctor");
    nerdctl.ok(&["pull", "--quiet", &reference])?;
    let run = ["run", "--rm", "--net", "none", &reference];
    let right = nerdctl.ok(&run)?.stdout;
    site.wait_sealed(Duration::from_secs(60))?;

    let healthy = doctor(&site, &config, &["--deep", "--image", &reference])?.expect(0)?;
    for check in [
        "metadata",
        "mounts",
        "layers",
        "leftovers",
        "content",
        "budget",
        "registry",
        "daemon",
        "kernel",
        "containerd",
        "sockets",
        "connections",
        "clock",
    ] {
        ensure!(healthy.ran(check), "{check} did not run: {healthy:#?}");
    }

    // containerd does not know Sluice any more.
    let text = std::fs::read_to_string(&config)?;
    let broken = site.root.join("doctor/broken.toml")?;
    std::fs::write(
        &broken,
        text.replace("proxy_plugins.sluice", "proxy_plugins.other"),
    )?;
    let found = doctor(&site, &broken, &[])?.expect(2)?;
    found.finding("containerd", "does not know Sluice")?;

    // The disk rots below a sealed layer: only a deep look sees it, and only --fix mends it.
    let data = rot(&site)?;
    doctor(&site, &config, &[])?.expect(0)?;
    let found = doctor(&site, &config, &["--deep"])?.expect(2)?;
    let finding = found.finding("content", "rotted")?;
    ensure!(
        finding["repairable"] == true && finding["repaired"] == false,
        "{finding}"
    );
    let subject = finding["subject"].as_str().unwrap_or_default();
    ensure!(
        subject.contains(&reference),
        "the image is not named: {subject}"
    );
    let found = doctor(&site, &config, &["--deep", "--fix"])?.expect(0)?;
    ensure!(found.finding("content", "rotted")?["repaired"] == true);
    doctor(&site, &config, &["--deep"])?.expect(0)?;
    let needle = &noise(700_000)[..];
    let bytes = std::fs::read(&data)?;
    ensure!(
        bytes.windows(needle.len()).any(|it| it == needle),
        "the right bytes did not come again"
    );
    ensure!(site.daemon.is_sealed()?, "the seal was not won again");
    ensure!(
        nerdctl.ok(&run)?.stdout == right,
        "a container reads something else"
    );

    // The registry is gone: nothing else is wrong.
    site.registry.stop()?;
    doctor(&site, &config, &[])?.expect(0)?;
    doctor(&site, &config, &["--image", &reference])?
        .expect(2)?
        .finding("registry", "")?;

    // The daemon is gone: its mounts are served on.
    site.daemon.kill()?;
    let found = doctor(&site, &config, &[])?.expect(2)?;
    found.finding("daemon", "not running")?;
    let connections = |found: &Examined| found.finding("connections", "").is_ok();
    ensure!(!connections(&found), "the shim lives: {found:#?}");

    // Nobody serves the mounts any more.
    let directory = site.daemon.state().join("mnt");
    site.daemon.kill_shim();
    ensure!(
        !mounts::below(&directory).is_empty(),
        "the test needs a mount"
    );
    let found = doctor(&site, &config, &[])?.expect(2)?;
    let finding = found.finding("connections", "no process serves")?;
    ensure!(finding["repaired"] == false, "{finding}");
    ensure!(
        !mounts::below(&directory).is_empty(),
        "a look unmounts nothing"
    );
    let found = doctor(&site, &config, &["--fix"])?.expect(2)?;
    ensure!(found.finding("connections", "no process serves")?["repaired"] == true);
    ensure!(
        mounts::below(&directory).is_empty(),
        "the orphan is still there"
    );

    site.daemon_again()?;
    eventually("the node is well again", || {
        Ok(doctor(&site, &config, &[])?.expect(0).is_ok())
    })
}

/// The daemon's own mount that it has forgotten: somebody mounted there.
/// Whether all threads of a process are stopped.
fn is_stopped(process: nix::unistd::Pid) -> Result<bool> {
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let stat = std::fs::read_to_string(thread?.path().join("stat"))?;
        let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        if !state.starts_with('T') {
            return Ok(false);
        }
    }
    Ok(true)
}

#[test]
fn a_hung_daemon_and_a_foreign_mount_are_found() -> Result<()> {
    let site = Site::start("doctor", Release::V1, Line::OPEN, "")?;
    let config = configured(&site)?;
    let orphan = site.daemon.state().join("mnt").join("ab".repeat(32));
    std::fs::create_dir(&orphan)?;
    nix::mount::mount(
        Some("orphan"),
        &orphan,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )?;
    eventually("the shim is adopted", || {
        let found = doctor(&site, &config, &[])?;
        Ok(found.finding("mounts", "nobody serves").is_ok())
    })?;
    doctor(&site, &config, &[])?.expect(1)?;
    ensure!(
        !mounts::below(&orphan).is_empty(),
        "a look unmounts nothing"
    );
    doctor(&site, &config, &["--fix"])?.expect(0)?;
    ensure!(mounts::below(&orphan).is_empty() && !orphan.exists());

    // A daemon that hangs does not hang its doctor.
    let daemon = site.daemon.pid()?;
    nix::sys::signal::kill(daemon, nix::sys::signal::Signal::SIGSTOP)?;
    // On a busy machine its threads stop one by one.
    let stopped = eventually("the daemon is stopped", || is_stopped(daemon));
    let found = doctor(&site, &config, &[]);
    nix::sys::signal::kill(daemon, nix::sys::signal::Signal::SIGCONT)?;
    stopped?;
    let found = found?.expect(2)?;
    found.finding("daemon", "says nothing")?;
    Ok(())
}

#[test]
fn pins_outlast_the_budget_and_are_told_of() -> Result<()> {
    let extra = "[mount]\ngrace = \"1s\"\n\n[store]\ngrace = \"1s\"\nbudget = \"64KiB\"\n\n[prefetch]\nenabled = false\n";
    let mut site = Site::start("doctor", Release::V1, Line::OPEN, extra)?;
    let config = configured(&site)?;
    let reference = image(&site, "pinned")?;
    let cache = |site: &Site| -> Result<Value> {
        let output = site.daemon.sluice_ok(&["cache", "ls", "--json"])?;
        Ok(serde_json::from_str(&output.stdout)?)
    };
    let held = |site: &Site| -> Result<u64> {
        Ok(cache(site)?["held_bytes"].as_u64().unwrap_or_default())
    };
    let collect = |site: &Site| -> Result<()> {
        site.containerd
            .ctr_ok("pinned", &["images", "tag", &reference, "gone:1"])?;
        site.containerd
            .ctr_ok("pinned", &["images", "rm", "--sync", "gone:1"])?;
        Ok(())
    };
    let nerdctl = |site: &Site, args: &[&str]| {
        Ok::<_, anyhow::Error>(site.nerdctl("pinned").ok(args)?.stdout)
    };
    nerdctl(&site, &["pull", "--quiet", &reference])?;
    site.daemon.sluice_ok(&["cache", "pin", &reference])?;
    let run = ["run", "--rm", "--net", "none", &reference];
    let right = nerdctl(&site, &run)?;
    let kept = held(&site)?;
    ensure!(kept > 700_000, "{}", cache(&site)?);

    // Pins hold over a restart, and against eviction by budget and by hand.
    site.daemon.stop()?;
    site.daemon_again()?;
    for _ in 0..8 {
        collect(&site)?;
        std::thread::sleep(Duration::from_secs(1));
    }
    ensure!(held(&site)? == kept, "{}", cache(&site)?);
    let mut evict = site.daemon.sluice()?;
    let evicted = command::run(evict.args(["cache", "evict", &reference]), DEADLINE)?;
    ensure!(
        !evicted.ok() && evicted.stdout.contains("pinned"),
        "{evicted:?}"
    );
    let found = doctor(&site, &config, &[])?.expect(1)?;
    found.finding("budget", "pinned layers")?;

    // Not any more: what nobody uses goes, and comes again when it is read.
    site.daemon.sluice_ok(&["cache", "unpin", &reference])?;
    ensure!(cache(&site)?["pins"] == serde_json::json!([]));
    eventually("what is unpinned can be evicted", || {
        site.daemon.sluice_ok(&["cache", "evict", "--unused"])?;
        Ok(held(&site)? == 0)
    })?;
    doctor(&site, &config, &[])?.expect(0)?;
    ensure!(nerdctl(&site, &run)? == right);
    ensure!(held(&site)? > 700_000);
    Ok(())
}
