// SPDX-License-Identifier: Apache-2.0
//! What a client asks for: paths, queries and ranges. Pure.
//!
//! A request names its registry in one of three ways, the first that is there counts:
//!
//! 1. `?ns=HOST`, as containerd sends it to the hosts of a `hosts.toml`;
//! 2. a first component of the name that can only be a host: `/v2/HOST/NAME/…`, what skopeo, podman and
//!    others make of a mirror with a path in `registries.conf`;
//! 3. the configured upstream, for clients that can say nothing: docker's `registry-mirrors`.

use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};
use sluice_fetcher::registry::{DOCKER_HUB, Repository};

/// Longest path that is looked at: a name of 255 bytes, a host, a tag or a digest.
const PATH_MAX_BYTES: usize = 1024;
/// Longest tag of the distribution specification.
const TAG_MAX_BYTES: usize = 128;
/// Longest value of a query that is passed on.
const QUERY_MAX_BYTES: usize = 512;

/// A manifest's name in its repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Tag(String),
    Digest(BlobDigest),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Tag(tag) => f.write_str(tag),
            Target::Digest(digest) => digest.fmt(f),
        }
    }
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// `/v2/`, of this registry if one is named.
    Version(Option<String>),
    Manifest(Repository, Target),
    Blob(Repository, BlobDigest),
    /// Passed on as it is: lists, referrers, and content named by other digests. What follows the name.
    Other(Repository, String),
}

/// Why a request is none of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// No path of the pull part of the API.
    NotFound,
    /// The name, tag or digest is none.
    Name,
    /// No registry is named, and no upstream is configured.
    NoUpstream,
}

/// Reads a path and a query.
pub(super) fn parse(path: &str, query: &str, upstream: Option<&str>) -> Result<Asked, Refusal> {
    if path.len() > PATH_MAX_BYTES {
        return Err(Refusal::NotFound);
    }
    let rest = path.strip_prefix("/v2").ok_or(Refusal::NotFound)?;
    let namespace = value(query, "ns").filter(|it| !it.is_empty());
    if matches!(rest, "" | "/") {
        return Ok(Asked::Version(
            namespace.or_else(|| upstream.map(str::to_owned)),
        ));
    }
    let rest = rest.strip_prefix('/').ok_or(Refusal::NotFound)?;
    let place = |name: &str| place(name, namespace.as_deref(), upstream);
    if let Some(name) = rest.strip_suffix("/tags/list") {
        let rest = with_query("tags/list", query, &["n", "last"]);
        return Ok(Asked::Other(place(name)?, rest));
    }
    let (before, last) = rest.rsplit_once('/').ok_or(Refusal::NotFound)?;
    if let Some(name) = before.strip_suffix("/manifests") {
        let place = place(name)?;
        return match (last.parse::<BlobDigest>(), is_digest(last)) {
            (Ok(digest), _) => Ok(Asked::Manifest(place, Target::Digest(digest))),
            (Err(_), true) => Ok(Asked::Other(place, format!("manifests/{last}"))),
            (Err(_), false) if is_tag(last) => {
                Ok(Asked::Manifest(place, Target::Tag(last.to_owned())))
            }
            _ => Err(Refusal::Name),
        };
    }
    if let Some(name) = before.strip_suffix("/blobs") {
        let place = place(name)?;
        return match (last.parse::<BlobDigest>(), is_digest(last)) {
            (Ok(digest), _) => Ok(Asked::Blob(place, digest)),
            (Err(_), true) => Ok(Asked::Other(place, format!("blobs/{last}"))),
            _ => Err(Refusal::Name),
        };
    }
    if let Some(name) = before.strip_suffix("/referrers") {
        let place = place(name)?;
        if !is_digest(last) {
            return Err(Refusal::Name);
        }
        let rest = with_query(&format!("referrers/{last}"), query, &["artifactType"]);
        return Ok(Asked::Other(place, rest));
    }
    Err(Refusal::NotFound)
}

