// SPDX-License-Identifier: Apache-2.0
//! Layers that Sluice wrote, built twice: what the second one needs of a registry.

use sluice_blockindex::encode::{EncodeOptions, encode_layer};
use sluice_blockindex::index::{INDEX_FILE_MAX_BYTES, Index, UncheckedIndex, decompress_index};

use super::*;
use crate::boot::BootRead;
use crate::fixture::TestLayer;
use crate::fixture::line::{Line, Mishap};
use crate::metrics::Metrics;
use crate::scheduler::FetcherOptions;
use crate::source::BlobSource;
use crate::store::{BootId, DeviceKey, Store, StoreOptions};

/// The files of an image: names and contents.
type Files = Vec<(String, Vec<u8>)>;

fn content(seed: usize, bytes: usize) -> Vec<u8> {
    let mut state = u64::try_from(seed).unwrap() * 2 + 1;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963);
        state.to_le_bytes()[7]
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// Small ones, some of several chunks, and two that are equal.
fn files() -> Files {
    let sizes = [10, 5_000, 400_000, 0, 70_000, 1_000_000, 3, 20_000, 20_000];
    let mut files: Files = (0..60)
        .map(|at| {
            (
                format!("usr/lib/file-{at}"),
                content(at, sizes[at % sizes.len()]),
            )
        })
        .collect();
    files.push(("usr/lib/again".to_owned(), files[4].1.clone()));
    files
}

struct Built {
    layer: TestLayer,
    index: Index<Vec<u8>>,
}

fn built(files: &Files, mtime: u64) -> Built {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(mtime);
        builder
            .append_data(&mut header, path, content.as_slice())
            .unwrap();
    }
    let tar = builder.into_inner().unwrap();
    let (blob, trailer) = encode_layer(&tar, EncodeOptions::default()).unwrap();
    let pin = trailer.index.unwrap();
    let range = pin.extent.range();
    let payload = &blob[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
    let file = decompress_index(payload, INDEX_FILE_MAX_BYTES).unwrap();
    let index = UncheckedIndex::parse(file).unwrap().validate().unwrap();
    let layer = TestLayer {
        tar,
        blob,
        chunks: index.chunk_map().clone(),
        key: DeviceKey {
            diff_id: trailer.diff_id,
            index: pin.digest,
        },
    };
    Built { layer, index }
}

impl Built {
    fn whole(&self) -> Extent<DeviceSpace> {
        Extent::new(0, self.layer.tar.len() as u64).unwrap()
    }

    /// Its files, and where `donor` has them under any name.
    fn reused(&self, donor: &Built, handle: &Arc<LayerHandle>) -> Vec<ReusedFile> {
        let table = donor.index.files().unwrap();
        let files = self.index.files().unwrap();
        let find = |digest| table.contents().find(|it| it.digest == digest);
        let file = |it: sluice_blockindex::index::FileContent| ReusedFile {
            run: it.run,
            copy: find(it.digest).map(|found| FileCopy {
                donor: Arc::clone(handle),
                start: found.run.start(),
            }),
        };
        files.contents().map(file).collect()
    }

    fn skeleton(&self) -> Option<SkeletonPin> {
        Some(self.index.metadata().skeleton)
    }
}

fn fetcher() -> Fetcher {
    let options = StoreOptions {
        boot: Some(BootId([1; 16])),
        reclaim: None,
    };
    let store = Arc::new(Store::in_memory(options).unwrap());
    Fetcher::new(FetcherOptions::default(), store, Metrics::new())
}

async fn add(fetcher: &Fetcher, built: &Built, line: &Line) -> Arc<LayerHandle> {
    let source = Arc::new(line.clone()) as Arc<dyn BlobSource>;
    fetcher
        .add_layer(built.layer.spec(vec![source]))
        .await
        .unwrap()
}

async fn fill(fetcher: &Fetcher, handle: &Arc<LayerHandle>, extent: Extent<DeviceSpace>) {
    let filled = fetcher.fill(handle, extent, Priority::Foreground, None);
    filled.await.unwrap();
}

/// A node that has `first` whole, or half of it, and a handle of `second`, whose line is given.
async fn site(
    first: &Built,
    whole: bool,
    second: &Built,
) -> (Fetcher, [Arc<LayerHandle>; 2], Line) {
    let fetcher = fetcher();
    let donor = add(&fetcher, first, &Line::new("first", &first.layer.blob)).await;
    let extent = match whole {
        true => first.whole(),
        false => Extent::new(0, first.whole().end() / 2).unwrap(),
    };
    fill(&fetcher, &donor, extent).await;
    let line = Line::new("second", &second.layer.blob);
    let handle = add(&fetcher, second, &line).await;
    (fetcher, [donor, handle], line)
}

#[tokio::test]
async fn a_layer_that_was_built_anew_costs_its_skeleton() {
    let (first, second) = (built(&files(), 1), built(&files(), 2));
    assert_ne!(first.layer.key.diff_id, second.layer.key.diff_id);
    let (fetcher, [donor, handle], line) = site(&first, true, &second).await;
    let files = second.reused(&first, &donor);
    let plan = ReusePlan::new(Arc::clone(&handle), files, second.skeleton()).unwrap();
    let (chunks, _) = plan.size();
    let reused = fetcher.reuse(plan).await.unwrap();
    assert_eq!((reused.chunks, reused.wrong), (chunks, 0));
    let count = usize::try_from(handle.chunks().count()).unwrap();
    // The last one holds no file: it is fetched.
    assert!(chunks >= count - 1, "{chunks} of {count}");
    fill(&fetcher, &handle, second.whole()).await;
    let asked: u64 = line.asked().iter().map(|it| it.extent.len()).sum();
    let bytes = second.layer.blob.len() as u64;
    assert!(asked * 100 < bytes, "{asked} of {bytes}");
    assert_eq!(handle.traffic().store_bytes, reused.device_bytes);
    // It is the layer that its diff ID names.
    fetcher.seal(&handle).await.unwrap();
}

