// SPDX-License-Identifier: Apache-2.0
//! Several providers as one: all are asked at once, and their credentials stand in the order of the providers.
//!
//! One that is slow, or hangs, does not keep back what another has: as soon as one has given something the others
//! get [`GRACE`]. Where that is refused, a refresh waits for all of them, each within its own bound. No more than
//! [`MOST`] credentials are given, for each costs a request.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;

use super::{Credential, CredentialProvider, CredentialTarget};
use crate::clock;

/// How long others are waited for when there is something to try. Shorter: a helper that needs a process start is
/// passed over; longer: a Prepare (5 s by default) waits for one that hangs.
const GRACE: Duration = Duration::from_millis(500);
/// Credentials that are tried for one request.
const MOST: usize = 8;

/// Several providers. See the module.
#[derive(Debug)]
pub struct CredentialChain {
    providers: Vec<Arc<dyn CredentialProvider>>,
}

impl CredentialChain {
    /// These, the one whose credentials are tried first at the beginning.
    pub fn new(providers: Vec<Arc<dyn CredentialProvider>>) -> Self {
        CredentialChain { providers }
    }
}

#[async_trait]
impl CredentialProvider for CredentialChain {
    async fn credentials(&self, target: &CredentialTarget, refresh: bool) -> Vec<Credential> {
        let mut asked: FuturesUnordered<_> = self
            .providers
            .iter()
            .enumerate()
            .map(|(at, provider)| async move { (at, provider.credentials(target, refresh).await) })
            .collect();
        let mut answers: Vec<(usize, Vec<Credential>)> = Vec::new();
        let mut until: Option<Instant> = None;
        loop {
            let next = match until {
                None => asked.next().await,
                Some(until) => match tokio::time::timeout_at(until, asked.next()).await {
                    Ok(next) => next,
                    Err(_) => break,
                },
            };
            let Some((at, found)) = next else { break };
            if !found.is_empty() && !refresh && until.is_none() {
                until = clock::moment_after(GRACE);
            }
            answers.push((at, found));
        }
        answers.sort_by_key(|(at, _)| *at);
        let mut known: Vec<Credential> = Vec::new();
        for credential in answers.into_iter().flat_map(|(_, found)| found) {
            if known.len() < MOST && !known.contains(&credential) {
                known.push(credential);
            }
        }
        known
    }

    async fn hosts(&self) -> Vec<String> {
        let all = self.providers.iter().map(|provider| provider.hosts());
        futures::future::join_all(all).await.concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Secret;

    #[derive(Debug)]
    struct Slow(&'static [&'static str], Duration);

    #[async_trait]
    impl CredentialProvider for Slow {
        async fn credentials(&self, _: &CredentialTarget, _: bool) -> Vec<Credential> {
            tokio::time::sleep(self.1).await;
            let token = |text: &&str| Credential::IdentityToken(Secret::new(*text));
            self.0.iter().map(token).collect()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_hangs_keeps_nobody_back_until_all_else_is_refused() {
        let second = Duration::from_secs(1);
        let provider = |names, takes| Arc::new(Slow(names, takes)) as Arc<dyn CredentialProvider>;
        let chain = CredentialChain::new(vec![
            provider(&["hangs"], second * 60),
            provider(&["b", "c"], Duration::ZERO),
            provider(&[], Duration::ZERO),
            provider(&["c", "d"], GRACE / 2),
        ]);
        let target = CredentialTarget::new("r.example", "a");
        let ask = async |refresh| {
            let begun = clock::now();
            let found = chain.credentials(&target, refresh).await;
            let found: Vec<String> = found
                .iter()
                .map(|it| match it {
                    Credential::IdentityToken(token) => token.reveal().to_owned(),
                    Credential::Password { .. } => String::new(),
                })
                .collect();
            (found.join(" "), begun.elapsed())
        };
        let (found, took) = ask(false).await;
        assert_eq!(found, "b c d");
        assert!(took < second, "{took:?}");
        let (found, took) = ask(true).await;
        assert_eq!(found, "hangs b c d");
        assert!(took >= second * 60, "{took:?}");
        // Nothing to try: there is nothing else to do than to wait.
        let alone = CredentialChain::new(vec![
            provider(&[], Duration::ZERO),
            provider(&["late"], second * 3),
        ]);
        assert_eq!(alone.credentials(&target, false).await.len(), 1);
        let many = CredentialChain::new(vec![provider(
            &["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
            Duration::ZERO,
        )]);
        assert_eq!(many.credentials(&target, false).await.len(), MOST);
    }
}
