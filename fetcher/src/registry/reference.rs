// SPDX-License-Identifier: Apache-2.0
//! Names of images, as people and containerd write them.
//!
//! ```text
//! reference  = [ host "/" ] path [ ":" tag ] [ "@" digest ]
//! ```
//! The first component is a host when it holds a `.` or a `:`, is `localhost`, or is an IPv6 address
//! in brackets; otherwise the host is `docker.io`, where a path of one component gets the prefix
//! `library/`. Without tag and digest the tag is `latest`. The grammar is that of the OCI
//! distribution specification 1.1, chapter "Pulling manifests", and of Docker's references.
//!
//! Pure; no I/O.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use sluice_blockindex::digest::ManifestDigest;

/// The host that a reference without one means.
pub const DOCKER_HUB: &str = "docker.io";
/// Where Docker Hub's registry API really is.
const DOCKER_HUB_ENDPOINT: &str = "registry-1.docker.io";
/// The older name of Docker Hub, still found in references and configuration.
const DOCKER_HUB_LEGACY: &str = "index.docker.io";
/// The tag that a reference without tag and digest means.
const DEFAULT_TAG: &str = "latest";
/// Longest repository path that registries accept (Docker's limit for a whole name).
const REPOSITORY_MAX_BYTES: usize = 255;
/// Longest tag of the distribution specification.
const TAG_MAX_BYTES: usize = 128;

/// Why a text is no reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// Nothing there.
    #[error("empty image reference")]
    Empty,
    /// The host part is malformed.
    #[error("{text:?} is not a registry host")]
    Host {
        /// The text.
        text: String,
    },
    /// Repository names are lower case.
    #[error("repository {text:?} must be lower case")]
    Uppercase {
        /// The text.
        text: String,
    },
    /// The repository part is malformed.
    #[error("{text:?} is not a repository name")]
    Repository {
        /// The text.
        text: String,
    },
    /// The tag is malformed.
    #[error("{text:?} is not a tag")]
    Tag {
        /// The text.
        text: String,
    },
    /// The digest is malformed or not sha256.
    #[error("{text:?} is not a sha256 digest")]
    Digest {
        /// The text.
        text: String,
    },
}

/// A repository at a host: a place that blobs and manifests can be asked for at.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repository {
    host: String,
    name: String,
}

impl Repository {
    /// The repository `name` at `host` (`host[:port]`), both checked.
    ///
    /// **Errors** [`ReferenceError`].
    pub fn new(host: &str, name: &str) -> Result<Self, ReferenceError> {
        let host = parse_host(host)?;
        check_repository(name)?;
        Ok(Repository {
            host,
            name: name.to_owned(),
        })
    }

    /// Host and port as written, `docker.io` for Docker Hub.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The path below the host.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The reference to `tag` in this repository.
    ///
    /// **Errors** [`ReferenceError::Tag`].
    pub fn tagged(&self, tag: &str) -> Result<ImageReference, ReferenceError> {
        check_tag(tag)?;
        Ok(ImageReference {
            place: self.clone(),
            tag: Some(tag.to_owned()),
            digest: None,
        })
    }

    /// The reference to a manifest by digest in this repository.
    pub fn with_digest(&self, digest: ManifestDigest) -> ImageReference {
        ImageReference {
            place: self.clone(),
            tag: None,
            digest: Some(digest),
        }
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.name)
    }
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Repository {
    type Err = ReferenceError;

    /// Parses `host/path` with Docker's defaults; neither tag nor digest is allowed.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let reference = ImageReference::parse_parts(text)?;
        match (&reference.tag, &reference.digest) {
            (None, None) => Ok(reference.place),
            _ => Err(ReferenceError::Repository {
                text: text.to_owned(),
            }),
        }
    }
}

/// A reference to an image: a repository and a tag, a digest, or both (then the digest decides).
///
/// Displays in full form, which parses to the same value.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageReference {
    place: Repository,
    tag: Option<String>,
    digest: Option<ManifestDigest>,
}

impl ImageReference {
    /// The repository.
    pub fn place(&self) -> &Repository {
        &self.place
    }

    /// Host and port as written, `docker.io` for Docker Hub.
    pub fn host(&self) -> &str {
        &self.place.host
    }

    /// The path below the host.
    pub fn repository(&self) -> &str {
        &self.place.name
    }

