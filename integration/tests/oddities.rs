// SPDX-License-Identifier: Apache-2.0
//! Each oddity of a tar by itself: under Sluice it is what containerd makes of it for overlayfs, or both refuse.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use sluice_integration::bench::process::peak_bytes;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Coding};
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::{REGISTRY, Site};
use sluice_integration::harness::wait::eventually;
use sluice_integration::harness::{command, http, images};
use sluice_integration::oddities::entry::Entry;
use sluice_integration::oddities::{self, Case, Outcome};
use sluice_integration::tree::same_but_touched;

/// The case with its layers coded so, pushed; gives its reference without the tag.
fn push(site: &Site, case: &Case, coding: Coding, tag: &str) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let layout = layout::write_tars(directory.path(), &case.layers, coding, &["/none"])?;
    let (host, direct) = (site.registry.host(), site.registry.direct());
    images::push_layout(&layout, &format!("{direct}/{}:{tag}", case.name))?;
    Ok(format!("{host}/{}", case.name))
}

/// Runs `sluice ARGS`; says whether it ended well.
fn sluice(site: &Site, args: &[&str]) -> Result<bool> {
    let mut command = site.daemon.sluice()?;
    Ok(command::run(command.args(args), Duration::from_secs(60))?.ok())
}

/// Pulls the references under Sluice, one after the other, and compares each with what containerd unpacks of the
/// first for overlayfs. Each comes with whether it has all that it needs to be lazy.
fn compare(site: &Site, case: &Case, references: &[(&str, bool)]) -> Result<()> {
    // Before the first unpacking of the case, if this is not its first comparison.
    let started = SystemTime::now() - Duration::from_secs(600);
    let (name, plain) = (case.name, format!("plain-{}", case.name));
    let first = references.first().context("a reference")?.0;
    let ordinary = site.pull_ordinarily(&plain, first);
    let nerdctl = site.nerdctl(name);
    let pull = |reference: &str| nerdctl.ok(&["pull", "--quiet", reference]);
    if case.outcome == Outcome::Refused {
        ensure!(ordinary.is_err(), "containerd unpacks it for overlayfs");
        for (reference, _) in references {
            ensure!(
                pull(reference).is_err(),
                "{reference} is pulled under Sluice"
            );
        }
        return Ok(());
    }
    ordinary?;
    let tag = first.rsplit(':').next().unwrap_or_default();
    let chain_id = http::chain_id(&site.registry.direct(), name, tag)?;
    let unpacked = site.files(&plain, "overlayfs", &chain_id, true)?;
    for (reference, prepared) in references {
        pull(reference).with_context(|| site.daemon.log_tail())?;
        let shown = site.files(name, "sluice", &chain_id, true)?;
        same_but_touched(&unpacked, &shown, started).context((*reference).to_owned())?;
        let why = site.why(name, reference)?;
        let lazy = why.iter().all(|layer| layer.lazy);
        let expected = *prepared && case.outcome == Outcome::Lazy;
        ensure!(!why.is_empty() && lazy == expected, "{reference}: {why:?}");
        // The next one has the same chain IDs, and is to be pulled itself.
        nerdctl.ok(&["rmi", "-f", reference])?;
        eventually("its snapshots go", Duration::from_secs(20), || {
            let list = ["snapshots", "--snapshotter", "sluice", "ls"];
            let left = site.containerd.ctr_ok(name, &list)?.stdout;
            Ok(left.lines().count() <= 1)
        })?;
    }
    Ok(())
}

/// Does it for each case; a failure of one keeps none from being looked at.
fn each(site: &Site, of: impl Fn(usize, &Case) -> Result<()>) -> Result<()> {
    let cases = oddities::cases();
    let mut failed = Vec::new();
    for (at, case) in cases.iter().enumerate() {
        if let Err(error) = of(at, case) {
            failed.push(format!("{}: {error:#}", case.name));
        }
    }
    ensure!(
        failed.is_empty(),
        "{} of {} differ:\n{}",
        failed.len(),
        cases.len(),
        failed.join("\n")
    );
    println!("{} oddities", cases.len());
    let healthy = site.status().is_ok();
    ensure!(healthy, "the daemon: {}", site.daemon.log_tail());
    Ok(())
}

/// As they are in gzip, and converted.
#[test]
fn each_oddity_is_what_containerd_1_makes_of_it() -> Result<()> {
    let config = "\n[index]\nnode = \"off\"\nreferrer = \"off\"\n";
    let site = Site::start("oddities1", Release::V1, Line::OPEN, config)?;
    each(&site, |_, case| {
        let image = push(&site, case, Coding::Gzip, "original")?;
        let [original, converted] = ["original", "sluice"].map(|tag| format!("{image}:{tag}"));
        // What cannot be read as a tar is not converted, and pulled as it is.
        let is_converted = sluice(&site, &["convert", &original, &converted])?;
        ensure!(is_converted || case.outcome == Outcome::Refused);
        let references = [(original.as_str(), false), (converted.as_str(), true)];
        compare(&site, case, &references[..1 + usize::from(is_converted)])
    })
}

