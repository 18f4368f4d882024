// SPDX-License-Identifier: Apache-2.0
//! Docker's `config.json` and the credential helpers that it names.
//!
//! The file is read anew for each look-up, so a change counts at once; it is small, and look-ups
//! happen when a token is missing or refused, not per request of a blob. For a host these are tried, the most
//! specific first: its entry in `credHelpers`, its entry in `auths` (an identity token, or name and
//! password), `credsStore`. The entries of `auths` are read by the `docker_credential` crate; helpers
//! are run here, because a helper that hangs must be killed with all its children.
//!
//! A helper's answer is kept for [`HELPER_LIFE`]; a refresh runs it again unless its answer is
//! younger than [`HELPER_MIN_AGE`], so that a burst of refusals runs it once. One run for a server is
//! under way at a time, and who comes meanwhile has its answer. While a helper does not work, its last
//! answer is given for [`HELPER_FAILED_LIFE`] at a time.

use std::collections::HashMap;
use std::io::Read;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use docker_credential::{CredentialRetrievalError, DockerCredential};
use serde::Deserialize;
use tokio::time::Instant;

use super::program;
use super::{Credential, CredentialProvider, CredentialTarget, Secret};
use crate::registry::reference::DOCKER_HUB;

/// Under which name Docker keeps the credentials of Docker Hub.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// Longest run of a helper; cloud helpers make a request or two.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a helper's answer is used. Tokens of cloud helpers live for an hour or more.
const HELPER_LIFE: Duration = Duration::from_secs(300);
/// Youngest answer that a refresh replaces.
const HELPER_MIN_AGE: Duration = Duration::from_secs(1);
/// How long after a run that failed the helper is left alone.
const HELPER_FAILED_LIFE: Duration = Duration::from_secs(10);
/// Largest answer of a helper that is read; tokens are some kilobytes.
const HELPER_ANSWER_BYTES: u64 = 64 * 1024;
/// Largest configuration that is read.
const CONFIG_BYTES: u64 = 1024 * 1024;
/// Longest wait for the file; it may lie on a network file system.
const FILE_TIMEOUT: Duration = Duration::from_secs(5);

/// Registries of one file that are told of.
const MOST_HOSTS: usize = 1024;

/// Helper and server.
type HelperKey = (String, String);

/// Docker's `config.json` and the credential helpers that it names.
#[derive(Debug)]
pub struct DockerConfig {
    path: Option<PathBuf>,
    helper_folder: Option<PathBuf>,
    helper_timeout: Duration,
    answers: Mutex<HashMap<HelperKey, Arc<Helper>>>,
}

/// What is known from a helper about a server.
#[derive(Debug, Default)]
struct Helper {
    /// Held while it runs.
    run: tokio::sync::Mutex<()>,
    answer: Mutex<Option<Answer>>,
}

#[derive(Clone, Debug)]
struct Answer {
    credential: Option<Credential>,
    since: Instant,
    /// The run failed: the credential is that of an earlier one.
    failed: bool,
}

impl Helper {
    /// The last answer, young or not.
    fn last(&self) -> Option<Answer> {
        lock(&self.answer).clone()
    }

