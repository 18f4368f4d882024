// SPDX-License-Identifier: Apache-2.0
//! The built `sluice` against real software: docker-registry, skopeo, zstd, and containerd.
//!
//! Each test starts what it needs on a free port under a temporary directory and ends it by its
//! process id, also when it fails. A program that is not installed fails the test: the README says
//! what has to be there.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest, Sha256};

/// A child process that ends with its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Registry {
    _process: Process,
    address: String,
    directory: PathBuf,
}

impl Registry {
    fn start(directory: &Path) -> Self {
        let directory = directory.join("registry");
        std::fs::create_dir_all(directory.join("data")).unwrap();
        // The port is free now; nobody else on a test machine takes it in between.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = format!("127.0.0.1:{port}");
        let config = format!(
            "version: 0.1\nlog:\n  accesslog:\n    disabled: false\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {address}\n",
            directory.join("data").display()
        );
        std::fs::write(directory.join("config.yml"), config).unwrap();
        let log = std::fs::File::create(directory.join("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(directory.join("config.yml"))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry is installed");
        let process = Process(child);
        wait_for("the registry", || TcpStream::connect(&address).is_ok());
        Self {
            _process: process,
            address,
            directory,
        }
    }

    /// Requests so far whose method changes something.
    fn writes(&self) -> usize {
        let log = std::fs::read_to_string(self.directory.join("log")).unwrap();
        log.lines()
            .filter(|line| {
                ["\"PUT ", "\"POST ", "\"PATCH "]
                    .iter()
                    .any(|method| line.contains(method))
            })
            .count()
    }

    /// Blob files on the registry's disk.
    fn blobs(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.directory.join("data")];
        while let Some(directory) = open.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    open.push(path);
                } else if path.ends_with("data") {
                    found.push(path);
                }
            }
        }
        found
    }
}

fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !ready() {
        assert!(Instant::now() < end, "{what} did not start");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn run(program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Output {
    let program = program.as_ref();
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| {
            panic!("{} must be installed: {e}", program.display());
        })
}

fn ok(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Without records of earlier conversions, unless the arguments say where.
fn sluice(arguments: &[&str]) -> Output {
    let state = tempfile::tempdir().unwrap();
    Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(arguments)
        .env("SLUICE_STATE", state.path())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// The last line that a command writes with `--json`, which has this event, and all lines.
fn told(command: &str, last_event: &str, arguments: &[&str]) -> (Value, Vec<Value>) {
    let output = sluice(&[&[command, "--json"], arguments].concat());
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command} {arguments:?}: {stderr}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let last = lines.last().expect("a summary").clone();
    assert_eq!(last["event"], last_event);
    (last, lines)
}

/// Runs a conversion and returns its summary.
fn convert(arguments: &[&str]) -> Value {
    told("convert", "summary", arguments).0
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn tar_of(seed: u32, files: u32) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut state = seed;
    for n in 0..files {
        let content: Vec<u8> = (0..20_000 + n * 300)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                b'a' + (state >> 28).to_le_bytes()[0]
            })
            .collect();
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        builder
            .append_data(&mut header, format!("s{seed}/f{n}"), content.as_slice())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

/// An OCI layout with one image for two platforms; returns the tars of the first.
fn layout(directory: &Path) -> Vec<Vec<u8>> {
    layout_with(directory, true)
}

/// With a layer compressed by zstd, or all that are by gzip.
fn layout_with(directory: &Path, zstd: bool) -> Vec<Vec<u8>> {
    let blobs = directory.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8], media_type: &str| {
        let name = digest(bytes);
        std::fs::write(blobs.join(&name[7..]), bytes).unwrap();
        serde_json::json!({"mediaType": media_type, "digest": name, "size": bytes.len()})
    };
    let mut manifests = Vec::new();
    let mut first = Vec::new();
    for (arch, seed) in [("amd64", 1), ("arm64", 100)] {
        let tars = vec![tar_of(seed, 60), tar_of(seed + 1, 10), vec![0; 1024]];
        let layers = [
            put(
                &gzip(&tars[0]),
                "application/vnd.oci.image.layer.v1.tar+gzip",
            ),
            match zstd {
                true => put(
                    &zstd::encode_all(tars[1].as_slice(), 3).unwrap(),
                    "application/vnd.oci.image.layer.v1.tar+zstd",
                ),
                false => put(
                    &gzip(&tars[1]),
                    "application/vnd.oci.image.layer.v1.tar+gzip",
                ),
            },
            put(&tars[2], "application/vnd.oci.image.layer.v1.tar"),
        ];
        let diff_ids: Vec<String> = tars.iter().map(|tar| digest(tar)).collect();
        let config = serde_json::json!({"architecture": arch, "os": "linux", "config": {"Cmd": ["/x"]}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = put(
            config.to_string().as_bytes(),
            "application/vnd.oci.image.config.v1+json",
        );
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers});
        let mut entry = put(manifest.to_string().as_bytes(), media_type);
        entry["platform"] = serde_json::json!({"architecture": arch, "os": "linux"});
        manifests.push(entry);
        if first.is_empty() {
            first = tars;
        }
    }
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index =
        serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests});
    let mut entry = put(index.to_string().as_bytes(), media_type);
    entry["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "v1"});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]});
    std::fs::write(directory.join("index.json"), index.to_string()).unwrap();
    std::fs::write(
        directory.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    first
}

#[test]
fn an_image_goes_through_a_registry_and_everybody_reads_it() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    let tars = layout(&source);
    let registry = Registry::start(directory.path());
    let source = format!("oci:{}:v1", source.display());
    let pushed = format!("docker://{}/team/app:v1", registry.address);

    let summary = convert(&[&source, &pushed]);
    // The empty layer is the same for both platforms.
    assert_eq!(
        (&summary["images"], &summary["layers"]),
        (&2.into(), &5.into())
    );
    assert_eq!(summary["layers_not_lazy"], 0);

    // Again: nothing is sent, whatever the access log calls it.
    let writes = registry.writes();
    assert!(writes > 0, "the log shows writes");
    let again = convert(&[&source, &pushed]);
    assert_eq!(
        (&again["uploads"], &again["digest"]),
        (&0.into(), &summary["digest"])
    );
    assert_eq!(registry.writes(), writes);

    // Into a layout, by one thread: the same blobs. Only the hint at the registry's port is not there, and
    // it goes again when the image comes back from the registry.
    let out = directory.path().join("out");
    let layout = format!("oci:{}:v1", out.display());
    let local = convert(&[&source, &layout, "--threads", "1", "--memory", "8"]);
    let back = format!("oci:{}", directory.path().join("back").display());
    assert_eq!(convert(&[&pushed, &back])["digest"], local["digest"]);
    let hint = format!(
        "\"{}\":\"{}\"",
        sluice_blockindex::annotations::PORT,
        registry.address.rsplit_once(':').unwrap().1
    );
    let raw = |reference: &str| {
        let arguments = ["inspect", "--raw", "--tls-verify=false", reference];
        ok("skopeo", &arguments)
    };
    let manifests = |index: &str| -> Vec<String> {
        let index: Value = serde_json::from_str(index).unwrap();
        let entries = index["manifests"].as_array().unwrap();
        let digest = |entry: &Value| entry["digest"].as_str().unwrap().to_owned();
        entries.iter().map(digest).collect()
    };
    let hinted = manifests(&raw(&pushed))
        .iter()
        .map(|digest| raw(&format!("{}@{digest}", pushed.trim_end_matches(":v1"))))
        .collect::<Vec<_>>();
    let plain = manifests(&raw(&layout))
        .iter()
        .map(|digest| std::fs::read_to_string(out.join("blobs/sha256").join(&digest[7..])))
        .map(Result::unwrap)
        .collect::<Vec<_>>();
    assert_eq!(hinted.len(), 2);
    for (hinted, plain) in hinted.iter().zip(&plain) {
        assert!(hinted.contains(&hint), "{hinted}");
        assert_eq!(hinted.replace(&format!(",{hint}"), ""), *plain);
    }

    // To another repository, where blobs are mounted.
    let other = format!("docker://{}/other/app:v2", registry.address);
    let blobs = registry.blobs().len();
    assert_eq!(convert(&[&pushed, &other])["digest"], summary["digest"]);
    assert_eq!(registry.blobs().len(), blobs);

    // zstd gives the same tars.
    let blob = |descriptor: &Value| {
        let name = descriptor["digest"].as_str().unwrap();
        out.join("blobs/sha256").join(&name[7..])
    };
    let manifest: Value = serde_json::from_str(&plain[0]).unwrap();
    for (layer, tar) in manifest["layers"].as_array().unwrap().iter().zip(&tars) {
        let path = blob(layer);
        let output = run("zstd", &["-dcq", path.to_str().unwrap()]);
        assert!(
            output.status.success() && output.stdout == *tar,
            "{}",
            path.display()
        );
        let inspected = sluice(&["inspect", "--json", path.to_str().unwrap()]);
        assert!(
            inspected.status.success(),
            "{}",
            String::from_utf8_lossy(&inspected.stderr)
        );
    }

    // Other tools read it.
    ok("skopeo", &["inspect", "--tls-verify=false", &pushed]);
    let copy = format!("oci:{}:x", directory.path().join("copy").display());
    ok(
        "skopeo",
        &["copy", "--all", "--src-tls-verify=false", &pushed, &copy],
    );
    let shown = sluice(&["inspect", &pushed]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(
        shown.contains("linux/amd64") && shown.contains(": lazy"),
        "{shown}"
    );

    // What is not there is named, and nothing appears at the destination.
    let wanted = format!("docker://{}/team/none:v1", registry.address);
    let refused: [(&[&str], &str); 3] = [
        (&["convert", &wanted, &layout], "team/none:v1"),
        (
            &["convert", &source, &wanted, "--platform", "linux/s390x"],
            "linux/amd64, linux/arm64",
        ),
        (&["inspect", &wanted], "team/none:v1"),
    ];
    for (arguments, message) in refused {
        let output = sluice(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.contains(message), "{arguments:?}: {stderr}");
    }
    let absent = run("skopeo", &["inspect", "--tls-verify=false", &wanted]);
    assert!(!absent.status.success());
}

#[test]
fn archives_of_other_tools_are_converted_into_archives_that_they_read() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    layout(&source);
    let source = format!("oci:{}:v1", source.display());
    let name =
        |scheme: &str, file: &str| format!("{scheme}:{}", directory.path().join(file).display());
    // skopeo's archive and what is in it become the same image.
    let made = name("oci-archive", "made.tar:v1");
    ok("skopeo", &["copy", "--quiet", "--all", &source, &made]);
    let unpacked = directory.path().join("x");
    std::fs::create_dir(&unpacked).unwrap();
    let tar = directory.path().join("made.tar");
    let (tar, into) = (tar.to_str().unwrap(), unpacked.to_str().unwrap());
    ok("tar", &["-xf", tar, "-C", into]);
    let layout = name("oci", "layout:v1");
    let expected = convert(&[&name("oci", "x:v1"), &layout])["digest"].clone();
    let archive = name("oci-archive", "converted.tar:v1");
    let summary = convert(&[&made, &archive]);
    assert_eq!(summary["digest"], expected);
    assert_eq!(summary["layers_converted"], 5);
    let path = directory.path().join("converted.tar");
    let bytes = std::fs::read(&path).unwrap();

    // Again: nothing is written. Elsewhere, by one thread: the same bytes.
    let again = convert(&[&made, &archive]);
    assert_eq!(
        (&again["uploads"], &again["digest"]),
        (&0.into(), &expected)
    );
    let other = name("oci-archive", "other.tar:v1");
    convert(&[&made, &other, "--threads", "1"]);
    assert!(std::fs::read(directory.path().join("other.tar")).unwrap() == bytes);

    // skopeo reads it.
    let copy = name("oci", "copy:v1");
    ok("skopeo", &["copy", "--quiet", "--all", &archive, &copy]);
    let raw = ok("skopeo", &["inspect", "--raw", &copy]);
    assert_eq!(digest(raw.as_bytes()), expected.as_str().unwrap());
    let shown = sluice(&["inspect", &archive]);
    assert!(shown.status.success());

    // A refused conversion changes nothing, and leaves nothing.
    let files = || std::fs::read_dir(directory.path()).unwrap().count();
    let before = files();
    let refused = sluice(&["convert", &made, &archive, "--platform", "linux/s390x"]);
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(files(), before);
    assert!(std::fs::read(&path).unwrap() == bytes);
}

