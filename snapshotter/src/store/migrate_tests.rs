// SPDX-License-Identifier: Apache-2.0
//! Files of older and of later versions. The oldest form of each version is recorded in `recorded/`.

use std::path::{Path, PathBuf};

use redb::{Database, TableDefinition, WriteTransaction};
use sluice_blockindex::digest::ChainId;

use super::tables::{CHILDREN, LAYERS, META, NEXT_ID, SNAPSHOTS, TARGETS, VERSION};
use super::*;
use crate::snapshots::SnapshotKind;

/// As written before boot lists and pins had tables.
const FIRST: &[u8] = include_bytes!("recorded/v1-first.redb.zst");

const CHAIN: &str = "sha256:5e6f000000000000000000000000000000000000000000000000000000000000";
const ROWS: [(&str, &str); 3] = [
    (
        "default/1/sha256:base",
        r#"{"id":1,"kind":"committed","labels":{"a":"b"},"created":[1700000000,5],"updated":[1700000001,6],"usage":{"inodes":3,"size_bytes":4096},"lazy":false}"#,
    ),
    (
        "sluice/5e6f/2",
        r#"{"id":2,"kind":"committed","parent":"default/1/sha256:base","labels":{},"created":[1700000002,0],"updated":[1700000002,0],"usage":{"inodes":0,"size_bytes":0},"lazy":true,"target":"sha256:5e6f000000000000000000000000000000000000000000000000000000000000"}"#,
    ),
    (
        "default/3/container",
        r#"{"id":3,"kind":"active","parent":"sluice/5e6f/2","labels":{},"created":[1700000003,0],"updated":[1700000003,0],"usage":{"inodes":0,"size_bytes":0},"lazy":false}"#,
    ),
];
const LAYER: &str = r#"{"chain_id":"sha256:5e6f000000000000000000000000000000000000000000000000000000000000","diff_id":"sha256:0102000000000000000000000000000000000000000000000000000000000000","index_digest":"sha256:0304000000000000000000000000000000000000000000000000000000000000","blob_digest":"sha256:0506000000000000000000000000000000000000000000000000000000000000","blob_bytes":31337,"device_bytes":104448,"sources":[{"host":"registry.example:5000","repository":"library/python"}]}"#;

fn recorded(directory: &Path) -> PathBuf {
    let path = directory.join("metadata.redb");
    std::fs::write(&path, zstd::decode_all(FIRST).unwrap()).unwrap();
    path
}

/// Whether the store has what was recorded.
fn assert_has_all(store: &MetadataStore) {
    store.check().unwrap();
    let (container, chain) = store.with_chain("default/3/container").unwrap();
    assert_eq!(container.kind, SnapshotKind::Active);
    let names: Vec<&str> = chain.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["sluice/5e6f/2", "default/1/sha256:base"]);
    let layer = chain[0].layer.as_ref().unwrap();
    assert_eq!(layer.blob_bytes, 31337);
    let chain_id: ChainId = CHAIN.parse().unwrap();
    let target = store
        .target(chain_id, Some("default/1/sha256:base"))
        .unwrap();
    assert_eq!(target.unwrap().name, "sluice/5e6f/2");
    assert_eq!(chain[1].usage.size_bytes, 4096);
    assert_eq!(chain[1].labels["a"], "b");
    assert_eq!(store.allocate_id().0, 4);
}

fn set_version(path: &Path, version: u64) {
    let database = Database::open(path).unwrap();
    let transaction = database.begin_write().unwrap();
    let mut meta = transaction.open_table(META).unwrap();
    meta.insert(VERSION, version).unwrap();
    drop(meta);
    transaction.commit().unwrap();
}

fn version(path: &Path) -> u64 {
    let database = Database::open(path).unwrap();
    let transaction = database.begin_write().unwrap();
    let meta = transaction.open_table(META).unwrap();
    meta.get(VERSION).unwrap().unwrap().value()
}

const MARKS: TableDefinition<'_, &str, u64> = TableDefinition::new("marks");

fn mark(transaction: &WriteTransaction, name: &str) -> Result<(), StoreError> {
    let mut marks = transaction.open_table(MARKS)?;
    let count = marks.get(name)?.map_or(0, |it| it.value());
    marks.insert(name, count + 1)?;
    Ok(())
}

fn first(transaction: &WriteTransaction) -> Result<(), StoreError> {
    mark(transaction, "first")
}

fn second(transaction: &WriteTransaction) -> Result<(), StoreError> {
    mark(transaction, "second")
}

fn fails(transaction: &WriteTransaction) -> Result<(), StoreError> {
    mark(transaction, "fails")?;
    Err(StoreError::corrupt("a row", "cannot be read"))
}

