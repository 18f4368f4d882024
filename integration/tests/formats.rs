// SPDX-License-Identifier: Apache-2.0
//! Images in formats of other tools, as those tools write them and as `sluice convert` does: lazy at their first pull by
//! the table of contents that their manifests pin.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::quick_reaper_with;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::root::Root;
use sluice_integration::harness::site::{REGISTRY, Site};
use sluice_integration::harness::wait::eventually;
use sluice_integration::harness::{command, http, images, tools};

const NAMESPACE: &str = "formats";
/// Where images are converted: nothing of it is left when they are pulled.
const WORKSHOP: &str = "workshop";
const REPOSITORY: &str = "formats/python";

/// A format, as nerdctl's option, the value of `sluice convert --format`, this project's word for people, and the label
/// of the metric.
#[derive(Debug, Clone, Copy)]
struct Format {
    option: &'static str,
    name: &'static str,
    words: &'static str,
    label: &'static str,
}

const ESTARGZ: Format = Format {
    option: "--estargz",
    name: "estargz",
    words: "eStargz",
    label: "index=\"estargz\"",
};
const ZSTD_CHUNKED: Format = Format {
    option: "--zstdchunked",
    name: "zstd-chunked",
    words: "zstd:chunked",
    label: "index=\"zstd_chunked\"",
};

impl Format {
    fn tag(self) -> &'static str {
        self.option.trim_start_matches('-')
    }
}

/// A set-up whose daemon knows its registry by its port, which containerd's labels leave out.
fn site(name: &str, extra: &str) -> Result<Site> {
    let config = quick_reaper_with("auto");
    let config = format!("{config}\n[registry.hosts.\"{REGISTRY}\"]\n{extra}");
    Site::start(name, Release::V2, Line::OPEN, &config)
}

/// The image's reference, and the bytes of its layers.
fn pushed(site: &Site, format: Format) -> Result<(String, u64)> {
    let target = format!("{}/{REPOSITORY}:{}", site.registry.host(), format.tag());
    let manifest = http::manifest(&site.registry.direct(), REPOSITORY, format.tag())?;
    let layers = manifest["layers"].as_array().into_iter().flatten();
    let bytes = layers.filter_map(|layer| layer["size"].as_u64()).sum();
    Ok((target, bytes))
}

/// Has `sluice convert` write the test image to the registry; gives what [`pushed`] does.
fn converted_by_sluice(site: &Site, format: Format) -> Result<(String, u64)> {
    let source = format!("oci:{}:latest", images::python_layout()?.display());
    let target = format!(
        "docker://{}/{REPOSITORY}:{}",
        site.registry.direct(),
        format.tag()
    );
    let arguments = ["convert", "--json", "--format", format.name];
    let said = site
        .daemon
        .sluice_ok(&[&arguments[..], &[&source, &target]].concat())?;
    let lines: Vec<serde_json::Value> = said
        .stdout
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let changes = lines
        .iter()
        .find(|line| line["event"] == "diff-ids-changed");
    ensure!(
        changes.is_some() == (format.name == ESTARGZ.name),
        "{said:?}"
    );
    if let Some(changes) = changes {
        let manifest = http::manifest(&site.registry.direct(), REPOSITORY, format.tag())?;
        ensure!(
            manifest["config"]["digest"] == changes["config"],
            "{changes}"
        );
    }
    let summary = lines.last().context("a summary")?;
    ensure!(summary["layers_not_lazy"] == 0, "{summary}");
    pushed(site, format)
}

/// Has nerdctl convert the test image and push it; gives what [`pushed`] does.
fn converted(site: &Site, format: Format) -> Result<(String, u64)> {
    let (host, direct) = (site.registry.host(), site.registry.direct());
    let original = format!("{host}/{REPOSITORY}:original");
    let target = format!("{host}/{REPOSITORY}:{}", format.tag());
    images::push_layout(
        &images::python_layout()?,
        &format!("{direct}/{REPOSITORY}:original"),
    )?;
    let nerdctl = site.nerdctl_with(WORKSHOP, "overlayfs");
    nerdctl.ok(&["pull", "--quiet", "--unpack=false", &original])?;
    nerdctl.ok(&[
        "image",
        "convert",
        format.option,
        "--oci",
        &original,
        &target,
    ])?;
    nerdctl.ok(&["push", "--quiet", &target])?;
    nerdctl.ok(&["rmi", "-f", &original, &target])?;
    eventually("the workshop is empty", Duration::from_secs(60), || {
        let left = site.containerd.ctr_ok(WORKSHOP, &["content", "ls", "-q"])?;
        Ok(left.stdout.trim().is_empty())
    })?;
    pushed(site, format)
}

/// All files of the image as a snapshotter shows them, a line each.
fn files(site: &Site, format: Format, snapshotter: &str) -> Result<Vec<String>> {
    let chain_id = http::chain_id(&site.registry.direct(), REPOSITORY, format.tag())?;
    site.files(NAMESPACE, snapshotter, &chain_id, false)
}

fn runs(site: &Site, reference: &str) -> Result<()> {
    let run = ["run", "--rm", "--net", "none", reference];
    let ran = site.nerdctl(NAMESPACE).ok(&run);
    let ran = ran.with_context(|| site.daemon.log_tail())?;
    ensure!(ran.stdout.contains("\"ready\": true"), "{ran:?}");
    Ok(())
}

