// SPDX-License-Identifier: Apache-2.0
//! Being let in: which `Authorization` goes with a request.
//!
//! # How
//! A host's scheme (Basic, or Bearer with its token service) is learnt from its first 401 and
//! remembered, so later requests carry their header from the start. Credentials are tried in order,
//! the one that worked last first, anonymous last. While the one that worked last has a live token (or
//! needs none) nothing is looked up at all. When a request that carried a remembered token or
//! credential is answered 401 or 403, the token is dropped, the credentials are looked up anew, and
//! each is tried once more with a new token; that is the one refresh of a request.
//!
//! Tokens are kept by (host, scope, credential) until shortly before they expire. Concurrent misses
//! of one key share one request to the token service (a flight): whoever waits drives it, and a
//! waiter that leaves does not stop the others.
//!
//! # Where credentials go
//! To the registry host itself, and to the token service that this host names. A service without TLS
//! gets them only when it is on this machine, or its host is configured as plain, or it is the
//! registry's own endpoint, which is plain already. A registry knows the credentials given to it, so
//! naming a service gains it nothing; against others, TLS protects both ways alike. Token requests
//! do not follow redirects.
//!
//! Locks: each map has its own mutex; none is held across an await or while another is taken.

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, Shared, WeakShared};
use lru::LruCache;
use reqwest::Method;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use url::Url;

use super::RegistryError;
use super::challenge::{Challenge, parse_challenges};
use super::credentials::{Credential, CredentialProvider, CredentialTarget, Secret};
use super::endpoint::Endpoint;
use super::options::RegistryOptions;
use super::reference::is_plain_http_default;
use super::transport::{Call, Own, Transport, endpoint_of, host_of};
use crate::source::{Attempts, Class, Priority, ReadContext, SourceKind};

/// Tokens, schemes and working credentials that are remembered. A node has tens of repositories; an
/// entry is some kilobytes.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
/// Life of a token whose service does not say (distribution token specification).
const DEFAULT_TOKEN_LIFE: Duration = Duration::from_secs(60);
/// Longest time before its end that a token is no longer used; a quarter of short lives.
const TOKEN_MARGIN: Duration = Duration::from_secs(30);
/// Largest answer of a token service that is read.
const TOKEN_ANSWER_BYTES: u64 = 1024 * 1024;

type Fingerprint = [u8; 32];

/// What a token must allow: `repository:NAME:ACTIONS`, several separated by spaces.
pub(super) type Scope = str;

