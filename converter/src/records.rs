// SPDX-License-Identifier: Apache-2.0
//! What earlier calls have converted: one small file per layer, so that a call that was interrupted goes on
//! where it ended.
//!
//! A record says what a source blob became by a recipe, and nothing of where: whoever uses it asks the
//! destination for the blob and looks at its index. It is a hint. What cannot be read, is of another
//! version, or says something of another layer is no record; what cannot be written is not missed.
//!
//! The file's name is the digest of what the record is about, so calls side by side do not disturb each
//! other: each file appears whole, by a rename, and the same layer gives the same file. When there are
//! too many, those go that were written first.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sluice_blockindex::annotations::LayerMark;
use sluice_blockindex::digest::{BlobDigest, DiffId};

use crate::image::Descriptor;
use crate::plan::{LayerFormat, Outcome, Recipe, TocBlob};

/// The most records. One takes a block of the disk, so this is 32 MiB; a registry of a thousand images
/// has some thousands of layers.
const RECORDS_MAX: usize = 8192;
/// How many are left when there were too many.
const RECORDS_KEPT: usize = RECORDS_MAX / 4 * 3;
/// The most bytes of a record: the annotations of a layer take some 700.
const RECORD_MAX_BYTES: u64 = 64 * 1024;
/// To be changed with any change of the file's meaning.
const VERSION: u32 = 1;

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// The source's blob.
    pub source: BlobDigest,
    /// The layer's diff ID by the config, which was checked when the record was made.
    pub diff_id: DiffId,
    /// How it was converted.
    pub recipe: Recipe,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    source: String,
    diff_id: String,
    recipe: String,
    media_type: String,
    blob: String,
    blob_bytes: u64,
    annotations: std::collections::BTreeMap<String, String>,
}

/// A directory of records.
#[derive(Debug)]
pub struct Records {
    directory: PathBuf,
}

impl Records {
    /// The records in `directory`, which is made with the first. Blocks while too many are removed.
    pub fn open(directory: &Path) -> Self {
        if let Err(e) = prune(directory, RECORDS_MAX, RECORDS_KEPT) {
            tracing::debug!(directory = %directory.display(), "records are not looked through: {e}");
        }
        Self {
            directory: directory.to_owned(),
        }
    }

    fn path(&self, key: &Key) -> PathBuf {
        let name = format!("{} {} {}", key.source, key.diff_id, key.recipe);
        let name = BlobDigest::of(name.as_bytes()).hex();
        self.directory.join(format!("{name}.json"))
    }

    /// What the layer became, if that is known. The annotations name the config of that time. Blocks for
    /// a small read.
    pub fn find(&self, key: &Key) -> Option<Outcome> {
        let mut text = String::new();
        let file = fs::File::open(self.path(key)).ok()?;
        file.take(RECORD_MAX_BYTES).read_to_string(&mut text).ok()?;
        outcome(&serde_json::from_str(&text).ok()?, key)
    }

    /// Remembers what the layer became. Blocks for a small write.
    pub fn put(&self, key: &Key, outcome: &Outcome) {
        let Some(record) = record(key, outcome) else {
            return;
        };
        if let Err(e) = self.write(&self.path(key), &record) {
            tracing::debug!(directory = %self.directory.display(), "record is not kept: {e}");
        }
    }

    fn write(&self, path: &Path, record: &Record) -> io::Result<()> {
        // Which images somebody converts is nobody else's concern.
        let mut directories = fs::DirBuilder::new();
        directories.recursive(true).mode(0o700);
        directories.create(&self.directory)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.persist(path).map_err(|e| e.error)?;
        Ok(())
    }
}

fn record(key: &Key, outcome: &Outcome) -> Option<Record> {
    let (annotations, media_type, blob, blob_bytes) = match outcome {
        Outcome::Toc(toc) => {
            let annotations = toc.to_map(key.diff_id);
            (
                annotations,
                toc.media_type.as_str(),
                toc.blob,
                toc.blob_bytes,
            )
        }
        Outcome::Lazy(found) => {
            let media_type = crate::image::document::OCI_LAYER_ZSTD;
            let mark = LayerMark::Lazy(found.clone());
            (mark.to_map(), media_type, found.blob, found.blob_bytes)
        }
        Outcome::NotLazy {
            reason,
            media_type,
            blob,
            blob_bytes,
        } => {
            let mark = LayerMark::NotLazy(reason.clone());
            (mark.to_map(), media_type.as_str(), *blob, *blob_bytes)
        }
        Outcome::Foreign => return None,
    };
    Some(Record {
        version: VERSION,
        source: key.source.to_string(),
        diff_id: key.diff_id.to_string(),
        recipe: key.recipe.to_string(),
        media_type: media_type.to_owned(),
        blob: blob.to_string(),
        blob_bytes,
        annotations,
    })
}

/// What a record says, if it is one about `key` and makes sense.
fn outcome(record: &Record, key: &Key) -> Option<Outcome> {
    let about = (
        record.version,
        record.source.as_str(),
        record.diff_id.as_str(),
        record.recipe.as_str(),
    );
    let (source, diff_id) = (key.source.to_string(), key.diff_id.to_string());
    if about != (VERSION, &source, &diff_id, &key.recipe.to_string()) {
        return None;
    }
    let blob: BlobDigest = record.blob.parse().ok()?;
    if key.recipe.format != LayerFormat::Sluice {
        let mut descriptor = Descriptor::new(&record.media_type, blob, record.blob_bytes);
        descriptor.annotations = record.annotations.clone();
        let (source_diff, toc) = TocBlob::of_annotations(&descriptor)?;
        return (source_diff == key.diff_id).then_some(Outcome::Toc(toc));
    }
    let annotation = |name: &str| record.annotations.get(name).map(String::as_str);
    match LayerMark::parse(annotation).ok()? {
        LayerMark::Lazy(found) => {
            let same = (found.blob, found.blob_bytes, found.diff_id)
                == (blob, record.blob_bytes, key.diff_id);
            same.then_some(Outcome::Lazy(found))
        }
        LayerMark::NotLazy(reason) => Some(Outcome::NotLazy {
            reason,
            media_type: record.media_type.clone(),
            blob,
            blob_bytes: record.blob_bytes,
        }),
        LayerMark::Unmarked => None,
    }
}

