// SPDX-License-Identifier: Apache-2.0
//! What a credential is for: the registry and repository that are asked, and the patterns that match them.
//!
//! Patterns are those of kubelet's `matchImages` and of the keys of docker's `auths`:
//! `host[:port][/path]`, maybe with a scheme. A `*` or `?` in the host stands for text without a dot, so
//! `*.example` matches `a.example` and not `a.b.example`; the port must be the same, or absent from both; the path must
//! be the beginning of the repository up to a slash. kubelet lets `/team` match `/teammate` as well: here it does
//! not, for a credential goes rather to too few than to too many. Pure.
//!
//! **Source** Kubernetes, "Configure a kubelet image credential provider", "Images", section "Interpretation of
//! config.json".

use std::fmt;

use crate::registry::reference::DOCKER_HUB;

/// The longest pattern that is looked at; hosts have 255 bytes at most, repositories as many.
const PATTERN_MAX_BYTES: usize = 1024;

/// Whom a credential is shown.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CredentialTarget {
    host: String,
    repository: String,
}

impl CredentialTarget {
    /// The repository at `host` (`host[:port]`); empty where a request is for none.
    pub fn new(host: &str, repository: &str) -> Self {
        CredentialTarget {
            host: host.to_ascii_lowercase(),
            repository: repository.to_owned(),
        }
    }

    /// The registry, with its port if it is not that of the scheme.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository; may be empty.
    pub fn repository(&self) -> &str {
        &self.repository
    }
}

impl fmt::Display for CredentialTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.repository.as_str() {
            "" => f.write_str(&self.host),
            repository => write!(f, "{}/{repository}", self.host),
        }
    }
}

/// A set of registries and repositories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern {
    /// Labels of the host, from the left; one for an IPv6 address.
    labels: Vec<String>,
    port: Option<String>,
    /// Without slashes around it; may be empty.
    path: String,
}

/// Splits `host[:port]`.
fn split_port(host: &str) -> (&str, Option<&str>) {
    let after = host.rfind(']').map_or(0, |at| at + 1);
    match host[after..].find(':') {
        Some(at) => (&host[..after + at], Some(&host[after + at + 1..])),
        None => (host, None),
    }
}

/// The other names of Docker Hub are its own.
fn labels_of(name: &str) -> Vec<String> {
    match name {
        "index.docker.io" | "registry-1.docker.io" => labels_of(DOCKER_HUB),
        name if name.starts_with('[') => vec![name.to_owned()],
        name => name.split('.').map(str::to_owned).collect(),
    }
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// **Errors** what is wrong with it; the text is not repeated.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        if text.len() > PATTERN_MAX_BYTES {
            return Err("too long");
        }
        let text = match text.split_once("://") {
            Some(("http" | "https", rest)) => rest,
            Some(_) => return Err("neither http nor https"),
            None => text,
        };
        let (host, path) = text.split_once('/').unwrap_or((text, ""));
        let host = host.to_ascii_lowercase();
        let (name, port) = split_port(&host);
        let in_name = |c: char| c.is_ascii_alphanumeric() || "-_.*?[]:".contains(c);
        let brackets = name.contains(['[', ']', ':']);
        if name.is_empty() || !name.chars().all(in_name) {
            return Err("no host");
        }
        if brackets && !(name.starts_with('[') && name.ends_with(']') && !name.contains('*')) {
            return Err("sets of characters are not understood");
        }
        if port.is_some_and(|port| port.parse::<u16>().is_err()) {
            return Err("the port is no number");
        }
        if path.contains(['*', '?', '#', '@']) {
            return Err("only the host may have wildcards");
        }
        // As docker writes them: the version of the API is not a part of any repository.
        let path = path
            .strip_prefix("v1")
            .or(path.strip_prefix("v2"))
            .map_or(path, |rest| {
                match rest.is_empty() || rest.starts_with('/') {
                    true => rest,
                    false => path,
                }
            });
        Ok(Pattern {
            labels: labels_of(name),
            port: port.map(str::to_owned),
            path: path.trim_matches('/').to_owned(),
        })
    }

    /// Whether the target is in the set.
    pub(super) fn matches(&self, target: &CredentialTarget) -> bool {
        let (name, port) = split_port(&target.host);
        let labels = labels_of(name);
        let below = || match target.repository.strip_prefix(self.path.as_str()) {
            Some(rest) => self.path.is_empty() || rest.is_empty() || rest.starts_with('/'),
            None => false,
        };
        port == self.port.as_deref()
            && labels.len() == self.labels.len()
            && self.labels.iter().zip(&labels).all(|(p, l)| glob(p, l))
            && below()
    }

    /// Whether `self` says more than `other`: the longer path, then the host without wildcards.
    pub(super) fn rank(&self) -> (std::cmp::Reverse<usize>, bool) {
        (std::cmp::Reverse(self.path.len()), self.is_wild())
    }

    fn is_wild(&self) -> bool {
        self.labels.iter().any(|label| label.contains(['*', '?']))
    }

    /// The host and port, if it is one.
    pub(super) fn host(&self) -> Option<String> {
        if self.is_wild() {
            return None;
        }
        let name = self.labels.join(".");
        Some(match &self.port {
            Some(port) => format!("{name}:{port}"),
            None => name,
        })
    }
}

