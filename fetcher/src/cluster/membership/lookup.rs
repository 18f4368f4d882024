// SPDX-License-Identifier: Apache-2.0
//! Where the seeds are: addresses as they stand, names resolved and the seed file read again and again.
//!
//! A name that does not resolve keeps the addresses that it had last; a file that cannot be read keeps
//! its seeds. Both are said once, and once more when they are well again. Nothing waits for any of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cluster::seed::{SEED_FILE_MAX_BYTES, Seed, parse_seed_file};

/// How often names are resolved and the file is read: a pod that comes is found soon, and a resolver
/// asked for one name every ten seconds does not notice.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long a resolver may take: longer than its own patience with servers that do not answer, so that
/// threads which wait for it do not pile up.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(30);
/// Names resolved at a time.
const RESOLVE_AT_ONCE: usize = 4;
/// The most addresses of seeds.
const SEEDS_MAX: usize = 4096;

/// Where a seed is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::cluster) struct SeedAddress {
    /// Its address.
    pub address: SocketAddr,
    /// The DNS name that led there.
    pub name: Option<String>,
}

/// The seeds as they are known now.
pub(super) type Seeds = watch::Receiver<Arc<Vec<SeedAddress>>>;

/// Looks seeds up.
#[derive(Debug)]
pub(super) struct Lookup {
    fixed: Vec<Seed>,
    file: Option<PathBuf>,
    from_file: Vec<Seed>,
    /// What was wrong with the file when it was last read.
    file_failure: Option<String>,
    /// By name and port. `Err`: it never resolved, or does not any more, with the addresses of before.
    resolved: BTreeMap<Seed, Result<Vec<SocketAddr>, Vec<SocketAddr>>>,
    sender: watch::Sender<Arc<Vec<SeedAddress>>>,
}

impl Lookup {
    /// Knows the seeds that are addresses at once.
    pub(super) fn new(fixed: Vec<Seed>, file: Option<PathBuf>) -> (Self, Seeds) {
        let (sender, seeds) = watch::channel(Arc::default());
        let lookup = Lookup {
            fixed,
            file,
            from_file: Vec::new(),
            file_failure: None,
            resolved: BTreeMap::new(),
            sender,
        };
        lookup.publish();
        (lookup, seeds)
    }

    /// Looks again and again until `stop`.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let look = async {
            loop {
                self.look().await;
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = look => {}
        }
    }

    async fn look(&mut self) {
        if let Some(file) = self.file.clone() {
            let read = tokio::task::spawn_blocking(move || read_file(&file)).await;
            // Only the stop of the runtime cancels it.
            if let Ok(read) = read {
                self.take_file(read);
            }
            self.publish();
        }
        let names: BTreeSet<Seed> = self.named().cloned().collect();
        self.resolved.retain(|seed, _| names.contains(seed));
        let mut resolving = futures::stream::iter(names.into_iter().map(|seed| async move {
            let addresses = resolve(&seed).await;
            (seed, addresses)
        }))
        .buffer_unordered(RESOLVE_AT_ONCE);
        while let Some((seed, addresses)) = resolving.next().await {
            self.take_addresses(seed, addresses);
            // One name that hangs does not keep the others from being known.
            self.publish();
        }
    }

    fn named(&self) -> impl Iterator<Item = &Seed> {
        let seeds = self.fixed.iter().chain(&self.from_file);
        seeds.filter(|seed| seed.address().is_none())
    }

    fn take_file(&mut self, read: Result<String, String>) {
        let failure = match read {
            Ok(text) => {
                let (seeds, wrong) = parse_seed_file(&text);
                self.from_file = seeds;
                wrong.first().map(|line| format!("no seed: {line:?}"))
            }
            Err(failure) => Some(failure),
        };
        if failure != self.file_failure {
            let path = self.file.as_deref().unwrap_or(Path::new(""));
            match &failure {
                Some(failure) => tracing::warn!(?path, failure, "read the seed file"),
                None => tracing::info!(?path, "the seed file is well again"),
            }
            self.file_failure = failure;
        }
    }

    fn take_addresses(&mut self, seed: Seed, addresses: Result<Vec<SocketAddr>, String>) {
        let before = self.resolved.remove(&seed);
        let now = match (addresses, before) {
            (Ok(addresses), before) => {
                if matches!(before, Some(Err(_))) {
                    tracing::info!(%seed, "a seed resolves again");
                }
                Ok(addresses)
            }
            (Err(_), Some(Err(addresses))) => Err(addresses),
            (Err(error), before) => {
                tracing::warn!(%seed, error, "a seed does not resolve");
                Err(before.and_then(Result::ok).unwrap_or_default())
            }
        };
        self.resolved.insert(seed, now);
    }

    fn publish(&self) {
        let mut addresses: BTreeSet<SeedAddress> = BTreeSet::new();
        for seed in self.fixed.iter().chain(&self.from_file) {
            if let Some(address) = seed.address() {
                let name = None;
                addresses.insert(SeedAddress { address, name });
            }
            let known = match self.resolved.get(seed) {
                Some(Ok(known) | Err(known)) => known.as_slice(),
                None => &[],
            };
            addresses.extend(known.iter().map(|&address| SeedAddress {
                address,
                name: Some(seed.host().to_owned()),
            }));
        }
        let addresses: Vec<_> = addresses.into_iter().take(SEEDS_MAX).collect();
        self.sender.send_if_modified(|known| {
            let changed = **known != addresses;
            if changed {
                *known = Arc::new(addresses);
            }
            changed
        });
    }
}

