// SPDX-License-Identifier: Apache-2.0
//! The kernel's lists of mounts and of locks, as text.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// A mount of a run that the kernel's EROFS serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelMount {
    /// Where; its last component is the run's key.
    pub mountpoint: PathBuf,
}

/// A FUSE mount of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FuseMount {
    /// Where.
    pub mountpoint: PathBuf,
    /// The name of its connection below `/sys/fs/fuse/connections`: the minor number of its device.
    pub connection: u32,
}

/// The mounts of type `fuse.sluice` directly below `directory`.
///
/// **Source** proc_pid_mountinfo(5).
#[must_use]
pub fn fuse_mounts(mountinfo: &[u8], directory: &Path) -> Vec<FuseMount> {
    below(mountinfo, directory)
        .filter(|line| line.kind == b"fuse.sluice")
        .map(|line| FuseMount {
            mountpoint: line.mountpoint,
            connection: line.minor,
        })
        .collect()
}

/// The mounts of type `erofs` directly below `directory`.
#[must_use]
pub fn erofs_mounts(mountinfo: &[u8], directory: &Path) -> Vec<KernelMount> {
    below(mountinfo, directory)
        .filter(|line| line.kind == b"erofs")
        .map(|line| KernelMount {
            mountpoint: line.mountpoint,
        })
        .collect()
}

/// Whether this mount is the topmost at its mountpoint: an unmount there would take this one, and no other.
#[must_use]
pub fn is_top(mountinfo: &[u8], mount: &FuseMount) -> bool {
    // The list is in the order in which they were made.
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let there = lines.filter_map(parse_line);
    let top = there.rev().find(|line| line.mountpoint == mount.mountpoint);
    top.is_some_and(|top| top.kind == b"fuse.sluice" && top.minor == mount.connection)
}

struct Line<'a> {
    mountpoint: PathBuf,
    minor: u32,
    kind: &'a [u8],
}

fn below<'a>(mountinfo: &'a [u8], directory: &'a Path) -> impl Iterator<Item = Line<'a>> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let lines = lines.filter_map(parse_line);
    lines.filter(move |line| line.mountpoint.parent() == Some(directory))
}

fn parse_line(line: &[u8]) -> Option<Line<'_>> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let minor = device.split_once(':')?.1.parse().ok()?;
    let mountpoint = unescape(fields.nth(1)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Line {
        mountpoint: OsString::from_vec(mountpoint).into(),
        minor,
        kind,
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits behind a backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut at = 0;
    while let Some(byte) = field.get(at) {
        let digits = field.get(at + 1..at + 4).filter(|_| *byte == b'\\');
        let value = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(value.unwrap_or(*byte));
        at += if value.is_some() { 4 } else { 1 };
    }
    out
}

/// Whether somebody holds an exclusive `flock` on the file with this inode number.
///
/// Looking at the list takes no lock, so whoever wants it at this moment gets it.
/// **Source** proc_locks(5).
#[must_use]
pub fn is_locked(locks: &str, inode: u64) -> bool {
    locks.lines().any(|line| {
        let mut fields = line
            .split_whitespace()
            .skip(1)
            .filter(|field| *field != "->");
        let kind = fields.next();
        let access = fields.nth(1);
        let place = fields.nth(1).and_then(|place| place.rsplit(':').next());
        let same = place.and_then(|inode| inode.parse().ok()) == Some(inode);
        kind == Some("FLOCK") && access == Some("WRITE") && same
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_mounts_are_found_by_type_and_place() {
        let text = b"36 35 98:0 / / rw - ext4 /dev/root rw\n\
            77 36 0:51 / /r\\040x/mnt/aa ro shared:3 - fuse.sluice sluice ro,user_id=0\n\
            78 36 0:52 / /r\\040x/mnt/aa/deeper ro - fuse.sluice sluice ro\n\
            79 36 0:53 / /r\\040x/mnt/bb ro - fuse.other other ro\n\
            80 36 0:54 / /elsewhere/mnt/cc ro - fuse.sluice sluice ro\nnonsense\n";
        let expected = FuseMount {
            mountpoint: "/r x/mnt/aa".into(),
            connection: 51,
        };
        assert_eq!(fuse_mounts(text, Path::new("/r x/mnt")), [expected]);
        assert_eq!(fuse_mounts(b"", Path::new("/")), []);
    }

    #[test]
    fn an_unmount_takes_only_what_is_on_top() {
        let fuse = "77 36 0:51 / /r/mnt/aa ro - fuse.sluice sluice ro\n";
        let kernel = "81 77 0:60 / /r/mnt/aa ro - erofs /r/trees/aa.erofs ro\n";
        let beside = "82 36 0:61 / /r/mnt/bb ro - erofs /r/trees/bb.erofs ro\n";
        let mount = FuseMount {
            mountpoint: "/r/mnt/aa".into(),
            connection: 51,
        };
        let top = |lines: &[&str]| is_top(lines.concat().as_bytes(), &mount);
        assert!(top(&[fuse]) && top(&[fuse, beside]) && top(&[kernel, fuse]));
        assert!(!top(&[fuse, kernel]) && !top(&[]));
        // Another connection that was mounted over it.
        assert!(!top(&[fuse, &fuse.replace("0:51", "0:52")]));
        let both = [fuse, kernel, beside].concat();
        let found = erofs_mounts(both.as_bytes(), Path::new("/r/mnt"));
        let found: Vec<_> = found.into_iter().map(|it| it.mountpoint).collect();
        assert_eq!(found, [Path::new("/r/mnt/aa"), Path::new("/r/mnt/bb")]);
    }

    #[test]
    fn only_an_exclusive_flock_of_that_file_counts() {
        let text = "1: POSIX  ADVISORY  WRITE 900 00:1a:11 0 EOF\n\
            2: FLOCK  ADVISORY  READ 901 00:1a:12 0 EOF\n\
            3: FLOCK  ADVISORY  WRITE 902 08:01:13 0 EOF\n\
            3: -> FLOCK  ADVISORY  WRITE 903 08:01:14 0 EOF\n";
        let locked: Vec<bool> = (11..=15).map(|inode| is_locked(text, inode)).collect();
        assert_eq!(locked, [false, false, true, true, false]);
    }
}
