// SPDX-License-Identifier: Apache-2.0
//! The content store's twin in memory, for tests: it can also be slow or dead.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;

use super::{ContentError, ContentInfo, ContentQuery, ContentReader};

type Contents = BTreeMap<(String, String), (ContentInfo, Bytes)>;

/// A content store in memory.
#[derive(Debug, Default)]
pub struct MemoryContent {
    contents: Mutex<Contents>,
    images: Mutex<Vec<(String, String)>>,
    dead: AtomicBool,
    calls: AtomicUsize,
}

impl MemoryContent {
    /// Puts a content with labels under the digest of its bytes, which it returns.
    pub fn put(&self, namespace: &str, bytes: impl Into<Bytes>, labels: &[(&str, &str)]) -> String {
        use sha2::Digest as _;
        let bytes = bytes.into();
        let digest = format!("sha256:{}", hex::encode(sha2::Sha256::digest(&bytes)));
        let info = ContentInfo {
            digest: digest.clone(),
            size_bytes: bytes.len() as u64,
            labels: labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            updated: Some(SystemTime::now()),
        };
        let key = (namespace.to_owned(), digest.clone());
        self.contents
            .lock()
            .expect("not poisoned")
            .insert(key, (info, bytes));
        digest
    }

    /// Calls an image so.
    pub fn name_image(&self, namespace: &str, name: &str) {
        let named = (namespace.to_owned(), name.to_owned());
        self.images.lock().expect("not poisoned").push(named);
    }

    /// Changes the bytes behind a digest.
    pub fn corrupt(&self, namespace: &str, digest: &str) {
        let key = (namespace.to_owned(), digest.to_owned());
        if let Some(entry) = self.contents.lock().expect("not poisoned").get_mut(&key) {
            entry.1 = Bytes::from_static(b"{\"config\":{},\"layers\":[]}");
        }
    }

    /// From now on each call fails.
    pub fn kill(&self) {
        self.dead.store(true, Ordering::SeqCst);
    }

    /// How many calls were made.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn enter(&self, what: &'static str) -> Result<(), ContentError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if self.dead.load(Ordering::SeqCst) {
            return Err(ContentError::Unavailable {
                what,
                message: "killed by the test".into(),
            });
        }
        Ok(())
    }
}

#[async_trait]
impl ContentReader for MemoryContent {
    async fn find(
        &self,
        namespace: &str,
        query: ContentQuery<'_>,
    ) -> Result<Vec<ContentInfo>, ContentError> {
        self.enter("list contents")?;
        let contents = self.contents.lock().expect("not poisoned");
        Ok(contents
            .iter()
            .filter(|((ns, _), _)| ns == namespace)
            .map(|(_, (info, _))| info.clone())
            .filter(|info| match query {
                ContentQuery::LabelIs { key, value } => {
                    info.labels.get(key).is_some_and(|v| v == value)
                }
                ContentQuery::HasLabel(key) => info.labels.contains_key(key),
            })
            .collect())
    }

    async fn info(
        &self,
        namespace: &str,
        digest: &str,
    ) -> Result<Option<ContentInfo>, ContentError> {
        self.enter("stat content")?;
        let contents = self.contents.lock().expect("not poisoned");
        let key = (namespace.to_owned(), digest.to_owned());
        Ok(contents.get(&key).map(|(info, _)| info.clone()))
    }

    async fn read(
        &self,
        namespace: &str,
        digest: &str,
        cap_bytes: usize,
    ) -> Result<Option<Bytes>, ContentError> {
        self.enter("read content")?;
        let contents = self.contents.lock().expect("not poisoned");
        let key = (namespace.to_owned(), digest.to_owned());
        let Some((info, bytes)) = contents.get(&key) else {
            return Ok(None);
        };
        if bytes.len() > cap_bytes {
            let digest = digest.to_owned();
            return Err(ContentError::TooLarge {
                digest,
                size_bytes: info.size_bytes,
                cap_bytes,
            });
        }
        Ok(Some(bytes.clone()))
    }

    async fn read_part(
        &self,
        namespace: &str,
        digest: &str,
        offset: u64,
        bytes: usize,
    ) -> Result<Option<Bytes>, ContentError> {
        let whole = self.read(namespace, digest, usize::MAX).await?;
        Ok(whole.map(|whole| {
            let start = usize::try_from(offset)
                .unwrap_or(usize::MAX)
                .min(whole.len());
            whole.slice(start..start.saturating_add(bytes).min(whole.len()))
        }))
    }

    async fn image_names(&self, namespace: &str, host: &str) -> Result<Vec<String>, ContentError> {
        self.enter("list images")?;
        let images = self.images.lock().expect("not poisoned");
        let of_host = |name: &str| {
            let rest = name.strip_prefix(host).unwrap_or_default();
            rest.starts_with([':', '/'])
        };
        let fits = images
            .iter()
            .filter(|(its, name)| its == namespace && of_host(name));
        Ok(fits.map(|(_, name)| name.clone()).collect())
    }
}