fn place(
    name: &str,
    namespace: Option<&str>,
    upstream: Option<&str>,
) -> Result<Repository, Refusal> {
    if let Some(host) = namespace {
        return at(host, name);
    }
    if let Some((host, rest)) = name.split_once('/')
        && (host.contains(['.', ':']) || host == "localhost")
    {
        return at(host, rest);
    }
    at(upstream.ok_or(Refusal::NoUpstream)?, name)
}

fn at(host: &str, name: &str) -> Result<Repository, Refusal> {
    let place = Repository::new(host, name).map_err(|_| Refusal::Name)?;
    // Clients leave `library/` out where they take us for Docker Hub by another name.
    if place.host() == DOCKER_HUB && !name.contains('/') {
        return Repository::new(host, &format!("library/{name}")).map_err(|_| Refusal::Name);
    }
    Ok(place)
}

/// `ALGORITHM:HEX`, of whatever algorithm.
fn is_digest(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+._-".contains(c);
    text.split_once(':').is_some_and(|(algorithm, digits)| {
        let known = !algorithm.is_empty() && algorithm.chars().all(plain);
        known && (32..=256).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

fn is_tag(text: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.len() <= TAG_MAX_BYTES
        && text.chars().next().is_some_and(word)
        && text.chars().all(|c| word(c) || c == '.' || c == '-')
}

/// The first value of a key.
fn value(query: &str, key: &str) -> Option<String> {
    let (_, value) = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find(|(name, _)| *name == key)?;
    decoded(value)
}

/// Percent-decoded; `None` where that is no text.
fn decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(out).ok()
}

/// `path` with those pairs of the query whose keys are known, as they were written.
fn with_query(path: &str, query: &str, keys: &[&str]) -> String {
    let known = |pair: &&str| {
        let plain = pair.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        plain && keys.contains(&key) && value.len() <= QUERY_MAX_BYTES
    };
    let pairs: Vec<&str> = query.split('&').filter(known).collect();
    if pairs.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{}", pairs.join("&"))
    }
}

/// What a `Range` header asks of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ranged {
    /// All of it: no range, or one that need not be understood (RFC 9110, section 14.2: several ranges,
    /// other units, a form that is none).
    Whole,
    Part(Extent<BlobSpace>),
    /// 416.
    Beyond,
}

