// SPDX-License-Identifier: Apache-2.0
//! The cache over a real directory and sources that misbehave.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::StreamExt as _;
use futures::future::join_all;
use tempfile::TempDir;

use super::*;
use crate::registry::RegistryError;
use crate::source::fault::{Fault, FaultSource};
use crate::source::memory::MemorySource;
use crate::source::{Priority, SourceKind};

const SECOND: Duration = Duration::from_secs(1);
const PIECE: usize = 2 << 20;

/// Bytes that do not repeat within a piece.
fn bytes(length: usize) -> Bytes {
    let word = |at: usize| u32::try_from(at).unwrap().wrapping_mul(2_654_435_761);
    let all: Vec<u8> = (0..length.div_ceil(4))
        .flat_map(|at| word(at).to_le_bytes())
        .collect();
    Bytes::from(all).slice(..length)
}

/// A source with a label, that notes what is asked.
#[derive(Debug)]
struct Origin {
    label: &'static str,
    below: Arc<dyn BlobSource>,
    asked: Mutex<Vec<(u64, u64)>>,
}

impl Origin {
    fn new(label: &'static str, below: impl BlobSource + 'static) -> Arc<Self> {
        Arc::new(Origin {
            label,
            below: Arc::new(below),
            asked: Mutex::default(),
        })
    }

    fn of(blob: &Bytes) -> Arc<Self> {
        Self::new("origin", MemorySource::new(blob.clone()))
    }

    fn asked(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut lock(&self.asked))
    }
}

#[async_trait]
impl BlobSource for Origin {
    fn label(&self) -> &str {
        self.label
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Origin
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        lock(&self.asked).push((extent.start(), extent.end()));
        self.below.open(context, extent).await
    }
}

struct Site {
    directory: TempDir,
    cache: BlobCache,
}

impl Site {
    fn new(budget_bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cache = open(directory.path(), budget_bytes);
        Site { directory, cache }
    }

    /// As after a crash: files as they are.
    async fn again(self) -> Self {
        self.cache.stop().await;
        let cache = open(self.directory.path(), 1 << 30);
        Site { cache, ..self }
    }

    async fn read(
        &self,
        blob: &Bytes,
        range: std::ops::Range<usize>,
        supply: &Supply,
    ) -> (Vec<u8>, Result<(), SourceError>) {
        let digest = BlobDigest::of(blob);
        self.read_as(digest, blob.len(), range, supply).await
    }

    /// What came before the end or the failure.
    async fn read_as(
        &self,
        digest: BlobDigest,
        size: usize,
        range: std::ops::Range<usize>,
        supply: &Supply,
    ) -> (Vec<u8>, Result<(), SourceError>) {
        let context = ReadContext::new(Priority::Foreground).with_timeout(60 * SECOND);
        let extent = Extent::new(range.start as u64, range.end as u64).unwrap();
        let opened = self
            .cache
            .read(&context, digest, size as u64, extent, supply.clone());
        let mut all = Vec::new();
        let mut stream = match opened.await {
            Ok(stream) => stream,
            Err(BlobError::Source(error)) => return (all, Err(error)),
            Err(other) => panic!("{other}"),
        };
        while let Some(piece) = stream.body.next().await {
            match piece {
                Ok(piece) => all.extend_from_slice(&piece),
                Err(error) => return (all, Err(error)),
            }
        }
        (all, Ok(()))
    }

    async fn ok(&self, blob: &Bytes, range: std::ops::Range<usize>, supply: &Supply) {
        let (got, end) = self.read(blob, range.clone(), supply).await;
        end.unwrap();
        assert!(got == blob[range.clone()], "{range:?}");
    }

    fn whole(&self, blob: &Bytes) -> bool {
        self.cache.whole_bytes(BlobDigest::of(blob)).is_some()
    }

    fn files(&self, kind: &str) -> usize {
        let path = self.directory.path().join(kind);
        std::fs::read_dir(path).unwrap().count()
    }
}

fn open(directory: &Path, budget_bytes: u64) -> BlobCache {
    let options = BlobCacheOptions {
        directory: directory.to_owned(),
        budget_bytes,
        stall: 20 * SECOND,
    };
    BlobCache::open(options, BlobMetrics::default()).unwrap()
}

