// SPDX-License-Identifier: Apache-2.0
//! What is wrong below or beside the scheduler: rot, sources that lie, sources that trickle.

use std::sync::atomic::{AtomicBool, Ordering};

use sluice_blockindex::digest::{BlobDigest, StrongAlgorithm};
use sluice_blockindex::encode::{EncodeOptions, encode_layer};
use sluice_blockindex::index::{UncheckedIndex, decompress_index};

use super::*;

/// An index file that rots after it was validated, as a mapped one may.
#[derive(Clone)]
struct Rotting(Arc<(Vec<u8>, Vec<u8>, AtomicBool)>);

impl AsRef<[u8]> for Rotting {
    fn as_ref(&self) -> &[u8] {
        let (good, rotten, rots) = &*self.0;
        if rots.load(Ordering::Relaxed) {
            rotten
        } else {
            good
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_chunk_map_that_rots_ends_the_fill() {
    let tar = [0; 10_240];
    let options = EncodeOptions {
        level: 1,
        algorithm: StrongAlgorithm::Blake3,
        ..EncodeOptions::default()
    };
    let (blob, trailer) = encode_layer(&tar, options).unwrap();
    let pin = trailer.index.unwrap();
    let range =
        usize::try_from(pin.extent.start()).unwrap()..usize::try_from(pin.extent.end()).unwrap();
    let file = decompress_index(&blob[range], pin.file_bytes).unwrap();
    let index = UncheckedIndex::parse(file.clone())
        .unwrap()
        .validate()
        .unwrap();
    let digest = index.chunk_map().chunk(0).unwrap().digest.0;
    let mut rotten = file.clone();
    let at = file.windows(digest.len()).position(|it| it == digest);
    // The codec's byte stands 8 bytes before the digest.
    rotten[at.unwrap() - 8] = 0xff;
    for in_flight in [false, true] {
        let bytes = Rotting(Arc::new((
            file.clone(),
            rotten.clone(),
            AtomicBool::new(false),
        )));
        let index = UncheckedIndex::parse(bytes.clone())
            .unwrap()
            .validate()
            .unwrap();
        let fetcher = fetcher();
        let line = Line::new("a", &blob);
        line.always(Some(Mishap::Refuse));
        let spec = LayerSpec {
            key: DeviceKey {
                diff_id: trailer.diff_id,
                index: pin.digest,
            },
            chunks: index.chunk_map().clone(),
            blob: BlobDigest::of(&blob),
            blob_bytes: trailer.blob_bytes,
            sources: vec![Arc::new(line.clone())],
        };
        let handle = fetcher.add_layer(spec).await.unwrap();
        let rot = async {
            if in_flight {
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
            bytes.0.2.store(true, Ordering::Relaxed);
        };
        let extent = Extent::new(0, 10).unwrap();
        let fill = fetcher.fill(&handle, extent, Priority::Foreground, None);
        let ((), filled) = tokio::join!(rot, fill);
        assert!(no_such_chunk(&filled), "{filled:?}");
    }
}

fn no_such_chunk(filled: &Result<(), FillError>) -> bool {
    matches!(filled, Err(FillError::Store(error))
        if matches!(**error, StoreError::NoSuchChunk { chunk: 0 }))
}
