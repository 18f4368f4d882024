// SPDX-License-Identifier: Apache-2.0
//! Layers that are lazy by the table of contents that others wrote.

use super::unmodified::Rig;
use crate::fixture::contents::{estargz, zstd_chunked};
use crate::fixture::unmodified::Unmodified;

/// Files that share a stream, files of several chunks, and files that end on a block.
const SIZES: [usize; 9] = [700, 3, 200, 599, 20_000, 512, 9000, 1, 1];

fn both(seed: u64) -> [Unmodified; 2] {
    [estargz(seed, &SIZES), zstd_chunked(seed, &SIZES)].map(|layer| Unmodified {
        layer,
        windows: Vec::new(),
    })
}

#[tokio::test(start_paused = true)]
async fn any_chunk_is_read_alone_and_costs_its_frame() {
    for made in both(41) {
        let count = made.layer.chunks.count();
        for ordinal in 0..count {
            let rig = Rig::new(made.clone(), false).await;
            rig.read(rig.extent(ordinal)).await;
            assert_eq!(
                rig.line.sent_bytes() as u64,
                rig.frames_bytes(),
                "chunk {ordinal}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_layer_is_completed_and_sealed_without_its_diff_id() {
    for made in both(42) {
        let rig = Rig::new(made, false).await;
        rig.complete().await;
        assert!(rig.handle.device().is_sealed());
        // No device of another index stands in for it, nor it for one.
        assert_eq!(rig.fetcher.store().sealed_twins(&rig.handle.key()), []);
    }
}
