// SPDX-License-Identifier: Apache-2.0
//! Referrers: manifests that name another one as their subject (distribution specification 1.1).
//!
//! ```text
//! list:  GET referrers/<digest>?artifactType=…   -> pages, as many as LINK headers say
//!        not known to the registry               -> the index under the tag sha256-<hex>
//! push:  PUT manifest, answered with OCI-Subject -> the registry lists it
//!        answered without                        -> read the index under that tag, put it back with an entry more
//! ```
//!
//! What a registry answers is bounded in bytes, pages and entries, and filtered here once more: not every
//! registry filters. A page may only lead to another one of the same endpoint, and to none twice.
//!
//! The index under the tag belongs to all who attach something. It is read again right before and right
//! after it is put, and put anew when somebody else was faster; no registry offers more, so two who
//! write within the same milliseconds can still lose an entry. Who lost it finds it missing the next time.
//! A crash between both writes leaves a manifest that nothing lists; the next push does both again.

mod list;
mod push;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::Deserialize;
use sluice_blockindex::digest::ManifestDigest;

pub use push::{Listed, NewReferrer};

/// The most pages of one list that are read.
const PAGES_MAX: usize = 16;
/// The most entries of one type that are kept; more are no use to anybody, and a way to keep us busy.
const REFERRERS_MAX: usize = 256;

/// A manifest that has the one asked about as its subject, as a list describes it: nothing is proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Referrer {
    /// Its digest.
    pub digest: ManifestDigest,
    /// Its media type.
    pub media_type: String,
    /// Its size.
    pub size_bytes: u64,
    /// What it is.
    pub artifact_type: String,
    /// Its annotations, where the registry repeats them.
    pub annotations: BTreeMap<String, String>,
}

/// The tag under which referrers stand where the registry does not list them.
///
/// **Source** distribution specification 1.1, "Referrers Tag Schema".
pub fn fallback_tag(subject: ManifestDigest) -> String {
    format!("sha256-{}", subject.hex())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct List {
    manifests: Vec<serde_json::Value>,
}

/// An entry, if it is one that we could read: others (of another digest algorithm, of a shape of their own)
/// are no concern of ours.
fn entry_of(value: serde_json::Value) -> Option<Referrer> {
    let entry: Entry = serde_json::from_value(value).ok()?;
    Some(Referrer {
        digest: entry.digest.parse().ok()?,
        media_type: entry.media_type,
        size_bytes: entry.size,
        artifact_type: entry.artifact_type?,
        annotations: entry.annotations.unwrap_or_default(),
    })
}

/// The entries of this type in an index.
///
/// **Errors** the parser's words.
fn entries_of(bytes: &[u8], artifact_type: &str) -> Result<Vec<Referrer>, String> {
    let list: List = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let entries = list.manifests.into_iter().filter_map(entry_of);
    Ok(entries
        .filter(|it| it.artifact_type == artifact_type)
        .collect())
}

/// The target of `rel="next"` in a `Link` header (RFC 8288), as it is written there.
fn next_link(header: &str) -> Option<&str> {
    let mut rest = header;
    while let Some((_, after)) = rest.split_once('<') {
        let (target, after) = after.split_once('>')?;
        // Targets may hold commas; parameters of the next link begin after its own target.
        let parameters = after.split('<').next().unwrap_or_default();
        let next = parameters.split([';', ',']).any(|parameter| {
            let (name, value) = parameter.split_once('=').unwrap_or_default();
            let value = value.trim().trim_matches('"');
            name.trim().eq_ignore_ascii_case("rel") && value.eq_ignore_ascii_case("next")
        });
        if next {
            return Some(target);
        }
        rest = after;
    }
    None
}
