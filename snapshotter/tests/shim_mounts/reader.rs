// SPDX-License-Identifier: Apache-2.0
//! Readers of a mount: processes of their own, because who touches a mount whose server is gone may
//! never come back. The test binary starts itself with a task in the environment.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::image::Expected;

const TASK: &str = "SLUICE_SHIM_READER_TASK";

/// What a reader is to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Task {
    /// Compare everything below a mount with what is expected.
    Compare { mount: PathBuf, expected: PathBuf },
    /// Read, list and look up at random for some time, past the page cache.
    Storm {
        mount: PathBuf,
        expected: PathBuf,
        millis: u64,
        seed: u64,
    },
    /// Read these files at the same time, each whole.
    ReadAll {
        mount: PathBuf,
        expected: PathBuf,
        paths: Vec<String>,
    },
    /// Change into a directory and stay until standard input ends.
    Stay { directory: PathBuf },
}

/// What it says at its end.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// What was wrong, one line each.
    pub faults: Vec<String>,
    /// Error numbers that reads gave.
    pub errnos: BTreeSet<i32>,
    /// Operations done.
    pub done: u64,
    /// Longest wait of one.
    pub worst_ms: u64,
}

/// A reader that runs.
pub struct Reader(Child);

impl Reader {
    pub fn start(task: &Task) -> Reader {
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "a_reader_does_its_task",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(TASK, serde_json::to_string(task).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Reader(child)
    }

    /// Waits for its end, at most so long; its report.
    pub fn finish(mut self, longest: Duration) -> Report {
        drop(self.0.stdin.take());
        let deadline = Instant::now() + longest;
        while self.0.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                let _gone = self.0.kill();
                panic!("a reader hangs");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut text = String::new();
        self.0
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        let report = text
            .split("REPORT ")
            .nth(1)
            .and_then(|rest| rest.lines().next());
        serde_json::from_str(report.unwrap_or_else(|| panic!("no report: {text}"))).unwrap()
    }

    /// Waits until it has said that it is where it wants to be.
    pub fn wait_ready(&mut self) {
        let stdout = self.0.stdout.as_mut().unwrap();
        let (mut seen, mut byte) = (Vec::new(), [0u8]);
        while !seen.ends_with(b"READY\n") {
            assert_eq!(
                stdout.read(&mut byte).unwrap(),
                1,
                "{}",
                String::from_utf8_lossy(&seen)
            );
            seen.push(byte[0]);
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Killed, but not waited for: it might be stuck until the watchdog ends the connection.
        let _gone = self.0.kill();
    }
}

/// In a reader process: does the task and ends the process. Elsewhere: nothing.
pub fn run_if_asked() {
    let Ok(task) = std::env::var(TASK) else {
        return;
    };
    let mut report = Report::default();
    match serde_json::from_str(&task).unwrap() {
        Task::Compare { mount, expected } => compare(&mount, &load(&expected), &mut report),
        Task::Storm {
            mount,
            expected,
            millis,
            seed,
        } => {
            storm(
                &mount,
                &load(&expected),
                Duration::from_millis(millis),
                seed,
                &mut report,
            );
        }
        Task::ReadAll {
            mount,
            expected,
            paths,
        } => {
            read_all(&mount, &load(&expected), &paths, &mut report);
        }
        Task::Stay { directory } => {
            std::env::set_current_dir(directory).unwrap();
            print!("\nREADY\n");
            std::io::stdout().flush().unwrap();
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        }
    }
    println!("\nREPORT {}", serde_json::to_string(&report).unwrap());
    std::process::exit(0);
}

type Entries = BTreeMap<Vec<u8>, Expected>;

fn load(path: &Path) -> Entries {
    let list: Vec<Expected> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    list.into_iter()
        .map(|entry| (hex::decode(&entry.path).unwrap(), entry))
        .collect()
}

fn at(mount: &Path, path: &[u8]) -> PathBuf {
    if path.is_empty() {
        mount.to_owned()
    } else {
        mount.join(OsStr::from_bytes(path))
    }
}

impl Report {
    fn timed<T>(&mut self, what: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = what();
        self.done += 1;
        self.worst_ms = self
            .worst_ms
            .max(u64::try_from(begun.elapsed().as_millis()).unwrap());
        result
    }

    fn fault(&mut self, path: &[u8], what: impl std::fmt::Display) {
        if self.faults.len() < 20 {
            self.faults
                .push(format!("{}: {what}", String::from_utf8_lossy(path)));
        }
    }

    fn failed(&mut self, path: &[u8], what: &str, error: &std::io::Error) {
        self.errnos.extend(error.raw_os_error());
        self.fault(path, format!("{what}: {error}"));
    }
}

fn compare(mount: &Path, entries: &Entries, report: &mut Report) {
    for (path, want) in entries {
        compare_attributes(mount, path, want, report);
        if want.mode & 0o170_000 == 0o040_000 {
            compare_listing(mount, entries, path, report);
        }
        if let Some(size) = want.size {
            compare_content(mount, path, want, 0, size, report);
        }
    }
    let absent = mount.join("data/absent");
    for _ in 0..2 {
        if !std::fs::symlink_metadata(&absent).is_err_and(|e| e.raw_os_error() == Some(2)) {
            report.fault(b"data/absent", "is there");
        }
    }
    match nix::sys::statvfs::statvfs(mount) {
        Ok(fs) if fs.blocks() > 0 && fs.blocks_free() == 0 && fs.name_max() == 255 => {}
        other => report.fault(b"", format!("statfs: {other:?}")),
    }
}

fn compare_attributes(mount: &Path, path: &[u8], want: &Expected, report: &mut Report) {
    let full = at(mount, path);
    let got = match report.timed(|| std::fs::symlink_metadata(&full)) {
        Ok(got) => got,
        Err(error) => return report.failed(path, "stat", &error),
    };
    let seen = (
        got.mode(),
        got.uid(),
        got.gid(),
        got.mtime(),
        got.mtime_nsec(),
        got.nlink(),
    );
    let wanted = (
        want.mode,
        want.uid,
        want.gid,
        want.mtime.0,
        want.mtime.1,
        want.links,
    );
    if seen != wanted {
        report.fault(path, format!("{seen:?} for {wanted:?}"));
    }
    if want
        .size
        .is_some_and(|size| got.size() != size || got.blocks() != size.div_ceil(512))
    {
        report.fault(path, format!("size {} blocks {}", got.size(), got.blocks()));
    }
    if want.mode & 0o060_000 == 0o020_000 && want.mode & 0o100_000 == 0 {
        let (major, minor) = (libc::major(got.rdev()), libc::minor(got.rdev()));
        let wanted = (
            want.rdev >> 8 & 0xfff,
            want.rdev & 0xff | want.rdev >> 12 & 0xfff00,
        );
        if (u64::from(major), u64::from(minor)) != wanted {
            report.fault(path, format!("device {major}:{minor} for {wanted:?}"));
        }
    }
    if let Some(target) = &want.target {
        match std::fs::read_link(&full) {
            Ok(got) if hex::encode(got.as_os_str().as_bytes()) == *target => {}
            other => report.fault(path, format!("target {other:?}")),
        }
    }
    let mut xattrs = Vec::new();
    match xattr::list(&full) {
        Ok(names) => {
            for name in names {
                match xattr::get(&full, &name) {
                    Ok(Some(value)) => {
                        xattrs.push((hex::encode(name.as_bytes()), hex::encode(value)))
                    }
                    other => report.fault(path, format!("xattr {name:?}: {other:?}")),
                }
            }
        }
        // A tree without any says so once and for all.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) => report.failed(path, "list xattrs", &error),
    }
    xattrs.sort();
    let mut wanted = want.xattrs.clone();
    wanted.sort();
    if xattrs != wanted {
        report.fault(path, format!("xattrs {xattrs:?} for {wanted:?}"));
    }
}

fn compare_listing(mount: &Path, entries: &Entries, path: &[u8], report: &mut Report) {
    let parent = |child: &[u8]| match child.iter().rposition(|&b| b == b'/') {
        Some(slash) => child[..slash].to_vec(),
        None => Vec::new(),
    };
    let want: BTreeSet<Vec<u8>> = entries
        .keys()
        .filter(|child| !child.is_empty() && parent(child) == path)
        .map(|child| child.rsplit(|&b| b == b'/').next().unwrap().to_vec())
        .collect();
    let full = at(mount, path);
    let listed = report.timed(|| std::fs::read_dir(&full).and_then(Iterator::collect));
    let listed: Vec<std::fs::DirEntry> = match listed {
        Ok(listed) => listed,
        Err(error) => return report.failed(path, "list", &error),
    };
    let got: Vec<Vec<u8>> = listed
        .iter()
        .map(|e| e.file_name().as_bytes().to_vec())
        .collect();
    if got.len() != want.len() || got.into_iter().collect::<BTreeSet<_>>() != want {
        report.fault(path, "lists other names");
    }
    for entry in listed.iter().take(50) {
        let stat = std::fs::symlink_metadata(entry.path());
        if !stat.is_ok_and(|stat| stat.ino() == entry.ino()) {
            report.fault(
                path,
                format!("{entry:?} has another inode number when listed"),
            );
        }
    }
}

fn compare_content(
    mount: &Path,
    path: &[u8],
    want: &Expected,
    offset: u64,
    length: u64,
    report: &mut Report,
) {
    let mut got = vec![0u8; usize::try_from(length).unwrap()];
    let read = report.timed(|| {
        let file = File::open(at(mount, path))?;
        // What is in the page cache asks nothing of the shim.
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        file.read_exact_at(&mut got, offset)
    });
    if let Err(error) = read {
        return report.failed(path, "read", &error);
    }
    let mut wanted = vec![0u8; got.len()];
    if let Some((source, start)) = &want.content {
        File::open(source)
            .unwrap()
            .read_exact_at(&mut wanted, start + offset)
            .unwrap();
    }
    if got != wanted {
        report.fault(path, "wrong bytes");
    }
}

fn storm(mount: &Path, entries: &Entries, time: Duration, seed: u64, report: &mut Report) {
    let mut random = StdRng::seed_from_u64(seed);
    let all: Vec<&Vec<u8>> = entries.keys().collect();
    let files: Vec<&Vec<u8>> = all
        .iter()
        .copied()
        .filter(|path| entries[*path].size.is_some_and(|s| s > 0))
        .collect();
    // Open from the start to the end.
    let big = File::open(mount.join("big")).unwrap();
    let big_want = &entries[&b"big"[..]];
    let (source, start) = big_want.content.clone().unwrap();
    let source = File::open(source).unwrap();
    let end = Instant::now() + time;
    while Instant::now() < end {
        match random.random_range(0..8) {
            0 => {
                let path = all[random.random_range(0..all.len())];
                compare_attributes(mount, path, &entries[path], report);
            }
            1 => compare_listing(mount, entries, b"many", report),
            2 => {
                let name = format!("data/none{}", random.random_range(0..1_000_000));
                if std::fs::symlink_metadata(mount.join(&name)).is_ok() {
                    report.fault(name.as_bytes(), "is there");
                }
            }
            3 => {
                let offset = random.random_range(0..(6 << 20) - 50_000);
                let (mut got, mut want) = (vec![0; 50_000], vec![0; 50_000]);
                let read = report.timed(|| {
                    posix_fadvise(&big, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
                    big.read_exact_at(&mut got, offset)
                });
                source.read_exact_at(&mut want, start + offset).unwrap();
                match read {
                    Ok(()) if got == want => {}
                    Ok(()) => report.fault(b"big", "wrong bytes"),
                    Err(error) => report.failed(b"big", "read", &error),
                }
            }
            4 if random.random_range(0..4) == 0 => {
                let program = mount.join("bin/cat");
                let output = report.timed(|| Command::new(program).arg("/proc/self/comm").output());
                match output {
                    Ok(output) if output.stdout == b"cat\n" => {}
                    other => report.fault(b"bin/cat", format!("{other:?}")),
                }
            }
            _ => {
                let path = files[random.random_range(0..files.len())];
                let size = entries[path].size.unwrap();
                let offset = random.random_range(0..size);
                let length = random.random_range(0..=size - offset);
                compare_content(mount, path, &entries[path], offset, length, report);
            }
        }
    }
}

fn read_all(mount: &Path, entries: &Entries, paths: &[String], report: &mut Report) {
    let reports: Vec<Report> = std::thread::scope(|scope| {
        let readers: Vec<_> = paths
            .iter()
            .map(|path| {
                scope.spawn(move || {
                    let mut report = Report::default();
                    let want = &entries[path.as_bytes()];
                    compare_content(
                        mount,
                        path.as_bytes(),
                        want,
                        0,
                        want.size.unwrap(),
                        &mut report,
                    );
                    report
                })
            })
            .collect();
        readers
            .into_iter()
            .map(|reader| reader.join().unwrap())
            .collect()
    });
    for one in reports {
        report.faults.extend(one.faults);
        report.errnos.extend(one.errnos);
        report.done += one.done;
        report.worst_ms = report.worst_ms.max(one.worst_ms);
    }
}
