// SPDX-License-Identifier: Apache-2.0
//! `sluiced` under a real containerd 1.6 with runc: import an image, run it, survive a crash of the
//! daemon, free everything. Needs root, containerd, ctr and runc; says so and passes without them.

#![allow(clippy::unwrap_used, reason = "a test, in functions of its own")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest as _, Sha256};

const IMAGE: &str = "localhost/sluice-test:1";

/// A private containerd and sluiced below a temporary root; cleans up however the test ends.
struct Site {
    root: PathBuf,
    sluiced: Option<Child>,
    containerd: Option<Child>,
}

impl Site {
    fn new() -> Self {
        let root = PathBuf::from(format!("/tmp/snap-ctd-{}", std::process::id()));
        fs::create_dir(&root).unwrap();
        let config = format!(
            "version = 2\nroot = \"{0}/containerd\"\nstate = \"{0}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{0}/c.sock\"\n\
             [proxy_plugins.sluice]\ntype = \"snapshot\"\naddress = \"{0}/run/snapshots.sock\"\n",
            root.display()
        );
        fs::write(root.join("containerd.toml"), config).unwrap();
        fs::write(
            root.join("sluice.toml"),
            "[telemetry]\naddress = \"\"\n[log]\nlevel = \"info\"\n",
        )
        .unwrap();
        let mut site = Site {
            root,
            sluiced: None,
            containerd: None,
        };
        site.start_sluiced();
        let mut containerd = Command::new("containerd");
        containerd
            .arg("--config")
            .arg(site.root.join("containerd.toml"));
        site.containerd = Some(site.spawn(containerd, "containerd.log"));
        site.wait("containerd answers", |site| {
            site.ctr(&["version"]).status.success()
        });
        site
    }

    fn spawn(&self, mut command: Command, log: &str) -> Child {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.root.join(log));
        let log = log.unwrap();
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn start_sluiced(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluiced"));
        command
            .arg("--config")
            .arg(self.root.join("sluice.toml"))
            .arg("--root")
            .arg(self.root.join("sluice"))
            .arg("--run-dir")
            .arg(self.root.join("run"));
        self.sluiced = Some(self.spawn(command, "sluiced.log"));
        let socket = self.root.join("run/snapshots.sock");
        self.wait("sluiced answers", |_| {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
    }

    fn kill_sluiced(&mut self) {
        let mut child = self.sluiced.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{what}: not so\n{}",
                self.logs()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn ctr(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        command
            .arg("60")
            .arg("ctr")
            .arg("--address")
            .arg(self.root.join("c.sock"));
        command
            .args(["--namespace", "sluice-test"])
            .args(arguments)
            .output()
            .unwrap()
    }

    fn ctr_ok(&self, arguments: &[&str]) -> String {
        let output = self.ctr(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "ctr {arguments:?}: {errors}\n{}",
            self.logs()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn run(&self, name: &str, script: &str) -> String {
        self.ctr_ok(&[
            "run",
            "--rm",
            "--snapshotter",
            "sluice",
            IMAGE,
            name,
            "/bin/sh",
            "-c",
            script,
        ])
    }

    fn snapshot_directories(&self) -> usize {
        fs::read_dir(self.root.join("sluice/snapshots"))
            .unwrap()
            .count()
    }

    fn logs(&self) -> String {
        let tail = |name: &str| {
            let log = fs::read_to_string(self.root.join(name)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            lines[lines.len().saturating_sub(25)..].join("\n")
        };
        format!(
            "--- sluiced\n{}\n--- containerd\n{}",
            tail("sluiced.log"),
            tail("containerd.log")
        )
    }

    /// Processes that name our root in their arguments: containerd's shims.
    fn strays(&self) -> Vec<Pid> {
        let marker = self.root.to_str().unwrap();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let ids = processes.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        ids.filter(|id| *id != i32::try_from(std::process::id()).unwrap())
            .filter(|id| {
                fs::read(format!("/proc/{id}/cmdline"))
                    .is_ok_and(|arguments| String::from_utf8_lossy(&arguments).contains(marker))
            })
            .map(Pid::from_raw)
            .collect()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for child in [&mut self.containerd, &mut self.sluiced]
            .into_iter()
            .flatten()
        {
            let _ = kill(
                Pid::from_raw(i32::try_from(child.id()).unwrap()),
                Signal::SIGTERM,
            );
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(10) && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        for stray in self.strays() {
            let _ = kill(stray, Signal::SIGKILL);
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let below = self.root.to_str().unwrap().to_owned() + "/";
        let targets: Vec<&str> = mounts.lines().filter_map(|l| l.split(' ').nth(1)).collect();
        for target in targets
            .into_iter()
            .rev()
            .filter(|target| target.starts_with(&below))
        {
            let _ = umount2(target, MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn append(archive: &mut tar::Builder<Vec<u8>>, path: &str, mode: u32, bytes: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_size(u64::try_from(bytes.len()).unwrap());
    header.set_mode(mode);
    archive.append_data(&mut header, path, bytes).unwrap();
}

/// An image of two layers with a shell, as an OCI layout in a tar.
fn image(path: &Path) {
    let mut low = tar::Builder::new(Vec::new());
    append(&mut low, "bin/sh", 0o755, &fs::read("/bin/sh").unwrap());
    let libraries = Command::new("ldd").arg("/bin/sh").output().unwrap();
    let libraries = String::from_utf8(libraries.stdout).unwrap();
    for library in libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        append(&mut low, &library[1..], 0o755, &fs::read(library).unwrap());
    }
    append(&mut low, "etc/greeting", 0o644, b"one\n");
    append(&mut low, "gone/file", 0o644, b"x");
    let mut high = tar::Builder::new(Vec::new());
    append(&mut high, "etc/greeting", 0o644, b"two\n");
    append(&mut high, ".wh.gone", 0o644, b"");

    let mut blobs: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut add = |bytes: Vec<u8>, media_type: &str| {
        let digest = hex::encode(Sha256::digest(&bytes));
        let descriptor = serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.{media_type}"),
            "digest": format!("sha256:{digest}"),
            "size": bytes.len(),
        });
        blobs.insert(digest, bytes);
        descriptor
    };
    let layers = [low, high].map(|layer| add(layer.into_inner().unwrap(), "layer.v1.tar"));
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layers[0]["digest"], layers[1]["digest"]]},
    });
    let config = add(serde_json::to_vec(&config).unwrap(), "config.v1+json");
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers});
    let mut manifest = add(serde_json::to_vec(&manifest).unwrap(), "manifest.v1+json");
    manifest["annotations"] = serde_json::json!({"io.containerd.image.name": IMAGE});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});

    let mut layout = tar::Builder::new(Vec::new());
    append(
        &mut layout,
        "oci-layout",
        0o644,
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    );
    append(
        &mut layout,
        "index.json",
        0o644,
        &serde_json::to_vec(&index).unwrap(),
    );
    for (digest, bytes) in &blobs {
        append(&mut layout, &format!("blobs/sha256/{digest}"), 0o644, bytes);
    }
    fs::write(path, layout.into_inner().unwrap()).unwrap();
}

/// What is missing on this machine.
fn missing() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("root");
    }
    let found = |program: &str| {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&paths).any(|path| path.join(program).exists())
    };
    [
        "containerd",
        "ctr",
        "runc",
        "containerd-shim-runc-v2",
        "ldd",
        "timeout",
    ]
    .into_iter()
    .find(|program| !found(program))
}

