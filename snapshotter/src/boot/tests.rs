// SPDX-License-Identifier: Apache-2.0
//! Learning from a back-end that says what a test wants, and lists from outside.

use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use sluice_blockindex::boot::BootChunk;
use sluice_blockindex::digest::ChainId;
use sluice_fetcher::metrics::Metrics;
use sluice_fetcher::registry::{NoCredentials, RegistryClient, RegistryOptions};
use sluice_fetcher::scheduler::{Fetcher, FetcherOptions};
use sluice_fetcher::source::RetryPolicy;
use sluice_fetcher::store::{Store, StoreOptions};
use tempfile::TempDir;

use super::*;
use crate::chain::RunKey;
use crate::indexes::{IndexFiles, IndexPin, sample};
use crate::mount::{
    Backend, FirstRead, FirstReads, MountError, MountSpec, MountState, UnmountMode, UnmountOutcome,
};

/// A back-end that mounts nothing and tells what was read.
#[derive(Debug, Default)]
struct Script {
    reads: Mutex<FirstReads>,
    forgotten: AtomicUsize,
}

impl Script {
    fn say(&self, chunks: &[u32], recorded: bool, complete: bool) {
        self.say_of("first", chunks, recorded, complete);
    }

    fn say_of(&self, recording: &str, chunks: &[u32], recorded: bool, complete: bool) {
        let read = |chunk: &u32| FirstRead {
            device: 0,
            chunk: *chunk,
            after: Duration::from_millis(u64::from(*chunk)),
        };
        let reads = chunks.iter().map(read).collect();
        *self.reads.lock().unwrap() = FirstReads {
            recorded,
            recording: recording.to_owned(),
            complete,
            reads,
        };
    }
}

#[async_trait]
impl ImageMount for Script {
    async fn mount(&self, _: &MountSpec) -> Result<Backend, MountError> {
        Ok(Backend::Bind)
    }

    async fn check(&self, _: &str) -> Result<MountState, MountError> {
        Ok(MountState::Absent)
    }

    async fn unmount(&self, _: &str, _: UnmountMode) -> Result<UnmountOutcome, MountError> {
        Ok(UnmountOutcome::Done)
    }

    async fn first_reads(
        &self,
        _: &str,
        from: u32,
        forget: bool,
    ) -> Result<FirstReads, MountError> {
        self.forgotten
            .fetch_add(usize::from(forget), Ordering::SeqCst);
        let mut page = self.reads.lock().unwrap().clone();
        page.reads
            .drain(..usize::try_from(from).unwrap().min(page.reads.len()));
        Ok(page)
    }
}

struct Site {
    boot: Arc<Boot>,
    script: Arc<Script>,
    record: LazyLayerRecord,
    annotations: LayerAnnotations,
    _dir: TempDir,
}

fn site() -> Site {
    site_with(true)
}

fn site_with(enabled: bool) -> Site {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let store = Arc::new(Store::open(&at("devices"), StoreOptions::default()).unwrap());
    let fetcher = Fetcher::new(FetcherOptions::default(), store, Metrics::new());
    let client = RegistryClient::new(RegistryOptions::default(), Arc::new(NoCredentials)).unwrap();
    let metadata = Arc::new(MetadataStore::open(&at("metadata.redb")).unwrap());
    let indexes = Arc::new(IndexFiles::open(&at("indexes")).unwrap());
    let (payload, annotations) = sample::layer();
    drop(
        indexes
            .put(&payload, &IndexPin::from(&annotations))
            .unwrap(),
    );
    let retry = RetryPolicy::default();
    let layers = Layers::new(fetcher, client, retry, indexes, Arc::clone(&metadata));
    let script = Arc::new(Script::default());
    let options = BootOptions {
        enabled,
        window: Duration::from_millis(200),
        whole_pages: false,
    };
    let backend = Arc::clone(&script);
    let metrics = BootMetrics::default();
    let boot = Boot::new(options, Arc::new(layers), metadata, backend, metrics);
    let record = LazyLayerRecord {
        chain_id: ChainId::child(None, annotations.diff_id),
        diff_id: annotations.diff_id,
        index_digest: annotations.index_digest,
        blob_digest: annotations.blob,
        blob_bytes: annotations.blob_bytes,
        index_source: crate::snapshots::IndexSource::Blob,
        device_bytes: 1024,
        sources: Vec::new(),
    };
    Site {
        boot,
        script,
        record,
        annotations,
        _dir: dir,
    }
}

