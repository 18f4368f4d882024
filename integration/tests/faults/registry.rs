// SPDX-License-Identifier: Apache-2.0
//! Registries that misbehave.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sluice_fetcher::registry::fake::{Access, Misbehaviour};
use sluice_integration::harness::command;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::Daemon;
use sluice_integration::harness::faulty::FaultyRegistry;
use sluice_integration::harness::proxy::{Line, Mode};
use sluice_integration::harness::registry::free_address;
use sluice_integration::harness::site::Site;

use super::image::{Got, Image, Mounted, READERS_ONLY, REPOSITORY, Since, soon};

const SEED: u64 = 51;
/// Longer than a stall is waited for (10 s), so that a transfer that stands still costs no read.
const DEADLINE: Duration = Duration::from_secs(15);
/// Several chunks, so that a fault meets some and spares others.
const FILE_BYTES: usize = 700_000;
const ALWAYS: u32 = u32::MAX;

fn config() -> String {
    format!(
        "\n[fetch]\nread_deadline = \"{}s\"\n{READERS_ONLY}",
        DEADLINE.as_secs()
    )
}

/// A fault, and what it comes to.
struct Fault {
    name: &'static str,
    what: Misbehaviour,
    strikes: u32,
    got: Got,
    said: &'static str,
    metric: &'static str,
    labels: &'static [&'static str],
}

const TRANSIENT: &[&str] = &["source=\"origin\"", "class=\"transient\""];
const FAILURES: &str = "sluice_fetch_failures_total";

/// Those that cost no more than a moment.
fn quick() -> Vec<Fault> {
    let fault = |name, what, strikes, said| Fault {
        name,
        what,
        strikes,
        got: Got::Bytes,
        said,
        metric: FAILURES,
        labels: TRANSIENT,
    };
    let status = |status, after: Option<&str>| Misbehaviour::Status(status, after.map(Into::into));
    vec![
        fault(
            "429 with Retry-After",
            status(429, Some("1")),
            2,
            "throttles blob",
        ),
        fault("500", status(500, None), 2, "HTTP 500"),
        fault("503", status(503, None), 2, "HTTP 503"),
        fault(
            "cut bodies",
            Misbehaviour::CutBody(20_000),
            3,
            "failed to fetch chunks",
        ),
        fault(
            "a connection that ends instead of an answer",
            Misbehaviour::LostAnswer,
            2,
            "failed to fetch chunks",
        ),
        Fault {
            metric: "sluice_corrupt_chunks_total",
            labels: &["source=\"origin\""],
            ..fault(
                "flipped bodies",
                Misbehaviour::FlipByte,
                2,
                "drop corrupt chunk",
            )
        },
        Fault {
            labels: &["source=\"origin\"", "class=\"corrupt\""],
            ..fault(
                "wrong lengths",
                Misbehaviour::ShortLength(100),
                2,
                "instead of",
            )
        },
        Fault {
            labels: &["source=\"origin\"", "class=\"corrupt\""],
            ..fault(
                "other ranges than asked",
                Misbehaviour::ShiftedRange,
                2,
                "Content-Range",
            )
        },
        Fault {
            metric: "sluice_registry_events_total",
            labels: &["event=\"ranges_ignored\""],
            ..fault(
                "ignored ranges",
                Misbehaviour::IgnoreRange,
                ALWAYS,
                "registry ignores ranges",
            )
        },
    ]
}