/// The marks of a file, in order of their names.
fn marks(path: &Path) -> Vec<(String, u64)> {
    let database = Database::open(path).unwrap();
    let transaction = database.begin_write().unwrap();
    let marks = transaction.open_table(MARKS).unwrap();
    let marks = marks.iter().unwrap().map(|it| {
        let (name, count) = it.unwrap();
        (name.value().to_owned(), count.value())
    });
    marks.collect()
}

#[test]
fn the_first_form_of_version_1_is_read_and_completed() {
    let root = tempfile::tempdir().unwrap();
    let path = recorded(root.path());
    for _ in 0..2 {
        let store = MetadataStore::open(&path).unwrap();
        assert_has_all(&store);
        // Tables of later programs are there, and empty.
        assert_eq!(store.count_documents(DocumentTable::Pins).unwrap(), 0);
        assert_eq!(store.count_documents(DocumentTable::BootLists).unwrap(), 0);
    }
    assert!(!migrate::kept_path(&path, 1).exists(), "no step was needed");
}

#[test]
fn an_older_file_is_kept_and_brought_to_the_present_version_once() {
    let root = tempfile::tempdir().unwrap();
    let path = recorded(root.path());
    for _ in 0..2 {
        assert_has_all(&MetadataStore::open_by(&path, &[first, second]).unwrap());
    }
    assert_eq!(version(&path), 3);
    assert_eq!(marks(&path), [("first".into(), 1), ("second".into(), 1)]);
    // Whoever goes back to the older program finds its file as it was.
    let kept = migrate::kept_path(&path, 1);
    assert_eq!((version(&kept), marks(&kept)), (1, vec![]));
    std::fs::rename(&kept, &path).unwrap();
    assert_has_all(&MetadataStore::open(&path).unwrap());
    // From the middle only what comes after it.
    set_version(&path, 2);
    drop(MetadataStore::open_by(&path, &[first, second]).unwrap());
    assert_eq!(marks(&path), [("second".into(), 1)]);
}

#[test]
fn a_step_that_fails_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let path = recorded(root.path());
    let error = MetadataStore::open_by(&path, &[first, fails]).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Corrupt, "{error}");
    assert_eq!((version(&path), marks(&path)), (1, vec![]));
    assert_has_all(&MetadataStore::open(&path).unwrap());
}

#[test]
fn a_new_file_is_of_the_present_version_and_needs_no_step() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("metadata.redb");
    drop(MetadataStore::open_by(&path, &[fails]).unwrap());
    assert_eq!(version(&path), 2);
    assert!(!migrate::kept_path(&path, 1).exists());
}

#[test]
fn a_later_file_is_refused_and_loses_nothing() {
    let root = tempfile::tempdir().unwrap();
    let path = recorded(root.path());
    set_version(&path, SCHEMA_VERSION + 1);
    let error = MetadataStore::open(&path).unwrap_err().to_string();
    let says = format!("schema version {}", SCHEMA_VERSION + 1);
    assert!(
        error.contains(&says) && error.contains("nothing was changed"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    // The later program goes on with it.
    assert_eq!(version(&path), SCHEMA_VERSION + 1);
    set_version(&path, SCHEMA_VERSION);
    assert_has_all(&MetadataStore::open(&path).unwrap());
}

/// Made the recording; run by hand when a version begins.
#[test]
#[ignore = "writes into the source"]
fn record_the_first_form_of_version_1() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("metadata.redb");
    let database = Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut meta = transaction.open_table(META).unwrap();
        meta.insert(VERSION, 1).unwrap();
        meta.insert(NEXT_ID, 4).unwrap();
        let mut snapshots = transaction.open_table(SNAPSHOTS).unwrap();
        for (name, row) in ROWS {
            snapshots.insert(name, row.as_bytes()).unwrap();
        }
        let mut children = transaction.open_table(CHILDREN).unwrap();
        children.insert((1, 2), ()).unwrap();
        children.insert((2, 3), ()).unwrap();
        let mut targets = transaction.open_table(TARGETS).unwrap();
        let target = (CHAIN, "default/1/sha256:base");
        targets.insert(target, "sluice/5e6f/2").unwrap();
        let mut layers = transaction.open_table(LAYERS).unwrap();
        layers.insert(2, LAYER.as_bytes()).unwrap();
        for table in [DocumentTable::Images, DocumentTable::Decisions] {
            transaction.open_table(table.definition()).unwrap();
        }
    }
    transaction.commit().unwrap();
    drop(database);
    let bytes = zstd::encode_all(&*std::fs::read(&path).unwrap(), 19).unwrap();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store/recorded");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("v1-first.redb.zst"), bytes).unwrap();
}
