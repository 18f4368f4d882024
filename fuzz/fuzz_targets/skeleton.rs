// SPDX-License-Identifier: Apache-2.0
//! Invariant: no payload makes a rebuild panic, write more than the device has, or ask for a content
//! beyond it; and a rebuild that succeeds wrote exactly the device.
//!
//! The first four bytes are the device's size; the rest is the payload before its compression.
#![no_main]

use std::io::{self, Read, Write};

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::skeleton::{rebuild, ContentRequest};

fuzz_target!(|data: &[u8]| {
    let Some((size, payload)) = data.split_first_chunk::<4>() else {
        return;
    };
    let device_bytes = u64::from(u32::from_le_bytes(*size)) % (1 << 20);
    let compressed = zstd::encode_all(payload, 1).expect("in memory");
    for payload in [payload, &compressed] {
        let mut out = Vec::new();
        let provide = |request: ContentRequest, out: &mut dyn Write| {
            assert!(request.run.end() <= device_bytes);
            io::copy(&mut io::repeat(1).take(request.run.len()), out).map(drop)
        };
        let result = rebuild(payload, device_bytes, provide, &mut out);
        assert!(out.len() as u64 <= device_bytes);
        if result.is_ok() {
            assert_eq!(out.len() as u64, device_bytes);
        }
    }
});