fn from(origin: &Arc<Origin>) -> Supply {
    Supply {
        origin: origin.clone(),
        nodes: None,
    }
}

#[tokio::test]
async fn a_blob_is_streamed_once_and_then_here() {
    let site = Site::new(1 << 30);
    for length in [1, 1000, PIECE, 2 * PIECE + 5] {
        let blob = bytes(length);
        let origin = Origin::of(&blob);
        site.ok(&blob, 0..length, &from(&origin)).await;
        assert_eq!(origin.asked(), [(0, length as u64)], "one request for all");
        assert!(site.whole(&blob), "before its last bytes go out");
        site.ok(&blob, 0..length, &from(&origin)).await;
        site.ok(&blob, length / 2..length, &from(&origin)).await;
        assert!(origin.asked().is_empty());
    }
    assert_eq!((site.files("whole"), site.files("partial")), (4, 0));
    let origin = site.cache.metrics().bytes_from("origin");
    assert_eq!(origin, (1 + 1000 + 3 * PIECE + 5) as u64);
}

#[tokio::test]
async fn readers_share_what_arrives() {
    let site = Site::new(1 << 30);
    let blob = bytes(3 * PIECE);
    let slow = FaultSource::new(Arc::new(MemorySource::new(blob.clone()))).always(Fault::Slow {
        pause: Duration::from_millis(1),
    });
    let origin = Origin::new("origin", slow);
    let supply = from(&origin);
    join_all((0..8).map(|_| site.ok(&blob, 0..blob.len(), &supply))).await;
    let asked = origin.asked();
    let asked: u64 = asked.iter().map(|(start, end)| end - start).sum();
    assert_eq!(asked, blob.len() as u64);
}

#[tokio::test]
async fn ranges_bring_their_pieces_only() {
    let site = Site::new(1 << 30);
    let blob = bytes(5 * PIECE);
    let origin = Origin::of(&blob);
    let supply = from(&origin);
    let (two, three) = (2 * PIECE as u64, 3 * PIECE as u64);
    site.ok(&blob, 2 * PIECE + 10..2 * PIECE + 20, &supply)
        .await;
    assert_eq!(origin.asked(), [(two, three)]);
    // The end of a blob whose beginning is not here: no reason to fetch it all.
    site.ok(&blob, 5 * PIECE - 60..5 * PIECE, &supply).await;
    assert_eq!(origin.asked(), [(two * 2, 5 * PIECE as u64)]);
    // All of it: what is here is not fetched again.
    site.ok(&blob, 0..5 * PIECE, &supply).await;
    assert_eq!(origin.asked(), [(0, two), (three, two * 2)]);
    assert!(site.whole(&blob));
}

#[tokio::test]
async fn a_wrong_blob_is_cut_before_its_end_and_dropped() {
    let site = Site::new(1 << 30);
    for length in [100, 2 * PIECE + 7] {
        let blob = bytes(length);
        let wrong = Bytes::from([&[!blob[0]], &blob[1..]].concat());
        let lying = Origin::of(&wrong);
        let (got, end) = site.read(&blob, 0..length, &from(&lying)).await;
        assert!(
            matches!(end, Err(SourceError::DigestMismatch { .. })),
            "{end:?}"
        );
        assert!(got.len() < length && !site.whole(&blob));
        // Gone from the disk by the time it is read again.
        let origin = Origin::of(&blob);
        while site.files("partial") > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        site.ok(&blob, 0..length, &from(&origin)).await;
        assert!(!origin.asked().is_empty());
    }
    assert_eq!(site.cache.metrics().bad_blobs(), 2);
}

