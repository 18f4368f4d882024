// SPDX-License-Identifier: Apache-2.0
//! A blob of one long zstd frame: one pass over it, whoever reads what when.

use super::unmodified::{Rig, paused, read_all, reads};
use super::*;
use crate::fixture::unmodified::Unmodified;
use crate::store::{OnRot, SealStep};

/// A layer of one frame, a line that sends `piece_bytes` each millisecond.
async fn rig(seed: u64, piece_bytes: usize) -> Rig {
    let made = Unmodified::one_frame(seed);
    let line = Line::new("blob", &made.layer.blob).pieces(piece_bytes, MILLISECOND);
    let rig = Rig::with(made, line, false).await;
    assert_eq!(rig.handle.streams().len(), 1);
    assert!(rig.count() > 100, "{} chunks", rig.count());
    rig
}

impl Rig {
    fn count(&self) -> u32 {
        self.made.layer.chunks.count()
    }

    fn sent(&self) -> u64 {
        self.line.sent_bytes() as u64
    }

    /// All up to this chunk came, and nothing twice.
    fn check_once(&self, last: u32) {
        assert!((last + 1..last + 4).contains(&self.present()));
        self.check_sent(self.end_of(last));
    }

    /// So much came. A decoder may give a chunk a little before the place that the index names.
    fn check_sent(&self, bytes: u64) {
        let sent = self.sent();
        assert!(
            sent <= bytes && sent + (128 << 10) > bytes,
            "{sent} of {bytes}"
        );
    }

    fn end_of(&self, chunk: u32) -> u64 {
        self.made.layer.chunks.chunk(chunk).unwrap().blob.end()
    }

    fn last(&self) -> u32 {
        self.count() - 1
    }
}

#[tokio::test(start_paused = true)]
async fn reads_ahead_of_the_front_go_on_where_it_is() {
    let rig = rig(20, 16 << 10).await;
    let last = rig.last();
    for (chunk, front) in [(5, 5), (3, 5), (40, 40), (12, 40), (last, last)] {
        rig.read(rig.extent(chunk)).await;
        rig.check_once(front);
    }
    assert_eq!(rig.line.asked().len(), 3);
    rig.complete().await;
    rig.check_once(rig.last());
    rig.fetcher.shutdown().await;
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 4, ..Default::default() })]

    /// Whatever is read in whatever order, also at once, is what the tar has, and nothing comes twice.
    #[test]
    fn reads_in_any_order_are_the_tar(seed in 0_u64..1000, rounds in reads(4), together in reads(4)) {
        paused().block_on(async {
            let rig = rig(seed, 16 << 10).await;
            read_all(&rig, &rounds).await;
            let at_once = together.iter().map(|read| read_all(&rig, std::slice::from_ref(read)));
            futures::future::join_all(at_once).await;
            rig.complete().await;
            rig.check_once(rig.last());
        });
    }
}

#[tokio::test(start_paused = true)]
async fn completion_is_one_pass() {
    let rig = rig(21, 16 << 10).await;
    rig.complete().await;
    rig.check_once(rig.last());
    let starts: Vec<u64> = rig
        .line
        .asked()
        .iter()
        .map(|it| it.extent.start())
        .collect();
    assert!(starts.is_sorted() && starts.len() < 8, "{starts:?}");
}

#[tokio::test(start_paused = true)]
async fn readers_join_the_pass_before_and_behind_its_front() {
    let rig = rig(22, 4 << 10).await;
    let count = rig.count();
    let reader = |after: u32, chunk: u32| {
        let rig = &rig;
        async move {
            tokio::time::sleep(after * MILLISECOND).await;
            rig.read(rig.extent(chunk)).await;
        }
    };
    let readers = (0..8).map(|it| reader(25 + 30 * it, (it * 7919) % count));
    let readers = futures::future::join_all(readers.chain([reader(26, count - 1)]));
    let (_, ()) = tokio::join!(readers, rig.complete());
    rig.check_once(rig.last());
}

#[tokio::test(start_paused = true)]
async fn a_pass_that_breaks_off_goes_on_from_there() {
    let rig = rig(23, 4 << 10).await;
    let cuts = [50_000, 0, 300_001, 7].map(|at| Some(Mishap::Cut(at)));
    rig.line.mishaps(cuts);
    rig.line
        .mishaps([Some(Mishap::Refuse), Some(Mishap::Stall(100_000))]);
    rig.read(rig.extent(rig.last())).await;
    rig.check_once(rig.last());
    assert_eq!(rig.line.asked().len(), 7);
}

