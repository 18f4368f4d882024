// SPDX-License-Identifier: Apache-2.0
//! `nerdctl build` on top of a lazy image: BuildKit with containerd's worker and our snapshotter, as
//! docs/clients/nerdctl.md sets it up.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::quick_reaper_with;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::process::Process;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, tools};

const NAMESPACE: &str = "builds";
/// One build.
const DEADLINE: Duration = Duration::from_secs(180);

/// An image with a shell, converted; gives its reference.
fn push(site: &Site) -> Result<String> {
    let root = Attributes::root;
    let mut programs = Layer::new();
    programs
        .directory("bin", root(0o755))?
        .file("bin/busybox", root(0o755), &layout::busybox()?)?
        .directory("tmp", root(0o1777))?;
    for program in ["sh", "cat", "ls", "rm", "tr"] {
        programs.symlink(&format!("bin/{program}"), "busybox")?;
    }
    let mut data = Layer::new();
    data.directory("srv", root(0o755))?
        .file("srv/below", root(0o644), b"below\n")?
        .file("srv/removed", root(0o644), &[7; 600_000])?;
    let directory = tempfile::tempdir()?;
    let show = ["/bin/cat", "/srv/below"];
    let layout = layout::write(directory.path(), &mut [programs, data], &show)?;
    let [_, converted] = site.push_and_convert(&layout, "base")?;
    Ok(converted)
}

/// A running buildkitd, and the address that `nerdctl` wants.
fn buildkit(site: &Site) -> Result<(Process, String)> {
    let socket = site.root.join("buildkit.sock")?;
    let address = format!("unix://{}", socket.display());
    let config = site.root.join("buildkitd.toml")?;
    std::fs::write(
        &config,
        format!("[registry.\"{}\"]\n  http = true\n", site.registry.host()),
    )?;
    let mut daemon = Command::new(tools::go_tool("buildkitd")?);
    daemon
        .arg("--config")
        .arg(&config)
        .args(["--addr", &address])
        .arg("--root")
        .arg(site.root.directory("buildkit")?)
        .args(["--oci-worker=false", "--containerd-worker=true"])
        .arg("--containerd-worker-addr")
        .arg(site.containerd.socket())
        .args(["--containerd-worker-namespace", NAMESPACE])
        .args(["--containerd-worker-snapshotter", "sluice"])
        .args(["--containerd-worker-net", "host"]);
    let log = site.root.join("buildkitd.log")?;
    let mut process = Process::start("buildkitd", &mut daemon, &log)?;
    let ready = || {
        let mut ask = Command::new(tools::go_tool("buildctl").unwrap_or_default());
        ask.args(["--addr", &address, "debug", "workers"]);
        command::run(&mut ask, Duration::from_secs(5)).is_ok_and(|it| it.ok())
    };
    process.wait_ready(Duration::from_secs(30), ready)?;
    Ok((process, address))
}

/// `nerdctl build` with `buildctl` where it looks for it.
fn build(site: &Site, address: &str, context: &Path, tag: &str) -> Result<command::Output> {
    let mut path = tools::target().join("tools").into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut build = site.nerdctl(NAMESPACE).command()?;
    build
        .env("PATH", path)
        .args(["build", "--progress", "plain", "--buildkit-host", address])
        .args(["--tag", tag])
        .arg(context);
    command::run_ok(&mut build, DEADLINE)
}

fn context(site: &Site, base: &str) -> Result<PathBuf> {
    let context = site.root.directory("context")?;
    let recipe = format!(
        "FROM {base}\nCOPY copied /srv/copied\n\
         RUN cat /srv/below /srv/copied | tr a-z A-Z >/srv/above && rm /srv/removed\n\
         CMD [\"/bin/sh\", \"-c\", \"cat /srv/above; ls /srv\"]\n"
    );
    std::fs::write(context.join("Dockerfile"), recipe)?;
    std::fs::write(context.join("copied"), "copied\n")?;
    Ok(context)
}

#[test]
#[ignore = "long: BuildKit is built for it"]
fn long_an_image_is_built_on_a_lazy_one_and_pushed() -> Result<()> {
    let config = quick_reaper_with("auto");
    let site = Site::start("builds", Release::V2, Line::OPEN, &config)?;
    let base = push(&site)?;
    let nerdctl = site.nerdctl(NAMESPACE);
    nerdctl.ok(&["pull", "--quiet", &base])?;
    let why = site.why(NAMESPACE, &base)?;
    ensure!(why.iter().all(|layer| layer.lazy), "{why:?}");

    let (_buildkit, address) = buildkit(&site)?;
    let child = format!("{}/child:1", site.registry.host());
    let built = build(&site, &address, &context(&site, &base)?, &child);
    let built = built.with_context(|| site.daemon.log_tail())?;
    println!("built in {:.1} s", built.elapsed.as_secs_f64());

    let expected = "BELOW\nCOPIED\nabove\nbelow\ncopied\n";
    let run = ["run", "--rm", "--net", "none", &child];
    let ran = nerdctl.ok(&run)?;
    ensure!(ran.stdout == expected, "{ran:?}");
    nerdctl.ok(&["push", "--quiet", &child])?;
    // Elsewhere it is an image like others.
    let other = site.nerdctl_with("elsewhere", "overlayfs");
    other.ok(&["pull", "--quiet", &child])?;
    let ran = other.ok(&run)?;
    ensure!(ran.stdout == expected, "{ran:?}");
    Ok(())
}
