// SPDX-License-Identifier: Apache-2.0
//! Finds and removes the mounts below a directory, without touching them.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Minor number of its device: for FUSE, the name of the connection under `/sys/fs/fuse/connections`.
    pub minor: u32,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// File system type, such as `fuse.sluice`.
    pub kind: String,
}

fn parse_line(line: &str) -> Option<MountEntry> {
    let mut fields = line.split(' ');
    let minor = fields.nth(2)?.split_once(':')?.1.parse().ok()?;
    let mountpoint = PathBuf::from(unescape(fields.nth(1)?));
    let kind = line.split_once(" - ")?.1.split(' ').next()?.to_owned();
    Some(MountEntry {
        minor,
        mountpoint,
        kind,
    })
}

fn unescape(field: &str) -> String {
    field
        .replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

/// The mounts at or below `directory`, oldest first.
#[must_use]
pub fn below(directory: &Path) -> Vec<MountEntry> {
    fs::read_to_string("/proc/self/mountinfo")
        .unwrap_or_default()
        .lines()
        .filter_map(parse_line)
        .filter(|m| m.mountpoint.starts_with(directory))
        .collect()
}

/// Aborts every FUSE connection below `directory`: its readers get an error instead of waiting.
pub fn abort_fuse(directory: &Path) {
    let control = Path::new("/sys/fs/fuse/connections");
    if fs::read_dir(control)
        .map(|mut d| d.next().is_none())
        .unwrap_or(true)
    {
        nix::mount::mount(
            Some("fusectl"),
            control,
            Some("fusectl"),
            nix::mount::MsFlags::empty(),
            None::<&str>,
        )
        .ok();
    }
    for mount in below(directory)
        .iter()
        .filter(|m| m.kind.starts_with("fuse"))
    {
        fs::write(control.join(mount.minor.to_string()).join("abort"), "1").ok();
    }
}

/// Unmounts all below `directory`, newest first. Returns what could not be unmounted.
pub fn unmount_all(directory: &Path) -> Vec<MountEntry> {
    for _ in 0..3 {
        let mut mounts = below(directory);
        if mounts.is_empty() {
            break;
        }
        mounts.reverse();
        for mount in mounts {
            umount2(
                &mount.mountpoint,
                MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
            )
            .ok();
        }
    }
    below(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines() {
        let line =
            "36 35 0:47 / /tmp/a\\040b/mnt ro,relatime shared:9 - fuse.sluice sluice ro,user_id=0";
        let entry = parse_line(line).unwrap();
        assert_eq!(entry.minor, 47);
        assert_eq!(entry.mountpoint, Path::new("/tmp/a b/mnt"));
        assert_eq!(entry.kind, "fuse.sluice");
        assert_eq!(parse_line("nonsense"), None);
    }
}
