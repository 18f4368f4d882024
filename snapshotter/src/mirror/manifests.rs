// SPDX-License-Identifier: Apache-2.0
//! Manifests that were pulled lately, and what tags stood for. No I/O; in memory, because all of it is a
//! few kilobytes to fetch again.
//!
//! A registry may answer one tag differently to clients that accept different types: what a tag stands for
//! is kept by what was accepted. Bytes are kept by their digest, once.
//!
//! **Bounds** bytes of manifests: [`BYTES`]; tags: [`TAGS`], with at most [`VARIANTS`] answers each. The
//! least recently used go.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use lru::LruCache;
use sluice_blockindex::digest::BlobDigest;
use sluice_fetcher::registry::Repository;
use tokio::time::Instant;

/// Memory for manifests: a few kilobytes each, so all that a node pulls in months.
const BYTES: usize = 64 << 20;
/// Tags that are remembered.
const TAGS: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// Answers to different `Accept`s that are remembered of one tag.
const VARIANTS: usize = 8;

/// A manifest's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) media_type: String,
    pub(super) bytes: Bytes,
}

/// What a tag stood for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Variant {
    /// What was accepted, as [`accepted`] writes it.
    pub(super) accept: String,
    pub(super) digest: BlobDigest,
    pub(super) media_type: String,
    pub(super) size_bytes: u64,
    /// The registry's `ETag`.
    pub(super) etag: Option<String>,
    /// When the registry said so last.
    pub(super) checked: Instant,
}