    /// The tag, if one was written or is meant by default.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was written.
    pub fn digest(&self) -> Option<ManifestDigest> {
        self.digest
    }

    /// What stands in the URL after `manifests/`: the digest if there is one, else the tag.
    pub fn target(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            // Not constructible: parsing and both constructors set one of them.
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }

    fn parse_parts(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let parsed =
                    digest
                        .parse::<ManifestDigest>()
                        .map_err(|_| ReferenceError::Digest {
                            text: digest.to_owned(),
                        })?;
                (rest, Some(parsed))
            }
            None => (text, None),
        };
        // A colon after the last slash separates a tag; one before it belongs to the host's port.
        let (rest, tag) = match rest.rsplit_once(':') {
            Some((before, tag)) if !tag.contains('/') && !tag.contains(']') => {
                check_tag(tag)?;
                (before, Some(tag.to_owned()))
            }
            _ => (rest, None),
        };
        let (host, path) = match rest.split_once('/') {
            Some((first, path)) if looks_like_host(first) => (first, path.to_owned()),
            _ => (DOCKER_HUB, rest.to_owned()),
        };
        let host = parse_host(host)?;
        let name = if host == DOCKER_HUB && !path.contains('/') && !path.is_empty() {
            format!("library/{path}")
        } else {
            path
        };
        check_repository(&name)?;
        Ok(ImageReference {
            place: Repository { host, name },
            tag,
            digest,
        })
    }
}

impl FromStr for ImageReference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut reference = Self::parse_parts(text)?;
        if reference.tag.is_none() && reference.digest.is_none() {
            reference.tag = Some(DEFAULT_TAG.to_owned());
        }
        Ok(reference)
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.place)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Host and port that the registry API of `host` is served at.
pub fn api_host(host: &str) -> &str {
    if host == DOCKER_HUB {
        DOCKER_HUB_ENDPOINT
    } else {
        host
    }
}

/// Whether `host` (`host[:port]`) is this machine, for which plain HTTP is the default.
///
/// True for `localhost`, names below `.localhost`, 127.0.0.0/8 and `[::1]`, with or without a port.
pub fn is_plain_http_default(host: &str) -> bool {
    let (name, _) = split_port(host);
    let name = name.trim_start_matches('[').trim_end_matches(']');
    if name.eq_ignore_ascii_case("localhost") || name.to_ascii_lowercase().ends_with(".localhost") {
        return true;
    }
    if let Ok(v4) = name.parse::<Ipv4Addr>() {
        return v4.is_loopback();
    }
    name.parse::<Ipv6Addr>()
        .is_ok_and(|v6| v6.is_loopback() || v6.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback()))
}

/// The port that `host` (`host[:port]`) names; `None` where it leaves it to the scheme.
pub fn port_of(host: &str) -> Option<u16> {
    split_port(host).1.and_then(|port| port.parse().ok())
}

/// `host` (`host[:port]`) without its port.
pub fn host_name(host: &str) -> &str {
    split_port(host).0
}

/// Splits `host[:port]`; an IPv6 address keeps its brackets.
fn split_port(host: &str) -> (&str, Option<&str>) {
    if let Some(after) = host.strip_prefix('[') {
        return match after.find(']') {
            // `+ 2` counts both brackets.
            Some(at) => {
                let (address, rest) = host.split_at(at + 2);
                (address, rest.strip_prefix(':'))
            }
            None => (host, None),
        };
    }
    match host.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (host, None),
    }
}

