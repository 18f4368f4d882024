// SPDX-License-Identifier: Apache-2.0
//! Blobs that nobody converted: the scheduler against the tar, and what it asks registries for.

use proptest::prelude::*;
use sluice_blockindex::chunkmap::Codec;

use super::*;
use crate::fixture::unmodified::{Unmodified, Written};
use crate::source::SourceKind::Origin;
use crate::store::{OnRot, SealStep};

/// Only what is wanted comes: what is sent can be reckoned.
fn exact() -> FetcherOptions {
    FetcherOptions {
        gap_bytes: 0,
        ..options()
    }
}

/// A fetcher with one layer, a line to its blob and one to its file of windows.
pub(super) struct Rig {
    pub(super) fetcher: Fetcher,
    pub(super) made: Unmodified,
    pub(super) line: Line,
    windows: Line,
    pub(super) handle: Arc<LayerHandle>,
}

impl Rig {
    pub(super) async fn new(made: Unmodified, with_windows: bool) -> Self {
        let line = Line::new("blob", &made.layer.blob);
        Self::with(made, line, with_windows).await
    }

    pub(super) async fn with(made: Unmodified, line: Line, with_windows: bool) -> Self {
        Self::by(fetcher_with(exact()), made, line, with_windows).await
    }

    /// In a store on a disk that rots and can be filled up.
    pub(super) async fn on_a_disk(made: Unmodified) -> (CrashDisk, Self) {
        let disk = CrashDisk::default();
        let line = Line::new("blob", &made.layer.blob);
        let rig = Self::by(fetcher_on(&disk), made, line, true).await;
        (disk, rig)
    }

    async fn by(fetcher: Fetcher, made: Unmodified, line: Line, with_windows: bool) -> Self {
        let windows = Line::new("windows", &made.windows);
        let source = || Arc::new(windows.clone()) as Arc<dyn BlobSource>;
        let with_windows = with_windows && !made.windows.is_empty();
        let spec = made.spec(vec![Arc::new(line.clone())], with_windows.then(source));
        let handle = fetcher.add_layer(spec).await.unwrap();
        Self {
            fetcher,
            made,
            line,
            windows,
            handle,
        }
    }

    pub(super) fn extent(&self, chunk: u32) -> Extent<DeviceSpace> {
        chunk_extent(&self.made.layer, chunk)
    }

    pub(super) async fn fill(&self, extent: Extent<DeviceSpace>) -> Result<(), FillError> {
        let deadline = Some(60 * SECOND);
        let filled = self
            .fetcher
            .fill(&self.handle, extent, Priority::Foreground, deadline);
        filled.await
    }

    /// Reads as a reader does, and compares with the tar.
    pub(super) async fn read(&self, extent: Extent<DeviceSpace>) {
        self.fill(extent).await.unwrap();
        let at = |offset| usize::try_from(offset).unwrap();
        let mut bytes = vec![0; at(extent.len())];
        self.handle
            .device
            .read_at(extent.start(), &mut bytes)
            .unwrap();
        let expected = &self.made.layer.tar[at(extent.start())..at(extent.end())];
        assert!(bytes == expected, "{extent}");
    }

    pub(super) async fn complete(&self) {
        let job = self.fetcher.prefetch(vec![Arc::clone(&self.handle)]);
        let progress = tokio::time::timeout(3600 * SECOND, job.join()).await;
        assert_eq!(progress.unwrap().sealed_layers, 1);
        assert_eq!(self.present(), self.made.layer.chunks.count());
    }

    /// Checks what is present, and counts it.
    pub(super) fn present(&self) -> u32 {
        check(&self.handle, &self.made.layer)
    }

    /// Bytes of the frames of what is present, each once.
    pub(super) fn frames_bytes(&self) -> u64 {
        let chunks = self.made.layer.chunks.chunks().flatten();
        let present = chunks.filter(|it| self.handle.device.is_present(it.ordinal));
        let mut frames: Vec<_> = present.map(|chunk| chunk.blob).collect();
        frames.dedup();
        frames.iter().map(|frame| frame.len()).sum()
    }

    fn chunk_where(&self, is: impl Fn(&Chunk) -> bool) -> Chunk {
        let mut chunks = self.made.layer.chunks.chunks().flatten();
        chunks.find(|chunk| is(chunk)).unwrap()
    }

    /// A chunk with a window, and none of its device bytes before it present.
    fn windowed(&self) -> Chunk {
        self.chunk_where(|chunk| {
            chunk.ordinal > 3 && windows::pin_of(&self.made.layer.chunks, chunk).is_some()
        })
    }
}

