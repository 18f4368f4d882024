// SPDX-License-Identifier: Apache-2.0
//! Which chunks a list means where whole pages of a device are asked for: pure.
//!
//! Who reads a device through the kernel's page cache asks for its pages. Files begin between pages, and so do
//! chunks: the first read of a file needs the chunk before it, and the last one what follows. A list that was recorded
//! where files are asked for names neither.

use std::collections::HashSet;
use std::sync::Arc;

use sluice_blockindex::chunkmap::ChunkMap;
use sluice_blockindex::extent::{DeviceSpace, Extent};

use super::BootRead;
use crate::scheduler::LayerHandle;

/// The chunks that hold any byte of a page, of `page_bytes`, which a chunk of `list` has a part in. In the order of
/// the list, each once, beside what it shares a page with; what a layer does not have is left out.
#[must_use]
pub fn whole_pages(
    layers: &[Arc<LayerHandle>],
    list: &[BootRead],
    page_bytes: u64,
) -> Vec<BootRead> {
    let maps: Vec<&ChunkMap> = layers.iter().map(|it| it.chunks()).collect();
    of_pages(&maps, list, page_bytes)
}

fn of_pages(maps: &[&ChunkMap], list: &[BootRead], page_bytes: u64) -> Vec<BootRead> {
    let page_bytes = page_bytes.max(1);
    let mut seen = HashSet::new();
    let mut reads = Vec::with_capacity(list.len());
    for read in list {
        let Some(map) = maps.get(read.layer) else {
            continue;
        };
        let Some(chunk) = map.chunk(read.chunk) else {
            continue;
        };
        let (start, end) = (chunk.device.start(), chunk.device.end());
        let start = start - start % page_bytes;
        let end = end.checked_next_multiple_of(page_bytes).unwrap_or(end);
        let pages = Extent::<DeviceSpace>::new(start, end).unwrap_or(chunk.device);
        let beside = map.covering(pages).map(|chunk| BootRead {
            layer: read.layer,
            chunk,
        });
        reads.extend(beside.filter(|it| seen.insert(*it)));
    }
    reads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::TestLayer;

    #[test]
    fn what_shares_a_page_comes_too() {
        // Ends: 4096, 5096, 8192, 9192, 12288, 20480, 20580.
        let odd = TestLayer::new(1, &[4096, 1000, 3096, 1000, 3096, 8192, 100]);
        let even = TestLayer::even(2, 4, 8192);
        let maps = [&odd.chunks, &even.chunks];
        type Places = &'static [(usize, u32)];
        let cases: [(Places, Places); 7] = [
            (&[], &[]),
            (&[(0, 0)], &[(0, 0)]),
            (&[(0, 2), (0, 1)], &[(0, 1), (0, 2)]),
            (&[(0, 4), (1, 3), (0, 3)], &[(0, 3), (0, 4), (1, 3)]),
            // The device ends within its last page.
            (&[(0, 6), (0, 5)], &[(0, 6), (0, 5)]),
            (&[(1, 1), (1, 1)], &[(1, 1)]),
            // Nonsense.
            (&[(2, 0), (0, 7), (1, 4)], &[]),
        ];
        let read = |(layer, chunk): &(usize, u32)| BootRead {
            layer: *layer,
            chunk: *chunk,
        };
        for (list, expected) in cases {
            let list: Vec<_> = list.iter().map(read).collect();
            let expected: Vec<_> = expected.iter().map(read).collect();
            assert_eq!(of_pages(&maps, &list, 4096), expected, "{list:?}");
        }
        // Larger pages than chunks, and none that could be.
        assert_eq!(of_pages(&maps, &[read(&(0, 4))], 16384).len(), 6);
        assert_eq!(of_pages(&maps, &[read(&(0, 4))], 0), [read(&(0, 4))]);
    }
}
