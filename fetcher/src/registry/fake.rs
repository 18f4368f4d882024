// SPDX-License-Identifier: Apache-2.0
//! A registry in this process that can be told to misbehave, for tests.
//!
//! It speaks the distribution specification on one port and serves redirected blobs on another, the
//! storage. Every request is noted, so that tests can count them and look at what they carried.
//! Faults are rules: which requests (method, part of the path), how many to let pass first, how
//! often to strike, and what happens then.
//!
//! Dropping it stops both listeners.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::Request;
use bytes::Bytes;
use sluice_blockindex::digest::{BlobDigest, ManifestDigest};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::Repository;

mod referrers;
mod routes;

/// A request that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Whether it came to the storage port.
    pub storage: bool,
    /// The method.
    pub method: String,
    /// The path.
    pub path: String,
    /// The query, empty without one.
    pub query: String,
    /// The `Range` header.
    pub range: Option<String>,
    /// The `Authorization` header.
    pub authorization: Option<String>,
    /// All headers that are text, by lower-case name.
    pub headers: BTreeMap<String, String>,
}

impl Seen {
    /// A header, by lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What goes wrong with a request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Misbehaviour {
    /// Answers with this status and, maybe, `Retry-After`.
    Status(u16, Option<String>),
    /// Answers a range with 200 and the whole blob.
    IgnoreRange,
    /// Breaks the connection after so many bytes of the body.
    CutBody(usize),
    /// Sends so many bytes of the body, then nothing.
    StallBody(usize),
    /// Sends the body in pieces of so many bytes with a pause before each.
    SlowBody(usize, Duration),
    /// Never answers.
    NoAnswer,
    /// A `Content-Range` (and bytes) one further than asked.
    ShiftedRange,
    /// Sends so many bytes fewer than it should, with a `Content-Length` that says so.
    ShortLength(usize),
    /// Inverts the first byte of the body.
    FlipByte,
    /// Leaves out `Docker-Content-Digest`.
    NoDigestHeader,
    /// Redirects to this URL.
    Redirect(String),
    /// Does the work, then breaks the connection instead of answering.
    LostAnswer,
    /// Answers with this `Link` header besides.
    Link(String),
    /// Answers 200 with a body of this media type.
    Answer(String, Bytes),
    /// Somebody else puts a manifest of this repository, under this tag and with this media type, right before.
    Meanwhile([String; 3], Bytes),
}

/// Who is let in.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Access {
    /// Everybody.
    Open,
    /// By name and password in each request.
    Basic {
        /// The name.
        username: String,
        /// The password.
        password: String,
    },
    /// By token; the token service gives tokens to this name and password, to this identity token,
    /// or to everybody where neither is set.
    Bearer {
        /// Name and password.
        password: Option<(String, String)>,
        /// Identity token.
        identity: Option<String>,
        /// Life of the tokens as stated.
        expires_in: u64,
        /// Status by which an expired token is refused.
        refusal: u16,
    },
}

/// How referrers are listed.
#[derive(Clone, Copy, Debug)]
pub struct ReferrersApi {
    /// Entries of a page.
    pub page: usize,
    /// Whether lists are filtered by type.
    pub filters: bool,
    /// Whether entries repeat the annotations.
    pub annotations: bool,
}

impl Default for ReferrersApi {
    fn default() -> Self {
        ReferrersApi {
            page: 100,
            filters: true,
            annotations: true,
        }
    }
}

#[derive(Debug)]
struct Rule {
    method: String,
    path_part: String,
    pass: u32,
    strikes: u32,
    what: Misbehaviour,
}

#[derive(Debug)]
struct Inner {
    access: Access,
    redirects: bool,
    signature: u64,
    mounts: bool,
    referrers: Option<ReferrersApi>,
    blobs: BTreeMap<(String, String), Bytes>,
    manifests: BTreeMap<(String, String), (String, Bytes)>,
    uploads: BTreeMap<u64, Vec<u8>>,
    tokens: HashSet<String>,
    counter: u64,
    rules: Vec<Rule>,
    seen: Vec<Seen>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    address: SocketAddr,
    storage: SocketAddr,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module.
#[derive(Debug)]
pub struct FakeRegistry {
    shared: Arc<Shared>,
    listeners: [JoinHandle<()>; 2],
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        for listener in &self.listeners {
            listener.abort();
        }
    }
}

impl FakeRegistry {
    /// Starts on two free ports of this machine.
    ///
    /// # Panics
    /// When no port can be had.
    pub async fn start() -> Self {
        let bind = || TcpListener::bind(("127.0.0.1", 0));
        let (api, storage) = (bind().await.expect("a port"), bind().await.expect("a port"));
        let inner = Inner {
            access: Access::Open,
            redirects: false,
            signature: 1,
            mounts: true,
            referrers: None,
            blobs: BTreeMap::new(),
            manifests: BTreeMap::new(),
            uploads: BTreeMap::new(),
            tokens: HashSet::new(),
            counter: 0,
            rules: Vec::new(),
            seen: Vec::new(),
        };
        let shared = Arc::new(Shared {
            inner: Mutex::new(inner),
            address: api.local_addr().expect("bound"),
            storage: storage.local_addr().expect("bound"),
        });
        let listeners = [(api, false), (storage, true)].map(|(listener, is_storage)| {
            let router = Router::new()
                .fallback(
                    move |State(shared): State<Arc<Shared>>, request: Request<_>| {
                        routes::answer(shared, is_storage, request)
                    },
                )
                .with_state(Arc::clone(&shared));
            tokio::spawn(async move {
                // Ends only by being aborted.
                let _ = axum::serve(listener, router).await;
            })
        });
        FakeRegistry { shared, listeners }
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.shared.address.to_string()
    }

