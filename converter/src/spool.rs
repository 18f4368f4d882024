// SPDX-License-Identifier: Apache-2.0
//! Files without a name for blobs on their way: what is not finished vanishes with the process,
//! however it ends. A finished one is given a name at once, whole.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
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

/// Gives the unnamed file the name `path`, in place of what has it: all of it durable, or nothing
/// changed. Blocks.
pub fn replace(file: &File, path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    file.sync_all()?;
    // A link cannot take the place of another, but a rename can.
    let linked = tempfile::Builder::new().make_in(directory, |path| link(file, path));
    match linked {
        Ok(linked) => linked.persist(path).map_err(|e| e.error)?,
        Err(_) => {
            let mut copy = tempfile::NamedTempFile::new_in(directory)?;
            (&*file).seek(SeekFrom::Start(0))?;
            io::copy(&mut &*file, &mut copy)?;
            copy.as_file().sync_all()?;
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            copy.as_file().set_permissions(mode)?;
            copy.persist(path).map_err(|e| e.error)?;
        }
    }
    File::open(directory)?.sync_all()
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

    #[test]
    fn a_spool_takes_the_place_of_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("named");
        for bytes in [b"first", b"later"] {
            let mut file = create(directory.path()).unwrap();
            file.write_all(bytes).unwrap();
            replace(&file, &path).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
            assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        }
    }
}