impl Site {
    fn layers(&self) -> Vec<LazyLayerRecord> {
        vec![self.record.clone()]
    }

    fn key(&self) -> BootKey {
        boot_key(&self.layers())
    }

    fn list(&self, chunks: &[u32]) -> BootList {
        let chunk = |chunk: &u32| BootChunk {
            layer: 0,
            chunk: *chunk,
        };
        let chunks = chunks.iter().map(chunk).collect();
        BootList::new(vec![self.record.index_digest], chunks).unwrap()
    }

    async fn mount(&self) {
        let handle = self.boot.layers.open(&self.record).await.unwrap();
        let run = RunKey::from_hex(&"ab".repeat(32)).unwrap();
        self.boot.mounting(run, &self.layers(), &[handle]);
    }

    async fn summary(&self) -> BootSummary {
        self.boot.summary(&self.layers()).await
    }

    /// Waits until `holds` of the summary.
    async fn until(&self, holds: impl Fn(&BootSummary) -> bool) -> BootSummary {
        for _ in 0..1000 {
            let summary = self.summary().await;
            if holds(&summary) {
                return summary;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("still {:?}", self.summary().await);
    }

    /// Waits until nothing is being loaded.
    async fn loaded(&self) {
        for _ in 0..1000 {
            if !self.boot.state().loads.values().any(|load| load.running) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("still loading");
    }

    /// Waits until all that runs has ended by itself.
    async fn ended(&self) {
        self.boot.tasks.close();
        let ended = tokio::time::timeout(Duration::from_secs(30), self.boot.tasks.wait());
        ended.await.expect("it ends by itself");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_is_learnt_from() {
    let site = site();
    site.script.say(&[], true, false);
    site.mount().await;
    site.script.say(&[1], true, false);
    tokio::time::sleep(Duration::from_millis(100)).await;
    site.script.say(&[1, 0], true, true);
    let summary = site.until(|summary| summary.starts == 1).await;
    assert_eq!((summary.chunks, summary.origin), (2, Some(Origin::Learned)));
    assert_eq!(site.script.forgotten.load(Ordering::SeqCst), 1);
    let learned = site.boot.learned(site.key()).await;
    assert_eq!(
        (learned.list, learned.starts),
        (Some(site.list(&[1, 0])), 1)
    );
    let encoded = site.boot.given(site.key()).await.unwrap();
    assert_eq!(BootList::decode(&encoded).unwrap(), site.list(&[1, 0]));
    site.boot.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_that_is_made_anew_is_another_recording() {
    let site = site();
    site.script.say(&[0], true, false);
    site.mount().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    site.script.say_of("second", &[1, 0], true, true);
    let summary = site.until(|summary| summary.starts == 1).await;
    assert_eq!(summary.chunks, 1);
    site.boot.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_that_goes_away_leaves_what_was_read_from_it() {
    let site = site();
    site.script.say(&[1], true, false);
    site.mount().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    site.script.say(&[], false, false);
    let summary = site.until(|summary| summary.starts == 1).await;
    assert_eq!(summary.chunks, 1);
    site.boot.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_attached_to_a_layer_is_taken_if_it_is_of_that_layer() {
    let site = site();
    let with = |boot: &str| LayerAnnotations {
        boot: vec![boot.to_owned()],
        ..site.annotations.clone()
    };
    let chunk = BootChunk { layer: 0, chunk: 0 };
    let other = BootList::new(vec![IndexDigest::of(b"other")], vec![chunk]).unwrap();
    let text = |list: &BootList| list.part(0).unwrap().to_texts(1, 4000).0.remove(0);
    for boot in ["nonsense", &text(&other)] {
        site.boot.note_attached(&with(boot));
        site.boot.load(site.layers());
        site.loaded().await;
        assert_eq!(site.summary().await, BootSummary::none(), "{boot}");
    }
    site.boot.note_attached(&with(&text(&site.list(&[0]))));
    site.boot.load(site.layers());
    let summary = site.until(|summary| summary.chunks == 1).await;
    assert_eq!(summary.origin, Some(Origin::Attached));
    // It is attached everywhere already.
    assert_eq!(site.boot.given(site.key()).await, None);
    site.boot.stop().await;
}

#[derive(Debug, Default)]
struct Peers {
    /// What they have.
    list: Option<Vec<u8>>,
    /// They never answer.
    silent: bool,
    asked: AtomicUsize,
    told: Mutex<Vec<(BootKey, Bytes)>>,
}

#[async_trait]
impl BootPeers for Peers {
    async fn find(&self, _: BootKey) -> Option<Given> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.silent {
            std::future::pending::<()>().await;
        }
        let list = self.list.clone()?.into();
        let node = "other".to_owned();
        Some(Given { node, list })
    }

    async fn tell(&self, key: BootKey, list: Bytes) -> usize {
        self.told.lock().unwrap().push((key, list));
        2
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_other_nodes_are_asked_for_checked_and_outvoted() {
    let site = site();
    let key = site.key();
    let other = BootKey::from_bytes([7; 32]);
    let list = site.list(&[1, 0]).encode();
    let refused = site.boot.offer(other, "a", &list).await;
    assert!(
        matches!(refused, Err(OfferError::Key { .. })),
        "{refused:?}"
    );
    let refused = site.boot.offer(key, "a", &list[1..]).await;
    assert!(matches!(refused, Err(OfferError::List(_))), "{refused:?}");
    let refused = site.boot.offer(key, "a", &site.list(&[]).encode()).await;
    assert!(matches!(refused, Err(OfferError::Empty)), "{refused:?}");
    assert_eq!(site.boot.given(key).await, None);

    let peers = Arc::new(Peers {
        list: Some(list.clone()),
        ..Peers::default()
    });
    site.boot.set_peers(peers.clone());
    for _ in 0..3 {
        site.boot.load(site.layers());
        site.loaded().await;
    }
    let summary = site.until(|summary| summary.chunks == 2).await;
    assert_eq!(summary.origin, Some(Origin::Received));
    assert_eq!(peers.asked.load(Ordering::SeqCst), 1);
    assert_eq!(site.boot.given(key).await, Some(list.into()));
    site.script.say(&[1], true, true);
    site.mount().await;
    let summary = site.until(|summary| summary.starts == 1).await;
    assert_eq!(summary.chunks, 1);
    site.ended().await;
    // What this node has read, not what it was told.
    let told = peers.told.lock().unwrap().clone();
    assert_eq!(told, [(key, site.list(&[1]).encode().into())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_nodes_are_asked_once_while_the_indexes_load() {
    let site = site();
    let peers = Arc::new(Peers::default());
    site.boot.set_peers(peers.clone());
    for _ in 0..3 {
        site.boot.seek(&[site.record.index_digest]);
        site.boot.load(site.layers());
    }
    site.ended().await;
    assert_eq!(peers.asked.load(Ordering::SeqCst), 1);
    assert_eq!(site.summary().await.origin, None);
    // For another run another time; for none at all never.
    let other = self::site();
    other.boot.set_peers(peers.clone());
    other.boot.seek(&[]);
    other.boot.seek(&[IndexDigest::of(b"another")]);
    other.ended().await;
    assert_eq!(peers.asked.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_is_not_asked_for_and_nodes_that_are_silent_hold_nothing_up() {
    let known = site();
    let peers = Arc::new(Peers {
        silent: true,
        ..Peers::default()
    });
    known.boot.set_peers(peers.clone());
    let list = known.list(&[0]).encode();
    known.boot.take(known.key(), "a", &list).await.unwrap();
    known.boot.seek(&[known.record.index_digest]);
    known.ended().await;
    assert_eq!(peers.asked.load(Ordering::SeqCst), 0);

    let site = site();
    site.boot.set_peers(peers.clone());
    site.boot.seek(&[site.record.index_digest]);
    site.boot.load(site.layers());
    site.loaded().await;
    let asks: Vec<_> = site
        .boot
        .state()
        .asks
        .values()
        .map(ask::Asking::is_over)
        .collect();
    assert_eq!(asks, [false], "the load waited for the answer");
    // And the asking ends by itself.
    site.ended().await;
    assert_eq!(peers.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_list_that_names_what_there_is_not_the_rest_is_loaded() {
    let site = site();
    let key = site.key();
    let list = site.list(&[0, 1_000_000]);
    site.boot.offer(key, "a", &list.encode()).await.unwrap();
    let layers = site.layers();
    // Nobody has the blob, so the rest does not come; but it was asked for.
    assert_eq!(site.boot.load_now(key, &layers).await, 1);
    let list = site.list(&[1_000_000]);
    site.boot.offer(key, "a", &list.encode()).await.unwrap();
    assert_eq!(site.boot.load_now(key, &layers).await, 0);
    site.boot.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_lists_is_bounded_and_what_was_learnt_stays() {
    let site = site();
    let table = DocumentTable::BootLists;
    let metadata = &site.boot.metadata;
    let learnt = 3;
    for number in 0..DOCUMENTS_MAX + 5 {
        let index = IndexDigest::of(&number.to_le_bytes());
        let chunk = BootChunk { layer: 0, chunk: 0 };
        let list = BootList::new(vec![index], vec![chunk]).unwrap();
        let mut document = BootDocument::new(&[index]);
        if number < learnt {
            document.record(list, document::Start::Warm);
        } else {
            document.receive("a".to_owned(), list);
        }
        document.at = number;
        let key = BootKey::of_layers(&[index]).to_string();
        metadata.put_document(table, &key, &document).unwrap();
    }
    Boot::sweep(metadata).unwrap();
    Boot::sweep(metadata).unwrap();
    let left = metadata.documents::<BootDocument>(table).unwrap();
    assert_eq!(left.len() as u64, DOCUMENTS_MAX);
    let oldest = |starts: bool| {
        let of = left.iter().filter(|(_, it)| (it.starts() > 0) == starts);
        of.map(|(_, it)| it.at).min()
    };
    assert_eq!((oldest(true), oldest(false)), (Some(0), Some(learnt + 5)));
    // What others tell between two sweeps takes the place of what others told.
    for _ in 0..2 {
        let list = site.list(&[0]).encode();
        site.boot.take(site.key(), "b", &list).await.unwrap();
    }
    let left = metadata.documents::<BootDocument>(table).unwrap();
    assert_eq!(left.len() as u64, DOCUMENTS_MAX);
    let learned = left.iter().filter(|(_, it)| it.starts() > 0).count();
    assert_eq!(learned as u64, learnt);
    site.boot.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_learnt_or_loaded_where_it_is_turned_off() {
    let site = site_with(false);
    assert_eq!(site.boot.recorded(), None);
    let list = site.list(&[0]).encode();
    let refused = site.boot.offer(site.key(), "a", &list).await;
    assert!(
        matches!(refused, Err(OfferError::Unwanted(_))),
        "{refused:?}"
    );
    site.script.say(&[0], true, true);
    site.mount().await;
    site.boot.load(site.layers());
    assert!(site.boot.state().loads.is_empty());
    site.boot.tasks.close();
    site.boot.tasks.wait().await;
    assert_eq!(site.script.forgotten.load(Ordering::SeqCst), 0);
    let off = site.summary().await.off;
    assert_eq!(off.as_deref(), Some("[boot] enabled is false"));
}

#[test]
fn what_a_list_brings_twice_counts_once() {
    let read = |chunk| BootRead { layer: 0, chunk };
    let key = BootKey::from_bytes([1; 32]);
    let mut state = State::default();
    assert!(state.begin(key) && !state.begin(key));
    state.claimed(key, &[read(1), read(2)]);
    state.end(key);
    assert!(state.begin(key));
    state.claimed(key, &[read(2)]);
    state.end(key);
    assert_eq!(
        state.loads[&key].claimed,
        BTreeSet::from([read(1), read(2)])
    );
    // One that brought nothing leaves nothing.
    let idle = BootKey::from_bytes([2; 32]);
    assert!(state.begin(idle));
    state.end(idle);
    assert!(!state.loads.contains_key(&idle));
    // Images that are pulled and never started do not pile up.
    for number in 0..=u8::try_from(LOADS_MAX).unwrap() {
        let key = BootKey::from_bytes([number + 10; 32]);
        assert!(state.begin(key));
        state.claimed(key, &[read(1)]);
        state.end(key);
    }
    assert_eq!(state.loads.len(), LOADS_MAX);
    assert!(!state.loads.contains_key(&key));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_be_read_is_replaced() {
    let site = site();
    let metadata = &site.boot.metadata;
    let key = site.key().to_string();
    metadata
        .put_document(DocumentTable::BootLists, &key, &"nonsense")
        .unwrap();
    assert_eq!(site.summary().await, BootSummary::none());
    let list = site.list(&[0]).encode();
    site.boot.offer(site.key(), "a", &list).await.unwrap();
    assert_eq!(site.summary().await.chunks, 1);
    site.boot.stop().await;
}