/// How a host lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Scheme {
    Basic,
    Bearer {
        realm: Url,
        service: Option<String>,
        /// A scope that is not a repository's and that the host asks for besides.
        extra_scope: Option<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct TokenKey {
    host: String,
    scope: String,
    credential: Fingerprint,
}

#[derive(Clone, Debug)]
struct Token {
    secret: Secret,
    usable_until: Instant,
}

type Flight = BoxFuture<'static, Result<Token, RegistryError>>;

/// A credential to try; `None` inside is anonymous.
#[derive(Clone, Debug)]
struct Candidate {
    credential: Option<Credential>,
    fingerprint: Fingerprint,
}

impl Candidate {
    fn new(credential: Option<Credential>) -> Self {
        let mut hash = Sha256::new();
        match &credential {
            None => {
                return Candidate {
                    credential,
                    fingerprint: [0; 32],
                };
            }
            Some(Credential::Password { username, password }) => {
                hash.update(b"password\0");
                hash.update(username.as_bytes());
                hash.update(b"\0");
                hash.update(password.reveal().as_bytes());
            }
            Some(Credential::IdentityToken(token)) => {
                hash.update(b"identity\0");
                hash.update(token.reveal().as_bytes());
            }
        }
        Candidate {
            credential,
            fingerprint: hash.finalize().into(),
        }
    }

    fn name(&self) -> String {
        match &self.credential {
            None => "anonymous".into(),
            Some(Credential::Password { username, .. }) => format!("user {username}"),
            Some(Credential::IdentityToken(_)) => "identity token".into(),
        }
    }
}

/// The header of the request under way.
#[derive(Debug)]
struct Used {
    candidate: Candidate,
    token: Option<TokenUse>,
}

#[derive(Debug)]
struct TokenUse {
    secret: Secret,
    remembered: bool,
}

/// The attempts of one request to be let in.
#[derive(Debug)]
pub(super) struct Entry {
    host: String,
    /// Whether the host speaks plain HTTP, so that its own token service may.
    plain: bool,
    /// How the host, and its own token service, is reached.
    own: Option<(Url, Own)>,
    scope: String,
    queue: VecDeque<Candidate>,
    loaded: bool,
    refreshed: bool,
    tried: HashSet<Fingerprint>,
    names: Vec<String>,
    used: Option<Used>,
}

impl Entry {
    pub(super) fn new(endpoint: &Endpoint, scope: &Scope) -> Self {
        let own = (endpoint.kind != SourceKind::Dragonfly && endpoint.own.client.is_some())
            .then(|| (endpoint.base.clone(), endpoint.own.clone()));
        Entry {
            host: endpoint.account.clone(),
            plain: endpoint.plain,
            own,
            scope: scope.to_owned(),
            queue: VecDeque::new(),
            loaded: false,
            refreshed: false,
            tried: HashSet::new(),
            names: Vec::new(),
            used: None,
        }
    }

    /// Whether the header under way is there because a token, which was good once, was refused.
    pub(super) fn renews(&self) -> bool {
        self.refreshed && self.tried.is_empty()
    }

    /// What was tried, for the error.
    pub(super) fn summary(&self) -> String {
        if self.names.is_empty() {
            "nothing could be tried".to_owned()
        } else {
            format!("tried {}", self.names.join(", "))
        }
    }
}

pub(super) struct Authorizer {
    options: Arc<RegistryOptions>,
    transport: Arc<Transport>,
    provider: Arc<dyn CredentialProvider>,
    schemes: Mutex<LruCache<String, Scheme>>,
    tokens: Mutex<LruCache<TokenKey, Token>>,
    flights: Mutex<HashMap<TokenKey, WeakShared<Flight>>>,
    /// The credential that was accepted last, by host and scope.
    working: Mutex<LruCache<(String, String), Candidate>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Authorizer {
    pub(super) fn new(
        options: Arc<RegistryOptions>,
        transport: Arc<Transport>,
        provider: Arc<dyn CredentialProvider>,
    ) -> Self {
        Authorizer {
            options,
            transport,
            provider,
            schemes: Mutex::new(LruCache::new(REMEMBERED)),
            tokens: Mutex::new(LruCache::new(REMEMBERED)),
            flights: Mutex::new(HashMap::new()),
            working: Mutex::new(LruCache::new(REMEMBERED)),
        }
    }

    /// The registries that there are credentials for.
    pub(super) async fn hosts(&self) -> Vec<String> {
        self.provider.hosts().await
    }

    /// The header for the first try: `None` while the host has not asked for one.
    pub(super) async fn first(
        &self,
        context: &ReadContext,
        entry: &mut Entry,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let scheme = lock(&self.schemes).get(&entry.host).cloned();
        match scheme {
            Some(scheme) => self.next(context, entry, &scheme).await,
            None => Ok(None),
        }
    }

    /// The header for another try after the host has answered 401 or 403; `None` = nothing is left.
    pub(super) async fn again(
        &self,
        context: &ReadContext,
        entry: &mut Entry,
        answer: &HeaderMap,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let learnt = scheme_of(answer);
        let scheme = {
            let mut schemes = lock(&self.schemes);
            if let Some(learnt) = learnt {
                schemes.put(entry.host.clone(), learnt);
            }
            schemes.get(&entry.host).cloned()
        };
        let Some(scheme) = scheme else {
            return Ok(None);
        };
        if let Some(Used { candidate, token }) = entry.used.take() {
            let mut remembered = false;
            if let Some(token) = token {
                self.forget(&entry.host, &entry.scope, &candidate, &token.secret);
                remembered = token.remembered;
            }
            if remembered && !entry.refreshed {
                // The token was good once: the same credential deserves a new one.
                entry.refreshed = true;
                self.load(context, entry, true).await?;
            } else {
                entry.tried.insert(candidate.fingerprint);
            }
        }
        self.next(context, entry, &scheme).await
    }

    /// Notes that the last header was accepted. Where what was asked for is `missing`, that says nothing of others
    /// that are accepted, too, and may see more: then one that worked before stays the first.
    pub(super) fn accepted(&self, entry: &Entry, missing: bool) {
        if let Some(used) = &entry.used {
            let key = (entry.host.clone(), entry.scope.clone());
            let mut working = lock(&self.working);
            if !missing || working.peek(&key).is_none() {
                working.put(key, used.candidate.clone());
            }
        }
    }

    /// The header of another user, after what was asked for is not there for the one who asked; `None` = nobody is
    /// left. Who is not known to the host sees no more than who is, so anonymous is left out.
    pub(super) async fn another(
        &self,
        context: &ReadContext,
        entry: &mut Entry,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let scheme = lock(&self.schemes).get(&entry.host).cloned();
        let (Some(scheme), Some(used)) = (scheme, &entry.used) else {
            return Ok(None);
        };
        if used.candidate.credential.is_none() {
            return Ok(None);
        }
        entry.tried.insert(used.candidate.fingerprint);
        if !entry.loaded {
            self.load(context, entry, false).await?;
        }
        entry.queue.retain(|it| it.credential.is_some());
        if entry
            .queue
            .iter()
            .all(|it| entry.tried.contains(&it.fingerprint))
        {
            return Ok(None);
        }
        // Nothing is wrong with those that were tried: nothing is to be looked up anew.
        entry.refreshed = true;
        let before = entry.used.take();
        let header = match self.next(context, entry, &scheme).await {
            Err(error) if error.class() == Class::Cancelled => return Err(error),
            // The answer that is there is better than this error.
            Err(_) => None,
            Ok(header) => header,
        };
        if header.is_none() {
            entry.used = before;
        }
        Ok(header)
    }

    async fn next(
        &self,
        context: &ReadContext,
        entry: &mut Entry,
        scheme: &Scheme,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        if !entry.loaded
            && entry.tried.is_empty()
            && let Some((header, used)) = self.proven(entry, scheme)
        {
            entry.names.push(used.candidate.name());
            entry.used = Some(used);
            return Ok(Some(header));
        }
        if !entry.loaded {
            self.load(context, entry, false).await?;
        }
        loop {
            let Some(candidate) = entry.queue.pop_front() else {
                if entry.refreshed {
                    return Ok(None);
                }
                entry.refreshed = true;
                self.load(context, entry, true).await?;
                continue;
            };
            if entry.tried.contains(&candidate.fingerprint) {
                continue;
            }
            let name = candidate.name();
            match self.header(context, entry, scheme, candidate.clone()).await {
                Ok(Some((header, token))) => {
                    if entry.names.last() != Some(&name) {
                        entry.names.push(name);
                    }
                    entry.used = Some(Used { candidate, token });
                    return Ok(Some(header));
                }
                Ok(None) => {
                    entry.tried.insert(candidate.fingerprint);
                }
                Err(
                    error @ (RegistryError::Denied { .. }
                    | RegistryError::Refused { .. }
                    | RegistryError::NotFound { .. }),
                ) => {
                    tracing::debug!(host = entry.host, credential = name, %error, "no token");
                    entry.tried.insert(candidate.fingerprint);
                    entry
                        .names
                        .push(format!("{name} (refused by the token service)"));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The header that was accepted last, if it is good still: the look-up of credentials, which may
    /// run a helper, is not on the way of every request, and may fail meanwhile.
    fn proven(&self, entry: &Entry, scheme: &Scheme) -> Option<(HeaderValue, Used)> {
        let key = (entry.host.clone(), entry.scope.clone());
        let candidate = lock(&self.working).get(&key).cloned()?;
        let (text, token) = match (scheme, &candidate.credential) {
            (Scheme::Basic, Some(Credential::Password { username, password })) => {
                (basic(username, password), None)
            }
            (Scheme::Basic, _) => return None,
            (Scheme::Bearer { .. }, _) => {
                let token = self.live_token(&TokenKey {
                    host: entry.host.clone(),
                    scope: entry.scope.clone(),
                    credential: candidate.fingerprint,
                })?;
                (format!("Bearer {}", token.secret.reveal()), Some(token))
            }
        };
        Some((secret_header(&text)?, Used { candidate, token }))
    }

    fn live_token(&self, key: &TokenKey) -> Option<TokenUse> {
        let token = lock(&self.tokens).get(key).cloned()?;
        (Instant::now() < token.usable_until).then_some(TokenUse {
            secret: token.secret,
            remembered: true,
        })
    }

    async fn load(
        &self,
        context: &ReadContext,
        entry: &mut Entry,
        refresh: bool,
    ) -> Result<(), RegistryError> {
        let target = CredentialTarget::new(&entry.host, repository_of(&entry.scope));
        let known = context
            .bound(self.provider.credentials(&target, refresh))
            .await?;
        let mut queue: VecDeque<Candidate> = known
            .into_iter()
            .map(Some)
            .chain([None])
            .map(Candidate::new)
            .collect();
        let key = (entry.host.clone(), entry.scope.clone());
        let working = lock(&self.working).get(&key).map(|it| it.fingerprint);
        if let Some(at) = queue.iter().position(|c| Some(c.fingerprint) == working)
            && let Some(candidate) = queue.remove(at)
        {
            queue.push_front(candidate);
        }
        entry.queue = queue;
        entry.loaded = true;
        Ok(())
    }

    /// The header by which `candidate` is known under `scheme`; `None` where it cannot be.
    async fn header(
        &self,
        context: &ReadContext,
        entry: &Entry,
        scheme: &Scheme,
        candidate: Candidate,
    ) -> Result<Option<(HeaderValue, Option<TokenUse>)>, RegistryError> {
        let text = match (scheme, &candidate.credential) {
            (Scheme::Basic, Some(Credential::Password { username, password })) => {
                return Ok(secret_header(&basic(username, password)).map(|header| (header, None)));
            }
            (Scheme::Basic, _) => return Ok(None),
            (Scheme::Bearer { .. }, _) => self.token(context, entry, scheme, candidate).await?,
        };
        let header = secret_header(&format!("Bearer {}", text.secret.reveal()));
        Ok(header.map(|header| (header, Some(text))))
    }

    async fn token(
        &self,
        context: &ReadContext,
        entry: &Entry,
        scheme: &Scheme,
        candidate: Candidate,
    ) -> Result<TokenUse, RegistryError> {
        let key = TokenKey {
            host: entry.host.clone(),
            scope: entry.scope.clone(),
            credential: candidate.fingerprint,
        };
        if let Some(token) = self.live_token(&key) {
            return Ok(token);
        }
        let flight = self.flight(&key, scheme, candidate, entry);
        let outcome = context.bound(flight).await?;
        lock(&self.flights)
            .retain(|_, flight| flight.upgrade().is_some_and(|f| f.peek().is_none()));
        let token = outcome?;
        lock(&self.tokens).put(key, token.clone());
        Ok(TokenUse {
            secret: token.secret,
            remembered: false,
        })
    }

    /// The one request for this token that is under way, or a new one.
    fn flight(
        &self,
        key: &TokenKey,
        scheme: &Scheme,
        candidate: Candidate,
        entry: &Entry,
    ) -> Shared<Flight> {
        let mut flights = lock(&self.flights);
        if let Some(flight) = flights.get(key).and_then(WeakShared::upgrade) {
            return flight;
        }
        let request = TokenRequest {
            options: Arc::clone(&self.options),
            transport: Arc::clone(&self.transport),
            scheme: scheme.clone(),
            scope: key.scope.clone(),
            host: key.host.clone(),
            plain: entry.plain,
            own: entry.own.clone(),
            candidate,
        };
        let flight = request.run().boxed().shared();
        if let Some(weak) = flight.downgrade() {
            flights.insert(key.clone(), weak);
        }
        flight
    }

    /// Drops a token, unless another one has taken its place already.
    fn forget(&self, host: &str, scope: &str, candidate: &Candidate, secret: &Secret) {
        let key = TokenKey {
            host: host.to_owned(),
            scope: scope.to_owned(),
            credential: candidate.fingerprint,
        };
        let mut tokens = lock(&self.tokens);
        if tokens
            .peek(&key)
            .is_some_and(|token| token.secret == *secret)
        {
            tokens.pop(&key);
        }
    }
}

/// The repository of a scope: the first, which is that of the request.
fn repository_of(scope: &Scope) -> &str {
    let first = scope.split(' ').next().unwrap_or_default();
    let rest = first.strip_prefix("repository:").unwrap_or_default();
    rest.rsplit_once(':').map_or("", |(name, _)| name)
}

/// The scheme that an answer asks for; Bearer where both are offered.
fn scheme_of(answer: &HeaderMap) -> Option<Scheme> {
    let challenges: Vec<Challenge> = answer
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(parse_challenges)
        .collect();
    let bearer = challenges
        .iter()
        .filter(|c| c.scheme == "bearer")
        .find_map(|challenge| {
            let realm = Url::parse(challenge.parameter("realm")?).ok()?;
            let own_scope = |scope: &&str| !scope.is_empty() && !scope.starts_with("repository:");
            Some(Scheme::Bearer {
                realm,
                service: challenge.parameter("service").map(str::to_owned),
                extra_scope: challenge
                    .parameter("scope")
                    .filter(own_scope)
                    .map(str::to_owned),
            })
        });
    let basic = || {
        challenges
            .iter()
            .any(|c| c.scheme == "basic")
            .then_some(Scheme::Basic)
    };
    bearer.or_else(basic)
}

fn basic(username: &str, password: &Secret) -> String {
    format!(
        "Basic {}",
        BASE64.encode(format!("{username}:{}", password.reveal()))
    )
}

/// A header value that HTTP libraries do not show; `None` when it has characters that cannot be sent.
fn secret_header(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// One request to a token service (distribution specification's token authentication).
struct TokenRequest {
    options: Arc<RegistryOptions>,
    transport: Arc<Transport>,
    scheme: Scheme,
    scope: String,
    host: String,
    plain: bool,
    own: Option<(Url, Own)>,
    candidate: Candidate,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl TokenRequest {
    /// Bounded by the token time-out whoever waits for it.
    async fn run(self) -> Result<Token, RegistryError> {
        let context =
            ReadContext::new(Priority::Foreground).with_timeout(self.options.token_timeout);
        let mut call = self.call()?;
        if let Some((base, own)) = &self.own
            && base.origin() == call.url.origin()
        {
            // Its certificates; its headers are for the registry's API.
            call.own.client.clone_from(&own.client);
        }
        let mut attempts = Attempts::new(&self.options.retry);
        loop {
            match self.once(&context, &call).await {
                Ok(token) => return Ok(token),
                Err(RegistryError::DeadlineExceeded) => {
                    return Err(RegistryError::NoAnswer {
                        endpoint: endpoint_of(&call.url),
                        what: call.what.clone(),
                        after: self.options.token_timeout,
                    });
                }
                Err(error) => attempts.wait_after(&context, error).await?,
            }
        }
    }

    async fn once(&self, context: &ReadContext, call: &Call) -> Result<Token, RegistryError> {
        let answer = self.transport.send_here(context, call).await?;
        let received = Instant::now();
        let answer = self
            .transport
            .accept(context, answer, &[200], &call.what)
            .await;
        let answer = answer.map_err(|error| match error {
            RegistryError::Denied {
                endpoint,
                what,
                status,
                ..
            } => RegistryError::Denied {
                endpoint,
                what,
                status,
                credentials: self.candidate.name(),
            },
            other => other,
        })?;
        let endpoint = answer.endpoint.clone();
        let body = self
            .transport
            .read_body(context, answer, TOKEN_ANSWER_BYTES, "token")
            .await?;
        let wrong = |problem: &str| RegistryError::Protocol {
            endpoint: endpoint.clone(),
            what: call.what.clone(),
            problem: problem.to_owned(),
        };
        let parsed: TokenAnswer =
            serde_json::from_slice(&body).map_err(|_| wrong("malformed token answer"))?;
        let secret = parsed
            .token
            .filter(|token| !token.is_empty())
            .or(parsed.access_token)
            .filter(|token| !token.is_empty())
            .ok_or_else(|| wrong("no token in the answer"))?;
        let life = parsed
            .expires_in
            .map_or(DEFAULT_TOKEN_LIFE, Duration::from_secs);
        // A life beyond a day says nothing more; it also keeps the clock arithmetic small.
        let life = life.min(Duration::from_secs(86_400));
        let usable_until = received + life - TOKEN_MARGIN.min(life / 4);
        Ok(Token {
            secret: Secret::new(secret),
            usable_until,
        })
    }

    fn call(&self) -> Result<Call, RegistryError> {
        let what = format!("a token for {} of {}", self.scope, self.host);
        let Scheme::Bearer {
            realm,
            service,
            extra_scope,
        } = &self.scheme
        else {
            return Err(RegistryError::Configuration {
                host: self.host.clone(),
                problem: "no token service".into(),
            });
        };
        self.check_realm(realm)?;
        let scopes = self.scope.split(' ').chain(extra_scope.as_deref());
        let mut url = realm.clone();
        match &self.candidate.credential {
            Some(Credential::IdentityToken(token)) => {
                let mut form = url::form_urlencoded::Serializer::new(String::new());
                form.append_pair("grant_type", "refresh_token");
                form.append_pair("client_id", "sluice");
                form.append_pair("refresh_token", token.reveal());
                form.append_pair("service", service.as_deref().unwrap_or_default());
                form.append_pair("scope", &scopes.collect::<Vec<_>>().join(" "));
                let mut call = Call::new(Method::POST, url, what);
                let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
                call.headers.insert(CONTENT_TYPE, kind);
                call.body = Bytes::from(form.finish());
                Ok(call)
            }
            other => {
                if let Some(service) = service {
                    url.query_pairs_mut().append_pair("service", service);
                }
                for scope in scopes {
                    url.query_pairs_mut().append_pair("scope", scope);
                }
                let mut call = Call::new(Method::GET, url, what);
                if let Some(Credential::Password { username, password }) = other
                    && let Some(header) = secret_header(&basic(username, password))
                {
                    call.headers.insert(AUTHORIZATION, header);
                }
                Ok(call)
            }
        }
    }

    /// Whether the token service may be asked by this candidate (see the module's rules).
    fn check_realm(&self, realm: &Url) -> Result<(), RegistryError> {
        let service = host_of(realm);
        let safe = realm.scheme() == "https"
            || (realm.scheme() == "http"
                && (self.candidate.credential.is_none()
                    || is_plain_http_default(&service)
                    || self.options.is_configured_plain(&service)
                    || (service == self.host && self.plain)));
        if safe && realm.host_str().is_some() {
            return Ok(());
        }
        Err(RegistryError::Denied {
            endpoint: endpoint_of(realm),
            what: "a token".into(),
            status: 401,
            credentials: format!("{} not sent without TLS", self.candidate.name()),
        })
    }
}
