// SPDX-License-Identifier: Apache-2.0
//! How the fake registry lists referrers.

use axum::body::Body;
use axum::http::Response;
use bytes::Bytes;
use serde_json::{Value, json};
use sluice_blockindex::digest::BlobDigest;

use super::routes::{plain, query_value, set};
use super::{Inner, Seen};
use crate::registry::media::OCI_INDEX;

impl Inner {
    /// What is said of a manifest's subject when it is put.
    pub(super) fn subject_of(&self, manifest: &Bytes) -> Option<String> {
        self.referrers?;
        let value: Value = serde_json::from_slice(manifest).ok()?;
        Some(value.pointer("/subject/digest")?.as_str()?.to_owned())
    }

    /// A page of the manifests with this subject, in the order of their digests.
    pub(super) fn list_referrers(&self, seen: &Seen, name: &str, subject: &str) -> Response<Body> {
        let Some(api) = self.referrers else {
            return plain(404);
        };
        let wanted = query_value(&seen.query, "artifactType");
        let mut all = Vec::new();
        for ((of, target), (media_type, bytes)) in &self.manifests {
            let digest = BlobDigest::of(bytes).to_string();
            let value: Value = serde_json::from_slice(bytes).unwrap_or_default();
            let here = of == name && *target == digest;
            if !here || value.pointer("/subject/digest") != Some(&json!(subject)) {
                continue;
            }
            let artifact_type = &value["artifactType"];
            if api.filters && wanted.is_some() && artifact_type.as_str() != wanted.as_deref() {
                continue;
            }
            let mut entry = json!({
                "mediaType": media_type, "digest": digest, "size": bytes.len(),
                "artifactType": artifact_type,
            });
            if api.annotations {
                entry["annotations"] = value["annotations"].clone();
            }
            all.push(entry);
        }
        let first = query_value(&seen.query, "first");
        let first: usize = first.map_or(0, |text| text.parse().unwrap_or(usize::MAX));
        let last = first.saturating_add(api.page).min(all.len());
        let page = all.get(first..last).unwrap_or_default();
        let list = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": page});
        let mut response = Response::new(Body::from(list.to_string()));
        set(&mut response, "content-type", OCI_INDEX);
        if last < all.len() {
            let wanted = wanted
                .map(|it| format!("&artifactType={it}"))
                .unwrap_or_default();
            let link = format!("<{}?first={last}{wanted}>; rel=\"next\"", seen.path);
            set(&mut response, "link", &link);
        }
        response
    }
}
