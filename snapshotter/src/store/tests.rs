// SPDX-License-Identifier: Apache-2.0
//! Unit tests of the metadata store, and fixtures for its other tests.

use tempfile::TempDir;

use super::*;
use crate::boot::BootDocument;
use crate::snapshots::{
    BlobOrigin, LABEL_SNAPSHOT_REF, Labels, LazyLayerRecord, SnapshotKind, SnapshotRecord, Usage,
};
use sluice_blockindex::digest::{BlobDigest, ChainId, DiffId, IndexDigest};

pub(super) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

pub(super) fn layer(chain_id: ChainId) -> LazyLayerRecord {
    LazyLayerRecord {
        chain_id,
        diff_id: DiffId::of(b"diff"),
        index_digest: IndexDigest::of(b"index"),
        blob_digest: BlobDigest::of(b"blob"),
        blob_bytes: 10,
        index_source: crate::snapshots::IndexSource::Blob,
        device_bytes: 20,
        sources: vec![BlobOrigin {
            host: "registry:5000".into(),
            repository: "a/b".into(),
        }],
    }
}

pub(super) fn new(
    store: &MetadataStore,
    key: &str,
    kind: SnapshotKind,
    parent: Option<&str>,
) -> NewSnapshot {
    NewSnapshot {
        id: store.allocate_id(),
        key: key.into(),
        kind,
        parent: parent.map(Into::into),
        labels: Labels::new(),
    }
}

pub(super) fn lazy(store: &MetadataStore, chain_id: ChainId, parent: Option<&str>) -> NewCommitted {
    NewCommitted {
        id: store.allocate_id(),
        chain_id,
        parent: parent.map(Into::into),
        labels: labels(&[(LABEL_SNAPSHOT_REF, &chain_id.to_string())]),
        layer: Some(layer(chain_id)),
        usage: Usage::default(),
    }
}

fn store() -> (TempDir, MetadataStore) {
    let root = tempfile::tempdir().unwrap();
    let store = MetadataStore::open(&root.path().join("metadata.redb")).unwrap();
    (root, store)
}

fn active(store: &MetadataStore, key: &str, parent: Option<&str>) -> SnapshotRecord {
    store
        .create(new(store, key, SnapshotKind::Active, parent))
        .unwrap()
}

fn committed(store: &MetadataStore, name: &str, parent: Option<&str>) -> SnapshotRecord {
    let key = format!("{name}-key");
    active(store, &key, parent);
    store
        .commit(
            &key,
            name,
            Usage {
                inodes: 3,
                size_bytes: 4096,
            },
            Labels::new(),
        )
        .unwrap()
}

#[test]
fn a_snapshot_survives_reopening() {
    let (root, store) = store();
    committed(&store, "base", None);
    let base = store
        .update_labels("base", labels(&[("a", "b")]), &[])
        .unwrap();
    let chain_id = ChainId::of(b"top");
    let top = store.adopt(lazy(&store, chain_id, Some("base"))).unwrap();
    assert!(top.created);
    drop(store);

    let store = MetadataStore::open(&root.path().join("metadata.redb")).unwrap();
    store.check().unwrap();
    assert_eq!(store.get("base").unwrap(), base);
    assert_eq!(
        store.target(chain_id, Some("base")).unwrap(),
        Some(top.record.clone())
    );
    assert_eq!(store.target(chain_id, None).unwrap(), None);
    assert_eq!(
        store.chain(Some(&top.record.name)).unwrap(),
        vec![top.record.clone(), base]
    );
    assert!(store.allocate_id() > top.record.id);
}

#[test]
fn the_first_check_that_fails_names_the_error() {
    let (_root, store) = store();
    committed(&store, "base", None);
    active(&store, "work", Some("base"));
    store
        .create(new(&store, "view", SnapshotKind::View, Some("base")))
        .unwrap();
    let create = |key, parent| store.create(new(&store, key, SnapshotKind::Active, parent));
    let commit = |key, name| store.commit(key, name, Usage::default(), Labels::new());

    assert!(matches!(
        create("x", Some("no")),
        Err(StoreError::ParentNotFound { .. })
    ));
    assert!(matches!(
        create("x", Some("work")),
        Err(StoreError::ParentNotCommitted { .. })
    ));
    assert!(matches!(
        create("x", Some("view")),
        Err(StoreError::ParentNotCommitted { .. })
    ));
    assert!(matches!(
        create("work", Some("base")),
        Err(StoreError::AlreadyExists { .. })
    ));
    assert!(matches!(
        create("base", None),
        Err(StoreError::AlreadyExists { .. })
    ));
    // The parent is looked at before the key, as in containerd.
    assert!(matches!(
        create("work", Some("no")),
        Err(StoreError::ParentNotFound { .. })
    ));

    assert!(matches!(
        commit("no", "base"),
        Err(StoreError::AlreadyExists { .. })
    ));
    assert!(matches!(
        commit("no", "new"),
        Err(StoreError::NotFound { .. })
    ));
    assert!(matches!(
        commit("view", "new"),
        Err(StoreError::NotActive { .. })
    ));
    assert!(matches!(
        commit("base", "new"),
        Err(StoreError::NotActive { .. })
    ));

    assert!(matches!(
        store.remove("no"),
        Err(StoreError::NotFound { .. })
    ));
    assert!(matches!(
        store.remove("base"),
        Err(StoreError::HasChildren { .. })
    ));
    assert!(matches!(store.get("no"), Err(StoreError::NotFound { .. })));
    assert!(matches!(
        store.with_chain("no"),
        Err(StoreError::NotFound { .. })
    ));
    store.check().unwrap();
}

