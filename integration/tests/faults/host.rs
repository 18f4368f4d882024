// SPDX-License-Identifier: Apache-2.0
//! Little memory, and a clock that jumps.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sluice_fetcher::registry::fake::{Access, Misbehaviour};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::Surroundings;
use sluice_integration::harness::faulty::FaultyRegistry;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::root::Root;
use sluice_integration::harness::site::Site;

use super::image::{Got, Image, READERS_ONLY, REPOSITORY, Since};

const SEED: u64 = 91;

/// A control group with a limit of memory; removed when dropped.
struct Memory {
    path: PathBuf,
    v2: bool,
}

impl Memory {
    fn limited_to(bytes: u64) -> Result<Self> {
        let old = Path::new("/sys/fs/cgroup/memory");
        let v2 = !old.is_dir();
        let above = if v2 { Path::new("/sys/fs/cgroup") } else { old };
        let path = above.join(format!("sluice-faults-{}", std::process::id()));
        std::fs::create_dir(&path).context("make a control group")?;
        let this = Self { path, v2 };
        let limit = this.path.join(if v2 {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        });
        std::fs::write(limit, bytes.to_string()).context("limit memory")?;
        Ok(this)
    }

    fn processes(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    fn number(&self, file: [&str; 2], key: &str) -> Result<u64> {
        let text = std::fs::read_to_string(self.path.join(file[usize::from(self.v2)]))?;
        let value = text.lines().find_map(|line| match line.split_once(' ') {
            Some((name, value)) => (name == key).then_some(value),
            None => key.is_empty().then_some(line),
        });
        Ok(value
            .context("a number of the control group")?
            .trim()
            .parse()?)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // The processes in it end a moment after they are killed.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        eprintln!("{} is left", self.path.display());
    }
}

#[test]
fn a_large_image_is_read_within_little_memory() -> Result<()> {
    const LIMIT_BYTES: u64 = 96 << 20;
    let memory = Memory::limited_to(LIMIT_BYTES)?;
    let surroundings = Surroundings {
        group: Some(memory.processes()),
        ..Surroundings::default()
    };
    let site = Site::start_within(
        Root::new("memory")?,
        surroundings,
        Release::V1,
        Line::OPEN,
        READERS_ONLY,
    )?;
    let image = Image::new(8, 24_000_000, SEED)?;
    let seen = image.publish(&site, "memory")?;
    std::thread::scope(|scope| -> Result<()> {
        let readers: Vec<_> = (0..8)
            .map(|file| {
                scope.spawn({
                    let seen = &seen;
                    move || seen.read(file)
                })
            })
            .collect();
        for reader in readers {
            let (got, took) = reader.join().unwrap()?;
            ensure!(got == Got::Bytes, "{got:?} after {took:?}");
        }
        Ok(())
    })?;
    let killed = memory.number(["memory.oom_control", "memory.events"], "oom_kill")?;
    let most = memory.number(["memory.max_usage_in_bytes", "memory.peak"], "")?;
    println!(
        "192 MB read by 8 readers with daemon and shim within {LIMIT_BYTES} bytes: most {most}, {killed} killed"
    );
    ensure!(killed == 0 && site.daemon.pid().is_ok());
    // The limit was felt: the files alone are twice as large.
    ensure!(most > LIMIT_BYTES * 3 / 4, "{most}");
    drop(seen);
    drop(site);
    Ok(())
}

#[test]
fn a_clock_that_jumps_costs_no_reader_anything() -> Result<()> {
    let library = ["x86_64", "aarch64"]
        .map(|it| format!("/usr/lib/{it}-linux-gnu/faketime/libfaketimeMT.so.1"));
    let library = library.into_iter().find(|it| Path::new(it).exists());
    let library = library.context("libfaketime is missing: run `make setup`")?;
    let root = Root::new("clock")?;
    let offset = root.join("offset")?;
    std::fs::write(&offset, "+0")?;
    let set = |name: &str, value: &str| (name.to_owned(), value.into());
    let surroundings = Surroundings {
        environment: vec![
            set("LD_PRELOAD", &library),
            set("FAKETIME_TIMESTAMP_FILE", &offset.display().to_string()),
            set("FAKETIME_NO_CACHE", "1"),
            // As settimeofday(2): the monotonic clock does not jump.
            set("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ],
        ..Surroundings::default()
    };
    let extra = format!("\n[fetch]\nread_deadline = \"20s\"\n{READERS_ONLY}");
    let site = Site::start_within(root, surroundings, Release::V1, Line::OPEN, &extra)?;
    let jumps = ["+0", "+400d", "-400d", "+1h", "-1h", "+20y"];
    let image = Image::new(jumps.len(), 600_000, SEED + 1)?;
    let registry = FaultyRegistry::start(REPOSITORY, &image.convert(&site)?)?;
    let seen = image.mount(&site, &registry.host())?;
    registry.set_access(Access::Bearer {
        password: None,
        identity: None,
        expires_in: 300,
        refusal: 401,
    });
    let mut years = BTreeSet::new();
    for (file, jump) in jumps.iter().enumerate() {
        std::fs::write(&offset, jump)?;
        let since = Since::now(&site);
        // What the daemon says of it has the time of its clock.
        let fails = Misbehaviour::Status(500, None);
        registry.misbehave("GET", &seen.blobs[file], 0, 1, fails);
        let (got, took) = seen.read(file)?;
        let log = since.log();
        println!("clock at {jump}: {got:?} after {:.2} s", took.as_secs_f64());
        ensure!(got == Got::Bytes, "{jump}: {got:?}\n{log}");
        ensure!(took < Duration::from_secs(5), "{jump}: {took:?}");
        years.extend(
            log.lines()
                .filter_map(|line| Some(line.get(..4)?.to_owned())),
        );
    }
    println!("years in the log: {years:?}");
    ensure!(
        years.len() >= 4,
        "the daemon's clock did not jump: {years:?}"
    );
    Ok(())
}
