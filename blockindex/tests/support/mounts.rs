// SPDX-License-Identifier: Apache-2.0
//! Mounts for tests that ask the kernel, undone when dropped.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "test support")]

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mount that ends with this value, also when the test panics.
#[derive(Debug)]
pub struct Mount {
    at: PathBuf,
}

impl Mount {
    /// Mounts read-only.
    pub fn new(source: &str, at: &Path, kind: &str, options: &str) -> nix::Result<Self> {
        std::fs::create_dir_all(at).unwrap();
        mount(
            Some(source),
            at,
            Some(kind),
            MsFlags::MS_RDONLY,
            Some(options),
        )?;
        Ok(Self {
            at: at.to_path_buf(),
        })
    }

    /// Mounts an EROFS image from a file over device files.
    pub fn erofs(image: &Path, devices: &[&Path], at: &Path) -> nix::Result<Self> {
        let devices: Vec<_> = devices
            .iter()
            .map(|device| format!("device={}", device.display()))
            .collect();
        Self::new(image.to_str().unwrap(), at, "erofs", &devices.join(","))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.at, MntFlags::MNT_DETACH) {
            eprintln!("unmount {}: {error}", self.at.display());
        }
    }
}

/// Why the kernel cannot be asked here; printed, so that a test that did nothing is seen.
pub fn cannot_mount(kind: &str) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root".into());
    }
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    if !known
        .lines()
        .any(|line| line.split_whitespace().last() == Some(kind))
    {
        // The file system may be a module that the first mount loads.
        let _ = std::process::Command::new("modprobe").arg(kind).status();
        let known = std::fs::read_to_string("/proc/filesystems").unwrap();
        if !known
            .lines()
            .any(|line| line.split_whitespace().last() == Some(kind))
        {
            return Some(format!("this kernel has no {kind}"));
        }
    }
    None
}
