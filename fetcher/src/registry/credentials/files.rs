// SPDX-License-Identifier: Apache-2.0
//! Files with credentials: docker configurations as Kubernetes keeps them in Secrets (`.dockerconfigjson`).
//!
//! A path is such a file, or a directory with such files, or with directories of them: that is what mounted
//! Secrets look like. They are read anew for each look-up, so a change counts at once; look-ups happen when a token is
//! missing or refused, not per request of a blob. All entries that match the registry and the repository
//! count, those that say more first ([`super::target`]); a file with an error counts for nothing, and a
//! warning says so once. Helpers that a file names are not run: it may come from anybody who writes Secrets.
//!
//! **Bounds** [`MOST_FILES`] files of [`FILE_BYTES`] are read, within [`READ_TIMEOUT`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use super::target::Pattern;
use super::{Credential, CredentialProvider, CredentialTarget, Secret};
use crate::bounded;

/// Files that are read, those of directories counted.
const MOST_FILES: usize = 256;
/// Largest file that is read; a Secret has 1 MiB at most.
const FILE_BYTES: u64 = 1024 * 1024;
/// Entries of one file that are looked at.
const MOST_ENTRIES: usize = 1024;
/// Longest wait for all of them; they may lie on a network file system.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Files with credentials. See the module.
#[derive(Debug)]
pub struct CredentialFiles {
    paths: Vec<PathBuf>,
    /// What was said of files that are wrong.
    told: Mutex<BTreeMap<PathBuf, String>>,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

/// What docker and Kubernetes write for a registry.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

impl Entry {
    /// **Errors** what is wrong, without the secret.
    fn credential(self) -> Result<Option<Credential>, &'static str> {
        if !self.identitytoken.is_empty() {
            let token = Secret::new(self.identitytoken);
            return Ok(Some(Credential::IdentityToken(token)));
        }
        let (username, password) = match (self.username.as_str(), self.auth.trim()) {
            ("", "") => return Ok(None),
            ("", auth) => {
                let bytes = BASE64.decode(auth).map_err(|_| "`auth` is no base64")?;
                let text = String::from_utf8(bytes).map_err(|_| "`auth` is no text")?;
                let (user, password) = text.split_once(':').ok_or("`auth` has no colon")?;
                (user.to_owned(), password.trim_end_matches('\0').to_owned())
            }
            _ => (self.username, self.password),
        };
        if username.is_empty() {
            return Err("no user name");
        }
        let password = Secret::new(password);
        Ok(Some(Credential::Password { username, password }))
    }
}

/// The entries of a file, with the reason for each that is unusable.
struct Parsed {
    entries: Vec<(Pattern, Credential)>,
    problems: Vec<String>,
}

/// Reads a file's text.
///
/// **Errors** what is wrong with all of it.
fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    // serde's words may quote a secret.
    let document: Document =
        serde_json::from_slice(bytes).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => {
                format!("no docker configuration (line {})", error.line())
            }
            _ => format!("no JSON (line {})", error.line()),
        })?;
    let (mut entries, mut problems) = (Vec::new(), Vec::new());
    for (key, entry) in document.auths.into_iter().take(MOST_ENTRIES) {
        match (Pattern::parse(&key), entry.credential()) {
            (Ok(pattern), Ok(Some(credential))) => entries.push((pattern, credential)),
            (Ok(_), Ok(None)) => {}
            (Err(problem), _) | (Ok(_), Err(problem)) => {
                let key: String = key.chars().take(100).collect();
                problems.push(format!("entry {key:?}: {problem}"));
            }
        }
    }
    Ok(Parsed { entries, problems })
}

impl CredentialFiles {
    /// Reads these files and directories.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        CredentialFiles {
            paths,
            told: Mutex::default(),
        }
    }

    /// All entries of all files, in the order of the files.
    async fn entries(&self) -> Vec<(Pattern, Credential)> {
        let paths = self.paths.clone();
        if paths.is_empty() {
            return Vec::new();
        }
        let read = tokio::task::spawn_blocking(move || read_all(&paths));
        let Ok(Ok(read)) = tokio::time::timeout(READ_TIMEOUT, read).await else {
            tracing::warn!(files = ?self.paths, "failed to read files with credentials in time");
            return Vec::new();
        };
        let mut all = Vec::new();
        for (path, read) in read {
            let problem = match read {
                Ok(parsed) => {
                    all.extend(parsed.entries);
                    parsed.problems.join("; ")
                }
                Err(problem) => problem,
            };
            self.tell(path, problem);
        }
        all
    }

    /// Warns of a file once for each thing that is wrong with it.
    fn tell(&self, path: PathBuf, problem: String) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let before = told.insert(path.clone(), problem.clone());
        drop(told);
        if !problem.is_empty() && before.as_ref() != Some(&problem) {
            tracing::warn!(path = %path.display(), problem, "a file with credentials is unusable in part or whole");
        }
    }
}

type Read1 = (PathBuf, Result<Parsed, String>);

/// **Blocks**.
fn read_all(paths: &[PathBuf]) -> Vec<Read1> {
    let mut files = Vec::new();
    for path in paths {
        files_of(path, 2, &mut files);
    }
    let read = |path: PathBuf| {
        let parsed = read(&path).and_then(|bytes| parse(&bytes));
        (path, parsed)
    };
    files.into_iter().take(MOST_FILES).map(read).collect()
}

/// The files of a directory and of its directories, by name. Kubernetes keeps what is mounted behind names with two
/// dots, and links to it.
fn files_of(path: &Path, depth: u32, files: &mut Vec<PathBuf>) {
    if !path.is_dir() {
        files.push(path.to_owned());
        return;
    }
    if depth == 0 {
        return;
    }
    let Ok(entries) = std::fs::read_dir(path) else {
        files.push(path.to_owned());
        return;
    };
    let entries = entries.flatten().take(MOST_FILES);
    let visible = entries.filter(|it| !it.file_name().as_encoded_bytes().starts_with(b".."));
    let mut below: Vec<PathBuf> = visible.map(|entry| entry.path()).collect();
    below.sort();
    for path in below {
        files_of(&path, depth - 1, files);
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("neither a file nor a directory that can be read".to_owned());
    }
    bounded::read(path, FILE_BYTES).map_err(|error| error.to_string())
}

#[async_trait]
impl CredentialProvider for CredentialFiles {
    async fn credentials(&self, target: &CredentialTarget, _refresh: bool) -> Vec<Credential> {
        let mut entries = self.entries().await;
        entries.retain(|(pattern, _)| pattern.matches(target));
        // Stable: of two that say as much the one of the earlier file comes first.
        entries.sort_by_key(|(pattern, _)| pattern.rank());
        entries.into_iter().map(|(_, found)| found).collect()
    }

    async fn hosts(&self) -> Vec<String> {
        let entries = self.entries().await;
        entries.iter().filter_map(|(it, _)| it.host()).collect()
    }
}

#[cfg(test)]
mod tests;