/// With an index beside them. Short: one coding each, in turn; `SLUICE_LONG`: all codings.
#[test]
fn each_oddity_is_what_containerd_2_makes_of_it() -> Result<()> {
    // The first pulls would have to find out the port.
    let config = format!("\n[index]\nnode = \"off\"\n\n[registry.hosts.\"{REGISTRY}\"]\n");
    let site = Site::start("oddities2", Release::V2, Line::OPEN, &config)?;
    let all = std::env::var_os("SLUICE_LONG").is_some();
    each(&site, |at, case| {
        let codings = Coding::ALL.into_iter().enumerate();
        for (_, coding) in codings.filter(|(turn, _)| all || *turn == at % Coding::ALL.len()) {
            if coding == Coding::Plain && case.layers.iter().any(Vec::is_empty) {
                // containerd downloads no blob of no bytes.
                continue;
            }
            let tag = format!("{coding:?}").to_lowercase();
            let reference = format!("{}:{tag}", push(&site, case, coding, &tag)?);
            let indexed = sluice(&site, &["index", &reference])?;
            compare(&site, case, &[(&reference, indexed)]).context(tag)?;
        }
        Ok(())
    })
}

/// Ten million entries, 27 bytes of gzip each: more than an index may have, so the image is an ordinary one, as without
/// Sluice, and what looked at it says why and stayed small.
#[test]
#[ignore = "takes half an hour: containerd writes ten million files; make soak"]
fn long_ten_million_entries() -> Result<()> {
    const ENTRIES: usize = 10_000_000;
    const NAMES: usize = 1000;
    const PATIENCE: Duration = Duration::from_secs(3600);
    const MOST_BYTES: u64 = 1 << 30;
    let site = Site::start("entries", Release::V1, Line::OPEN, "")?;
    let directory = tempfile::tempdir_in(site.root.path())?;
    let layout = layout::write_large(
        directory.path(),
        |tar| {
            // Few names, so that the file system can hold them; each entry is one all the same.
            let files = (0..NAMES).map(|at| Entry::file(format!("odd/{at}"), at.to_string()));
            let files: Vec<_> = files.map(|entry| entry.bytes()).collect();
            for file in files.iter().cycle().take(ENTRIES) {
                tar.write_all(file)?;
            }
            tar.write_all(&[0; 1024])
        },
        &["/none"],
    )?;
    let (host, direct) = (site.registry.host(), site.registry.direct());
    images::push_layout(&layout, &format!("{direct}/entries:1"))?;
    let image = format!("{host}/entries:1");

    for arguments in [
        &["convert", &image, &format!("{host}/entries:2")][..],
        &["index", &image],
    ] {
        let mut command = site.daemon.sluice()?;
        let output = command::run(command.args(arguments), PATIENCE)?;
        println!("sluice {}: {output:?}", arguments[0]);
        let text = format!("{}{}", output.stdout, output.stderr);
        ensure!(text.contains("more than 4194304 entries"), "{output:?}");
    }

    let mut pull = site.containerd.ctr()?;
    let arguments = ["-n", "sluice", "images", "pull", "--plain-http"];
    let unpack = ["--snapshotter", "sluice", &image];
    let output = command::run_ok(pull.args(arguments).args(unpack), PATIENCE)?;
    println!("pulled in {:?}", output.elapsed);
    let chain_id = http::chain_id(&direct, "entries", "1")?;
    let shown = site.files("sluice", "sluice", &chain_id, true)?;
    let files = shown.iter().filter(|line| line.contains("odd/")).count();
    ensure!(files == NAMES, "{files} files");
    let why = site.why("sluice", &image)?;
    ensure!(why.iter().all(|layer| !layer.lazy), "{why:?}");
    let peak = peak_bytes(site.daemon.pid()?)?;
    println!("sluiced: {peak} bytes at its peak");
    ensure!(peak < MOST_BYTES, "sluiced took {peak} bytes");
    Ok(())
}

/// Converted to formats that others read too. What those cannot say is not lazy, and is unpacked the same.
#[test]
fn each_oddity_is_the_same_in_formats_of_others() -> Result<()> {
    let config = "\n[index]\nnode = \"off\"\nreferrer = \"off\"\n";
    let config = format!("{config}\n[registry.hosts.\"{REGISTRY}\"]\n");
    let site = Site::start("oddities3", Release::V2, Line::OPEN, &config)?;
    each(&site, |_, case| {
        let image = push(&site, case, Coding::Gzip, "original")?;
        let original = format!("{image}:original");
        for format in ["zstd-chunked", "estargz"] {
            let reference = format!("{image}:{format}");
            let arguments = ["convert", "--json", "--format", format];
            let arguments = [&arguments[..], &[&original, &reference]].concat();
            let mut convert = site.daemon.sluice()?;
            let said = command::run(convert.args(arguments), Duration::from_secs(60))?;
            ensure!(said.ok() || case.outcome == Outcome::Refused, "{said:?}");
            if !said.ok() {
                continue;
            }
            let summary = said.stdout.lines().last().context("a summary")?;
            let summary: serde_json::Value = serde_json::from_str(summary)?;
            let listed = summary["layers_not_lazy"] == 0;
            compare(&site, case, &[(&reference, listed)]).context(format)?;
        }
        Ok(())
    })
}
