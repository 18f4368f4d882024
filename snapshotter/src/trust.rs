// SPDX-License-Identifier: Apache-2.0
//! Which registries and repositories may be lazy (`[trust] lazy` of the configuration).
//!
//! A pattern is `host` or `host/path`, where `*` stands for any characters; a pattern without a
//! slash means all repositories of the host. Pure.

use crate::snapshots::BlobOrigin;

/// The patterns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust(Vec<String>);

impl Trust {
    /// Trusts what fits any of these.
    #[must_use]
    pub fn new(patterns: Vec<String>) -> Self {
        Self(patterns)
    }

    /// Whether layers from there may be lazy.
    #[must_use]
    pub fn allows(&self, origin: &BlobOrigin) -> bool {
        let name = origin.to_string();
        self.0.iter().any(|pattern| {
            if pattern.contains('/') {
                fits(pattern.as_bytes(), name.as_bytes())
            } else {
                fits(pattern.as_bytes(), origin.host.as_bytes())
            }
        })
    }
}

/// Linear in the product of both lengths at worst; patterns come from the configuration only.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skip| fits(rest, &text[skip..])),
        Some((first, rest)) => text
            .split_first()
            .is_some_and(|(head, tail)| head == first && fits(rest, tail)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_name_hosts_and_repositories() {
        let cases = [
            ("*", "docker.io", "library/a", true),
            ("docker.io", "docker.io", "library/a", true),
            ("docker.io", "docker.io.evil", "library/a", false),
            ("docker.io/library/*", "docker.io", "library/a", true),
            ("docker.io/library/*", "docker.io", "other/a", false),
            ("*.example/team/*", "reg.example", "team/x/y", true),
            ("localhost:5000", "localhost:5000", "a", true),
            ("localhost", "localhost:5000", "a", false),
            ("", "h", "a", false),
        ];
        for (pattern, host, repository, allowed) in cases {
            let origin = BlobOrigin {
                host: host.into(),
                repository: repository.into(),
            };
            let trust = Trust::new(vec![pattern.into()]);
            assert_eq!(trust.allows(&origin), allowed, "{pattern} {origin}");
        }
        let origin = BlobOrigin {
            host: "h".into(),
            repository: "a".into(),
        };
        assert!(!Trust::new(Vec::new()).allows(&origin));
    }
}
