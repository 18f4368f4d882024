// SPDX-License-Identifier: Apache-2.0
//! Whether a tree is what a device's tar says.
//!
//! The diff ID proves the bytes of a layer, and no more: which names, modes and owners stand over them is the tree's
//! word. Who made the tree of the bytes himself need not ask. Of a tree that somebody else made, the bytes are read
//! once more, as they are hashed for the seal; what the scanner makes of them must be that tree.
//!
//! Trees are compared as the writer of this version writes them, so another layout of the same files is no difference.
//! What the scanner makes of a tar is part of the format for this reason: a change to it makes honest trees of older
//! versions fail.

use crate::digest::DiffId;
use crate::erofs::{DeviceSlot, TreeError, TreeReader, WriteError, to_tree, write_tree};
use crate::index::device_tag;
use crate::tar::{ScanError, Scanner};
use crate::units::blocks_for;

/// Why a tree is not what the tar says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeFault {
    /// The tar has no tree at all.
    #[error("no tree can be made of its tar: {0}")]
    Scan(#[from] ScanError),
    /// The tree of the tar cannot be written.
    #[error("the tree of its tar cannot be written: {0}")]
    Write(#[from] WriteError),
    /// The tree in question cannot be read.
    #[error("its tree cannot be read: {0}")]
    Tree(#[from] TreeError),
    /// They differ.
    #[error("its tree has other files than its tar")]
    Differs,
}

/// Takes a device from its first byte to its last.
///
/// **Units** memory: as an indexer's tree, some hundred bytes for each file.
#[derive(Debug)]
pub struct TreeProof {
    scanner: Result<Scanner, ScanError>,
    device_bytes: u64,
}

impl Default for TreeProof {
    fn default() -> Self {
        Self {
            scanner: Ok(Scanner::new()),
            device_bytes: 0,
        }
    }
}

impl TreeProof {
    /// Takes the next bytes of the device.
    pub fn push(&mut self, bytes: &[u8]) {
        self.device_bytes += bytes.len() as u64;
        if let Ok(scanner) = &mut self.scanner
            && let Err(error) = scanner.push(bytes, &mut ())
        {
            self.scanner = Err(error);
        }
    }

    /// Whether `tree` is what the bytes say, of a layer with this diff ID.
    ///
    /// **Errors** [`TreeFault`].
    pub fn finish(self, tree: TreeReader<'_>, diff_id: DiffId) -> Result<(), TreeFault> {
        let scanned = self.scanner.and_then(Scanner::finish)?;
        let device = [DeviceSlot {
            tag: *device_tag(diff_id),
            blocks: blocks_for(self.device_bytes),
        }];
        let expected = write_tree(&scanned, &device)?;
        drop(scanned);
        // Nearly always, and then nothing is loaded.
        if tree.bytes() == expected {
            return Ok(());
        }
        match write_tree(&to_tree(tree)?, &device)? == expected {
            true => Ok(()),
            false => Err(TreeFault::Differs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::indexer::{IndexOptions, index_blob};
    use crate::tree::Tree;

    /// A file that the test changes, another one, and a link.
    fn tar_of(change: impl FnOnce(&mut tar::Header) -> &'static str) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for number in 0..2 {
            let mut header = tar::Header::new_gnu();
            header.set_size(600);
            header.set_mode(0o644);
            header.set_path(format!("other-{number}")).unwrap();
            header.set_cksum();
            builder.append(&header, &[number; 600][..]).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(600);
        header.set_mode(0o755);
        let path = change(&mut header);
        header.set_path(path).unwrap();
        header.set_cksum();
        builder.append(&header, &[9; 600][..]).unwrap();
        builder.into_inner().unwrap()
    }

    fn honest() -> Vec<u8> {
        tar_of(|_| "program")
    }

    /// Whether the tree of one tar passes for that of another.
    fn passes(tree_of: &[u8], bytes: &[u8]) -> Result<(), TreeFault> {
        let index = index_blob(tree_of, IndexOptions::default()).unwrap();
        let file = index.index.unwrap().file;
        let index = crate::index::UncheckedIndex::parse_unmodified(file).unwrap();
        let index = index.validate().unwrap();
        let mut proof = TreeProof::default();
        bytes.chunks(777).for_each(|part| proof.push(part));
        proof.finish(index.tree().unwrap(), DiffId::of(bytes))
    }

    #[test]
    fn a_tree_with_anything_else_than_the_tar_says_is_found_out() {
        passes(&honest(), &honest()).unwrap();
        type Change = fn(&mut tar::Header) -> &'static str;
        let cases: [(&str, Change); 5] = [
            ("name", |_| "prograM"),
            ("setuid", |it| {
                it.set_mode(0o4755);
                "program"
            }),
            ("owner", |it| {
                it.set_uid(7);
                "program"
            }),
            ("time", |it| {
                it.set_mtime(1);
                "program"
            }),
            ("place", |_| "a/program"),
        ];
        for (what, change) in cases {
            let result = passes(&tar_of(change), &honest());
            assert!(
                matches!(result, Err(TreeFault::Differs)),
                "{what}: {result:?}"
            );
        }
        // Content of one file under the name of another: the device is the same in all else.
        let mut swapped = honest();
        let (first, second) = swapped.split_at_mut(3 * 512);
        first[..512].swap_with_slice(&mut second[..512]);
        let result = passes(&swapped, &honest());
        assert!(matches!(result, Err(TreeFault::Differs)), "{result:?}");
        let cut = &honest()[..700];
        let result = passes(&honest(), cut);
        assert!(matches!(result, Err(TreeFault::Scan(_))), "{result:?}");
    }

    #[test]
    fn another_layout_of_the_same_files_passes() {
        let bytes = honest();
        let mut proof = TreeProof::default();
        proof.push(&bytes);
        let tree: Tree = {
            let mut scanner = Scanner::new();
            scanner.push(&bytes, &mut ()).unwrap();
            scanner.finish().unwrap()
        };
        // Another size of the device slot, another tag: other bytes, and the same files.
        let slot = DeviceSlot {
            tag: [b'x'; 64],
            blocks: 1 << 20,
        };
        let written = write_tree(&tree, &[slot]).unwrap();
        let reader = TreeReader::open(&written).unwrap();
        proof.finish(reader, DiffId::of(&bytes)).unwrap();
    }
}