#[tokio::test(start_paused = true)]
async fn wrong_bytes_end_the_pass_and_another_source_begins_anew() {
    let made = Unmodified::one_frame(24);
    let at = made.layer.chunks.chunk(60).unwrap().blob.start() + 10;
    let bad = Line::new("bad", &made.layer.blob).flip(at);
    let rig = Rig::with(made, bad, false).await;
    let good = Line::new("good", &rig.made.layer.blob);
    rig.handle.add_source(Arc::new(good.clone()));
    rig.read(rig.extent(rig.count() - 1)).await;
    assert_eq!(rig.present(), rig.count());
    assert!(rig.fetcher.metrics().corrupt_chunks(SourceKind::Origin) >= 1);
    assert_eq!(good.asked()[0].extent.start(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_decoder_that_is_gone_costs_a_pass_and_no_more() {
    let rig = rig(25, 16 << 10).await;
    rig.read(rig.extent(30)).await;
    let first = rig.sent();
    rig.fetcher.core.fronts.forget(&rig.made.layer.key);
    rig.read(rig.extent(45)).await;
    assert!((46..50).contains(&rig.present()));
    rig.check_sent(first + rig.end_of(45));
}

#[tokio::test(start_paused = true)]
async fn a_blob_that_comes_whole_is_passed_over_once() {
    let made = Unmodified::one_frame(26);
    let bytes = made.layer.blob.len();
    let line = Line::new("blob", &made.layer.blob).whole();
    let rig = Rig::with(made, line, false).await;
    let last = rig.count() - 1;
    tokio::join!(
        rig.read(rig.extent(last)),
        rig.read(rig.extent(3)),
        rig.read(rig.extent(last / 2))
    );
    assert_eq!(rig.present(), rig.count());
    assert!(rig.line.sent_bytes() <= bytes);
    rig.complete().await;
}

#[tokio::test(start_paused = true)]
async fn a_list_of_a_start_is_loaded_in_one_pass() {
    let rig = rig(27, 16 << 10).await;
    let list: Vec<_> = [90, 2, 50, 51, 7]
        .map(|chunk| crate::boot::BootRead { layer: 0, chunk })
        .into();
    let layers = [Arc::clone(&rig.handle)];
    rig.fetcher.load_boot_list(&layers, &list).join().await;
    // What was handed over goes on after it.
    rig.read(rig.extent(90)).await;
    rig.check_once(90);
}

#[tokio::test(start_paused = true)]
async fn what_rotted_behind_the_front_comes_by_a_new_pass() {
    let (disk, rig) = Rig::on_a_disk(Unmodified::one_frame(28)).await;
    rig.read(rig.extent(80)).await;
    let rotten = rig.extent(33);
    disk.rot(
        &rig.made.layer.key,
        usize::try_from(rotten.start()).unwrap(),
    );
    let audit = rig
        .handle
        .device
        .audit(OnRot::Drop, &mut || SealStep::Continue);
    assert_eq!(audit.unwrap().rotten, [33]);
    rig.read(rotten).await;
    rig.check_sent(rig.end_of(80) + rig.end_of(33));
    // The front stays where it was.
    rig.complete().await;
    rig.check_sent(rig.end_of(rig.last()) + rig.end_of(33));
}

#[tokio::test(start_paused = true)]
async fn a_full_store_passes_what_its_readers_want() {
    let (disk, rig) = Rig::on_a_disk(Unmodified::one_frame(29)).await;
    disk.fill_up(u32::MAX);
    for chunk in [20, 21, 5] {
        let bytes = rig.made.layer.bytes_of(chunk).to_vec();
        let pass = rig.fetcher.fill_or_pass(
            &rig.handle,
            rig.extent(chunk),
            Priority::Foreground,
            Some(60 * SECOND),
        );
        assert_eq!(pass.await.unwrap(), Filled::Passed(bytes.into()));
    }
    assert_eq!(rig.present(), 0);
    disk.fill_up(0);
    rig.complete().await;
}