/// Those that take until a stall is noticed, or the reader's deadline.
fn slow() -> Vec<Fault> {
    let stall = |name, what| Fault {
        name,
        what,
        strikes: 1,
        got: Got::Bytes,
        said: "nothing came for",
        metric: "sluice_fetch_stalls_total",
        labels: &["source=\"origin\""],
    };
    let never = |name, what| Fault {
        name,
        what,
        strikes: ALWAYS,
        got: Got::eio(),
        said: "no source gave it within",
        metric: "sluice_fill_failures_total",
        labels: &["reason=\"deadline\""],
    };
    vec![
        stall("a stall", Misbehaviour::StallBody(10_000)),
        stall("no answer", Misbehaviour::NoAnswer),
        stall(
            "a slow drip",
            Misbehaviour::SlowBody(1, Duration::from_millis(10)),
        ),
        never("503 for ever", Misbehaviour::Status(503, None)),
        never("404 for ever", Misbehaviour::Status(404, None)),
        never("flipped for ever", Misbehaviour::FlipByte),
        never("cut for ever", Misbehaviour::CutBody(1000)),
    ]
}

/// Reads file `number` under a fault. Gives how long it took.
fn meet(
    site: &Site,
    registry: &FaultyRegistry,
    seen: &Mounted<'_>,
    number: usize,
    fault: &Fault,
) -> Result<Duration> {
    let since = Since::now(site);
    let count = || site.daemon.metric(fault.metric, fault.labels);
    let before = count()?;
    registry.misbehave(
        "GET",
        &seen.blobs[number],
        0,
        fault.strikes,
        fault.what.clone(),
    );
    let (got, took) = seen.read(number)?;
    let log = || since.log();
    ensure!(got == fault.got, "{got:?}\n{}", log());
    since.said(&[fault.said])?;
    let does_count = soon(|| Ok(count()? > before))?;
    let counted = count()? - before;
    ensure!(
        does_count,
        "{} {:?} did not count\n{}",
        fault.metric,
        fault.labels,
        log()
    );
    println!(
        "{}: {got:?} after {:.1} s, log says {:?}, {} +{counted}",
        fault.name,
        took.as_secs_f64(),
        fault.said,
        fault.metric
    );
    ensure!(took < DEADLINE + Duration::from_secs(3), "{took:?}");
    Ok(took)
}

#[test]
fn each_fault_of_a_registry_is_survived_or_told_and_never_silent() -> Result<()> {
    let site = Site::start("faults", Release::V1, Line::OPEN, &config())?;
    let (quick, slow) = (quick(), slow());
    let image = Image::new(quick.len() + slow.len(), FILE_BYTES, SEED)?;
    let registry = FaultyRegistry::start(REPOSITORY, &image.convert(&site)?)?;
    let seen = image.mount(&site, &registry.host())?;
    for (number, fault) in quick.iter().enumerate() {
        let took = meet(&site, &registry, &seen, number, fault).with_context(|| fault.name)?;
        ensure!(took < Duration::from_secs(8), "{}: {took:?}", fault.name);
    }
    // They wait for most of their time: all at once.
    let (site, registry, seen) = (&site, &registry, &seen);
    std::thread::scope(|scope| {
        let met = slow.iter().enumerate().map(|(number, fault)| {
            let number = quick.len() + number;
            let read =
                move || meet(site, registry, seen, number, fault).with_context(|| fault.name);
            scope.spawn(read)
        });
        let met: Vec<_> = met.collect();
        met.into_iter()
            .try_for_each(|it| it.join().unwrap().map(|_| ()))
    })?;
    // What could not be had can be had as soon as the registry is well.
    registry.behave();
    // What was waited for in vain is not asked for again at once.
    std::thread::sleep(Duration::from_millis(200));
    for number in quick.len()..quick.len() + slow.len() {
        let (got, _) = seen.read(number)?;
        ensure!(got == Got::Bytes, "{number}: {got:?}");
    }
    Ok(())
}

