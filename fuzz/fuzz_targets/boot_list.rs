// SPDX-License-Identifier: Apache-2.0
//! Invariant: no bytes make the decoders of boot lists panic or allocate beyond their bounds; what
//! decodes is written back as the very same bytes; and the parts of a list make it up again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::boot::{BootList, BootPart, BOOT_CHUNKS_MAX, BOOT_LAYERS_MAX};

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        if let Ok(part) = BootPart::from_text(text) {
            assert_eq!(part.to_text(usize::MAX).map(|(text, _)| text).unwrap_or_default(), text_of(&part, text));
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

/// A part without chunks has no text of its own.
fn text_of(part: &BootPart, text: &str) -> String {
    match part.chunks().is_empty() {
        true => String::new(),
        false => text.to_owned(),
    }
}