#[test]
fn commit_replaces_labels_and_keeps_the_directory() {
    let (_root, store) = store();
    let mut work = new(&store, "work", SnapshotKind::Active, None);
    work.labels = labels(&[("a", "1")]);
    let work = store.create(work).unwrap();
    let usage = Usage {
        inodes: 7,
        size_bytes: 512,
    };
    let done = store
        .commit("work", "done", usage, labels(&[("b", "2")]))
        .unwrap();
    assert_eq!((done.id, done.usage), (work.id, usage));
    assert_eq!(done.labels, labels(&[("b", "2")]));
    assert_eq!(done.created, done.updated);
    assert!(matches!(
        store.get("work"),
        Err(StoreError::NotFound { .. })
    ));
}

#[test]
fn masks_update_what_they_name() {
    let (_root, store) = store();
    active(&store, "s", None);
    let update = |given: &[(&str, &str)], mask: &[&str]| {
        let mask: Vec<String> = mask.iter().map(|path| (*path).to_owned()).collect();
        store.update_labels("s", labels(given), &mask)
    };
    let first = update(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3"), ("e", "")], &[]).unwrap();
    assert_eq!(
        first.labels,
        labels(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3")])
    );
    assert!(first.updated > first.created);
    let second = update(&[("l1", "new"), ("l4", "v4")], &["labels.l1", "labels.l2"]).unwrap();
    assert_eq!(second.labels, labels(&[("l1", "new"), ("l3", "v3")]));
    let dotted = update(&[("a.b/c", "x")], &["labels.a.b/c"]).unwrap();
    assert_eq!(
        dotted.labels,
        labels(&[("a.b/c", "x"), ("l1", "new"), ("l3", "v3")])
    );
    let third = update(&[("l5", "v5")], &["labels"]).unwrap();
    assert_eq!(third.labels, labels(&[("l5", "v5")]));
    for field in [
        "parent",
        "name",
        "kind",
        "created_at",
        "label",
        "Labels",
        "",
    ] {
        let error = update(&[("l5", "changed")], &["labels.l5", field]).unwrap_err();
        assert!(
            matches!(error, StoreError::ImmutableField { .. }),
            "{field}: {error}"
        );
    }
    assert_eq!(store.get("s").unwrap().labels, labels(&[("l5", "v5")]));
    assert!(matches!(
        store.update_labels("no", Labels::new(), &["parent".into()]),
        Err(StoreError::NotFound { .. })
    ));
}

#[test]
fn one_snapshot_per_chain_and_parent() {
    let (_root, store) = store();
    committed(&store, "base", None);
    let chain_id = ChainId::of(b"chain");
    let first = store.adopt(lazy(&store, chain_id, Some("base"))).unwrap();
    let again = store.adopt(lazy(&store, chain_id, Some("base"))).unwrap();
    assert_eq!(
        again,
        Adopted {
            record: first.record.clone(),
            created: false
        }
    );
    let other = store.adopt(lazy(&store, chain_id, None)).unwrap();
    assert!(other.created);
    assert_ne!(other.record.name, first.record.name);
    assert!(first.record.name.starts_with("sluice/"));

    assert!(matches!(
        store.remove("base"),
        Err(StoreError::HasChildren { .. })
    ));
    store.remove(&first.record.name).unwrap();
    assert_eq!(store.target(chain_id, Some("base")).unwrap(), None);
    assert_eq!(store.target(chain_id, None).unwrap(), Some(other.record));
    assert_eq!(store.layers().unwrap().len(), 1);
    store.remove("base").unwrap();
    store.check().unwrap();
}

#[test]
fn an_unpacked_snapshot_is_a_target_with_a_directory() {
    let (_root, store) = store();
    let chain_id = ChainId::of(b"chain");
    let usage = Usage {
        inodes: 2,
        size_bytes: 8192,
    };
    let mut unpacked = lazy(&store, chain_id, None);
    (unpacked.layer, unpacked.usage) = (None, usage);
    let unpacked = store.adopt(unpacked).unwrap().record;
    let lazy = store
        .adopt(lazy(&store, ChainId::of(b"2"), Some(&unpacked.name)))
        .unwrap()
        .record;
    assert_eq!(
        (unpacked.usage, unpacked.chain_id()),
        (usage, Some(chain_id))
    );
    let (with_directory, without) = store.ids().unwrap();
    assert_eq!(
        (
            with_directory.into_iter().collect::<Vec<_>>(),
            without.len()
        ),
        (vec![unpacked.id], 1)
    );
    assert!(lazy.is_lazy() && !unpacked.is_lazy());
    store.check().unwrap();
}

#[test]
fn layers_learn_sources() {
    let (_root, store) = store();
    let name = store
        .adopt(lazy(&store, ChainId::of(b"1"), None))
        .unwrap()
        .record
        .name;
    let more = BlobOrigin {
        host: "other".into(),
        repository: "c".into(),
    };
    assert!(
        store
            .update_layer(&name, |layer| layer.sources.push(more.clone()))
            .unwrap()
    );
    assert!(
        store
            .get(&name)
            .unwrap()
            .layer
            .unwrap()
            .sources
            .contains(&more)
    );
    active(&store, "ordinary", None);
    assert!(!store.update_layer("ordinary", |_| ()).unwrap());
    assert!(!store.update_layer("no", |_| ()).unwrap());
}

#[test]
fn documents_are_kept_by_table_and_key() {
    let (_root, store) = store();
    store
        .put_document(DocumentTable::Images, "k", &vec![1, 2])
        .unwrap();
    store
        .put_document(DocumentTable::Decisions, "k", &"why")
        .unwrap();
    store
        .change_document(DocumentTable::Images, "k", |old: Option<Vec<u32>>| {
            old.map(|mut numbers| {
                numbers.push(3);
                numbers
            })
        })
        .unwrap();
    let numbers: Option<Vec<u32>> = store.document(DocumentTable::Images, "k").unwrap();
    assert_eq!(numbers, Some(vec![1, 2, 3]));
    let all: Vec<(String, String)> = store.documents(DocumentTable::Decisions).unwrap();
    assert_eq!(all, vec![("k".to_owned(), "why".to_owned())]);
    let wrong: Result<Option<u32>, _> = store.document(DocumentTable::Images, "k");
    assert!(matches!(wrong, Err(StoreError::Corrupt { .. })));
    assert!(store.remove_document(DocumentTable::Images, "k").unwrap());
    assert!(!store.remove_document(DocumentTable::Images, "k").unwrap());
}

#[test]
fn a_later_schema_is_refused() {
    let (root, store) = store();
    let path = root.path().join("metadata.redb");
    drop(store);
    for (key, value) in [(tables::VERSION, 2), (tables::FEATURES_INCOMPATIBLE, 1)] {
        let database = Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction
            .open_table(META)
            .unwrap()
            .insert(key, value)
            .unwrap();
        transaction.commit().unwrap();
        drop(database);
        let error = MetadataStore::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::Schema { .. }), "{error}");
        let database = Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction
            .open_table(META)
            .unwrap()
            .insert(tables::VERSION, 1)
            .unwrap();
        transaction.commit().unwrap();
    }
}

