// SPDX-License-Identifier: Apache-2.0
//! Layers for tests of more than one module.

/// A tar with a GNU sparse file, whose content is no single run.
pub fn sparse_tar() -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_path("sparse").unwrap();
    header.set_size(512);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.realsize = *b"00000010000\0";
    gnu.sparse[0].offset = *b"00000000000\0";
    gnu.sparse[0].numbytes = *b"00000001000\0";
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend([1; 512]);
    bytes.extend([0; 1024]);
    bytes
}