/// Whether the text is one that the pattern stands for: `*` is any text, `?` a character. Takes time linear in both
/// for each `*`.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Where to go on when what follows the last `*` does not fit.
    let mut again: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                again = Some((p + 1, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match again {
                Some((after, from)) => {
                    again = Some((after, from + 1));
                    p = after;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_what_kubelet_says_and_no_more() {
        let cases = [
            ("registry.example", "registry.example/a", true),
            ("REGISTRY.example", "registry.Example/a", true),
            ("registry.example", "registry.example:5000/a", false),
            ("registry.example:5000", "registry.example/a", false),
            ("registry.example:5000", "registry.example:5000/a", true),
            ("registry.example:5000", "registry.example:50000/a", false),
            ("*.registry.example:5000", "a.registry.example:5000/a", true),
            ("*.registry.example", "registry.example/a", false),
            ("*.registry.example", "a.b.registry.example/a", false),
            ("*.*.registry.example", "a.b.registry.example/a", true),
            ("app*.example", "app1.example/a", true),
            ("app*.example", "ap.example/a", false),
            ("*.example", "a.example.evil/a", false),
            ("*", "localhost/a", true),
            ("*", "a.example/a", false),
            ("a?.example", "ab.example/x", true),
            ("a?.example", "a.example/x", false),
            ("registry.example/team", "registry.example/team/app", true),
            ("registry.example/team/", "registry.example/team/app", true),
            ("registry.example/team", "registry.example/team", true),
            ("registry.example/team", "registry.example/teammate", false),
            ("registry.example/team", "registry.example/other", false),
            ("registry.example/team", "registry.example", false),
            ("https://registry.example/v2/", "registry.example/a", true),
            (
                "https://registry.example/v2/team",
                "registry.example/team/a",
                true,
            ),
            ("registry.example/v2x", "registry.example/a", false),
            ("https://index.docker.io/v1/", "docker.io/library/a", true),
            ("docker.io", "docker.io/library/a", true),
            ("[::1]:5000", "[::1]:5000/a", true),
            ("[::1]:5000", "[::2]:5000/a", false),
            (
                "123456.dkr.ecr.*.amazonaws.com",
                "123456.dkr.ecr.eu-1.amazonaws.com/a",
                true,
            ),
        ];
        for (pattern, target, expected) in cases {
            let (host, repository) = target.split_once('/').unwrap_or((target, ""));
            let target = CredentialTarget::new(host, repository);
            let parsed = Pattern::parse(pattern).unwrap();
            assert_eq!(parsed.matches(&target), expected, "{pattern} {target}");
        }
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        let cases = [
            ("", "no host"),
            ("/team", "no host"),
            ("user@registry.example", "no host"),
            ("registry.example:port", "the port is no number"),
            ("registry.example:*", "the port is no number"),
            ("registry.example/*", "only the host may have wildcards"),
            ("ftp://registry.example", "neither http nor https"),
            ("r[ab].example", "sets of characters are not understood"),
            ("registry.example\n", "no host"),
        ];
        for (text, problem) in cases {
            assert_eq!(Pattern::parse(text), Err(problem), "{text:?}");
        }
        let long = "a".repeat(PATTERN_MAX_BYTES + 1);
        assert_eq!(Pattern::parse(&long), Err("too long"));
    }

    #[test]
    fn many_wildcards_take_no_time() {
        let begun = crate::clock::now();
        assert!(!glob(&"*a".repeat(400), &"a".repeat(399)));
        assert!(glob(&"*a".repeat(300), &"a".repeat(300)));
        assert!(begun.elapsed() < std::time::Duration::from_secs(5));
    }

    #[test]
    fn what_says_more_comes_first() {
        let mut patterns: Vec<Pattern> = ["*.b", "a.b", "a.b/team", "a.b/team/app", "*.b/team"]
            .map(|text| Pattern::parse(text).unwrap())
            .to_vec();
        patterns.sort_by_key(Pattern::rank);
        let shown: Vec<(Option<String>, &str)> = patterns
            .iter()
            .map(|it| (it.host(), it.path.as_str()))
            .collect();
        let host = || Some("a.b".to_owned());
        assert_eq!(
            shown,
            [
                (host(), "team/app"),
                (host(), "team"),
                (None, "team"),
                (host(), ""),
                (None, "")
            ]
        );
    }
}