#[test]
fn tokens_and_redirects_expire_under_a_reader() -> Result<()> {
    // What is read past all caches must be read over FUSE: EROFS has no O_DIRECT.
    let config = format!("{}\n[mount]\nbackend = \"fuse\"\n", config());
    let site = Site::start("expiry", Release::V1, Line::OPEN, &config)?;
    let image = Image::new(1, 6 * FILE_BYTES, SEED + 1)?;
    let registry = FaultyRegistry::start(REPOSITORY, &image.convert(&site)?)?;
    // The harness shows no tokens, so the image is looked at before it needs one.
    let seen = image.mount(&site, &registry.host())?;
    let part = |skip: usize| -> Result<()> {
        let skip = format!("skip={skip}");
        let input = format!("if={}", seen.file(0).display());
        let mut dd = Command::new("dd");
        dd.args([
            &input,
            "of=/dev/null",
            "bs=4096",
            "count=1",
            &skip,
            "iflag=direct",
        ]);
        command::run_ok(&mut dd, Duration::from_secs(60)).map(|_| ())
    };
    let events = |event: &str| {
        let label = format!("event=\"{event}\"");
        site.daemon
            .metric("sluice_registry_events_total", &[&label])
    };
    registry.set_redirects(true);
    registry.set_access(Access::Bearer {
        password: None,
        identity: None,
        expires_in: 3600,
        refusal: 403,
    });
    part(0)?;
    // Far enough from what was read ahead.
    let since = Since::now(&site);
    registry.expire_redirects();
    part(400)?;
    since.said(&["target of a redirect expired"])?;
    ensure!(events("redirect_expired")? >= 1.0, "{}", since.log());
    registry.expire_tokens();
    registry.expire_redirects();
    part(800)?;
    since.said(&["token expired"])?;
    ensure!(events("token_expired")? >= 1.0, "{}", since.log());
    let (got, took) = seen.read(0)?;
    println!(
        "redirects and tokens expired: {got:?}, all of it after {:.1} s more",
        took.as_secs_f64()
    );
    ensure!(got == Got::Bytes, "{got:?}\n{}", since.log());
    Ok(())
}

#[test]
fn without_the_registry_what_is_here_or_at_another_node_serves() -> Result<()> {
    let peers = [free_address()?, free_address()?];
    let config = |at: usize| {
        format!(
            "{}\n[cluster]\nenabled = true\nname = \"node-{at}\"\nlisten = \"{}\"\nseeds = [\"{}\"]\n",
            config(),
            peers[at],
            peers[1 - at]
        )
    };
    let site = Site::start("dead", Release::V1, Line::OPEN, &config(0))?;
    let part = site.root.part("other")?;
    let other = Daemon::start(&part, &part.join("none.sock")?, &config(1))?;
    let begun = Instant::now();
    while !["node-0", "node-1"].iter().all(|name| {
        let nodes = site.daemon.sluice_ok(&["nodes"]);
        nodes.is_ok_and(|nodes| nodes.stdout.contains(name))
    }) {
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "the nodes do not find each other"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    let [here, held, nowhere] =
        [0, 1, 2].map(|number| Image::new(1, FILE_BYTES, SEED + 10 + number));
    let (here, held, nowhere) = (here?, held?, nowhere?);
    let here = here.publish(&site, "dead/here")?;
    let held = held.publish(&site, "dead/held")?;
    let nowhere = nowhere.publish(&site, "dead/nowhere")?;
    other.sluice_ok(&[
        "prewarm",
        &format!("{}/dead/held:sluice", site.registry.host()),
    ])?;
    ensure!(here.read(0)?.0 == Got::Bytes);
    site.registry.line.set_mode(Mode::Refuse);
    let since = Since::now(&site);
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    for (name, seen, expected) in [
        ("here", &here, Got::Bytes),
        ("held", &held, Got::Bytes),
        ("nowhere", &nowhere, Got::eio()),
    ] {
        let (got, took) = seen.read(0)?;
        println!(
            "registry gone, image {name}: {got:?} after {:.1} s",
            took.as_secs_f64()
        );
        ensure!(got == expected, "{name}: {got:?}\n{}", since.log());
        ensure!(took < DEADLINE + Duration::from_secs(3), "{name}: {took:?}");
    }
    since.said(&["failed to fill", "no source gave it within"])?;
    ensure!(
        site.daemon
            .metric("sluice_fetched_bytes_total", &["source=\"peer\""])?
            > 0.0
    );
    Ok(())
}
