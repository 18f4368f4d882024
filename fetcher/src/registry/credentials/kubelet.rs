// SPDX-License-Identifier: Apache-2.0
//! kubelet's credential provider plugins, with kubelet's own configuration.
//!
//! For a repository each plugin is asked whose `matchImages` match it, unless an earlier answer still counts:
//! for this image, its registry or all, as the plugin said, and for as long as it said. Of an answer those entries are
//! given whose key matches. The configuration is read anew for each look-up, so a change counts at once; one with an
//! error counts for nothing, and a warning says so once.
//!
//! A plugin runs in a task of its own, for [`RUN_TIMEOUT`] at most: who waits for it waits as long as he can, and finds
//! the answer the next time. One run for the same thing is under way at a time, and who comes meanwhile has its
//! answer. A refresh runs it again unless its answer is younger than [`MIN_AGE`]. A plugin that
//! fails, hangs or says what makes no sense is left alone for [`FAILED_LIFE`]; its earlier answer counts
//! until its end.
//!
//! **Locks** one mutex over what is remembered and what is under way; it is held across neither a run nor an await.
//! **Bounds** [`MOST_ANSWERS`] answers of [`ANSWER_BYTES`].

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt, Shared};
use lru::LruCache;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::program;
use super::target::Pattern;
use super::{Credential, CredentialProvider, CredentialTarget};
use crate::bounded;

mod config;
mod exchange;
#[cfg(test)]
mod tests;

use config::Plugin;
use exchange::{CacheKind, Response};

/// Longest run of a plugin, as kubelet's.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);
/// Youngest answer that a refresh replaces: a burst of refusals runs a plugin once.
const MIN_AGE: Duration = Duration::from_secs(2);
/// How long after a run that failed a plugin is left alone.
const FAILED_LIFE: Duration = Duration::from_secs(10);
/// Largest answer of a plugin; tokens are some kilobytes.
const ANSWER_BYTES: u64 = 256 * 1024;
/// Answers that are remembered.
const MOST_ANSWERS: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
/// Largest configuration that is read, and how many of a directory.
const CONFIG_BYTES: u64 = 1024 * 1024;
const MOST_CONFIGS: usize = 32;
/// Longest wait for the configuration.
const FILE_TIMEOUT: Duration = Duration::from_secs(5);

/// Plugin, and what the answer is for: an image, a registry, or nothing for all.
type Key = (String, CacheKind, String);

type Flight = Shared<BoxFuture<'static, Option<Arc<Answer>>>>;

/// What a plugin said.
#[derive(Debug)]
struct Answer {
    entries: Vec<(Pattern, Credential)>,
    since: Instant,
    until: Instant,
}

#[derive(Debug)]
struct State {
    answers: LruCache<Key, Arc<Answer>>,
    /// Until when plugins are left alone that did not work, by what they were asked for.
    failed: LruCache<Key, Instant>,
    flights: HashMap<Key, Flight>,
    /// What the last answer of a plugin was good for.
    kinds: HashMap<String, CacheKind>,
}