/// Reads a `Range` header for a blob of this size.
pub(super) fn range(header: Option<&str>, size_bytes: u64) -> Ranged {
    let Some(spec) = header.and_then(|text| text.trim().strip_prefix("bytes=")) else {
        return Ranged::Whole;
    };
    let Some((first, last)) = spec.trim().split_once('-') else {
        return Ranged::Whole;
    };
    let number = |text: &str| -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let (start, end) = match (first, number(first), last, number(last)) {
        ("", _, _, Some(0)) => return Ranged::Beyond,
        ("", _, _, Some(suffix)) => (size_bytes.saturating_sub(suffix), size_bytes),
        (_, Some(first), "", _) => (first, size_bytes),
        (_, Some(first), _, Some(last)) if first <= last => {
            (first, last.saturating_add(1).min(size_bytes))
        }
        _ => return Ranged::Whole,
    };
    match Extent::new(start, end) {
        Some(extent) if start < size_bytes => Ranged::Part(extent),
        _ => Ranged::Beyond,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(host: &str, name: &str) -> Repository {
        Repository::new(host, name).unwrap()
    }

    #[test]
    fn paths_name_what_is_asked() {
        let digest = BlobDigest::of(b"x");
        let sha512 = format!("sha512:{}", "ab".repeat(64));
        let tag = |place, tag: &str| Ok(Asked::Manifest(place, Target::Tag(tag.into())));
        let up = || repository("up.example", "a/b");
        let cases = [
            ("/v2/", "", Ok(Asked::Version(Some("up.example".into())))),
            (
                "/v2",
                "ns=r.example",
                Ok(Asked::Version(Some("r.example".into()))),
            ),
            ("/v2/a/b/manifests/1", "", tag(up(), "1")),
            (
                "/v2/a/b/manifests/1",
                "ns=docker.io",
                tag(repository("docker.io", "a/b"), "1"),
            ),
            (
                "/v2/a/manifests/1",
                "ns=docker.io",
                tag(repository("docker.io", "library/a"), "1"),
            ),
            (
                "/v2/a/b/manifests/1",
                "x=y&ns=r.example%3A5000",
                tag(repository("r.example:5000", "a/b"), "1"),
            ),
            // A name prefix; with `ns` it is part of the name.
            (
                "/v2/r.example/a/b/manifests/1",
                "",
                tag(repository("r.example", "a/b"), "1"),
            ),
            (
                "/v2/localhost:5000/a/manifests/1",
                "",
                tag(repository("localhost:5000", "a"), "1"),
            ),
            (
                "/v2/manifests/manifests/manifests",
                "",
                tag(repository("up.example", "manifests"), "manifests"),
            ),
            (
                "/v2/a/tags/list",
                "n=3&evil=1&last=z",
                Ok(Asked::Other(
                    repository("up.example", "a"),
                    "tags/list?n=3&last=z".into(),
                )),
            ),
            ("/v1/", "", Err(Refusal::NotFound)),
            ("/v2x", "", Err(Refusal::NotFound)),
            ("/v2/a", "", Err(Refusal::NotFound)),
            ("/v2/a/b/manifests/", "", Err(Refusal::Name)),
            ("/v2/a/b/manifests/.x", "", Err(Refusal::Name)),
            ("/v2/A/manifests/1", "", Err(Refusal::Name)),
            ("/v2/../manifests/1", "", Err(Refusal::Name)),
            ("/v2/a/manifests/1", "ns=../x", Err(Refusal::Name)),
            ("/v2/a/blobs/latest", "", Err(Refusal::Name)),
            ("/v2/a/blobs/uploads/", "", Err(Refusal::NotFound)),
            ("/v2/a/referrers/x", "", Err(Refusal::Name)),
            ("/v2/_catalog", "", Err(Refusal::NotFound)),
        ];
        for (path, query, expected) in cases {
            assert_eq!(
                parse(path, query, Some("up.example")),
                expected,
                "{path}?{query}"
            );
        }
        for (path, expected) in [
            (format!("/v2/a/b/blobs/{digest}"), Asked::Blob(up(), digest)),
            (
                format!("/v2/a/b/manifests/{digest}"),
                Asked::Manifest(up(), Target::Digest(digest)),
            ),
            (
                format!("/v2/a/b/blobs/{sha512}"),
                Asked::Other(up(), format!("blobs/{sha512}")),
            ),
            (
                format!("/v2/a/b/referrers/{digest}"),
                Asked::Other(up(), format!("referrers/{digest}")),
            ),
        ] {
            assert_eq!(parse(&path, "", Some("up.example")), Ok(expected), "{path}");
        }
        assert_eq!(
            parse("/v2/a/manifests/1", "", None),
            Err(Refusal::NoUpstream)
        );
        assert_eq!(parse("/v2/", "", None), Ok(Asked::Version(None)));
        let long = format!("/v2/{}/manifests/1", "a".repeat(2000));
        assert_eq!(parse(&long, "", Some("u.example")), Err(Refusal::NotFound));
    }

    #[test]
    fn ranges() {
        let part = |start, end| Ranged::Part(Extent::new(start, end).unwrap());
        for (header, expected) in [
            (None, Ranged::Whole),
            (Some("bytes=0-0"), part(0, 1)),
            (Some("bytes=5-"), part(5, 10)),
            (Some("bytes=5-100"), part(5, 10)),
            (Some("bytes=-3"), part(7, 10)),
            (Some("bytes=-30"), part(0, 10)),
            (Some("bytes=-0"), Ranged::Beyond),
            (Some("bytes=10-"), Ranged::Beyond),
            (Some("bytes=10-12"), Ranged::Beyond),
            (Some("bytes=99999999999999999999-"), Ranged::Beyond),
            (Some("bytes=9-5"), Ranged::Whole),
            (Some("bytes=0-1,3-4"), Ranged::Whole),
            (Some("bytes=a-b"), Ranged::Whole),
            (Some("bytes=-"), Ranged::Whole),
            (Some("items=0-1"), Ranged::Whole),
        ] {
            assert_eq!(range(header, 10), expected, "{header:?}");
        }
        assert_eq!(range(Some("bytes=0-"), 0), Ranged::Beyond);
    }
}
