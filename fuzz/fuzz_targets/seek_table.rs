// SPDX-License-Identifier: Apache-2.0
//! Invariant: no bytes make the seek table's parser panic or allocate more than the input has; and what
//! parses is written back to a table that parses to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::seektable::{frame_bytes, parse, write};

fuzz_target!(|data: &[u8]| {
    let _ = frame_bytes(data);
    if let Ok(entries) = parse(data) {
        assert!(entries.len() * 8 <= data.len());
        let table = write(entries.iter().copied()).expect("as many as were read");
        assert_eq!(parse(&table).as_ref(), Ok(&entries));
        assert_eq!(frame_bytes(&table[table.len() - 9..]), Ok(table.len() as u64));
    }
});