#[derive(Debug)]
struct Tables {
    held_bytes: usize,
    contents: LruCache<BlobDigest, Content>,
    tags: LruCache<(Repository, String), Vec<Variant>>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Manifests {
    tables: Mutex<Tables>,
}

impl Manifests {
    pub(super) fn new() -> Self {
        let tables = Tables {
            held_bytes: 0,
            contents: LruCache::unbounded(),
            tags: LruCache::new(TAGS),
        };
        Manifests {
            tables: Mutex::new(tables),
        }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        // Every critical section leaves the tables whole.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes of a manifest.
    pub(super) fn content(&self, digest: BlobDigest) -> Option<Content> {
        self.tables().contents.get(&digest).cloned()
    }

    /// Keeps a manifest whose digest was verified.
    pub(super) fn keep(&self, digest: BlobDigest, content: Content) {
        let mut tables = self.tables();
        if content.bytes.len() > BYTES {
            return;
        }
        tables.held_bytes += content.bytes.len();
        if let Some(old) = tables.contents.put(digest, content) {
            tables.held_bytes -= old.bytes.len();
        }
        while tables.held_bytes > BYTES {
            let Some((_, old)) = tables.contents.pop_lru() else {
                break;
            };
            tables.held_bytes -= old.bytes.len();
        }
    }

    /// What a tag stood for, for who accepts this.
    pub(super) fn tag(&self, place: &Repository, tag: &str, accept: &str) -> Option<Variant> {
        let key = (place.clone(), tag.to_owned());
        let mut tables = self.tables();
        let variants = tables.tags.get(&key)?;
        variants.iter().find(|it| it.accept == accept).cloned()
    }

    /// What a tag stood for to anybody, if this client would take it: when the registry cannot be asked.
    pub(super) fn tag_to_anybody(
        &self,
        place: &Repository,
        tag: &str,
        accept: &str,
    ) -> Option<Variant> {
        let key = (place.clone(), tag.to_owned());
        let mut tables = self.tables();
        let variants = tables.tags.get(&key)?;
        let takes = |it: &&Variant| accepts(accept, &it.media_type);
        variants
            .iter()
            .filter(takes)
            .max_by_key(|it| it.checked)
            .cloned()
    }

    /// The registry said what a tag stands for.
    pub(super) fn note_tag(&self, place: &Repository, tag: &str, variant: Variant) {
        let key = (place.clone(), tag.to_owned());
        let mut tables = self.tables();
        let variants = tables.tags.get_or_insert_mut(key, Vec::new);
        variants.retain(|it| it.accept != variant.accept);
        if variants.len() >= VARIANTS {
            variants.remove(0);
        }
        variants.push(variant);
    }

    /// The registry does not know the tag any more.
    pub(super) fn forget_tag(&self, place: &Repository, tag: &str) {
        self.tables().tags.pop(&(place.clone(), tag.to_owned()));
    }
}

/// `Accept` headers in one form: types in order of name, without parameters.
pub(super) fn accepted<'a>(headers: impl Iterator<Item = &'a str>) -> String {
    let mut types: Vec<&str> = headers
        .flat_map(|value| value.split(','))
        .map(|it| it.split(';').next().unwrap_or_default().trim())
        .filter(|it| !it.is_empty())
        .collect();
    types.sort_unstable();
    types.dedup();
    types.join(",")
}

/// Whether who accepts this takes that type. Who accepts nothing in particular takes all.
fn accepts(accept: &str, media_type: &str) -> bool {
    let fits = |it: &str| it == "*/*" || it == media_type;
    accept.is_empty() || accept.split(',').any(fits)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn variant(accept: &str, media_type: &str, checked: Instant) -> Variant {
        Variant {
            accept: accept.into(),
            digest: BlobDigest::of(accept.as_bytes()),
            media_type: media_type.into(),
            size_bytes: 1,
            etag: None,
            checked,
        }
    }

    #[test]
    fn accepts_have_one_form() {
        let written = ["b/x;q=0.5, a/y", "a/y", " "];
        assert_eq!(accepted(written.into_iter()), "a/y,b/x");
        for (accept, fits) in [("", true), ("*/*", true), ("a/y,b/x", true), ("a/y", false)] {
            assert_eq!(accepts(accept, "b/x"), fits, "{accept}");
        }
    }

    #[test]
    fn tags_are_kept_by_what_was_accepted() {
        let manifests = Manifests::new();
        let place = Repository::new("r.example", "a").unwrap();
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        manifests.note_tag(&place, "1", variant("a/y,b/x", "a/y", now));
        manifests.note_tag(&place, "1", variant("b/x", "b/x", later));
        let tag = |accept: &str| manifests.tag(&place, "1", accept).map(|it| it.media_type);
        assert_eq!(tag("b/x").as_deref(), Some("b/x"));
        assert_eq!(tag("a/y,b/x").as_deref(), Some("a/y"));
        assert_eq!(tag("c/z"), None);
        let any = |accept: &str| manifests.tag_to_anybody(&place, "1", accept);
        assert_eq!(any("a/y").unwrap().media_type, "a/y");
        assert_eq!(any("").unwrap().media_type, "b/x", "the latest");
        assert_eq!(any("c/z"), None);
        manifests.forget_tag(&place, "1");
        assert_eq!(any(""), None);
        for number in 0..20 {
            manifests.note_tag(&place, "2", variant(&number.to_string(), "a/y", now));
        }
        assert_eq!(
            manifests
                .tables()
                .tags
                .peek(&(place, "2".into()))
                .unwrap()
                .len(),
            VARIANTS
        );
    }

    #[test]
    fn bytes_are_bounded() {
        let manifests = Manifests::new();
        let content = |length| Content {
            media_type: "a/y".into(),
            bytes: vec![0; length].into(),
        };
        for name in [b"1", b"2", b"3"] {
            manifests.keep(BlobDigest::of(name), content(BYTES / 2));
        }
        assert_eq!(manifests.content(BlobDigest::of(b"1")), None);
        assert!(manifests.content(BlobDigest::of(b"3")).is_some());
        manifests.keep(BlobDigest::of(b"4"), content(BYTES + 1));
        assert_eq!(manifests.content(BlobDigest::of(b"4")), None);
        assert!(manifests.tables().held_bytes <= BYTES);
    }
}