#[test]
fn what_docker_save_and_others_write_is_converted() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    let tars = layout_with(&source, false);
    let name =
        |scheme: &str, file: &str| format!("{scheme}:{}", directory.path().join(file).display());
    // skopeo's docker-archive is of one platform, with uncompressed layers, equal ones as links.
    let source = format!("oci:{}:v1", source.display());
    let saved = name("docker-archive", "saved.tar");
    let tagged = format!("{saved}:team/app:v1");
    let amd64 = ["copy", "--quiet", "--override-arch", "amd64"];
    ok("skopeo", &[&amd64[..], &[&source, &tagged]].concat());
    let from_layout = name("oci", "from-layout:v1");
    let wanted = ["--platform", "linux/amd64"];
    convert(&[&[source.as_str(), &from_layout], &wanted[..]].concat());
    let from_saved = name("oci", "from-saved:v1");
    for image in [&saved, &tagged] {
        let summary = convert(&[&[image.as_str(), &from_saved, "--force"], &wanted[..]].concat());
        assert_eq!(
            (&summary["images"], &summary["layers_not_lazy"]),
            (&1.into(), &0.into())
        );
    }
    // The config and the layers are the same as without the detour.
    let parts = |reference: &str| -> (Value, Vec<Value>) {
        let mut raw = ok("skopeo", &["inspect", "--raw", reference]);
        if raw.contains("\"manifests\"") {
            let index: Value = serde_json::from_str(&raw).unwrap();
            let digest = index["manifests"][0]["digest"].as_str().unwrap();
            let path = reference.trim_start_matches("oci:").trim_end_matches(":v1");
            let path = Path::new(path).join("blobs/sha256").join(&digest[7..]);
            raw = std::fs::read_to_string(path).unwrap();
        }
        let manifest: Value = serde_json::from_str(&raw).unwrap();
        let layers = manifest["layers"].as_array().unwrap();
        let digests = layers.iter().map(|layer| layer["digest"].clone()).collect();
        (manifest["config"]["digest"].clone(), digests)
    };
    let expected = parts(&from_layout);
    assert_eq!(expected.1.len(), tars.len());
    assert_eq!(parts(&from_saved), expected);

    // Not as a destination; compressed ones with what to do.
    let refused = sluice(&["convert", &source, &name("docker-archive", "out.tar")]);
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("would not be lazy any more"), "{stderr}");
    let plain = std::fs::read(directory.path().join("saved.tar")).unwrap();
    std::fs::write(directory.path().join("saved.tar.gz"), gzip(&plain)).unwrap();
    let refused = sluice(&["inspect", &format!("{saved}.gz")]);
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("decompress it first"), "{stderr}");
    let refused = sluice(&["inspect", &format!("{saved}:team/other:v1")]);
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        stderr.contains("team/app:v1"),
        "names what is there: {stderr}"
    );
}

