// SPDX-License-Identifier: Apache-2.0
//! Files without a name for blobs on their way: what is not finished vanishes with the process,
//! however it ends. A finished one is given a name at once, whole.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A new empty file in `directory` with no name, mode 0644 once it is linked.
pub fn create(directory: &Path) -> io::Result<File> {
    let unnamed = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o644)
        .custom_flags(libc::O_TMPFILE)
        .open(directory);
    match unnamed {
        // Not every file system can; there the name is taken away right after creation.
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)
            ) =>
        {
            tempfile::tempfile_in(directory)
        }
        other => other,
    }
}

/// Gives the unnamed file a name on the same file system. **Errors**: it exists, it is another file
/// system, or the file system cannot; callers then copy.
pub fn link(file: &File, path: &Path) -> io::Result<()> {
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    nix::unistd::linkat(
        nix::fcntl::AT_FDCWD,
        Path::new(&source),
        nix::fcntl::AT_FDCWD,
        path,
        nix::fcntl::AtFlags::AT_SYMLINK_FOLLOW,
    )
    .map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_spool_has_no_name_until_it_is_linked() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = create(directory.path()).unwrap();
        file.write_all(b"bytes").unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let path = directory.path().join("named");
        link(&file, &path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"bytes");
        assert!(link(&file, &path).is_err());
    }
}