#[tokio::test]
async fn a_blob_that_was_left_half_way_resumes() {
    let site = Site::new(1 << 30);
    let blob = bytes(4 * PIECE);
    let origin = Origin::of(&blob);
    site.ok(&blob, 0..2 * PIECE, &from(&origin)).await;
    site.ok(&blob, 3 * PIECE..3 * PIECE + 1, &from(&origin))
        .await;
    origin.asked();
    // A power cut tears the second piece.
    let name = format!("partial/{}.data", BlobDigest::of(&blob).hex());
    let path = site.directory.path().join(name);
    let mut data = std::fs::read(&path).unwrap();
    data[PIECE + 100] ^= 1;
    std::fs::write(&path, data).unwrap();
    let site = site.again().await;
    site.ok(&blob, 0..4 * PIECE, &from(&origin)).await;
    let (one, three) = (PIECE as u64, 3 * PIECE as u64);
    assert_eq!(origin.asked(), [(one, three)]);
    assert!(site.whole(&blob));
    let site = site.again().await;
    site.ok(&blob, 0..4 * PIECE, &from(&origin)).await;
    assert!(origin.asked().is_empty());
}

#[tokio::test]
async fn damaged_files_are_nothing() {
    let site = Site::new(1 << 30);
    let blob = bytes(2 * PIECE);
    let origin = Origin::of(&blob);
    let name = BlobDigest::of(&blob).hex();
    let path =
        |site: &Site, kind: &str| site.directory.path().join(format!("partial/{name}.{kind}"));
    site.ok(&blob, 0..1, &from(&origin)).await;
    // Only the data, only the record, an empty record, data that is too short.
    std::fs::remove_file(path(&site, "pieces")).unwrap();
    let site = site.again().await;
    assert_eq!((site.files("partial"), site.cache.held_bytes()), (0, 0));
    site.ok(&blob, 0..1, &from(&origin)).await;
    std::fs::write(path(&site, "pieces"), b"").unwrap();
    let site = site.again().await;
    assert_eq!(site.files("partial"), 0);
    site.ok(&blob, 0..1, &from(&origin)).await;
    std::fs::write(path(&site, "data"), b"x").unwrap();
    let site = site.again().await;
    site.ok(&blob, 0..2 * PIECE, &from(&origin)).await;
    assert!(site.whole(&blob));
}

#[tokio::test]
async fn the_budget_holds_and_what_is_too_large_passes() {
    let site = Site::new(3 * PIECE as u64);
    let blobs = [bytes(PIECE), bytes(PIECE + 4), bytes(PIECE + 8)];
    for blob in &blobs {
        site.ok(blob, 0..blob.len(), &from(&Origin::of(blob))).await;
    }
    assert!(site.cache.held_bytes() <= 3 * PIECE as u64);
    assert!(!site.whole(&blobs[0]) && site.whole(&blobs[2]));
    let large = bytes(4 * PIECE);
    let origin = Origin::of(&large);
    for _ in 0..2 {
        site.ok(&large, 0..large.len(), &from(&origin)).await;
    }
    assert_eq!(origin.asked().len(), 2);
    assert_eq!(site.cache.metrics().uncached_reads(), 2);
    let wrong = Bytes::from([&large[..1], &large[..large.len() - 1]].concat());
    let (got, end) = site
        .read(&large, 0..large.len(), &from(&Origin::of(&wrong)))
        .await;
    assert!(got.len() < large.len() && matches!(end, Err(SourceError::DigestMismatch { .. })));
    // A smaller budget after a restart.
    site.cache.stop().await;
    let cache = open(site.directory.path(), 10);
    assert_eq!((cache.held_bytes(), site.files("whole")), (0, 0));
}

#[tokio::test]
async fn a_part_shows_only_what_its_own_origin_gave() {
    let site = Site::new(1 << 30);
    let blob = bytes(3 * PIECE);
    let wrong = Bytes::from(vec![7; 3 * PIECE]);
    let evil = Origin::new("evil", MemorySource::new(wrong));
    let good = Origin::of(&blob);
    let (got, _) = site.read(&blob, 10..20, &from(&evil)).await;
    assert_eq!(got, [7; 10]);
    // The piece is here, but not from this one's origin.
    site.ok(&blob, 10..20, &from(&good)).await;
    assert_eq!(site.cache.metrics().uncached_reads(), 1);
    assert_eq!(good.asked(), [(10, 20)]);
    // Whose a piece is stays known.
    let site = site.again().await;
    let (got, _) = site.read(&blob, 10..20, &from(&evil)).await;
    assert_eq!((got, evil.asked().len()), (vec![7; 10], 1));
    site.ok(&blob, 10..20, &from(&good)).await;
    assert_eq!(good.asked(), [(10, 20)]);
}

