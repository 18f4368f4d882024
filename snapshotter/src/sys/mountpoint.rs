// SPDX-License-Identifier: Apache-2.0
//! Mounting, unmounting, and finding out what is mounted where, without ever touching a mount's
//! root: a path walk that stops at a dead FUSE root would hang its caller.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountLine {
    /// The mount's ID.
    pub id: u64,
    /// Device numbers of the file system.
    pub device: (u32, u32),
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// File system type with its subtype, for instance `fuse.sluice`.
    pub kind: String,
    /// What the mount's source calls itself.
    pub source: String,
}

/// How an unmount ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// It is gone.
    Done,
    /// There was no mount.
    Absent,
    /// It is in use.
    Busy,
}

/// Mounts a file system with an option string.
pub fn attach(
    source: &str,
    mountpoint: &Path,
    kind: &str,
    flags: MsFlags,
    options: &str,
) -> io::Result<()> {
    Ok(mount(
        Some(source),
        mountpoint,
        Some(kind),
        flags,
        Some(options),
    )?)
}

/// Unmounts the topmost mount at `mountpoint`; with `detach` even while it is in use.
pub fn detach(mountpoint: &Path, detach: bool) -> io::Result<Unmounted> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    if detach {
        flags |= MntFlags::MNT_DETACH;
    }
    match umount2(mountpoint, flags) {
        Ok(()) => Ok(Unmounted::Done),
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(Unmounted::Absent),
        Err(Errno::EBUSY) => Ok(Unmounted::Busy),
        Err(error) => Err(error.into()),
    }
}

/// Unmounts what is at `mountpoint` by force: requests to a FUSE server that does not answer end with errors, now and
/// later.
pub fn abort(mountpoint: &Path) -> io::Result<()> {
    let flags = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_FORCE;
    // It aborts the connection also when the mount is busy and so stays.
    match umount2(mountpoint, flags) {
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// All mounts of our mount namespace, oldest first.
pub fn mounts() -> io::Result<Vec<MountLine>> {
    Ok(parse_mountinfo(&std::fs::read("/proc/self/mountinfo")?))
}

/// The topmost mount at exactly `mountpoint`, if there is one.
pub fn mount_at(mountpoint: &Path) -> io::Result<Option<MountLine>> {
    Ok(mounts()?
        .into_iter()
        .rev()
        .find(|line| line.mountpoint == mountpoint))
}

fn parse_mountinfo(bytes: &[u8]) -> Vec<MountLine> {
    bytes
        .split(|&b| b == b'\n')
        .filter_map(parse_line)
        .collect()
}

/// Fields: id parent major:minor root mountpoint options [optional…] - type source super-options.
fn parse_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|&b| b == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let device = std::str::from_utf8(fields.nth(1)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let mountpoint = unescape(fields.nth(1)?);
    let mut rest = fields.skip_while(|field| *field != b"-");
    rest.next()?;
    let kind = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = String::from_utf8_lossy(&unescape(rest.next()?)).into_owned();
    Some(MountLine {
        id,
        device: (major.parse().ok()?, minor.parse().ok()?),
        mountpoint: PathBuf::from(std::ffi::OsStr::from_bytes(&mountpoint)),
        kind,
        source,
    })
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| tail.get(..3)).flatten();
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match value {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_read() {
        let text =
            b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw\n\
            77 35 0:51 / /x ro - fuse.sluice sluice ro,user_id=0\nnonsense\n";
        let lines = parse_mountinfo(text);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].mountpoint, Path::new("/mnt 2"));
        assert_eq!((lines[0].id, lines[0].device), (36, (98, 0)));
        assert_eq!(
            (lines[0].kind.as_str(), lines[0].source.as_str()),
            ("ext3", "/dev/root")
        );
        assert_eq!(lines[1].kind, "fuse.sluice");
        assert_eq!(lines[1].device, (0, 51));
    }

    #[test]
    fn unescape_leaves_what_is_no_escape() {
        assert_eq!(unescape(b"a\\134b\\9\\04"), b"a\\b\\9\\04");
    }

    #[test]
    fn what_is_no_mount_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        assert!(mount_at(dir.path()).unwrap().is_none());
        if nix::unistd::geteuid().is_root() {
            assert_eq!(detach(dir.path(), false).unwrap(), Unmounted::Absent);
            assert_eq!(
                detach(&dir.path().join("none"), false).unwrap(),
                Unmounted::Absent
            );
        }
    }
}