#[test]
fn containerd_imports_runs_and_removes_an_image() {
    if let Some(missing) = missing() {
        eprintln!("SKIPPED: needs {missing}");
        return;
    }
    let mut site = Site::new();
    let archive = site.root.join("image.tar");
    image(&archive);
    site.ctr_ok(&[
        "images",
        "import",
        "--snapshotter",
        "sluice",
        archive.to_str().unwrap(),
    ]);
    assert_eq!(site.snapshot_directories(), 2);

    let script = "read line < /etc/greeting; echo $line; [ -e /gone ] || echo gone; echo x > /new";
    assert_eq!(site.run("first", script), "two\ngone\n");
    site.wait("the container's snapshot is deleted", |site| {
        site.snapshot_directories() == 2
    });

    let list = site.ctr_ok(&["snapshots", "--snapshotter", "sluice", "ls"]);
    assert_eq!(list.matches("Committed").count(), 2, "{list}");
    let usage = site.ctr_ok(&["snapshots", "--snapshotter", "sluice", "usage", "-b"]);
    let sizes = usage
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(1));
    assert!(
        sizes.map(|size| size.parse::<u64>().unwrap()).sum::<u64>() > 100_000,
        "{usage}"
    );

    // The daemon dies; its successor has everything, and finds what the crash left.
    site.kill_sluiced();
    fs::create_dir_all(site.root.join("sluice/snapshots/99/fs")).unwrap();
    site.start_sluiced();
    // containerd connects again after a back-off of its own, and fails fast until then.
    site.wait("containerd is connected again", |site| {
        site.ctr(&["snapshots", "--snapshotter", "sluice", "ls"])
            .status
            .success()
    });
    assert_eq!(site.run("second", script), "two\ngone\n");
    site.wait("the orphan is deleted", |site| {
        site.snapshot_directories() == 2
    });

    site.ctr_ok(&["images", "rm", "--sync", IMAGE]);
    site.wait("the image's snapshots are deleted", |site| {
        site.snapshot_directories() == 0
    });
    let list = site.ctr_ok(&["snapshots", "--snapshotter", "sluice", "ls"]);
    assert_eq!(list.lines().count(), 1, "{list}");
}