#[test]
fn a_killed_conversion_goes_on_where_it_ended() {
    use std::io::BufRead;
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    layout(&source);
    let source = format!("oci:{}:v1", source.display());
    let registry = Registry::start(directory.path());
    let pushed = format!("docker://{}/team/app:v1", registry.address);
    let state = directory.path().join("state");
    let state = state.to_str().unwrap();
    // Slow, so that it does not end before it is killed.
    let how = ["--level", "22", "--jobs", "1", "--state", state];
    let arguments = [&["convert", "--json", &source, &pushed], &how[..]].concat();
    let child = Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(&arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut child = Process(child);
    let lines = std::io::BufReader::new(child.0.stdout.take().unwrap()).lines();
    let mut finished = 0;
    for line in lines {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        assert_ne!(event["event"], "summary", "it ended before it was killed");
        finished += u64::from(event["event"] == "layer-done");
        if finished == 2 {
            break;
        }
    }
    // SIGKILL: nothing is tidied up.
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    let absent = run("skopeo", &["inspect", "--tls-verify=false", &pushed]);
    assert!(!absent.status.success(), "it has no name yet");

    let summary = convert(&arguments[2..]);
    let number = |name: &str| summary[name].as_u64().unwrap();
    assert!(number("layers_reused") >= finished, "{summary}");
    assert_eq!(number("layers_reused") + number("layers_converted"), 5);
    let other = format!("docker://{}/fresh/app:v1", registry.address);
    let fresh = convert(&[
        &source, &other, "--level", "22", "--state", state, "--force",
    ]);
    assert_eq!(summary["digest"], fresh["digest"]);
}

#[test]
fn several_images_go_to_one_place_and_one_that_fails_does_not_stop_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path());
    let mut images = Vec::new();
    for name in ["one", "two"] {
        let source = directory.path().join(name);
        layout(&source);
        images.push(format!("oci:{}:v1", source.display()));
    }
    images.insert(
        1,
        format!("oci:{}:v1", directory.path().join("none").display()),
    );
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    let place = format!("{}/team", registry.address);
    let state = directory.path().join("state");
    let options = ["--to", &place, "--state", state.to_str().unwrap()];
    let convert = |images: &[&str]| {
        let output = sluice(&[&["convert", "--json"], images, &options[..]].concat());
        let text = String::from_utf8(output.stdout).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        let events: Vec<Value> = lines.collect();
        (output.status.code(), events)
    };
    let of = |events: &[Value], name: &str| -> Vec<Value> {
        let found = events.iter().filter(|event| event["event"] == name);
        found.cloned().collect()
    };
    let (code, events) = convert(&images);
    assert_eq!(code, Some(1));
    let total = events.last().unwrap();
    assert_eq!(total["event"], "total");
    assert_eq!((&total["images"], &total["failed"]), (&3.into(), &1.into()));
    let failed = of(&events, "image-failed");
    assert!(failed[0]["error"].as_str().unwrap().contains("none"));
    // The second has the same layers; the registry mounts them from the first's repository.
    let summaries = of(&events, "summary");
    assert_eq!(summaries.len(), 2);
    assert_eq!(summaries[0]["layers_converted"], 5);
    assert_eq!(
        (
            &summaries[1]["layers_converted"],
            &summaries[1]["layers_shared"]
        ),
        (&0.into(), &5.into())
    );
    assert_eq!(summaries[0]["digest"], summaries[1]["digest"]);
    for (summary, name) in summaries.iter().zip(["one", "two"]) {
        let reference = format!("docker://{place}/{name}:v1");
        assert_eq!(summary["destination"], reference.as_str());
        let raw = ok(
            "skopeo",
            &["inspect", "--raw", "--tls-verify=false", &reference],
        );
        assert_eq!(digest(raw.as_bytes()), summary["digest"].as_str().unwrap());
    }
    let (code, events) = convert(&[images[0], images[2]]);
    assert_eq!(code, Some(0));
    assert!(of(&events, "summary").iter().all(|it| it["uploads"] == 0));
}