#[tokio::test]
async fn failures_in_passing_are_repeated_and_others_are_told() {
    let site = Site::new(1 << 30);
    let blob = bytes(2 * PIECE);
    let cut = FaultSource::new(Arc::new(MemorySource::new(blob.clone()))).on_calls(
        0..2,
        Fault::Cut {
            after_bytes: PIECE as u64 / 2,
        },
    );
    let origin = Origin::new("origin", cut);
    site.ok(&blob, 0..blob.len(), &from(&origin)).await;
    assert_eq!(origin.asked().len(), 3);
    let other = bytes(PIECE);
    let denied = RegistryError::NotFound {
        endpoint: "e".into(),
        what: "w".into(),
    };
    let fails = FaultSource::new(Arc::new(MemorySource::new(other.clone())))
        .always(Fault::Fail(SourceError::Registry(denied)));
    let origin = Origin::new("origin", fails);
    let (_, end) = site.read(&other, 0..other.len(), &from(&origin)).await;
    assert!(matches!(end, Err(SourceError::Registry(_))), "{end:?}");
    assert_eq!(origin.asked().len(), 1);
}

#[tokio::test]
async fn a_reader_that_leaves_does_not_stop_the_others() {
    let site = Site::new(1 << 30);
    let blob = bytes(2 * PIECE);
    let slow = FaultSource::new(Arc::new(MemorySource::new(blob.clone()))).always(Fault::Slow {
        pause: Duration::from_millis(2),
    });
    let origin = Origin::new("origin", slow);
    let supply = from(&origin);
    let context = ReadContext::new(Priority::Foreground);
    let whole = Extent::new(0, blob.len() as u64).unwrap();
    let digest = BlobDigest::of(&blob);
    let first = site
        .cache
        .read(&context, digest, blob.len() as u64, whole, supply.clone());
    let mut first = first.await.unwrap();
    first.body.next().await.unwrap().unwrap();
    let second = site.ok(&blob, 0..blob.len(), &supply);
    let leave = async move {
        tokio::time::sleep(Duration::from_millis(10)).await;
        drop(first);
    };
    tokio::join!(second, leave);
    assert_eq!(origin.asked().len(), 1);
}

#[tokio::test]
async fn a_disk_that_cannot_be_used_turns_caching_off_and_not_reads() {
    let site = Site::new(1 << 30);
    let blob = bytes(2 * PIECE);
    std::fs::remove_dir_all(site.directory.path().join("partial")).unwrap();
    site.ok(&blob, 0..blob.len(), &from(&Origin::of(&blob)))
        .await;
    assert!(!site.whole(&blob));
}

/// Nodes that give, fail or lie, by name.
#[derive(Debug)]
struct Nodes {
    blob: Bytes,
    names: Vec<&'static str>,
    asked: AtomicU64,
    liars: Mutex<Vec<NodeId>>,
}

impl Nodes {
    fn new(blob: &Bytes, names: &[&'static str]) -> Arc<Self> {
        Arc::new(Nodes {
            blob: blob.clone(),
            names: names.to_vec(),
            asked: AtomicU64::new(0),
            liars: Mutex::default(),
        })
    }
}

#[async_trait]
impl PieceGivers for Nodes {
    async fn open(&self, piece: &Piece, skip: &[NodeId]) -> Option<GivenPiece> {
        let fresh = |name: &&&str| !skip.iter().any(|id| id.as_str() == **name);
        let name = self.names.iter().find(fresh)?;
        self.asked.fetch_add(1, Ordering::Relaxed);
        let extent = piece.extent();
        let at = |offset| usize::try_from(offset).unwrap();
        let mut part = self.blob.slice(at(extent.start())..at(extent.end()));
        match *name {
            "short" => part.truncate(part.len() / 2),
            "liar" => part = vec![1; part.len()].into(),
            _ => {}
        }
        let pieces: Vec<_> = part
            .chunks(50_000)
            .map(|it| Ok(Bytes::copy_from_slice(it)))
            .collect();
        Some(GivenPiece {
            node: NodeId::parse(name).unwrap(),
            body: futures::stream::iter(pieces).boxed(),
        })
    }