#[tokio::test]
async fn only_what_changed_is_fetched() {
    let mut changed = files();
    changed[5].1 = content(999, 1_000_000);
    changed.remove(7);
    changed.insert(20, ("usr/lib/new".to_owned(), content(1000, 30_000)));
    let (first, second) = (built(&files(), 1), built(&changed, 2));
    for whole in [true, false] {
        let (fetcher, [donor, handle], line) = site(&first, whole, &second).await;
        let mut files = second.reused(&first, &donor);
        for file in &mut files {
            let here = |copy: &FileCopy| {
                let run = Extent::from_length(copy.start, file.run.len()).unwrap();
                copy.donor.device().missing(run).next().is_none()
            };
            file.copy = file.copy.take().filter(here);
        }
        let plan = ReusePlan::new(Arc::clone(&handle), files, second.skeleton()).unwrap();
        let (chunks, _) = plan.size();
        let reused = fetcher.reuse(plan).await.unwrap();
        assert_eq!((reused.chunks, reused.wrong), (chunks, 0));
        fill(&fetcher, &handle, second.whole()).await;
        let asked: u64 = line.asked().iter().map(|it| it.extent.len()).sum();
        let (changed, bytes) = (1_200_000, second.layer.blob.len() as u64);
        let most = if whole { changed } else { bytes * 2 / 3 };
        assert!(asked > 1_000_000 && asked < most, "{asked} of {bytes}");
        fetcher.seal(&handle).await.unwrap();
    }
}

#[tokio::test]
async fn a_copy_that_is_not_what_was_said_makes_no_chunk() {
    let (first, second) = (built(&files(), 1), built(&files(), 2));
    let (fetcher, [donor, handle], _) = site(&first, true, &second).await;
    let mut files = second.reused(&first, &donor);
    // Of the same length at another place.
    files[2].copy.as_mut().unwrap().start += 512;
    let plan = ReusePlan::new(Arc::clone(&handle), files, second.skeleton()).unwrap();
    let reused = fetcher.reuse(plan).await.unwrap();
    assert!(reused.wrong >= 3 && reused.chunks > 10, "{reused:?}");
    fill(&fetcher, &handle, second.whole()).await;
    fetcher.seal(&handle).await.unwrap();
}

#[tokio::test]
async fn without_a_skeleton_chunks_inside_of_files_are_made() {
    let (first, second) = (built(&files(), 1), built(&files(), 2));
    let (fetcher, [donor, handle], line) = site(&first, true, &second).await;
    let files = second.reused(&first, &donor);
    let plan = ReusePlan::new(Arc::clone(&handle), files, None).unwrap();
    let reused = fetcher.reuse(plan).await.unwrap();
    assert!(reused.chunks > 10, "{reused:?}");
    assert_eq!((reused.wrong, line.asked().len()), (0, 0));
}

#[tokio::test]
async fn a_skeleton_that_is_late_damaged_or_refused_ends_the_plan() {
    let (first, second) = (built(&files(), 1), built(&files(), 2));
    let at = second.index.metadata().skeleton.extent.start();
    let line = || Line::new("second", &second.layer.blob);
    let lines = [
        (line(), Some(Mishap::Refuse)),
        (line().flip(at + 9), None),
        (line(), Some(Mishap::Cut(5))),
    ];
    for (line, mishap) in lines {
        line.always(mishap);
        let fetcher = fetcher();
        let donor = add(&fetcher, &first, &Line::new("first", &first.layer.blob)).await;
        fill(&fetcher, &donor, first.whole()).await;
        let handle = add(&fetcher, &second, &line).await;
        let files = second.reused(&first, &donor);
        let plan = ReusePlan::new(Arc::clone(&handle), files, second.skeleton()).unwrap();
        assert!(handle.is_expected(0));
        fetcher.reuse(plan).await.unwrap_err();
        // Others fetch it now.
        assert!(!handle.is_expected(0) && !handle.device().is_present(0));
    }
}

#[tokio::test]
async fn what_is_expected_is_left_to_the_plan_but_by_readers() {
    let (first, second) = (built(&files(), 1), built(&files(), 2));
    let (fetcher, [donor, handle], line) = site(&first, true, &second).await;
    let files = second.reused(&first, &donor);
    let plan = ReusePlan::new(Arc::clone(&handle), files, second.skeleton()).unwrap();
    let reads = [0, 1].map(|chunk| BootRead { layer: 0, chunk });
    let burst = fetcher.load_boot_list(&[Arc::clone(&handle)], &reads);
    assert!(burst.claimed().is_empty() && line.asked().is_empty());
    fill(&fetcher, &handle, Extent::new(0, 10).unwrap()).await;
    assert!(handle.device().is_present(0) && !line.asked().is_empty());
    drop(plan);
    let burst = fetcher.load_boot_list(&[Arc::clone(&handle)], &[BootRead { layer: 0, chunk: 9 }]);
    assert_eq!(burst.claimed().len(), 1);
}

#[tokio::test]
async fn what_is_not_worth_a_skeleton_is_not_planned() {
    let (first, second) = (built(&files(), 1), built(&files(), 2));
    let (_fetcher, [donor, handle], _) = site(&first, true, &second).await;
    let mut files = second.reused(&first, &donor);
    files.iter_mut().skip(1).for_each(|file| file.copy = None);
    assert!(ReusePlan::new(Arc::clone(&handle), files, second.skeleton()).is_none());
    assert!(!handle.is_expected(0));
}
