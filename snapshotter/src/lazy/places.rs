// SPDX-License-Identifier: Apache-2.0
//! Where an image's registry really is, when containerd names its host alone.
//!
//! The candidates ([`crate::resolve::with_ports`]) come of what this node has seen and of what the administrator
//! wrote. A layer whose index comes from elsewhere than the registry would be lazy without anybody having talked to
//! the registry, and readers would find out that it is not there; so one byte of a layer is asked for first, of one
//! candidate after the other. What answered is remembered, durably, by host and repository, and tried first the
//! next time; within [`PROOF_LIFE`] it is not asked again.
//!
//! containerd writes down what an image is called when its pull is over. So after a pull whose registry was not
//! found it is looked up some times, and known for the next pull, whether the name is still there then or not.
//!
//! **Bounds** [`PLACES`] repositories are remembered, [`LOOKERS`] looks are under way, the answer of a registry is
//! awaited for half of what a Prepare has left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::Extent;
use sluice_fetcher::registry::{ImageReference, host_name, port_of};
use sluice_fetcher::source::{Priority, ReadContext, read_checked};
use tokio::time::Instant;

use super::Inner;
use super::decisions::now;
use super::index_fetch::{HEAD_START, first_of, refused};
use super::unmodified::unmarked;
use crate::config::{IndexPolicy, IndexUse};
use crate::plan::{Layout, Refusal, RefusalKind};
use crate::resolve::{KnownPorts, with_ports};
use crate::snapshots::BlobOrigin;
use crate::store::{DocumentTable, StoreError};

/// Repositories whose place is remembered; a node has hundreds.
const PLACES: usize = 4096;
/// Images whose names are looked for at a time.
const LOOKERS: usize = 64;
/// How long files may take that name registries: those on a network file system may hang.
const FILES_DEADLINE: Duration = Duration::from_secs(1);
/// How long a place that let this node read is taken to go on with it: credentials expire, and a layer that is lazy
/// needs them. Shorter: each image of a repository costs a question.
const PROOF_LIFE: Duration = Duration::from_secs(600);
/// How often it is looked what a client calls an image: the name may go soon after it came. One look is a question to
/// containerd about the images of a host.
const LOOK_OFTEN: Duration = Duration::from_secs(1);
/// How long so often: most pulls are over then.
const OFTEN: Duration = Duration::from_secs(120);
/// How often from then on.
const LOOK_SELDOM: Duration = Duration::from_secs(10);
/// How long in all.
const LOOK_FOR: Duration = Duration::from_secs(20 * 60);

/// Where a repository was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    /// The host with its port; without one where it is that of the scheme.
    host: String,
    /// Seconds since 1970.
    at: u64,
}

/// Host and repository, as containerd's labels name them.
fn place_key(origin: &BlobOrigin) -> String {
    format!("{}/{}", host_name(&origin.host), origin.repository)
}

/// What this daemon has found out since it started.
#[derive(Debug, Default)]
pub(super) struct Answers(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    /// The images whose names are being looked for.
    looking: BTreeSet<String>,
    /// When places let this node read.
    read: BTreeMap<BlobOrigin, Instant>,
}

impl Answers {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Every critical section leaves the table whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, key: &str) -> bool {
        let looking = &mut self.table().looking;
        looking.len() < LOOKERS && looking.insert(key.to_owned())
    }

    fn end(&self, key: &str) {
        self.table().looking.remove(key);
    }

    fn note(&self, place: &BlobOrigin) {
        let read = &mut self.table().read;
        read.retain(|_, at| at.elapsed() < PROOF_LIFE);
        if read.len() < PLACES {
            read.insert(place.clone(), Instant::now());
        }
    }

    /// Whether this node could read there a while ago.
    fn lets_in(&self, place: &BlobOrigin) -> bool {
        let table = self.table();
        let at = table.read.get(place);
        at.is_some_and(|at| at.elapsed() < PROOF_LIFE)
    }
}

/// The places of an image's blobs, and whether one is known to answer.
#[derive(Clone, Debug)]
pub(super) struct Places {
    /// The likeliest first.
    pub(super) origins: Vec<BlobOrigin>,
    /// Why none is of use, where they were tried.
    pub(super) unreachable: Option<Refusal>,
}

impl From<&[BlobOrigin]> for Places {
    fn from(origins: &[BlobOrigin]) -> Self {
        Self {
            origins: origins.to_vec(),
            unreachable: None,
        }
    }
}