#[test]
fn a_damaged_source_leaves_the_tag_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    layout(&source);
    let registry = Registry::start(directory.path());
    let pushed = format!("docker://{}/team/app:v1", registry.address);
    let source_name = format!("oci:{}:v1", source.display());
    let before = convert(&[&source_name, &pushed])["digest"].clone();

    // A layer that is no longer what its name says, in a new image with the same tag.
    let fresh = directory.path().join("fresh");
    layout(&fresh);
    let largest = std::fs::read_dir(fresh.join("blobs/sha256"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| path.metadata().unwrap().len())
        .unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&largest, bytes).unwrap();
    let fresh = format!("oci:{}:v1", fresh.display());
    let output = sluice(&["convert", "--force", &fresh, &pushed]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let name = largest.file_name().unwrap().to_str().unwrap();
    assert!(
        stderr.contains(name) && stderr.contains("corrupt"),
        "{stderr}"
    );
    let raw = ok(
        "skopeo",
        &["inspect", "--raw", "--tls-verify=false", &pushed],
    );
    assert_eq!(digest(raw.as_bytes()), before.as_str().unwrap());
}

#[test]
fn help_and_bad_arguments_behave() {
    let help = sluice(&["--help"]);
    let text = String::from_utf8(help.stdout).unwrap();
    for command in [
        "convert", "inspect", "pull", "status", "why", "content", "setup",
    ] {
        assert!(text.contains(command), "{command}");
    }
    for bad in [
        &["convert", "x"][..],
        &["convert", "http://x/y", "oci:z"],
        &["convert", "a", "b", "--platform", "linux"],
        &["convert", "a", "b", "--format", "zip"],
        &["convert", "a", "b", "--format", "estargz", "--level", "10"],
        &["nonsense"],
    ] {
        assert_eq!(sluice(bad).status.code(), Some(2), "{bad:?}");
    }
    let output = sluice(&["status", "--socket", "/nonexistent/control.sock"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/control.sock"));
}

/// containerd needs root; elsewhere the test says so and ends.
fn is_root() -> bool {
    let mut status = String::new();
    std::fs::File::open("/proc/self/status")
        .unwrap()
        .read_to_string(&mut status)
        .unwrap();
    status.lines().any(|line| line.starts_with("Uid:\t0\t"))
}

#[test]
fn privileged_containerd_imports_a_converted_image_and_pulls_it_with_overlayfs() {
    if !is_root() {
        eprintln!("skipped: containerd needs root");
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let source = directory.path().join("source");
    layout(&source);
    let registry = Registry::start(directory.path());
    let reference = format!("{}/team/app:v1", registry.address);
    let pushed = format!("docker://{reference}");
    convert(&[&format!("oci:{}:v1", source.display()), &pushed]);

    let config = format!(
        "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = \"{}\"\n",
        path("root"),
        path("state"),
        path("c.sock")
    );
    std::fs::write(path("config.toml"), config).unwrap();
    let log = std::fs::File::create(path("containerd.log")).unwrap();
    let child = Command::new("containerd")
        .args(["-c", &path("config.toml")])
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("containerd is installed");
    let _process = Process(child);
    let socket = path("c.sock");
    wait_for("containerd", || {
        run("ctr", &["-a", &socket, "version"]).status.success()
    });

    let pull = [
        "pull",
        &reference,
        "-a",
        &socket,
        "--snapshotter",
        "overlayfs",
        "--platform",
        "linux/amd64",
        "--json",
    ];
    let output = sluice(&pull);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    let images = ok("ctr", &["-a", &socket, "images", "check"]);
    let line = images
        .lines()
        .find(|line| line.contains(&reference))
        .expect("the image");
    assert!(line.contains("true"), "unpacked: {line}");
    assert_eq!(
        ok("ctr", &["-a", &socket, "leases", "ls", "-q"]).trim(),
        "",
        "no lease is left"
    );
    let again = sluice(&pull);
    let again = String::from_utf8(again.stdout).unwrap();
    assert_eq!(again.matches("\"how\":\"present\"").count(), 3, "{again}");

    let archive = path("archive.tar");
    let target = format!("oci-archive:{archive}:imported:1");
    ok(
        "skopeo",
        &["copy", "--all", "--src-tls-verify=false", &pushed, &target],
    );
    ok(
        "ctr",
        &[
            "-a",
            &socket,
            "images",
            "import",
            "--all-platforms",
            "--no-unpack",
            &archive,
        ],
    );
    assert!(ok("ctr", &["-a", &socket, "images", "ls", "-q"]).contains("imported:1"));
}

#[test]
fn containerd_accepts_the_configuration_that_setup_writes() {
    accepts_what_setup_writes("containerd");
    // Where the tools of the end-to-end tests were built, there is a containerd 2 as well.
    let second = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/containerd2");
    match second.exists() {
        true => accepts_what_setup_writes(second.to_str().unwrap()),
        false => println!("skipped for containerd 2: no {}", second.display()),
    }
}

fn accepts_what_setup_writes(containerd: &str) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    let default = ok(containerd, &["config", "default"]);
    // A root of our own, so that the link for containerd 1.6 lands in this directory.
    let root = directory.path().join("root");
    let own_root = format!("root = \"{}\"", root.display());
    let before = default
        .replace("root = \"/var/lib/containerd\"", &own_root)
        .replace("root = '/var/lib/containerd'", &own_root);
    assert_ne!(before, default);
    std::fs::write(&path, &before).unwrap();
    let config = path.to_str().unwrap();

    let common = ["setup", "containerd", "--config", config];
    let common = [&common[..], &["--containerd", containerd]].concat();
    let setup = [&common[..], &["--cri", "--yes"]].concat();
    let output = sluice(&setup);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(stdout.contains("+[proxy_plugins.sluice]"), "{stdout}");
    let dump = ok(containerd, &["-c", config, "config", "dump"]).replace('\'', "\"");
    assert!(dump.contains("[proxy_plugins.sluice]"), "{dump}");
    assert!(dump.contains("snapshotter = \"sluice\""), "{dump}");
    if ok(containerd, &["--version"]).contains(" 1.6.") {
        let link = root.join("io.containerd.snapshotter.v1.sluice");
        assert_eq!(
            std::fs::read_link(link).unwrap(),
            Path::new("/var/lib/sluice")
        );
    }

    let again = sluice(&setup);
    assert!(String::from_utf8_lossy(&again.stdout).contains("nothing to change"));
    // Without a terminal and without --yes nothing is written.
    let unasked = sluice(&[&common[..], &["--undo"]].concat());
    assert_eq!(unasked.status.code(), Some(1));
    let undo = sluice(&[&common[..], &["--undo", "--yes"]].concat());
    assert!(undo.status.success());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), before);
}

