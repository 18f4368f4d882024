// SPDX-License-Identifier: Apache-2.0
//! containerd's `hosts.toml`: where else a registry's content is, and how to get there. Pure.
//!
//! Read as containerd's documentation of registry hosts says: hosts in the order of the file, `server` (the
//! registry itself where there is none) behind them, each with its own certificates and headers. Where
//! containerd stops at what it does not know we pass over it: keys of later versions mean nothing here.
//! Host URLs with `http` are plain HTTP, also where certificates are named for them; containerd
//! would try TLS first.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use toml_edit::{DocumentMut, Item, TableLike, Value};
use url::Url;

mod directory;

pub(super) use directory::{Found, Stamp, find, named};

/// Name of the file in a registry's directory.
const FILE: &str = "hosts.toml";
/// Hosts of one file that are used; more would only be asked in vain, one after the other.
const MOST_HOSTS: usize = 16;

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum HostsError {
    /// It cannot be read.
    #[error("{0}")]
    Read(String),
    /// It is no TOML.
    #[error("{0}")]
    Syntax(String),
    /// A key's value makes no sense.
    #[error("{key}: {problem}")]
    Key {
        /// The key with its table.
        key: String,
        /// What is wrong.
        problem: String,
    },
}

/// What a host may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Content by its digest.
    pub(super) pull: bool,
    /// What a tag stands for.
    pub(super) resolve: bool,
}

impl Capabilities {
    /// What a host may be asked for whose entry does not say.
    pub(super) const ALL: Self = Self {
        pull: true,
        resolve: true,
    };
}

/// How a host is reached.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Access {
    /// PEM files of authorities to trust besides the system's.
    pub(super) ca: Vec<PathBuf>,
    /// PEM files of client certificates, each with the file of its key if that is another.
    pub(super) client: Vec<(PathBuf, Option<PathBuf>)>,
    /// Accept any certificate.
    pub(super) skip_verify: bool,
    /// Longest wait for a connection.
    pub(super) dial_timeout: Option<Duration>,
    /// An HTTP proxy, instead of what the environment says.
    pub(super) proxy: Option<Url>,
    /// Further headers; they may be secret.
    pub(super) headers: HeaderMap,
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    /// The root of its API (`https://host/v2`), without a slash at the end.
    pub(super) base: Url,
    pub(super) can: Capabilities,
    pub(super) access: Access,
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Hosts {
    /// In the order in which they are asked.
    pub(super) mirrors: Vec<Host>,
    /// `server`, which stands for the registry itself.
    pub(super) server: Option<Host>,
    /// How the registry itself is reached where there is no `server`.
    pub(super) access: Access,
}

/// Reads the text of a file; `directory` is where relative paths in it begin.
///
/// **Errors** [`HostsError::Syntax`], [`HostsError::Key`]: nothing of the file counts then.
pub(super) fn parse(text: &str, directory: &Path) -> Result<Hosts, HostsError> {
    let document: DocumentMut = text
        .parse()
        .map_err(|error: toml_edit::TomlError| HostsError::Syntax(error.to_string()))?;
    let root = Section {
        table: document.as_table(),
        prefix: "",
        directory,
    };
    let access = root.access()?;
    let can = root.capabilities()?;
    root.flag("override_path")?;
    let server = match root.text("server")? {
        Some(server) if !server.is_empty() => Some(Host {
            base: root.base("server", server)?,
            can,
            access: access.clone(),
        }),
        _ => None,
    };
    let mut mirrors = Vec::new();
    if let Some(item) = document.get("host") {
        let hosts = item
            .as_table_like()
            .ok_or_else(|| wrong("host", "want tables [host.\"https://…\"]"))?;
        for (name, item) in hosts.iter() {
            let prefix = format!("host.{name:?}");
            let table = item
                .as_table_like()
                .ok_or_else(|| wrong(&prefix, "want a table"))?;
            let section = Section {
                table,
                prefix: &prefix,
                directory,
            };
            mirrors.push(Host {
                base: section.base("", name)?,
                can: section.capabilities()?,
                access: section.access()?,
            });
        }
    }
    if mirrors.len() > MOST_HOSTS {
        return Err(wrong("host", &format!("more than {MOST_HOSTS} hosts")));
    }
    Ok(Hosts {
        mirrors,
        server,
        access,
    })
}

fn wrong(key: &str, problem: &str) -> HostsError {
    HostsError::Key {
        key: key.to_owned(),
        problem: problem.to_owned(),
    }
}

/// One table of the file.
struct Section<'a> {
    table: &'a dyn TableLike,
    prefix: &'a str,
    directory: &'a Path,
}