impl Inner {
    /// The origins with every port that is known of their hosts, the likeliest first.
    pub(super) async fn candidates(
        self: &Arc<Self>,
        namespace: &str,
        origins: &[BlobOrigin],
        hints: BTreeSet<u16>,
    ) -> Vec<BlobOrigin> {
        let portless = origins.iter().filter(|it| port_of(&it.host).is_none());
        let hosts: BTreeSet<&str> = portless.map(|it| it.host.as_str()).collect();
        if hosts.is_empty() {
            return with_ports(origins, &KnownPorts::default());
        }
        let client = self.parts.layers.client();
        let names = async {
            let mut images = Vec::new();
            for host in hosts {
                images.extend(self.image_places(namespace, host).await);
            }
            images
        };
        let (configured, images, proven) = tokio::join!(
            tokio::time::timeout(FILES_DEADLINE, client.named_hosts()),
            names,
            self.blocking(|inner| inner.proven()),
        );
        let known = KnownPorts {
            proven: proven.into_values().collect(),
            images,
            configured: configured.unwrap_or_default(),
            hints,
        };
        with_ports(origins, &known)
    }

    /// What the images of a host are called in containerd.
    async fn image_places(&self, namespace: &str, host: &str) -> Vec<BlobOrigin> {
        let names = self.parts.content.image_names(namespace, host).await;
        let names = names.unwrap_or_else(|error| {
            tracing::debug!(host, "look what images are called: {error}");
            Vec::new()
        });
        let parsed = names.iter().filter_map(|it| it.parse().ok());
        parsed
            .map(|reference: ImageReference| BlobOrigin::from(reference.place()))
            .filter(|place| host_name(&place.host) == host)
            .collect()
    }

    /// Where repositories were found, or are by their images' names, by [`place_key`]. **Blocks**.
    pub(super) fn proven(&self) -> BTreeMap<String, BlobOrigin> {
        let table = DocumentTable::Places;
        let documents = self.parts.metadata.documents::<Place>(table);
        let documents = documents.unwrap_or_else(|error| {
            tracing::warn!("failed to look up where registries are: {error}");
            Vec::new()
        });
        let place = |(key, place): (String, Place)| {
            let repository = key.split_once('/')?.1.to_owned();
            let host = place.host;
            Some((key, BlobOrigin { host, repository }))
        };
        documents.into_iter().filter_map(place).collect()
    }

    /// Remembers where a repository was found, by reading there.
    pub(super) fn found_at(self: &Arc<Self>, origin: &BlobOrigin) {
        self.answers.note(origin);
        self.called(origin);
    }

    /// Remembers where a repository is. That this node may read there is not said.
    fn called(self: &Arc<Self>, origin: &BlobOrigin) {
        let origin = origin.clone();
        self.write(move |inner| inner.store_place(&origin));
    }

    /// **Blocks**.
    fn store_place(&self, origin: &BlobOrigin) -> Result<(), StoreError> {
        let (table, key) = (DocumentTable::Places, place_key(origin));
        let metadata = &self.parts.metadata;
        let known = metadata.document::<Place>(table, &key)?;
        if known.is_some_and(|known| known.host == origin.host) {
            return Ok(());
        }
        tracing::info!(place = %origin, "found out where a repository is");
        let host = origin.host.clone();
        metadata.put_document(table, &key, &Place { host, at: now() })?;
        self.plans.forget_unresolved();
        if metadata.count_documents(table)? > PLACES as u64 {
            let all = metadata.documents::<Place>(table)?;
            if let Some((oldest, _)) = all.into_iter().min_by_key(|(_, place)| place.at) {
                metadata.remove_document(table, &oldest)?;
            }
        }
        Ok(())
    }

