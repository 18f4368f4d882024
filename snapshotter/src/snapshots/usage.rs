// SPDX-License-Identifier: Apache-2.0
//! Disk usage of a directory tree.

use std::collections::BTreeSet;
use std::fs::{Metadata, symlink_metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::Usage;

/// Unit of `st_blocks`, whatever the file system's block size: see stat(2).
const ST_BLOCKS_UNIT: u64 = 512;

/// Allocated bytes and distinct inodes of a tree, its root included. What vanishes meanwhile does
/// not count: a container may be writing.
pub(crate) fn of_tree(root: &Path) -> io::Result<Usage> {
    let mut tally = Tally::default();
    tally.add(&symlink_metadata(root)?);
    let mut pending = vec![root.to_path_buf()];
    while let Some(directory) = pending.pop() {
        let entries = match std::fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => (),
                Err(error) => return Err(error),
                Ok(metadata) => {
                    tally.add(&metadata);
                    if metadata.is_dir() {
                        pending.push(entry.path());
                    }
                }
            }
        }
    }
    Ok(tally.usage)
}

/// Allocated bytes of one file or directory, without what is in it.
pub(crate) fn of_file(path: &Path) -> io::Result<Usage> {
    let mut tally = Tally::default();
    tally.add(&symlink_metadata(path)?);
    Ok(tally.usage)
}

#[derive(Debug, Default)]
struct Tally {
    usage: Usage,
    /// (device, inode) of files with several links: the others cannot come twice.
    linked: BTreeSet<(u64, u64)>,
}

impl Tally {
    fn add(&mut self, metadata: &Metadata) {
        let again = !metadata.is_dir()
            && metadata.nlink() > 1
            && !self.linked.insert((metadata.dev(), metadata.ino()));
        if !again {
            self.usage.inodes += 1;
            self.usage.size_bytes += metadata.blocks() * ST_BLOCKS_UNIT;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_count_once_and_holes_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        let empty = of_tree(root.path()).unwrap();
        assert_eq!(empty.inodes, 1);

        std::fs::write(path("a"), vec![1; 100_000]).unwrap();
        std::fs::create_dir(path("d")).unwrap();
        std::fs::hard_link(path("a"), path("d/b")).unwrap();
        std::os::unix::fs::symlink("a", path("s")).unwrap();
        std::fs::File::create(path("sparse"))
            .unwrap()
            .set_len(1 << 30)
            .unwrap();
        let usage = of_tree(root.path()).unwrap();
        assert_eq!(usage.inodes, 5); // root, a, d, s, sparse
        let bytes = usage.size_bytes - empty.size_bytes;
        assert!((100_000..200_000).contains(&bytes), "{bytes}");
        assert!(of_tree(&path("missing")).is_err());
    }
}