/// Removes those that were written first, down to `kept`, if there are more than `most`.
fn prune(directory: &Path, most: usize, kept: usize) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    let mut files: Vec<(SystemTime, PathBuf)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
            Some((metadata.modified().ok()?, entry.path()))
        })
        .collect();
    if files.len() <= most {
        return Ok(());
    }
    files.sort();
    let surplus = files.len() - kept;
    for (_, path) in files.iter().take(surplus) {
        fs::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_blockindex::annotations::LayerAnnotations;
    use sluice_blockindex::digest::{ConfigDigest, IndexDigest};
    use sluice_blockindex::extent::Extent;

    fn key(source: &[u8]) -> Key {
        Key {
            source: BlobDigest::of(source),
            diff_id: DiffId::of(b"tar"),
            recipe: Recipe::default(),
        }
    }

    fn lazy() -> Outcome {
        Outcome::Lazy(LayerAnnotations {
            index_extent: Extent::new(10, 20).unwrap(),
            index_digest: IndexDigest::of(b"i"),
            blob: BlobDigest::of(b"new"),
            blob_bytes: 100,
            diff_id: DiffId::of(b"tar"),
            config: ConfigDigest::of(b"config"),
            port: None,
            boot: Vec::new(),
        })
    }

    fn not_lazy() -> Outcome {
        Outcome::NotLazy {
            reason: "sparse".to_owned(),
            media_type: "application/x".to_owned(),
            blob: BlobDigest::of(b"kept"),
            blob_bytes: 7,
        }
    }

    #[test]
    fn a_record_is_found_by_all_that_it_is_about() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let records = Records::open(&path);
        assert_eq!(records.find(&key(b"one")), None);
        for (source, outcome) in [(b"one", lazy()), (b"two", not_lazy())] {
            records.put(&key(source), &outcome);
            assert_eq!(Records::open(&path).find(&key(source)), Some(outcome));
        }
        records.put(&key(b"foreign"), &Outcome::Foreign);
        assert_eq!(records.find(&key(b"foreign")), None);
        let other_diff = Key {
            diff_id: DiffId::of(b"other"),
            ..key(b"one")
        };
        let other_recipe = Key {
            recipe: Recipe {
                level: 9,
                ..Recipe::default()
            },
            ..key(b"one")
        };
        for other in [key(b"three"), other_diff, other_recipe] {
            assert_eq!(records.find(&other), None);
        }
        assert_eq!(fs::read_dir(&path).unwrap().count(), 2, "no leftovers");
    }

    #[test]
    fn what_is_no_record_of_the_layer_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path());
        records.put(&key(b"one"), &lazy());
        let path = records.path(&key(b"one"));
        let text = fs::read_to_string(&path).unwrap();
        for (from, to) in [
            ("\"version\":1", "\"version\":2"),
            (
                &*BlobDigest::of(b"one").to_string(),
                &*BlobDigest::of(b"1").to_string(),
            ),
            ("\"blob_bytes\":100", "\"blob_bytes\":101"),
            ("sluice.index.digest", "sluice.index.other"),
            ("{", ""),
        ] {
            let changed = text.replace(from, to);
            assert_ne!(changed, text, "{from}");
            fs::write(&path, changed).unwrap();
            assert_eq!(records.find(&key(b"one")), None, "{from}");
        }
        // A record of another layer in this one's place.
        records.put(&key(b"two"), &lazy());
        fs::rename(records.path(&key(b"two")), &path).unwrap();
        assert_eq!(records.find(&key(b"one")), None);
        fs::write(&path, &text).unwrap();
        assert!(records.find(&key(b"one")).is_some());
        // A directory that cannot be written costs nothing but the hint.
        let records = Records::open(&path);
        records.put(&key(b"one"), &lazy());
        assert_eq!(records.find(&key(b"one")), None);
    }

    #[test]
    fn the_documented_example_is_a_record() {
        let text = include_str!("../../docs/formats/conversion-records.md");
        let example = text.split("```json").nth(1).unwrap();
        let example = example.split("```").next().unwrap();
        let record: Record = serde_json::from_str(example).unwrap();
        let key = Key {
            source: record.source.parse().unwrap(),
            diff_id: record.diff_id.parse().unwrap(),
            recipe: Recipe::default(),
        };
        let found = outcome(&record, &key);
        assert!(matches!(found, Some(Outcome::NotLazy { reason, .. }) if reason == "sparse"));
    }

    #[test]
    fn the_oldest_go_first() {
        let directory = tempfile::tempdir().unwrap();
        for n in 0..10 {
            let path = directory.path().join(format!("{n}"));
            let file = fs::File::create(path).unwrap();
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(100 - n);
            file.set_modified(time).unwrap();
        }
        prune(directory.path(), 10, 3).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 10);
        prune(directory.path(), 9, 3).unwrap();
        let mut left: Vec<_> = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["0", "1", "2"]);
    }
}
