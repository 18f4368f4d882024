// SPDX-License-Identifier: Apache-2.0
//! How users name images on the command line: `docker://host/repo:tag`, `oci:PATH[:TAG]`,
//! `oci-archive:PATH[:TAG]`, `docker-archive:PATH[:NAME]`, `containerd:NAME`, or a bare reference, which
//! means `docker://`.

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
    /// A tar of an OCI layout and the name within it.
    OciArchive {
        /// The tar.
        path: PathBuf,
        /// As in a layout; may be a whole reference.
        tag: Option<String>,
    },
    /// What `docker save` wrote. Only read.
    DockerArchive {
        /// The tar.
        path: PathBuf,
        /// The image's name within it.
        tag: Option<String>,
    },
    /// An image in containerd's own store, by its name there.
    Containerd(String),
}

/// For messages.
const KNOWN: &str = "docker://, oci:, oci-archive:, docker-archive: and containerd:";

/// What follows the scheme of an archive: as other tools read it, the first colon ends the path, because
/// the name may have colons of its own.
fn archive(text: &str, scheme: &str, rest: &str) -> Result<(PathBuf, Option<String>), String> {
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if path.is_empty() || tag == Some("") {
        return Err(format!(
            "{text:?}: write {scheme}:PATH or {scheme}:PATH:TAG"
        ));
    }
    Ok((path.into(), tag.map(str::to_owned)))
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
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (path, tag) = archive(text, "oci-archive", rest)?;
            return Ok(Self::OciArchive { path, tag });
        }
        if let Some(name) = text.strip_prefix("containerd:") {
            return match name.is_empty() || name.contains(char::is_whitespace) {
                true => Err(format!("{text:?}: write containerd:NAME")),
                false => Ok(Self::Containerd(name.to_owned())),
            };
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (path, tag) = archive(text, "docker-archive", rest)?;
            return Ok(Self::DockerArchive { path, tag });
        }
        let rest = text.strip_prefix("docker://").unwrap_or(text);
        if let Some((scheme, _)) = rest.split_once("://") {
            return Err(format!(
                "{text:?}: unknown scheme {scheme}; {KNOWN} are known"
            ));
        }
        for other in ["dir:", "docker-daemon:", "containers-storage:"] {
            if rest.starts_with(other) {
                return Err(format!("{text:?}: {other} is not supported; {KNOWN} are"));
            }
        }
        if rest.is_empty() {
            return Err(format!("{text:?}: empty reference"));
        }
        rest.parse()
            .map(Self::Registry)
            .map_err(|e| format!("{text:?}: {e}"))
    }

    /// Reads where to write. **Errors**: also for what can only be read.
    pub fn parse_destination(text: &str) -> Result<Self, String> {
        let location = Self::parse(text)?;
        location.check_writable()?;
        Ok(location)
    }

    /// **Errors**: why it can only be read.
    pub fn check_writable(&self) -> Result<(), String> {
        match self {
            Self::DockerArchive { .. } => Err(format!(
                "{self}: layers of a docker archive are not compressed, so a converted image would \
                 not be lazy any more; write an oci-archive:"
            )),
            _ => Ok(()),
        }
    }

    /// The port that the name of the image's registry has, if it has one.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Registry(reference) => port_of(reference.host()),
            // Where it is pushed to later.
            Self::Containerd(name) => {
                let reference = name.parse::<ImageReference>().ok();
                reference.and_then(|reference| port_of(reference.host()))
            }
            Self::Layout { .. } | Self::OciArchive { .. } | Self::DockerArchive { .. } => None,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, path, tag) = match self {
            Self::Registry(reference) => return write!(f, "docker://{reference}"),
            Self::Containerd(name) => return write!(f, "containerd:{name}"),
            Self::Layout { path, tag } => ("oci", path, tag),
            Self::OciArchive { path, tag } => ("oci-archive", path, tag),
            Self::DockerArchive { path, tag } => ("docker-archive", path, tag),
        };
        write!(f, "{scheme}:{}", path.display())?;
        tag.iter().try_for_each(|tag| write!(f, ":{tag}"))
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
        let archive = |path: &str, tag: Option<&str>| Location::OciArchive {
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
            ("containerd:a:1", Location::Containerd("a:1".to_owned())),
            ("oci-archive:x.tar", archive("x.tar", None)),
            (
                "oci-archive:/a/x.tar:localhost:5000/a/b:1",
                archive("/a/x.tar", Some("localhost:5000/a/b:1")),
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(Location::parse(text), Ok(expected), "{text}");
        }
        for bad in [
            "",
            "oci:",
            "oci::x",
            "oci:a:",
            "oci-archive:",
            "oci-archive::x",
            "oci-archive:x:",
            "http://x/y",
            "docker-archive:",
            "containerd:",
            "containerd:a b",
            "dir:/x",
            "docker://",
            "docker://localhost:5000/Upper/case",
            "a b",
        ] {
            assert!(Location::parse(bad).is_err(), "{bad}");
        }
    }
}