    /// The last answer, if it need not be asked for again.
    fn answer(&self, refresh: bool) -> Option<Answer> {
        self.last().filter(|answer| {
            let life = match (refresh, answer.failed) {
                (true, _) => HELPER_MIN_AGE,
                (false, true) => HELPER_FAILED_LIFE,
                (false, false) => HELPER_LIFE,
            };
            answer.since.elapsed() < life
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DockerConfig {
    /// Reads `path`, or where none is given `$DOCKER_CONFIG/config.json`, or `~/.docker/config.json`.
    pub fn new(path: Option<PathBuf>) -> Self {
        DockerConfig {
            path,
            helper_folder: None,
            helper_timeout: HELPER_TIMEOUT,
            answers: Mutex::new(HashMap::new()),
        }
    }

    /// The same with another limit on the run of a helper.
    #[must_use]
    pub fn with_helper_timeout(mut self, timeout: Duration) -> Self {
        self.helper_timeout = timeout;
        self
    }

    /// The same with helpers looked for in `folder` alone, not on the search path, which is short in
    /// a service.
    #[must_use]
    pub fn with_helper_folder(mut self, folder: PathBuf) -> Self {
        self.helper_folder = Some(folder);
        self
    }

    /// The file that is read.
    pub fn path(&self) -> Option<PathBuf> {
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker"));
        self.path.clone().or_else(|| {
            let folder = std::env::var_os("DOCKER_CONFIG")
                .map(PathBuf::from)
                .or_else(home)?;
            Some(folder.join("config.json"))
        })
    }

    async fn read(&self) -> Option<Vec<u8>> {
        let path = self.path()?;
        let shown = path.display().to_string();
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            std::fs::File::open(path)?
                .take(CONFIG_BYTES)
                .read_to_end(&mut bytes)?;
            Ok::<_, std::io::Error>(bytes)
        });
        match tokio::time::timeout(FILE_TIMEOUT, read).await {
            Ok(Ok(Ok(bytes))) => Some(bytes),
            Ok(Ok(Err(error))) if error.kind() == std::io::ErrorKind::NotFound => None,
            Ok(Ok(Err(error))) => {
                tracing::warn!(path = shown, %error, "failed to read Docker's configuration");
                None
            }
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(
                    path = shown,
                    "failed to read Docker's configuration in time"
                );
                None
            }
        }
    }

    /// Asks `docker-credential-<helper> get`.
    async fn run_helper(&self, helper: &str, server: &str) -> Result<Option<Credential>, String> {
        if helper.contains('/') {
            return Err("a helper is named without a path".into());
        }
        let name = format!("docker-credential-{helper}");
        let program = match &self.helper_folder {
            Some(folder) => folder.join(name),
            None => PathBuf::from(name),
        };
        ask(Command::new(program), server, self.helper_timeout).await
    }

    async fn helper_answer(&self, helper: &str, server: &str, refresh: bool) -> Option<Credential> {
        let key = (helper.to_owned(), server.to_owned());
        let known = Arc::clone(lock(&self.answers).entry(key).or_default());
        if let Some(answer) = known.answer(refresh) {
            return answer.credential;
        }
        let _run = known.run.lock().await;
        // Whoever ran it before us asked for us too.
        if let Some(answer) = known.answer(refresh) {
            return answer.credential;
        }
        let (credential, failed) = match self.run_helper(helper, server).await {
            Ok(credential) => (credential, false),
            Err(problem) => {
                tracing::warn!(helper, server, problem, "failed to ask a credential helper");
                (known.last().and_then(|last| last.credential), true)
            }
        };
        *lock(&known.answer) = Some(Answer {
            credential: credential.clone(),
            since: Instant::now(),
            failed,
        });
        credential
    }
}

#[async_trait]
impl CredentialProvider for DockerConfig {
    async fn credentials(&self, target: &CredentialTarget, refresh: bool) -> Vec<Credential> {
        let host = target.host();
        let Some(bytes) = self.read().await else {
            return Vec::new();
        };
        let Ok(mut config) = serde_json::from_slice::<serde_json::Value>(&bytes) else {
            tracing::warn!(path = ?self.path(), "Docker's configuration is no JSON");
            return Vec::new();
        };
        let server = if host == DOCKER_HUB {
            DOCKER_HUB_KEY
        } else {
            host
        };
        let own_helper = [server, host]
            .iter()
            .find_map(|name| config["credHelpers"][*name].as_str())
            .filter(|helper| !helper.is_empty())
            .map(str::to_owned);
        let common_helper = config["credsStore"]
            .as_str()
            .filter(|helper| !helper.is_empty())
            .map(str::to_owned);
        // What is left is read without running anything.
        if let Some(fields) = config.as_object_mut() {
            fields.remove("credHelpers");
            fields.remove("credsStore");
        }
        let mut known = Vec::new();
        if let Some(helper) = own_helper {
            known.extend(self.helper_answer(&helper, server, refresh).await);
        }
        known.extend(from_auths(&config, server));
        if let Some(helper) = common_helper {
            known.extend(self.helper_answer(&helper, server, refresh).await);
        }
        known.dedup();
        known
    }

    async fn hosts(&self) -> Vec<String> {
        let bytes = self.read().await.unwrap_or_default();
        let config: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let named = ["auths", "credHelpers"].into_iter();
        let named = named.filter_map(|key| config[key].as_object());
        named
            .flat_map(|entries| entries.keys())
            .take(MOST_HOSTS)
            .map(|key| host_of_key(key).to_owned())
            .collect()
    }
}

/// The `host[:port]` of a key of `auths`, which may be a URL.
fn host_of_key(key: &str) -> &str {
    let key = key.split_once("://").map_or(key, |(_, rest)| rest);
    key.split('/').next().unwrap_or_default()
}

/// The entry for `server` in `auths`.
fn from_auths(config: &serde_json::Value, server: &str) -> Option<Credential> {
    let text = serde_json::to_vec(config).ok()?;
    match docker_credential::get_credential_from_reader(text.as_slice(), server) {
        Ok(DockerCredential::IdentityToken(token)) if !token.is_empty() => {
            Some(Credential::IdentityToken(Secret::new(token)))
        }
        Ok(DockerCredential::UsernamePassword(username, password)) if !username.is_empty() => {
            Some(Credential::Password {
                username,
                password: Secret::new(password),
            })
        }
        Ok(_) | Err(CredentialRetrievalError::NoCredentialConfigured) => None,
        Err(error) => {
            // None of the errors that can happen without helpers quotes a secret.
            tracing::warn!(server, %error, "an entry of Docker's configuration is unusable");
            None
        }
    }
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// Asks a helper for the credentials of `server`; `None` when it knows nothing of it.
async fn ask(
    mut command: Command,
    server: &str,
    timeout: Duration,
) -> Result<Option<Credential>, String> {
    command.arg("get");
    let said = program::run(command, server.as_bytes(), HELPER_ANSWER_BYTES, timeout).await?;
    if !said.status.success() {
        // Helpers say "credentials not found in native keychain" and fail; so do those that are broken.
        return Ok(None);
    }
    let answer: HelperAnswer =
        serde_json::from_slice(&said.output).map_err(|_| "malformed answer".to_owned())?;
    if answer.secret.is_empty() {
        return Ok(None);
    }
    Ok(Some(match answer.username.as_str() {
        "<token>" => Credential::IdentityToken(Secret::new(answer.secret)),
        _ => Credential::Password {
            username: answer.username,
            password: Secret::new(answer.secret),
        },
    }))
}

#[cfg(test)]
mod tests;
