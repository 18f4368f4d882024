// SPDX-License-Identifier: Apache-2.0
//! The built `sluice` by itself: exit codes, closed outputs, what is left behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use sha2::{Digest, Sha256};

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args(arguments).stdin(Stdio::null());
    // No test leaves records of conversions on the machine.
    command.env("SLUICE_STATE", "/proc/none");
    command
}

fn sluice(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// Exit code, and what stands on standard error.
fn outcome(output: &Output) -> (Option<i32>, String) {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), stderr)
}

/// Runs with a standard output that nobody reads.
fn unread(arguments: &[&str]) -> Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = command(arguments)
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.wait_with_output().unwrap()
}

/// An OCI layout with one manifest for linux/amd64 and no index above it; returns its name.
fn layout(directory: &Path) -> String {
    let blobs = directory.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8], media_type: &str| {
        let name = hex::encode(Sha256::digest(bytes));
        std::fs::write(blobs.join(&name), bytes).unwrap();
        serde_json::json!({"mediaType": media_type, "digest": format!("sha256:{name}"), "size": bytes.len()})
    };
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    builder
        .append_data(&mut header, "file", &b"hello"[..])
        .unwrap();
    let tar = builder.into_inner().unwrap();
    let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&tar)));
    let layer = put(&tar, "application/vnd.oci.image.layer.v1.tar");
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}});
    let config = put(
        config.to_string().as_bytes(),
        "application/vnd.oci.image.config.v1+json",
    );
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer]});
    let entry = put(manifest.to_string().as_bytes(), media_type);
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]});
    std::fs::write(directory.join("index.json"), index.to_string()).unwrap();
    let marker = r#"{"imageLayoutVersion":"1.0.0"}"#;
    std::fs::write(directory.join("oci-layout"), marker).unwrap();
    format!("oci:{}", directory.display())
}

#[test]
fn exit_codes_tell_nonsense_from_failure() {
    for bad in [
        &["convert", "docker://localhost:5000/Upper", "oci:z"][..],
        &["inspect", "http://x/y"],
        &["inspect", "x", "--ca-file", "foo"],
        &["pull", "localhost:5000/Upper"],
        &["pull", "oci:z"],
        &["convert", "oci:a"],
        &["convert", "oci:a", "oci:b", "oci:c"],
        &["convert", "oci:a", "docker-archive:b.tar"],
        &["convert", "oci:a", "containerd:"],
        &["convert", "oci:a", "oci:b", "--level", "0"],
        &["convert", "oci:a", "oci:b", "--level", "23"],
        &["convert", "oci:a", "oci:b", "--chunk-size", "1M"],
        &["convert", "oci:a", "oci:b", "--jobs", "0"],
        &[
            "convert",
            "oci:x/a:1",
            "oci:y/a:1",
            "--to",
            "registry.invalid",
        ],
        &["convert", "oci:x/A:1", "--to", "registry.invalid"],
        &["convert", "oci:x/a:1", "--to", "containerd:"],
    ] {
        let (code, stderr) = outcome(&sluice(bad));
        assert_eq!(code, Some(2), "{bad:?}: {stderr}");
    }
    // What makes sense and is not there is a failure.
    for absent in [
        &["convert", "oci:/nonexistent", "oci:/nonexistent/b"][..],
        &[
            "convert",
            "oci-archive:/nonexistent.tar",
            "oci:/nonexistent/b",
        ],
        &[
            "convert",
            "docker-archive:/nonexistent.tar",
            "oci:/nonexistent/b",
        ],
        &[
            "convert",
            "containerd:a",
            "containerd:a",
            "--address",
            "/nonexistent/c.sock",
        ],
        &["convert", "oci:/nonexistent", "--to", "127.0.0.1:1/x"],
    ] {
        let (code, stderr) = outcome(&sluice(absent));
        assert_eq!(code, Some(1), "{absent:?}: {stderr}");
        assert!(stderr.contains("nonexistent"), "{absent:?}: {stderr}");
    }
    let missing = "/nonexistent/config.json";
    let (code, stderr) = outcome(&sluice(&["inspect", "x", "--auth-file", missing]));
    assert_eq!(code, Some(1));
    assert!(stderr.contains(missing), "{stderr}");
}

#[test]
fn a_closed_output_ends_what_only_shows_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.toml");
    std::fs::write(&config, "version = 2\n").unwrap();
    let path = config.to_str().unwrap();
    let setup = unread(&["setup", "containerd", "--config", path, "--yes"]);
    assert_eq!(outcome(&setup).0, Some(0), "{}", outcome(&setup).1);
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(text.contains("[proxy_plugins.sluice]"), "{text}");

    let image = layout(&directory.path().join("source"));
    assert!(sluice(&["inspect", &image]).status.success());
    assert!(unread(&["inspect", &image]).status.success());
}

#[test]
fn a_refused_conversion_makes_no_layout() {
    let directory = tempfile::tempdir().unwrap();
    let image = layout(&directory.path().join("source"));
    let made = directory.path().join("deep/made");
    let target = format!("oci:{}", made.display());
    for refuse in [["--platform", "linux/s390x"], ["--max-layer-bytes", "1"]] {
        let arguments = [&["convert", &image, &target][..], &refuse].concat();
        let (code, stderr) = outcome(&sluice(&arguments));
        assert_eq!(code, Some(1), "{stderr}");
        assert!(!directory.path().join("deep").exists(), "{refuse:?}");
    }
    let done = sluice(&["convert", "--quiet", &image, &target]);
    assert_eq!(outcome(&done), (Some(0), String::new()));
    assert!(made.join("index.json").exists() && made.join("oci-layout").exists());
}

#[test]
fn inspect_refuses_a_platform_that_the_image_is_not_for() {
    let directory = tempfile::tempdir().unwrap();
    let image = layout(directory.path());
    for (platform, code) in [("linux/amd64", 0), ("linux/arm64", 1)] {
        let output = sluice(&["inspect", &image, "--platform", platform]);
        assert_eq!(outcome(&output).0, Some(code), "{platform}");
    }
}