pub(super) fn reads(count: usize) -> impl Strategy<Value = Vec<(usize, usize)>> {
    prop::collection::vec((any::<usize>(), 1_usize..200_000), 1..count)
}

/// Reads at places taken modulo the device.
pub(super) async fn read_all(rig: &Rig, reads: &[(usize, usize)]) {
    let total = rig.made.layer.tar.len();
    for (at, length) in reads {
        let start = at % total;
        let end = total.min(start + length);
        rig.read(Extent::new(start as u64, end as u64).unwrap())
            .await;
    }
}

pub(super) fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Whatever is read in whatever order is what the tar has, and no frame comes twice.
    #[test]
    fn reads_in_any_order_are_the_tar(seed in 0_u64..1000, reads in reads(12)) {
        for written in Written::RANDOM {
            paused().block_on(async {
                let rig = Rig::new(Unmodified::new(seed, written, 1 << 20), true).await;
                read_all(&rig, &reads).await;
                rig.present();
                assert_eq!(rig.line.sent_bytes() as u64, rig.frames_bytes(), "{written:?}");
                // Each window at most once, and some beside it.
                let windows = rig.windows.sent_bytes();
                assert!(windows <= 3 * rig.made.windows.len(), "{written:?}: {windows}");
                rig.complete().await;
                assert_eq!(rig.line.sent_bytes() as u64, rig.frames_bytes(), "{written:?}");
                rig.fetcher.shutdown().await;
            });
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_fixtures_are_what_they_say() {
    let of = |written| Unmodified::new(1, written, 1 << 20).layer.chunks;
    let windows = |written| Unmodified::new(1, written, 1 << 20).windows.len();
    assert!(windows(Written::Gzip) > 8000 && windows(Written::Tar) == 0);
    let codec = |written| of(written).chunk(0).unwrap().codec;
    assert_eq!(codec(Written::Members), Codec::Deflate);
    assert_eq!(codec(Written::Frames), Codec::ZstdFrames);
    assert_eq!(codec(Written::Tar), Codec::Raw);
    let shared = |written| {
        let chunks = of(written);
        let shared = chunks.chunks().flatten().filter(|it| it.skip_bytes > 0);
        shared.count()
    };
    assert!(shared(Written::LongBlocks) > 6 && shared(Written::LongFrames) > 6);
    assert!(shared(Written::Gzip) < 10);
}

#[tokio::test(start_paused = true)]
async fn completion_from_the_front_needs_no_windows() {
    for written in [Written::Gzip, Written::Members, Written::LongBlocks] {
        for with_windows in [false, true] {
            let rig = Rig::new(Unmodified::new(2, written, 3 << 20), with_windows).await;
            rig.complete().await;
            assert_eq!(rig.windows.asked().len(), 0, "{written:?}");
            assert_eq!(rig.line.sent_bytes() as u64, rig.frames_bytes());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_window_comes_beside_its_frame_and_brings_its_neighbours() {
    let rig = Rig::new(Unmodified::new(3, Written::Gzip, 3 << 20), true).await;
    let chunk = rig.windowed();
    let before = clock::now();
    rig.read(chunk.device).await;
    // One round trip for both, not two.
    assert!(clock::now() - before < Duration::from_millis(35));
    assert_eq!((rig.line.asked().len(), rig.windows.asked().len()), (1, 1));
    // A run after it: its windows come from the frames before, or were read with the first one.
    let next = rig
        .extent(chunk.ordinal + 2)
        .hull(rig.extent(chunk.ordinal + 5));
    rig.read(next).await;
    assert_eq!((rig.line.asked().len(), rig.windows.asked().len()), (2, 1));
    // What stands before is present: no window is needed, also of a fetcher that keeps none.
    let further = rig
        .extent(chunk.ordinal + 6)
        .hull(rig.extent(chunk.ordinal + 9));
    rig.read(further).await;
    assert_eq!((rig.line.asked().len(), rig.windows.asked().len()), (3, 1));
    rig.present();
    let of = |source, priority| rig.fetcher.metrics().requests(source, priority);
    assert_eq!(of(Origin, Priority::Foreground), 4);
}

#[tokio::test(start_paused = true)]
async fn without_windows_a_read_in_the_middle_fails_at_once_and_in_order_does_not() {
    let rig = Rig::new(Unmodified::new(4, Written::Gzip, 2 << 20), false).await;
    let chunk = rig.windowed();
    let before = clock::now();
    let error = rig.fill(chunk.device).await.unwrap_err();
    assert!(
        matches!(error, FillError::NoWindows { chunk: of } if of == chunk.ordinal),
        "{error}"
    );
    assert_eq!(error.class(), Class::Permanent);
    assert!(clock::now() - before < SECOND);
    assert_eq!((rig.line.asked().len(), rig.handle.flights.len()), (0, 0));
    // Up to there in one request, and then that chunk.
    let front = Extent::new(0, chunk.device.start()).unwrap();
    rig.read(front).await;
    rig.read(chunk.device).await;
    // And a read that begins at the front goes as far as it likes.
    let all = Extent::new(0, rig.made.layer.tar.len() as u64).unwrap();
    rig.read(all).await;
    assert_eq!(rig.line.sent_bytes() as u64, rig.frames_bytes());
}

#[tokio::test(start_paused = true)]
async fn who_lacks_a_window_waits_for_those_before_who_are_on_their_way() {
    let rig = Rig::new(Unmodified::new(4, Written::Gzip, 2 << 20), false).await;
    let chunk = rig.windowed();
    let front = rig.read(Extent::new(0, chunk.device.start()).unwrap());
    let behind = async {
        tokio::time::sleep(MILLISECOND).await;
        rig.read(chunk.device).await;
    };
    tokio::join!(front, behind);
    assert_eq!(rig.line.sent_bytes() as u64, rig.frames_bytes());
}

#[tokio::test(start_paused = true)]
async fn windows_that_fail_are_told_of_and_tried_again() {
    let rig = Rig::new(Unmodified::new(5, Written::Gzip, 2 << 20), true).await;
    let chunk = rig.windowed();
    let refuse = Some(Mishap::Refuse);
    rig.windows
        .mishaps([refuse, Some(Mishap::Cut(10)), Some(Mishap::Silence), refuse]);
    rig.read(chunk.device).await;
    assert_eq!(rig.windows.asked().len(), 5);
    assert_eq!(rig.fetcher.metrics().failures(Origin, Class::Transient), 4);
    rig.windows.always(refuse);
    let other = rig.chunk_where(|it| {
        it.ordinal > chunk.ordinal + 3
            && windows::pin_of(&rig.made.layer.chunks, it)
                .is_some_and(|pin| !rig.handle.windows.has(&pin))
    });
    let deadline = Some(5 * SECOND);
    let filled = rig
        .fetcher
        .fill(&rig.handle, other.device, Priority::Foreground, deadline);
    let error = filled.await.unwrap_err();
    let FillError::Deadline {
        last: Some(last), ..
    } = &error
    else {
        panic!("{error}");
    };
    assert!(matches!(last, FetchFailure::Windows { .. }), "{error}");
    assert_eq!(rig.present(), 1);
    // Nothing came of the blob that could not be used.
    assert!(rig.line.sent_bytes() as u64 <= rig.frames_bytes() + 100_000);
    rig.windows.always(None);
    rig.read(other.device).await;
}

#[tokio::test(start_paused = true)]
async fn forged_windows_are_refused_and_another_file_serves() {
    let made = Unmodified::new(6, Written::Gzip, 2 << 20);
    let mut forged = made.clone();
    // Every byte of every payload.
    forged
        .windows
        .iter_mut()
        .skip(16)
        .for_each(|byte| *byte ^= 0x55);
    let rig = Rig::new(forged, true).await;
    let chunk = rig.windowed();
    let deadline = Some(3 * SECOND);
    let filled = rig
        .fetcher
        .fill(&rig.handle, chunk.device, Priority::Foreground, deadline);
    let error = filled.await.unwrap_err();
    let FillError::Deadline {
        last: Some(last), ..
    } = &error
    else {
        panic!("{error}");
    };
    assert!(matches!(last, FetchFailure::Windows { .. }), "{error}");
    assert_eq!(last.class(), Class::Corrupt);
    assert_eq!(rig.present(), 0);
    assert!(rig.fetcher.metrics().failures(Origin, Class::Corrupt) > 0);
    let waiting = rig.read(chunk.device);
    let mending = async {
        tokio::time::sleep(MILLISECOND).await;
        let good: Arc<dyn BlobSource> = Arc::new(Line::new("good", &made.windows));
        rig.handle.set_windows(good);
    };
    tokio::join!(waiting, mending);
    assert_eq!(rig.present(), 1);
}

#[tokio::test(start_paused = true)]
async fn readers_of_one_long_frame_make_one_request_for_it() {
    for written in [Written::LongBlocks, Written::LongFrames] {
        let rig = Rig::new(Unmodified::new(7, written, 2 << 20), true).await;
        let second = rig.chunk_where(|it| it.ordinal > 3 && it.skip_bytes > 0);
        let sharing = rig.handle.sharing(second.ordinal);
        assert!(sharing.len() > 3);
        let reads = sharing
            .clone()
            .rev()
            .map(|chunk| rig.read(rig.extent(chunk)));
        futures::future::join_all(reads).await;
        assert_eq!(rig.line.asked().len(), 1, "{written:?}");
        assert_eq!(rig.present() as usize, sharing.len());
        assert_eq!(rig.line.sent_bytes() as u64, second.blob.len());
    }
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_ignores_ranges_sends_the_blob_once() {
    for written in Written::RANDOM {
        for with_windows in [false, true] {
            // In one request, so that none is made before it is known.
            let made = Unmodified::new(8, written, 900_000);
            let line = Line::new("blob", &made.layer.blob).whole();
            let rig = Rig::with(made, line, with_windows).await;
            // The first chunk can be had without a window.
            let all = Extent::new(0, rig.made.layer.tar.len() as u64).unwrap();
            rig.read(all).await;
            assert_eq!(rig.line.asked().len(), 1, "{written:?}");
            rig.complete().await;
            assert_eq!(rig.windows.asked().len(), 0);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_evicted_is_fetched_again() {
    for written in Written::RANDOM {
        let rig = Rig::new(Unmodified::new(9, written, 1 << 20), true).await;
        rig.complete().await;
        rig.fetcher.remove_layer(&rig.made.layer.key).await.unwrap();
        let again = Rig {
            handle: rig
                .fetcher
                .add_layer(rig.made.spec(
                    vec![Arc::new(rig.line.clone())],
                    Some(Arc::new(rig.windows.clone())),
                ))
                .await
                .unwrap(),
            ..rig
        };
        let sent = again.line.sent_bytes() as u64;
        for chunk in (0..again.made.layer.chunks.count()).rev() {
            again.read(again.extent(chunk)).await;
        }
        let frames = again.frames_bytes();
        assert_eq!(again.line.sent_bytes() as u64 - sent, frames, "{written:?}");
        again.complete().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_rotted_is_found_and_fetched_again() {
    for written in Written::RANDOM {
        let (disk, rig) = Rig::on_a_disk(Unmodified::new(10, written, 1 << 20)).await;
        rig.complete().await;
        let chunk = rig.chunk_where(|chunk| chunk.ordinal == 4).device;
        disk.rot(
            &rig.made.layer.key,
            usize::try_from(chunk.end() - 1).unwrap(),
        );
        let audit = rig
            .handle
            .device
            .audit(OnRot::Drop, &mut || SealStep::Continue);
        assert_eq!(audit.unwrap().rotten, [4], "{written:?}");
        rig.read(chunk).await;
        rig.complete().await;
        assert_eq!(rig.windows.asked().len(), 0, "{written:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn device_bytes_that_rotted_are_no_window() {
    let (disk, rig) = Rig::on_a_disk(Unmodified::new(11, Written::Gzip, 2 << 20)).await;
    let chunk = rig.windowed();
    let before = rig.extent(chunk.ordinal - 1);
    rig.read(before).await;
    let asked = rig.windows.asked().len();
    // Far outside of what the window needs, and yet nobody vouches for the rest.
    disk.rot(
        &rig.made.layer.key,
        usize::try_from(before.start()).unwrap(),
    );
    rig.handle.windows.forget();
    rig.read(chunk.device).await;
    assert_eq!(rig.windows.asked().len(), asked + 1);
    assert_eq!(rig.fetcher.metrics().corrupt_chunks(Origin), 0);
}

#[tokio::test(start_paused = true)]
async fn a_full_store_passes_gzip_to_its_readers() {
    let (disk, rig) = Rig::on_a_disk(Unmodified::new(12, Written::Gzip, 2 << 20)).await;
    disk.fill_up(u32::MAX);
    let extent = rig.extent(6).hull(rig.extent(9));
    let at = |offset| usize::try_from(offset).unwrap();
    let bytes = rig.made.layer.tar[at(extent.start())..at(extent.end())].to_vec();
    let pass =
        rig.fetcher
            .fill_or_pass(&rig.handle, extent, Priority::Foreground, Some(60 * SECOND));
    assert_eq!(pass.await.unwrap(), Filled::Passed(bytes.into()));
    assert_eq!(rig.present(), 0);
}