    /// `127.0.0.1:PORT` of the storage.
    pub fn storage_host(&self) -> String {
        self.shared.storage.to_string()
    }

    /// A repository of it.
    ///
    /// # Panics
    /// When `name` is no repository name.
    pub fn place(&self, name: &str) -> Repository {
        Repository::new(&self.host(), name).expect("a repository name")
    }

    /// Puts a blob into a repository.
    pub fn add_blob(&self, name: &str, bytes: impl Into<Bytes>) -> BlobDigest {
        let bytes = bytes.into();
        let digest = BlobDigest::of(&bytes);
        self.shared
            .lock()
            .blobs
            .insert((name.to_owned(), digest.to_string()), bytes);
        digest
    }

    /// Puts an image into a repository: an OCI layout with one manifest.
    ///
    /// # Panics
    /// When `layout` is none.
    pub fn add_layout(&self, name: &str, tag: &str, layout: &Path) {
        let read = |path: &Path| std::fs::read(path).expect("a file of the layout");
        let blob = |digest: &str| read(&layout.join("blobs").join(digest.replace(':', "/")));
        let index: serde_json::Value =
            serde_json::from_slice(&read(&layout.join("index.json"))).expect("JSON");
        let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
        let described = &index["manifests"][0];
        let bytes = blob(&text(&described["digest"]));
        let manifest: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
        let layers = manifest["layers"].as_array().expect("layers");
        for of in layers.iter().chain([&manifest["config"]]) {
            self.add_blob(name, blob(&text(&of["digest"])));
        }
        self.add_manifest(name, tag, &text(&described["mediaType"]), bytes);
    }

    /// The bytes of a blob, if the repository has it.
    pub fn blob(&self, name: &str, digest: BlobDigest) -> Option<Bytes> {
        self.shared
            .lock()
            .blobs
            .get(&(name.to_owned(), digest.to_string()))
            .cloned()
    }

    /// Puts a manifest into a repository, under its digest and a tag.
    pub fn add_manifest(
        &self,
        name: &str,
        tag: &str,
        media_type: &str,
        bytes: impl Into<Bytes>,
    ) -> ManifestDigest {
        let bytes = bytes.into();
        let digest = ManifestDigest::of(&bytes);
        let mut inner = self.shared.lock();
        for target in [tag.to_owned(), digest.to_string()] {
            let value = (media_type.to_owned(), bytes.clone());
            inner.manifests.insert((name.to_owned(), target), value);
        }
        digest
    }

    /// Says who is let in; tokens given before are void.
    pub fn set_access(&self, access: Access) {
        let mut inner = self.shared.lock();
        inner.access = access;
        inner.tokens.clear();
    }

    /// Voids all tokens given so far.
    pub fn expire_tokens(&self) {
        self.shared.lock().tokens.clear();
    }

    /// Whether blobs are redirected to the storage.
    pub fn set_redirects(&self, redirects: bool) {
        self.shared.lock().redirects = redirects;
    }

    /// Voids the signatures of all redirects given so far.
    pub fn expire_redirects(&self) {
        self.shared.lock().signature += 1;
    }

    /// Whether blobs are mounted across repositories.
    pub fn set_mounts(&self, mounts: bool) {
        self.shared.lock().mounts = mounts;
    }

    /// Whether referrers are listed, and how; without it the request is not known, as in older registries.
    pub fn set_referrers(&self, api: Option<ReferrersApi>) {
        self.shared.lock().referrers = api;
    }

    /// The bytes of a manifest, by tag or digest.
    pub fn manifest(&self, name: &str, target: &str) -> Option<Bytes> {
        let inner = self.shared.lock();
        let found = inner.manifests.get(&(name.to_owned(), target.to_owned()));
        found.map(|(_, bytes)| bytes.clone())
    }

    /// Forgets a manifest, by tag or digest.
    pub fn remove_manifest(&self, name: &str, target: &str) {
        let key = (name.to_owned(), target.to_owned());
        self.shared.lock().manifests.remove(&key);
    }

    /// From now on, lets `pass` requests of `method` (empty: any) whose path contains `path_part`
    /// pass, then strikes `strikes` times. The first rule that fits a request decides it. The path
    /// of a request to the storage has `storage ` before it.
    pub fn misbehave(
        &self,
        method: &str,
        path_part: &str,
        pass: u32,
        strikes: u32,
        what: Misbehaviour,
    ) {
        let (method, path_part) = (method.to_owned(), path_part.to_owned());
        self.shared.lock().rules.push(Rule {
            method,
            path_part,
            pass,
            strikes,
            what,
        });
    }

    /// Forgets all rules.
    pub fn behave(&self) {
        self.shared.lock().rules.clear();
    }

    /// The requests since the last call.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.shared.lock().seen)
    }

    /// The requests since the last call, each as `METHOD path` with the storage marked.
    pub fn take_lines(&self) -> Vec<String> {
        let line = |seen: Seen| {
            let port = if seen.storage { "storage " } else { "" };
            format!("{port}{} {}", seen.method, seen.path)
        };
        self.take_seen().into_iter().map(line).collect()
    }

    /// Uploads that are open.
    pub fn open_uploads(&self) -> usize {
        self.shared.lock().uploads.len()
    }
}