    /// Finds out which of an image's places answers, where nobody would otherwise before a reader does.
    pub(super) async fn located(
        self: &Arc<Self>,
        namespace: &str,
        layout: &Layout,
        deadline: Instant,
    ) -> Places {
        let places = Places::from(layout.origins.as_slice());
        if self.options.index_use == IndexPolicy::NONE {
            return places;
        }
        let unmarked = unmarked(layout, self.options.index_use);
        let blobs: Vec<(BlobDigest, u64)> = unmarked.map(|it| (it.0, it.1)).collect();
        let trust = &self.options.trust;
        let allowed = layout.origins.iter().filter(|it| trust.allows(it));
        let allowed: Vec<BlobOrigin> = allowed.cloned().collect();
        let (Some(first), false) = (allowed.first().cloned(), blobs.is_empty()) else {
            return places;
        };
        let known = self.blocking(move |inner| {
            let mut all = blobs.iter();
            let usable = all.find(|(blob, _)| inner.has_usable_index(*blob));
            (usable.copied(), blobs.first().copied())
        });
        let (usable, any) = known.await;
        if self.answers.lets_in(&first) {
            return places;
        }
        let asks = self.options.index_use.referrer == IndexUse::On;
        let Some((blob, blob_bytes)) = usable.or_else(|| any.filter(|_| asks)) else {
            self.learn_later(namespace, &layout.origins);
            return places;
        };
        // What comes after it needs time, too.
        let until = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
        match self.answering(allowed, (blob, blob_bytes), until).await {
            Ok(place) => {
                self.found_at(&place);
                Places::from(settled(layout.origins.clone(), &place).as_slice())
            }
            Err(refusal) => {
                tracing::debug!(%blob, "{refusal}");
                self.learn_later(namespace, &layout.origins);
                Places {
                    unreachable: Some(refusal),
                    ..places
                }
            }
        }
    }

    /// The place that gives a byte of the blob first.
    pub(super) async fn answering(
        &self,
        places: Vec<BlobOrigin>,
        (blob, blob_bytes): (BlobDigest, u64),
        until: Instant,
    ) -> Result<BlobOrigin, Refusal> {
        let mut context = ReadContext::new(Priority::Foreground);
        context.deadline = Some(until);
        let layers = &self.parts.layers;
        let extent = Extent::from_length(0, blob_bytes.min(1)).unwrap_or_else(Extent::empty);
        let ask = |place: BlobOrigin| {
            let source = layers.source_once(blob, blob_bytes, &place);
            let context = context.clone();
            async move {
                let read = read_checked(&*source, &context, extent, |_| Ok::<_, Refusal>(()));
                let read = read.await.map_err(|error| refused(&error));
                read.and_then(|checked| checked).map(drop)
            }
        };
        let answered = first_of(places.clone(), ask, HEAD_START).await;
        let failed = match answered {
            Ok((at, ())) => return Ok(places[at].clone()),
            Err(failed) => failed,
        };
        let tried = failed
            .into_iter()
            .map(|(at, refusal)| format!("{}: {refusal}", places[at]));
        let tried: Vec<String> = tried.collect();
        let reason = format!("no registry is known to have it; {}", tried.join("; "));
        Err(Refusal::new(RefusalKind::Unresolved, reason))
    }

    /// Looks, when the pull may be over, what the client calls the image.
    fn learn_later(self: &Arc<Self>, namespace: &str, origins: &[BlobOrigin]) {
        for origin in origins.iter().filter(|it| port_of(&it.host).is_none()) {
            let key = format!("{namespace}/{}", place_key(origin));
            if !self.answers.begin(&key) {
                continue;
            }
            let (inner, origin) = (Arc::clone(self), origin.clone());
            let namespace = namespace.to_owned();
            self.spawn(async move {
                let begun = Instant::now();
                while begun.elapsed() < LOOK_FOR {
                    let often = begun.elapsed() < OFTEN;
                    tokio::time::sleep(if often { LOOK_OFTEN } else { LOOK_SELDOM }).await;
                    let images = inner.image_places(&namespace, &origin.host).await;
                    let mut same = images.iter();
                    if let Some(place) = same.find(|it| it.repository == origin.repository) {
                        inner.called(place);
                        break;
                    }
                }
                inner.answers.end(&key);
            });
        }
    }
}

/// The origins with what is now known of one: it comes first, and its host is not guessed at elsewhere.
fn settled(origins: Vec<BlobOrigin>, place: &BlobOrigin) -> Vec<BlobOrigin> {
    let mut all = vec![place.clone()];
    for mut origin in origins {
        if host_name(&origin.host) == host_name(&place.host) {
            origin.host.clone_from(&place.host);
        }
        if !all.contains(&origin) {
            all.push(origin);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_was_found_is_not_guessed_at_again() {
        let origin = |text: &str| {
            let (host, repository) = text.split_once('/').unwrap();
            BlobOrigin {
                host: host.to_owned(),
                repository: repository.to_owned(),
            }
        };
        let given = ["r:1/a", "r:2/a", "r/a", "r:1/b", "r/b", "s:3/a", "s/a"];
        let expected = ["r:2/a", "r:2/b", "s:3/a", "s/a"];
        assert_eq!(
            settled(given.map(origin).to_vec(), &origin("r:2/a")),
            expected.map(origin)
        );
    }
}
