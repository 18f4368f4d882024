// SPDX-License-Identifier: Apache-2.0
//! How users name images on the command line: `docker://host/repo:tag`, `oci:PATH[:TAG]`, or a bare
//! reference, which means `docker://`.

use std::fmt;
use std::path::PathBuf;

use sluice_fetcher::registry::{ImageReference, port_of};

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// An image in a registry, with Docker's defaults filled in.
    Registry(ImageReference),
    /// An OCI layout directory and the name within it.
    Layout {
        /// The directory.
        path: PathBuf,
        /// `org.opencontainers.image.ref.name` in its index, if given.
        tag: Option<String>,
    },
}

impl Location {
    /// Reads what a user wrote. **Errors**: a message that names the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(rest) = text.strip_prefix("oci:") {
            // The tag is what follows the last colon, unless that colon is part of the path.
            let (path, tag) = match rest.rsplit_once(':') {
                Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
                _ => (rest, None),
            };
            if path.is_empty() || tag == Some("") {
                return Err(format!("{text:?}: write oci:PATH or oci:PATH:TAG"));
            }
            return Ok(Self::Layout {
                path: path.into(),
                tag: tag.map(str::to_owned),
            });
        }
        let rest = text.strip_prefix("docker://").unwrap_or(text);
        if let Some((scheme, _)) = rest.split_once("://") {
            return Err(format!(
                "{text:?}: unknown scheme {scheme}; docker:// and oci: are known"
            ));
        }
        for known in [
            "docker-archive:",
            "oci-archive:",
            "dir:",
            "docker-daemon:",
            "containers-storage:",
        ] {
            if rest.starts_with(known) {
                return Err(format!(
                    "{text:?}: {known} is not supported; docker:// and oci: are"
                ));
            }
        }
        if rest.is_empty() {
            return Err(format!("{text:?}: empty reference"));
        }
        rest.parse()
            .map(Self::Registry)
            .map_err(|e| format!("{text:?}: {e}"))
    }

    /// The port that a registry reference names, if it names one.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Registry(reference) => port_of(reference.host()),
            Self::Layout { .. } => None,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => write!(f, "docker://{reference}"),
            Self::Layout { path, tag: None } => write!(f, "oci:{}", path.display()),
            Self::Layout {
                path,
                tag: Some(tag),
            } => write!(f, "oci:{}:{tag}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_read_as_users_write_them() {
        let layout = |path: &str, tag: Option<&str>| Location::Layout {
            path: path.into(),
            tag: tag.map(str::to_owned),
        };
        let registry = |text: &str| Location::Registry(text.parse().unwrap());
        let cases = [
            (
                "docker://localhost:5000/a/b:1",
                registry("localhost:5000/a/b:1"),
            ),
            ("debian", registry("debian")),
            ("localhost:5000/a", registry("localhost:5000/a")),
            ("oci:/tmp/x", layout("/tmp/x", None)),
            ("oci:/tmp/x:v1", layout("/tmp/x", Some("v1"))),
            ("oci:a:b/c", layout("a:b/c", None)),
            ("oci:rel:latest", layout("rel", Some("latest"))),
        ];
        for (text, expected) in cases {
            assert_eq!(Location::parse(text), Ok(expected), "{text}");
        }
        for bad in [
            "",
            "oci:",
            "oci::x",
            "oci:a:",
            "http://x/y",
            "docker-archive:/x",
            "docker://",
            "docker://localhost:5000/Upper/case",
            "a b",
        ] {
            assert!(Location::parse(bad).is_err(), "{bad}");
        }
    }
}