/// kubelet's plugins. See the module.
#[derive(Debug)]
pub struct KubeletPlugins {
    config: PathBuf,
    programs: PathBuf,
    run_timeout: Duration,
    state: Arc<Mutex<State>>,
    told: Mutex<String>,
    runs: TaskTracker,
    /// Ends what runs, with the provider at the latest.
    stop: DropGuard,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KubeletPlugins {
    /// Those that `config` (a file, or a directory of files) names, in the directory `programs`: kubelet's
    /// `--image-credential-provider-config` and `--image-credential-provider-bin-dir`.
    pub fn new(config: PathBuf, programs: PathBuf) -> Self {
        let state = State {
            answers: LruCache::new(MOST_ANSWERS),
            failed: LruCache::new(MOST_ANSWERS),
            flights: HashMap::new(),
            kinds: HashMap::new(),
        };
        KubeletPlugins {
            config,
            programs,
            run_timeout: RUN_TIMEOUT,
            state: Arc::new(Mutex::new(state)),
            told: Mutex::default(),
            runs: TaskTracker::new(),
            stop: CancellationToken::new().drop_guard(),
        }
    }

    /// Kills what runs, and waits for that. Nothing is run from then on.
    pub async fn stop(&self) {
        self.stop.token().cancel();
        self.runs.close();
        self.runs.wait().await;
    }

    /// The same with another limit on the run of a plugin.
    #[must_use]
    pub fn with_run_timeout(mut self, timeout: Duration) -> Self {
        self.run_timeout = timeout;
        self
    }

    async fn plugins(&self) -> Vec<Plugin> {
        let path = self.config.clone();
        let read = tokio::task::spawn_blocking(move || read_config(&path));
        let read = match tokio::time::timeout(FILE_TIMEOUT, read).await {
            Ok(Ok(read)) => read,
            Ok(Err(_)) | Err(_) => Err(format!("not read within {FILE_TIMEOUT:?}")),
        };
        let (plugins, problem) = match read {
            Ok(plugins) => (plugins, String::new()),
            Err(problem) => (Vec::new(), problem),
        };
        let before = std::mem::replace(&mut *lock(&self.told), problem.clone());
        if !problem.is_empty() && before != problem {
            let path = self.config.display();
            tracing::warn!(%path, problem, "the configuration of credential providers is unusable");
        }
        plugins
    }

    /// What a plugin says about the target, of an earlier answer or by a run of it.
    async fn answer(
        &self,
        plugin: &Plugin,
        target: &CredentialTarget,
        refresh: bool,
    ) -> Option<Arc<Answer>> {
        let flight = {
            let mut state = lock(&self.state);
            if let Some(known) = state.known(plugin, target)
                && !(refresh && known.since.elapsed() >= MIN_AGE)
            {
                return Some(known);
            }
            let kind = state.kinds.get(&plugin.name).copied().unwrap_or_default();
            let key = key_of(plugin, kind, target);
            let left_alone = state.failed.get(&key).copied();
            if left_alone.is_some_and(|until| Instant::now() < until) {
                return state.known(plugin, target);
            }
            match state.flights.get(&key) {
                Some(flight) => flight.clone(),
                None => {
                    let flight = self.start(plugin.clone(), target.clone(), key.clone());
                    state.flights.insert(key, flight.clone());
                    flight
                }
            }
        };
        match flight.await {
            Some(answer) => Some(answer),
            None => lock(&self.state).known(plugin, target),
        }
    }

    /// A run of a plugin, which goes on when nobody waits for it.
    fn start(&self, plugin: Plugin, target: CredentialTarget, key: Key) -> Flight {
        let mut command = Command::new(self.programs.join(&plugin.name));
        command
            .args(&plugin.arguments)
            .envs(plugin.environment.iter().cloned());
        let timeout = self.run_timeout;
        let state = Arc::downgrade(&self.state);
        let stop = self.stop.token().clone();
        let run = async move {
            let input = exchange::request(plugin.version, &target.to_string());
            let said = program::run(command, &input, ANSWER_BYTES, timeout).await;
            let response = said.and_then(|said| match said.status.success() {
                false => Err(format!("it ends with {}", said.status)),
                true => exchange::parse(plugin.version, &said.output).map_err(str::to_owned),
            });
            if let Err(problem) = &response {
                let name = &plugin.name;
                tracing::warn!(plugin = name, %target, problem, "failed to ask a credential provider");
            }
            settle(&state, &plugin, &target, key, response.ok())
        };
        let run = async move { stop.run_until_cancelled_owned(run).await.flatten() };
        let run = self.runs.spawn(run);
        let flight = async move { run.await.ok().flatten() };
        flight.boxed().shared()
    }
}

impl State {
    /// An answer that still counts.
    fn known(&mut self, plugin: &Plugin, target: &CredentialTarget) -> Option<Arc<Answer>> {
        let kinds = [CacheKind::Image, CacheKind::Registry, CacheKind::Global];
        let now = Instant::now();
        kinds.into_iter().find_map(|kind| {
            let found = self.answers.get(&key_of(plugin, kind, target))?;
            (now < found.until).then(|| Arc::clone(found))
        })
    }
}

fn key_of(plugin: &Plugin, kind: CacheKind, target: &CredentialTarget) -> Key {
    let what = match kind {
        CacheKind::Image => target.to_string(),
        CacheKind::Registry => target.host().to_owned(),
        CacheKind::Global => String::new(),
    };
    (plugin.name.clone(), kind, what)
}

/// Keeps what a run came to.
fn settle(
    state: &Weak<Mutex<State>>,
    plugin: &Plugin,
    target: &CredentialTarget,
    key: Key,
    response: Option<Response>,
) -> Option<Arc<Answer>> {
    let state = state.upgrade()?;
    let mut state = lock(&state);
    let now = Instant::now();
    // Its waiters have their own hold on it.
    let flight = state.flights.remove(&key);
    let Some(response) = response else {
        state.failed.put(key, now + FAILED_LIFE);
        drop(state);
        drop(flight);
        return None;
    };
    state.failed.pop(&key);
    let answer = Arc::new(Answer {
        entries: response.entries,
        since: now,
        until: now + response.life.unwrap_or(plugin.life),
    });
    state.kinds.insert(plugin.name.clone(), response.kind);
    let key = key_of(plugin, response.kind, target);
    state.answers.put(key, Arc::clone(&answer));
    drop(state);
    drop(flight);
    Some(answer)
}

/// **Blocks**.
///
/// **Errors** what is wrong with the file, or with one of them.
fn read_config(path: &Path) -> Result<Vec<Plugin>, String> {
    let failed = |error: std::io::Error| error.to_string();
    if !path.is_dir() {
        return config::parse(&read_file(path)?);
    }
    let wanted = |path: &PathBuf| {
        let extension = path.extension().and_then(|it| it.to_str());
        matches!(extension, Some("json" | "yaml" | "yml"))
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        files.push(entry.map_err(failed)?.path());
    }
    files.retain(wanted);
    files.sort();
    let mut all: Vec<Plugin> = Vec::new();
    for file in files.into_iter().take(MOST_CONFIGS) {
        let named = |problem: String| format!("{}: {problem}", file.display());
        let plugins = read_file(&file).and_then(|text| config::parse(&text));
        for plugin in plugins.map_err(named)? {
            if all.iter().any(|other| other.name == plugin.name) {
                return Err(named(format!("provider {:?}: named twice", plugin.name)));
            }
            all.push(plugin);
        }
    }
    Ok(all)
}

fn read_file(path: &Path) -> Result<String, String> {
    let bytes = bounded::read(path, CONFIG_BYTES).map_err(|error| error.to_string())?;
    String::from_utf8(bytes).map_err(|error| error.to_string())
}

#[async_trait]
impl CredentialProvider for KubeletPlugins {
    async fn credentials(&self, target: &CredentialTarget, refresh: bool) -> Vec<Credential> {
        // A plugin is asked about an image.
        if target.repository().is_empty() {
            return Vec::new();
        }
        let plugins = self.plugins().await;
        let fits = |plugin: &&Plugin| plugin.images.iter().any(|it| it.matches(target));
        let asked = plugins.iter().filter(fits);
        let asked = asked.map(|plugin| self.answer(plugin, target, refresh));
        let answers = futures::future::join_all(asked).await;
        let entries = answers.iter().flatten().flat_map(|it| &it.entries);
        let fitting = entries.filter(|(pattern, _)| pattern.matches(target));
        fitting.map(|(_, credential)| credential.clone()).collect()
    }
}