fn looks_like_host(first: &str) -> bool {
    first == "localhost"
        || first.contains('.')
        || first.contains(':')
        || first.starts_with('[')
        // An upper-case letter is never part of a repository, so this can only be meant as a host.
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

/// Checks and normalises a host: lower case, Docker Hub's other names become `docker.io`.
fn parse_host(text: &str) -> Result<String, ReferenceError> {
    let refuse = || ReferenceError::Host {
        text: text.to_owned(),
    };
    let (name, port) = split_port(text);
    if let Some(inner) = name.strip_prefix('[') {
        let address = inner.strip_suffix(']').ok_or_else(refuse)?;
        address.parse::<Ipv6Addr>().map_err(|_| refuse())?;
        if text.len() > name.len() && port.is_none() {
            return Err(refuse());
        }
    } else {
        let label_is_good = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if name.len() > 253 || !name.split('.').all(label_is_good) {
            return Err(refuse());
        }
    }
    if let Some(port) = port
        && (port.is_empty()
            || !port.bytes().all(|b| b.is_ascii_digit())
            || !port.parse::<u16>().is_ok_and(|number| number > 0))
    {
        return Err(refuse());
    }
    let host = text.to_ascii_lowercase();
    Ok(match host.as_str() {
        DOCKER_HUB_LEGACY | DOCKER_HUB_ENDPOINT => DOCKER_HUB.to_owned(),
        _ => host,
    })
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/…)*` of the distribution specification.
fn check_repository(name: &str) -> Result<(), ReferenceError> {
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(ReferenceError::Uppercase {
            text: name.to_owned(),
        });
    }
    let refuse = || ReferenceError::Repository {
        text: name.to_owned(),
    };
    if name.is_empty() || name.len() > REPOSITORY_MAX_BYTES {
        return Err(refuse());
    }
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    for component in name.split('/') {
        let separators = component.split(|c: char| c.is_ascii() && alphanumeric_char(c));
        let good_ends = component.bytes().next().is_some_and(alphanumeric)
            && component.bytes().next_back().is_some_and(alphanumeric);
        let good_separators = separators
            .filter(|run| !run.is_empty())
            .all(|run| matches!(run, "." | "_" | "__") || run.bytes().all(|b| b == b'-'));
        if !good_ends || !good_separators {
            return Err(refuse());
        }
    }
    Ok(())
}

fn alphanumeric_char(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}

/// `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}` of the distribution specification.
fn check_tag(tag: &str) -> Result<(), ReferenceError> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let good = tag.len() <= TAG_MAX_BYTES
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    if good {
        Ok(())
    } else {
        Err(ReferenceError::Tag {
            text: tag.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn references_mean_what_docker_means() {
        let digest = format!("sha256:{HEX}");
        let cases: &[(&str, &str, &str, Option<&str>, bool)] = &[
            (
                "debian",
                "docker.io",
                "library/debian",
                Some("latest"),
                false,
            ),
            (
                "debian:12",
                "docker.io",
                "library/debian",
                Some("12"),
                false,
            ),
            ("team/app", "docker.io", "team/app", Some("latest"), false),
            (
                "docker.io/debian",
                "docker.io",
                "library/debian",
                Some("latest"),
                false,
            ),
            (
                "index.docker.io/debian",
                "docker.io",
                "library/debian",
                Some("latest"),
                false,
            ),
            (
                "registry-1.docker.io/a/b:t",
                "docker.io",
                "a/b",
                Some("t"),
                false,
            ),
            ("localhost/app", "localhost", "app", Some("latest"), false),
            (
                "localhost:5000/app:v1",
                "localhost:5000",
                "app",
                Some("v1"),
                false,
            ),
            (
                "127.0.0.1:5000/a/b",
                "127.0.0.1:5000",
                "a/b",
                Some("latest"),
                false,
            ),
            ("[::1]:5000/app:v1", "[::1]:5000", "app", Some("v1"), false),
            ("[::1]/app", "[::1]", "app", Some("latest"), false),
            ("[fe80::1]/a/b:t", "[fe80::1]", "a/b", Some("t"), false),
            (
                "Quay.IO/team/app",
                "quay.io",
                "team/app",
                Some("latest"),
                false,
            ),
            (
                "quay.io/a__b/c-d.e---f_g:T.1-x",
                "quay.io",
                "a__b/c-d.e---f_g",
                Some("T.1-x"),
                false,
            ),
            (
                "registry:5000/app",
                "registry:5000",
                "app",
                Some("latest"),
                false,
            ),
            ("quay.io/app@DIGEST", "quay.io", "app", None, true),
            ("quay.io/app:v1@DIGEST", "quay.io", "app", Some("v1"), true),
            ("debian@DIGEST", "docker.io", "library/debian", None, true),
        ];
        for (text, host, repository, tag, pinned) in cases {
            let text = text.replace("DIGEST", &digest);
            let parsed: ImageReference = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(parsed.host(), *host, "{text}");
            assert_eq!(parsed.repository(), *repository, "{text}");
            assert_eq!(parsed.tag(), *tag, "{text}");
            assert_eq!(
                parsed.digest().map(|d| d.hex()),
                pinned.then(|| HEX.to_owned()),
                "{text}"
            );
            let again: ImageReference = parsed.to_string().parse().unwrap();
            assert_eq!(again, parsed, "{text} displays as {parsed}");
        }
    }

    #[test]
    fn malformed_references_are_refused_by_part() {
        let text = |text: &str| text.to_owned();
        let long_name = "a".repeat(256);
        let long_tag = format!("x:{}", "t".repeat(129));
        let cases: &[(&str, ReferenceError)] = &[
            ("", ReferenceError::Empty),
            (
                "quay.io/Team/app",
                ReferenceError::Uppercase {
                    text: text("Team/app"),
                },
            ),
            (
                "Debian",
                ReferenceError::Uppercase {
                    text: text("library/Debian"),
                },
            ),
            ("quay.io/", ReferenceError::Repository { text: text("") }),
            (
                "quay.io//app",
                ReferenceError::Repository { text: text("/app") },
            ),
            (
                "quay.io/-app",
                ReferenceError::Repository { text: text("-app") },
            ),
            (
                "quay.io/app.",
                ReferenceError::Repository { text: text("app.") },
            ),
            (
                "quay.io/a..b",
                ReferenceError::Repository { text: text("a..b") },
            ),
            (
                "quay.io/a___b",
                ReferenceError::Repository {
                    text: text("a___b"),
                },
            ),
            (
                "quay.io/a b",
                ReferenceError::Repository { text: text("a b") },
            ),
            ("quay.io/é", ReferenceError::Repository { text: text("é") }),
            (
                "quay.io/../x",
                ReferenceError::Repository { text: text("../x") },
            ),
            ("app:", ReferenceError::Tag { text: text("") }),
            ("app:.x", ReferenceError::Tag { text: text(".x") }),
            ("app:a+b", ReferenceError::Tag { text: text("a+b") }),
            (
                &long_tag,
                ReferenceError::Tag {
                    text: "t".repeat(129),
                },
            ),
            (
                &long_name,
                ReferenceError::Repository {
                    text: format!("library/{long_name}"),
                },
            ),
            (
                "app@sha256:12",
                ReferenceError::Digest {
                    text: text("sha256:12"),
                },
            ),
            (
                "app@md5:00",
                ReferenceError::Digest {
                    text: text("md5:00"),
                },
            ),
            (
                "host:0/app",
                ReferenceError::Host {
                    text: text("host:0"),
                },
            ),
            (
                "host:99999/app",
                ReferenceError::Host {
                    text: text("host:99999"),
                },
            ),
            (
                "-bad.example/app",
                ReferenceError::Host {
                    text: text("-bad.example"),
                },
            ),
            (
                "[::g]/app",
                ReferenceError::Host {
                    text: text("[::g]"),
                },
            ),
            (
                "[::1]x/app",
                ReferenceError::Host {
                    text: text("[::1]x"),
                },
            ),
            (
                "user@host/app",
                ReferenceError::Digest {
                    text: text("host/app"),
                },
            ),
        ];
        for (input, expected) in cases {
            let got = input.parse::<ImageReference>().expect_err(input);
            assert_eq!(got, *expected, "{input}");
        }
    }

    #[test]
    fn plain_http_is_the_default_for_this_machine_only() {
        let cases = [
            ("localhost", true),
            ("localhost:5000", true),
            ("a.localhost:80", true),
            ("127.0.0.1", true),
            ("127.8.9.1:5000", true),
            ("[::1]", true),
            ("[::1]:5000", true),
            ("[::ffff:127.0.0.1]:5000", true),
            ("[::2]:5000", false),
            ("10.0.0.1:5000", false),
            ("localhost.example", false),
            ("127.0.0.1.example", false),
            ("docker.io", false),
        ];
        for (host, plain) in cases {
            assert_eq!(is_plain_http_default(host), plain, "{host}");
        }
    }

    #[test]
    fn docker_hub_is_served_elsewhere() {
        assert_eq!(api_host("docker.io"), "registry-1.docker.io");
        assert_eq!(api_host("quay.io"), "quay.io");
    }

    #[test]
    fn repositories_parse_without_tag_only() {
        assert_eq!(
            "debian".parse::<Repository>().unwrap().to_string(),
            "docker.io/library/debian"
        );
        assert!("debian:12".parse::<Repository>().is_err());
        assert!(Repository::new("quay.io", "a/b").is_ok());
        assert!(Repository::new("quay.io/", "a").is_err());
    }
}