impl Section<'_> {
    fn wrong(&self, key: &str, problem: &str) -> HostsError {
        let dot = if self.prefix.is_empty() || key.is_empty() {
            ""
        } else {
            "."
        };
        wrong(&format!("{}{dot}{key}", self.prefix), problem)
    }

    fn text(&self, key: &str) -> Result<Option<&str>, HostsError> {
        match self.table.get(key) {
            None => Ok(None),
            Some(item) => item
                .as_str()
                .map(Some)
                .ok_or_else(|| self.wrong(key, "want a text")),
        }
    }

    fn flag(&self, key: &str) -> Result<bool, HostsError> {
        match self.table.get(key) {
            None => Ok(false),
            Some(item) => item
                .as_bool()
                .ok_or_else(|| self.wrong(key, "want true or false")),
        }
    }

    /// The root of the API below `server`, a URL or a host.
    fn base(&self, key: &str, server: &str) -> Result<Url, HostsError> {
        let override_path = self.flag("override_path")?;
        let text = if server.contains("://") {
            server.to_owned()
        } else {
            format!("https://{server}")
        };
        let mut url = Url::parse(&text).map_err(|error| self.wrong(key, &error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(self.wrong(key, "want http://… or https://…"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(self.wrong(key, "credentials do not belong into a URL"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(self.wrong(key, "want a URL without query and fragment"));
        }
        let mut path = url.path().trim_end_matches('/').to_owned();
        if !override_path && !path.ends_with("/v2") {
            path.push_str("/v2");
        }
        url.set_path(&path);
        Ok(url)
    }

    fn capabilities(&self) -> Result<Capabilities, HostsError> {
        let key = "capabilities";
        let Some(item) = self.table.get(key) else {
            return Ok(Capabilities::ALL);
        };
        let words = self.texts(key, item)?;
        if words.is_empty() {
            return Ok(Capabilities::ALL);
        }
        let mut can = Capabilities {
            pull: false,
            resolve: false,
        };
        for word in words {
            match word.to_ascii_lowercase().as_str() {
                "pull" => can.pull = true,
                "resolve" => can.resolve = true,
                // Nothing is pushed from here. Referrers are found by clients.
                "push" | "referrers" => {}
                _ => {
                    let problem = format!("unknown {word:?}; want \"pull\", \"resolve\", \"push\"");
                    return Err(self.wrong(key, &problem));
                }
            }
        }
        Ok(can)
    }

    fn access(&self) -> Result<Access, HostsError> {
        let ca = match self.table.get("ca") {
            None => Vec::new(),
            Some(item) => self
                .texts("ca", item)?
                .iter()
                .map(|path| self.directory.join(path))
                .collect(),
        };
        let dial_timeout = match self.text("dial_timeout")? {
            None | Some("") => None,
            Some(text) => Some(go_duration(text).ok_or_else(|| {
                self.wrong("dial_timeout", "want a time such as \"1s\" or \"500ms\"")
            })?),
        };
        let proxy = match self.text("proxy")? {
            None | Some("") => None,
            Some(text) => Some(
                Url::parse(text)
                    .ok()
                    .filter(|url| matches!(url.scheme(), "http" | "https"))
                    .ok_or_else(|| {
                        self.wrong("proxy", "want http://… or https://…, others are not known")
                    })?,
            ),
        };
        Ok(Access {
            ca,
            client: self.client()?,
            skip_verify: self.flag("skip_verify")?,
            dial_timeout,
            proxy,
            headers: self.headers()?,
        })
    }

    /// A text, or several.
    fn texts<'t>(&self, key: &str, item: &'t Item) -> Result<Vec<&'t str>, HostsError> {
        if let Some(text) = item.as_str() {
            return Ok(vec![text]);
        }
        let several = item
            .as_array()
            .ok_or_else(|| self.wrong(key, "want a text or a list of texts"))?;
        several
            .iter()
            .map(|value| {
                value
                    .as_str()
                    .ok_or_else(|| self.wrong(key, "want a list of texts"))
            })
            .collect()
    }

    /// A path, several, or pairs of certificate and key.
    fn client(&self) -> Result<Vec<(PathBuf, Option<PathBuf>)>, HostsError> {
        let key = "client";
        let path = |text: &str| self.directory.join(text);
        let Some(item) = self.table.get(key) else {
            return Ok(Vec::new());
        };
        if let Some(text) = item.as_str() {
            return Ok(vec![(path(text), None)]);
        }
        let unknown = || self.wrong(key, "want a path, paths, or pairs of paths");
        let several = item.as_array().ok_or_else(unknown)?;
        let pair = |value: &Value| match value {
            Value::String(text) => Ok((path(text.value()), None)),
            Value::Array(pair) => {
                let texts: Vec<&str> = pair.iter().filter_map(Value::as_str).collect();
                match (pair.len(), texts.as_slice()) {
                    (2, [certificate, key]) => {
                        let key = (!key.is_empty()).then(|| path(key));
                        Ok((path(certificate), key))
                    }
                    _ => Err(self.wrong(key, "want pairs of two paths")),
                }
            }
            _ => Err(unknown()),
        };
        several.iter().map(pair).collect()
    }

    fn headers(&self) -> Result<HeaderMap, HostsError> {
        let mut headers = HeaderMap::new();
        let Some(item) = self.table.get("header") else {
            return Ok(headers);
        };
        let table = item
            .as_table_like()
            .ok_or_else(|| self.wrong("header", "want a table"))?;
        for (name, item) in table.iter() {
            let key = format!("header.{name}");
            let parsed: HeaderName = name
                .parse()
                .map_err(|_| self.wrong(&key, "no name of a header"))?;
            for text in self.texts(&key, item)? {
                // Its value may be a secret: it is not shown.
                let mut value = HeaderValue::from_str(text)
                    .map_err(|_| self.wrong(&key, "characters that no header may have"))?;
                value.set_sensitive(true);
                headers.append(parsed.clone(), value);
            }
        }
        Ok(headers)
    }
}

/// A duration as Go writes it: `1m30s`, `1.5s`, `500ms`; not negative, and a year at most.
pub(super) fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        seconds += number
            * match &rest[..end] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" | "μs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &rest[end..];
    }
    (!text.is_empty() && seconds <= 366.0 * 86_400.0).then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests;