fn read_file(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(SEED_FILE_MAX_BYTES).read_to_string(&mut text))
        .map(|_| text)
        .map_err(|error| error.to_string())
}

async fn resolve(seed: &Seed) -> Result<Vec<SocketAddr>, String> {
    let found = tokio::net::lookup_host((seed.host(), seed.port()));
    match tokio::time::timeout(RESOLVE_DEADLINE, found).await {
        Ok(Ok(found)) => Ok(found.collect()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the resolver did not answer in time".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seed(text: &str) -> Seed {
        Seed::parse(text).unwrap()
    }

    fn shown(seeds: &Seeds) -> Vec<String> {
        let seeds = seeds.borrow();
        let shown = seeds.iter().map(|it| match &it.name {
            Some(name) => format!("{}={name}", it.address),
            None => it.address.to_string(),
        });
        shown.collect()
    }

    #[test]
    fn names_keep_their_addresses_while_the_resolver_fails() {
        let address = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let name = seed("peers.example:1");
        let (mut lookup, seeds) = Lookup::new(vec![seed("10.0.0.1:1"), name.clone()], None);
        assert_eq!(shown(&seeds), ["10.0.0.1:1"]);
        lookup.take_addresses(name.clone(), Err("no such name".into()));
        lookup.publish();
        assert_eq!(shown(&seeds), ["10.0.0.1:1"]);
        let found = vec![address("10.0.0.3:1"), address("10.0.0.2:1")];
        lookup.take_addresses(name.clone(), Ok(found));
        lookup.publish();
        let both = [
            "10.0.0.1:1",
            "10.0.0.2:1=peers.example",
            "10.0.0.3:1=peers.example",
        ];
        assert_eq!(shown(&seeds), both);
        for _ in 0..2 {
            lookup.take_addresses(name.clone(), Err("down".into()));
            lookup.publish();
            assert_eq!(shown(&seeds), both);
        }
        lookup.take_addresses(name, Ok(vec![address("10.0.0.4:1")]));
        lookup.publish();
        assert_eq!(shown(&seeds), ["10.0.0.1:1", "10.0.0.4:1=peers.example"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_file_is_read_again_and_names_are_resolved() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("seeds");
        let (lookup, mut seeds) = Lookup::new(vec![], Some(file.clone()));
        let stop = CancellationToken::new();
        let running = tokio::spawn(lookup.run(stop.clone()));
        // It need not be there at the start.
        tokio::time::sleep(LOOK_EVERY * 2).await;
        assert!(seeds.borrow().is_empty());
        std::fs::write(&file, "127.0.0.1:7\nno seed\n").unwrap();
        seeds.changed().await.unwrap();
        assert_eq!(shown(&seeds), ["127.0.0.1:7"]);
        std::fs::write(&file, "localhost:8\n").unwrap();
        let both = |seeds: &Seeds| shown(seeds).contains(&"127.0.0.1:8=localhost".to_owned());
        while !both(&seeds) {
            seeds.changed().await.unwrap();
        }
        assert!(!shown(&seeds).contains(&"127.0.0.1:7".to_owned()));
        // A file that is gone takes nothing away.
        std::fs::remove_file(&file).unwrap();
        tokio::time::sleep(LOOK_EVERY * 2).await;
        assert!(both(&seeds));
        stop.cancel();
        running.await.unwrap();
    }
}
