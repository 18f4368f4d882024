// SPDX-License-Identifier: Apache-2.0
//! Where several images go: a place under which each has its own name.

use std::path::Path;

use sluice_fetcher::registry::{ImageReference, Repository};

use super::Location;

/// A place for several images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prefix {
    /// A registry, and the beginning of its repositories if any: images keep their repositories below
    /// it, and their tags.
    Registry(String),
    /// containerd's own store: images keep their whole names.
    Containerd,
}

impl Prefix {
    /// Reads what a user wrote. **Errors**: a message that names the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "containerd:" {
            return Ok(Self::Containerd);
        }
        let rest = text.strip_prefix("docker://").unwrap_or(text);
        let rest = rest.trim_end_matches('/');
        match format!("{rest}/name").parse::<ImageReference>() {
            Ok(_) => Ok(Self::Registry(rest.to_owned())),
            Err(e) => Err(format!(
                "{text:?}: write REGISTRY, REGISTRY/PREFIX or containerd: ({e})"
            )),
        }
    }

    /// Where an image goes. **Errors**: a message that names the image, which has no name to go by.
    pub fn place(&self, image: &Location) -> Result<Location, String> {
        let nameless = || format!("{image} has no name that it could keep");
        match self {
            Self::Containerd => match image {
                Location::Containerd(name) => Ok(Location::Containerd(name.clone())),
                _ => {
                    let name = whole_name(image).ok_or_else(nameless)?;
                    Ok(Location::Containerd(name.to_string()))
                }
            },
            Self::Registry(prefix) => {
                let (repository, tag) = match whole_name(image) {
                    Some(name) => {
                        let tag = name.tag().ok_or_else(|| {
                            format!("{image} is named by a digest, which changes; name it by a tag")
                        })?;
                        (name.repository().to_owned(), tag.to_owned())
                    }
                    None => file_name(image).ok_or_else(nameless)?,
                };
                let name = format!("{prefix}/{repository}");
                let reference = format!("{name}:{tag}").parse::<ImageReference>();
                let reference = reference.map_err(|e| format!("{image} as {name}:{tag}: {e}"))?;
                Ok(Location::Registry(reference))
            }
        }
    }
}

/// The image's name with host, repository and tag, if it has one.
fn whole_name(image: &Location) -> Option<ImageReference> {
    match image {
        Location::Registry(reference) => Some(reference.clone()),
        Location::Containerd(name) => name.parse().ok(),
        Location::DockerArchive { tag, .. } => tag.as_ref()?.parse().ok(),
        Location::Layout { tag, .. } | Location::OciArchive { tag, .. } => {
            // A bare tag would read as a repository.
            let tag = tag.as_ref().filter(|tag| tag.contains(['/', ':']))?;
            tag.parse().ok()
        }
    }
}

/// What a file or directory is called, and the tag in it.
fn file_name(image: &Location) -> Option<(String, String)> {
    let (path, tag): (&Path, _) = match image {
        Location::Layout { path, tag } | Location::OciArchive { path, tag } => (path, tag.clone()),
        Location::DockerArchive { path, .. } => (path, None),
        Location::Registry(_) | Location::Containerd(_) => return None,
    };
    let name = path.file_name()?.to_str()?;
    let name = name.strip_suffix(".tar").unwrap_or(name);
    // As a repository it must be one.
    Repository::new("registry.invalid", name).ok()?;
    Some((name.to_owned(), tag.unwrap_or_else(|| "latest".to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_keep_their_names_under_a_prefix() {
        let cases = [
            (
                "registry.test/mirror",
                "debian:12",
                "docker://registry.test/mirror/library/debian:12",
            ),
            (
                "docker://registry.test",
                "quay.test/team/app",
                "docker://registry.test/team/app:latest",
            ),
            (
                "registry.test:5000/a/",
                "oci:/x/app:v1",
                "docker://registry.test:5000/a/app:v1",
            ),
            (
                "registry.test/a",
                "oci-archive:/x/app.tar",
                "docker://registry.test/a/app:latest",
            ),
            (
                "registry.test/a",
                "oci-archive:/x/app.tar:quay.test/team/app:v2",
                "docker://registry.test/a/team/app:v2",
            ),
            (
                "registry.test/a",
                "docker-archive:/x/saved.tar:app:v3",
                "docker://registry.test/a/library/app:v3",
            ),
            (
                "registry.test/a",
                "containerd:quay.test/b:1",
                "docker://registry.test/a/b:1",
            ),
            ("containerd:", "containerd:app", "containerd:app"),
            (
                "containerd:",
                "debian:12",
                "containerd:docker.io/library/debian:12",
            ),
        ];
        for (prefix, image, expected) in cases {
            let prefix = Prefix::parse(prefix).unwrap();
            let placed = prefix.place(&Location::parse(image).unwrap()).unwrap();
            assert_eq!(placed.to_string(), expected, "{image}");
        }
        let digest = format!("quay.test/a@sha256:{}", "0".repeat(64));
        for (prefix, image, message) in [
            ("registry.test/a", &*digest, "name it by a tag"),
            ("registry.test/a", "oci:/x/Upper:v1", "no name"),
            ("containerd:", "oci:/x/app:v1", "no name"),
        ] {
            let prefix = Prefix::parse(prefix).unwrap();
            let error = prefix.place(&Location::parse(image).unwrap()).unwrap_err();
            assert!(error.contains(message), "{image}: {error}");
        }
        for bad in ["", "a/Upper", "oci:/x", "a b"] {
            assert!(Prefix::parse(bad).is_err(), "{bad}");
        }
    }
}
