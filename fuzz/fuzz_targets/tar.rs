// SPDX-License-Identifier: Apache-2.0
//! Invariant: no bytes make the tar scanner panic, overflow or run away; the outcome and what its sink
//! sees are the same however the bytes are cut into pieces; the sink gets exactly the bytes pushed; and
//! a tree that comes out can be written and is valid.
//!
//! The first byte chooses the pieces. Checksums of headers are put right, or hardly any mutation
//! would get past them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::erofs::{validate, write_tree, DeviceSlot, TreeLimits};
use sluice_blockindex::extent::{DeviceSpace, Extent};
use sluice_blockindex::tar::{ScanError, Scanner, TarSink};
use sluice_blockindex::tree::Tree;

#[derive(Default, PartialEq, Debug)]
struct Seen {
    bytes: Vec<u8>,
    contents: Vec<Extent<DeviceSpace>>,
    inside: bool,
}

impl TarSink for Seen {
    fn structure(&mut self, bytes: &[u8]) {
        assert!(!self.inside);
        self.bytes.extend_from_slice(bytes);
    }
    fn content_start(&mut self, run: Extent<DeviceSpace>) {
        assert!(!self.inside && !run.is_empty());
        assert_eq!(run.start(), self.bytes.len() as u64);
        self.inside = true;
        self.contents.push(run);
    }
    fn content(&mut self, bytes: &[u8]) {
        assert!(self.inside);
        self.bytes.extend_from_slice(bytes);
    }
    fn content_end(&mut self) {
        assert_eq!(self.contents.last().map(|run| run.end()), Some(self.bytes.len() as u64));
        self.inside = false;
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((piece, tar)) = data.split_first() else {
        return;
    };
    let mut tar = tar.to_vec();
    for block in tar.chunks_exact_mut(512) {
        // Only what looks like a header: a known magic.
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    let whole = scan(&tar, tar.len().max(1));
    let cut = scan(&tar, usize::from(*piece) + 1);
    assert_eq!(whole.1, cut.1);
    match (whole.0, cut.0) {
        (Ok(whole_tree), Ok(cut_tree)) => {
            assert_eq!(whole.1.bytes, tar);
            let device = DeviceSlot { tag: [b'0'; 64], blocks: tar.len().div_ceil(512) as u64 };
            let image = write_tree(&whole_tree, &[device]);
            assert_eq!(image, write_tree(&cut_tree, &[device]));
            if let Ok(image) = image {
                validate(&image, TreeLimits::default()).expect("what we write is valid");
            }
        }
        (Err(whole_error), Err(cut_error)) => assert_eq!(whole_error, cut_error),
        _ => panic!("one way fails, the other does not"),
    }
});

fn scan(tar: &[u8], piece: usize) -> (Result<Tree, ScanError>, Seen) {
    let mut seen = Seen::default();
    let mut scanner = Scanner::new();
    for bytes in tar.chunks(piece) {
        if let Err(error) = scanner.push(bytes, &mut seen) {
            return (Err(error), seen);
        }
    }
    (scanner.finish(), seen)
}