/// The summary of `sluice index --json`, and all lines.
fn index(arguments: &[&str]) -> (Value, Vec<Value>) {
    told("index", "index-summary", arguments)
}

#[test]
fn an_image_is_indexed_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    layout(&source);
    let registry = Registry::start(directory.path());
    let image = format!("docker://{}/team/app:v1", registry.address);
    let layout = format!("oci:{}:v1", source.display());
    let copy = ["copy", "--all", "--dest-tls-verify=false", &layout, &image];
    ok("skopeo", &copy);
    let raw = |reference: &str| {
        ok(
            "skopeo",
            &["inspect", "--raw", "--tls-verify=false", reference],
        )
    };
    let before = raw(&image);

    let (summary, lines) = index(&["--all", &image]);
    let number = |name: &str| summary[name].as_u64().unwrap();
    // The empty layer is the same for both platforms.
    assert_eq!((number("images"), number("layers")), (2, 5));
    assert_eq!(
        (number("layers_not_lazy"), number("artifacts_pushed")),
        (0, 2)
    );
    let beside = number("index_bytes") + number("windows_bytes");
    assert!(beside * 20 < number("blob_bytes"), "{summary}");
    assert_eq!(raw(&image), before);
    assert_eq!(summary["digest"], digest(before.as_bytes()));

    // Debian's registry lists no referrers: the artifacts stand under tags, and everybody can read them.
    let artifacts: Vec<&Value> = lines
        .iter()
        .filter(|it| it["event"] == "artifact-done")
        .collect();
    assert_eq!(artifacts.len(), 2);
    for done in artifacts {
        assert_eq!(done["listed"], "by a tag");
        let manifest = done["manifest"].as_str().unwrap();
        let repository = image.trim_end_matches(":v1");
        let tag = manifest.replace(':', "-");
        let listed: Value = serde_json::from_str(&raw(&format!("{repository}:{tag}"))).unwrap();
        let entry = &listed["manifests"][0];
        assert_eq!(entry["artifactType"], "application/vnd.sluice.index.v1");
        assert_eq!(entry["digest"], done["artifact"]);
        let artifact = done["artifact"].as_str().unwrap();
        let artifact: Value =
            serde_json::from_str(&raw(&format!("{repository}@{artifact}"))).unwrap();
        assert_eq!(artifact["subject"]["digest"], manifest);
    }

    // Again: nothing is sent, whatever the access log calls it.
    let writes = registry.writes();
    assert!(writes > 0, "the log shows writes");
    let (again, _) = index(&["--all", &image]);
    assert_eq!(
        (&again["uploads"], &again["layers_reused"]),
        (&0.into(), &5.into())
    );
    assert_eq!(registry.writes(), writes);
    let words = sluice(&["index", "--platform", "linux/arm64", &image]);
    let words = String::from_utf8(words.stderr).unwrap();
    assert!(
        words.contains("not a byte of it changed: nothing to upload"),
        "{words}"
    );
    assert!(
        words.contains(" gzip, ") && words.contains("as it was"),
        "{words}"
    );
    // A layout has no referrers.
    let refused = sluice(&["index", &layout]);
    assert_eq!(refused.status.code(), Some(2));
}
