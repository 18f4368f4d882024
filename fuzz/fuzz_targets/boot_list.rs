// SPDX-License-Identifier: Apache-2.0
//! Invariant: no bytes make the decoders of boot lists panic or allocate beyond their bounds; what
//! decodes is written back as the very same bytes; and the parts of a list make it up again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::boot::{BootList, BootPart, BOOT_CHUNKS_MAX, BOOT_LAYERS_MAX};

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        let texts: Vec<&str> = text.lines().collect();
        if let Ok(part) = BootPart::from_texts(&texts) {
            let (written, count) = part.to_texts(1, usize::MAX);
            assert_eq!(count, part.chunks().len());
            // One text has one spelling; a part without chunks has none of its own.
            if let ([text], [again]) = (texts.as_slice(), written.as_slice()) {
                assert_eq!(again, text);
            }
            if count > 0 {
                assert_eq!(BootPart::from_texts(&written), Ok(part));
            }
        }
    }
    if let Ok(part) = BootPart::decode(data) {
        assert_eq!(part.encode(), data);
        assert!(part.chunks().len() <= BOOT_CHUNKS_MAX);
        assert!(part.chunks().windows(2).all(|pair| pair[0].position < pair[1].position));
    }
    let Ok(list) = BootList::decode(data) else {
        return;
    };
    assert_eq!(list.encode(), data);
    assert!(list.chunks().len() <= BOOT_CHUNKS_MAX && list.layers().len() <= BOOT_LAYERS_MAX);
    let mut unique = list.layers().to_vec();
    unique.sort();
    unique.dedup();
    if unique.len() == list.layers().len() {
        let count = u16::try_from(list.layers().len()).unwrap();
        let parts: Vec<BootPart> = (0..count).filter_map(|layer| list.part(layer)).collect();
        assert_eq!(BootList::of_parts(list.layers().to_vec(), &parts), Ok(list));
    }
});