#[test]
fn a_damaged_row_is_an_error_that_names_it() {
    let (_root, store) = store();
    active(&store, "s", None);
    let transaction = store.database.begin_write().unwrap();
    transaction
        .open_table(tables::SNAPSHOTS)
        .unwrap()
        .insert("s", b"{".as_slice())
        .unwrap();
    transaction.commit().unwrap();
    for error in [store.get("s").unwrap_err(), store.check().unwrap_err()] {
        assert_eq!(error.class(), ErrorClass::Corrupt);
        assert!(error.to_string().contains("\"s\""), "{error}");
    }
}

#[test]
fn the_documented_row_is_what_is_written() {
    let text = include_str!("../../../docs/formats/metadata.md");
    let example = |heading: &str| {
        let at = text.find(heading).unwrap();
        let body = text[at..].split("```json\n").nth(1).unwrap();
        body.split("```")
            .next()
            .unwrap()
            .split_whitespace()
            .collect::<String>()
    };
    let row = example("## Table `snapshots`");
    let decoded = row::Row::decode("example", row.as_bytes()).unwrap();
    assert_eq!(
        String::from_utf8(decoded.encode("example").unwrap()).unwrap(),
        row
    );
    let layer = example("## Table `layers`");
    let decoded: LazyLayerRecord = serde_json::from_str(&layer).unwrap();
    assert_eq!(serde_json::to_string(&decoded).unwrap(), layer);
    let list = example("## Table `boot_lists`");
    let decoded: BootDocument = serde_json::from_str(&list).unwrap();
    assert_eq!(serde_json::to_string(&decoded).unwrap(), list);
}