/// How the image gets to the registry.
type Make = fn(&Site, Format) -> Result<(String, u64)>;

fn is_lazy_as_it_is(name: &str, format: Format, make: Make) -> Result<()> {
    let mut site = site(name, "")?;
    let (reference, image_bytes) = make(&site, format)?;
    let before = site.registry.line.bytes();
    site.nerdctl(NAMESPACE)
        .ok(&["pull", "--quiet", &reference])?;
    let pulled = site.registry.line.bytes() - before;
    let why = site.why(NAMESPACE, &reference)?;
    println!("the first pull moved {pulled} of {image_bytes} bytes; {why:?}");
    ensure!(
        !why.is_empty()
            && why
                .iter()
                .all(|layer| layer.lazy && layer.reason.contains(format.words)),
        "{why:?}\n{}",
        site.daemon.log_tail()
    );
    ensure!(pulled * 10 < image_bytes, "{pulled} of {image_bytes}");
    let lazy = site
        .daemon
        .metric("sluice_lazy_layers_total", &[format.label])?;
    ensure!(lazy == why.len() as f64, "{lazy}");

    // What was made of the tables is on disk.
    site.daemon.stop()?;
    site.daemon_again()?;
    runs(&site, &reference)?;
    let seen = files(&site, format, "sluice")?;
    site.wait_sealed(Duration::from_secs(240))?;
    site.pull_ordinarily(NAMESPACE, &reference)?;
    let expected = files(&site, format, "overlayfs")?;
    for (ours, theirs) in seen.iter().zip(&expected) {
        ensure!(ours == theirs, "shows\n  {ours}\ninstead of\n  {theirs}");
    }
    ensure!(seen.len() == expected.len() && seen.len() > 1000);
    ensure!(files(&site, format, "sluice")? == expected);

    // It is complete: neither the registry nor what the daemon had in memory is needed.
    site.registry.stop()?;
    site.daemon.stop()?;
    site.daemon_again()?;
    ensure!(site.daemon.is_sealed()?, "{:#}", site.status()?);
    runs(&site, &reference)
}

#[test]
fn an_estargz_image_is_lazy_as_it_is() -> Result<()> {
    is_lazy_as_it_is("estargz", ESTARGZ, converted)
}

#[test]
fn a_zstd_chunked_image_is_lazy_as_it_is() -> Result<()> {
    is_lazy_as_it_is("zstdchunked", ZSTD_CHUNKED, converted)
}

#[test]
fn an_estargz_image_of_sluice_is_lazy_and_unpacks() -> Result<()> {
    is_lazy_as_it_is("our-estargz", ESTARGZ, converted_by_sluice)
}

#[test]
fn a_zstd_chunked_image_of_sluice_is_lazy_and_unpacks() -> Result<()> {
    is_lazy_as_it_is("our-zstdchunked", ZSTD_CHUNKED, converted_by_sluice)
}

/// `toccheck` reads layouts with the code of stargz-snapshotter and tar-split, and must find mistakes.
#[test]
fn others_verify_every_chunk_and_file() -> Result<()> {
    let root = Root::new("toccheck")?;
    let source = format!("oci:{}:latest", images::python_layout()?.display());
    let minutes = Duration::from_secs(300);
    for format in [ESTARGZ, ZSTD_CHUNKED] {
        let layout = root.join(format.name)?;
        let target = format!("oci:{}:latest", layout.display());
        let mut convert = Command::new(tools::binary("sluice")?);
        convert.args([
            "convert",
            "--force",
            "--format",
            format.name,
            &source,
            &target,
        ]);
        command::run_ok(convert.env("SLUICE_STATE", root.path()), minutes)?;
        let check = || -> Result<_> {
            let mut check = Command::new(tools::go_tool("toccheck")?);
            command::run(check.arg(&layout), minutes)
        };
        let checked = check()?;
        ensure!(checked.status.success(), "{checked:?}");
        ensure!(checked.stdout.lines().count() >= 5, "{checked:?}");
        println!("{}", checked.stdout);
        damage_the_largest_blob(&layout)?;
        let checked = check()?;
        ensure!(!checked.status.success(), "{checked:?}");
    }
    Ok(())
}

/// Flips a bit in the middle of the largest blob.
fn damage_the_largest_blob(layout: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let mut blobs = Vec::new();
    for entry in std::fs::read_dir(layout.join("blobs/sha256"))? {
        let entry = entry?;
        blobs.push((entry.metadata()?.len(), entry.path()));
    }
    let (bytes, path) = blobs.into_iter().max().context("a blob")?;
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, bytes / 2)?;
    file.write_all_at(&[byte[0] ^ 1], bytes / 2)?;
    Ok(())
}

#[test]
fn a_table_of_contents_is_not_used_where_the_policy_forbids_it() -> Result<()> {
    let config = "\n[index]\ntoc = \"off\"\nreferrer = \"off\"\n";
    let site = site("no-toc", config)?;
    let (reference, image_bytes) = converted(&site, ESTARGZ)?;
    let before = site.registry.line.bytes();
    site.nerdctl(NAMESPACE)
        .ok(&["pull", "--quiet", &reference])?;
    let pulled = site.registry.line.bytes() - before;
    let why = site.why(NAMESPACE, &reference)?;
    ensure!(pulled >= image_bytes, "{pulled} of {image_bytes}");
    ensure!(why.iter().all(|layer| !layer.lazy), "{why:?}");
    runs(&site, &reference)
}