    fn lied(&self, nodes: &[NodeId]) {
        lock(&self.liars).extend_from_slice(nodes);
    }
}

#[tokio::test]
async fn pieces_come_from_nodes_and_the_origin_is_left() {
    let site = Site::new(1 << 30);
    let blob = bytes(9 * PIECE + 100);
    let origin = Origin::of(&blob);
    let nodes = Nodes::new(&blob, &["short", "good"]);
    let supply = Supply {
        origin: origin.clone(),
        nodes: Some(nodes.clone()),
    };
    site.ok(&blob, 0..blob.len(), &supply).await;
    assert!(site.whole(&blob) && origin.asked().is_empty());
    assert_eq!(nodes.asked.load(Ordering::Relaxed), 20);
    // A part in the middle is never asked of nodes.
    let other = bytes(3 * PIECE);
    let (nodes, origin) = (Nodes::new(&other, &["good"]), Origin::of(&other));
    let supply = Supply {
        origin: origin.clone(),
        nodes: Some(nodes.clone()),
    };
    site.ok(&other, PIECE + 1..PIECE + 9, &supply).await;
    assert_eq!(
        (nodes.asked.load(Ordering::Relaxed), origin.asked().len()),
        (0, 1)
    );
}

#[tokio::test]
async fn nodes_that_lie_are_told_on_and_the_blob_comes_from_the_origin() {
    let site = Site::new(1 << 30);
    let blob = bytes(3 * PIECE);
    let origin = Origin::of(&blob);
    let nodes = Nodes::new(&blob, &["liar"]);
    let supply = Supply {
        origin: origin.clone(),
        nodes: Some(nodes.clone()),
    };
    let (got, end) = site.read(&blob, 0..blob.len(), &supply).await;
    assert!(matches!(end, Err(SourceError::DigestMismatch { .. })) && got.len() < blob.len());
    assert_eq!(*lock(&nodes.liars), [NodeId::parse("liar").unwrap()]);
    let asked = nodes.asked.load(Ordering::Relaxed);
    site.ok(&blob, 0..blob.len(), &supply).await;
    assert_eq!(
        nodes.asked.load(Ordering::Relaxed),
        asked,
        "the origin only"
    );
}

#[tokio::test]
async fn a_reader_is_not_given_the_end_when_his_own_bytes_were_wrong() {
    let site = Site::new(1 << 30);
    let blob = bytes(PIECE);
    let wrong = Bytes::from(vec![9; PIECE]);
    // The first attempt breaks off after wrong bytes, the second is right.
    let first = FaultSource::new(Arc::new(MemorySource::new(wrong))).always(Fault::Cut {
        after_bytes: PIECE as u64 / 2,
    });
    #[derive(Debug)]
    struct Turns(FaultSource, MemorySource, AtomicU64);
    #[async_trait]
    impl BlobSource for Turns {
        fn label(&self) -> &str {
            "turns"
        }
        fn kind(&self) -> SourceKind {
            SourceKind::Origin
        }
        async fn open(
            &self,
            context: &ReadContext,
            extent: Extent<BlobSpace>,
        ) -> Result<BlobStream, SourceError> {
            match self.2.fetch_add(1, Ordering::Relaxed) {
                0 => self.0.open(context, extent).await,
                _ => self.1.open(context, extent).await,
            }
        }
    }
    let turns = Turns(first, MemorySource::new(blob.clone()), AtomicU64::new(0));
    let origin = Origin::new("origin", turns);
    let (got, end) = site.read(&blob, 0..PIECE, &from(&origin)).await;
    // Unless nothing was shown of the first attempt, the connection is cut.
    match end {
        Ok(()) => assert!(got == blob),
        Err(error) => {
            assert!(matches!(error, SourceError::DigestMismatch { .. }) && got.len() < PIECE)
        }
    }
    assert!(site.whole(&blob));
}
