// SPDX-License-Identifier: Apache-2.0
//! Requests as they go over the wire: one client per set of TLS options, a limit per endpoint,
//! time-outs for head and body, redirects by hand.
//!
//! A [`Permit`] is held from before a request is sent until its body has been read or dropped; it is
//! released by dropping the [`Answer`] or the stream made of it. Background requests leave some
//! permits free, so that a reader never queues behind a full set of them.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use futures::stream::{self, Stream, StreamExt};
use lru::LruCache;
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER,
};
use reqwest::{Method, StatusCode, redirect};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use url::Url;

use super::options::RegistryOptions;
use super::reference::is_plain_http_default;
use super::{MAX_REDIRECTS, RegistryError};
use crate::metrics::priority_word;
use crate::source::{Priority, ReadContext, SourceError};
use crate::steps::{StepKind, Steps};

/// Longest wait for a free place in the queue of an endpoint. Far above any healthy wait; it bounds
/// the wait of callers without a deadline behind readers that do not read.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(120);
/// Endpoints whose limit is remembered; forgetting one only makes a new, empty queue.
const LANES: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
/// Pieces in which an upload's body is handed to the connection; each one counts as progress.
const BODY_PIECE_BYTES: usize = 64 * 1024;
/// A place in the queue of an endpoint; a reader's requests find one at once.
const QUEUE_STEP: StepKind = StepKind::new("registry queue", Duration::from_secs(30));
/// The head of an answer, connecting included: half of what the scheduler gives an endpoint.
const HEAD_STEP: StepKind = StepKind::new("registry head", Duration::from_secs(5));
/// The next bytes of a body: half of the scheduler's patience.
const BODY_STEP: StepKind = StepKind::new("registry body", Duration::from_secs(5));
/// How much of an error's body is read for its message.
const ERROR_BODY_BYTES: u64 = 16 * 1024;
/// How much of a registry's own words goes into our error.
const DETAIL_CHARS: usize = 200;

/// A request that can be sent any number of times.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// What is asked, for errors.
    pub(super) what: String,
    /// What goes to the endpoint asked, and not along a redirect to another.
    pub(super) own: Own,
}

/// How an endpoint is reached, where that is not as its host is known to be.
#[derive(Clone, Debug, Default)]
pub(super) struct Own {
    /// With its TLS options. `None`: as every host.
    pub(super) client: Option<reqwest::Client>,
    /// Further headers. They may be secret.
    pub(super) headers: HeaderMap,
}

impl Call {
    pub(super) fn new(method: Method, url: Url, what: impl Into<String>) -> Self {
        let mut headers = HeaderMap::new();
        // Bytes must come as they are stored: offsets and digests are of those.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        Call {
            method,
            url,
            headers,
            body: Bytes::new(),
            what: what.into(),
            own: Own::default(),
        }
    }
}

/// The head of an answer, and the right to read its body.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: reqwest::Response,
    pub(super) permit: Permit,
    /// `scheme://host:port` that answered.
    pub(super) endpoint: String,
    /// Where the answer came from, if that is another endpoint than the one asked.
    pub(super) redirected: Option<Url>,
}

impl Answer {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.response
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
    }
}

/// A place among the requests in flight to an endpoint.
#[derive(Debug)]
pub(super) struct Permit {
    _all: OwnedSemaphorePermit,
    _background: Option<OwnedSemaphorePermit>,
}

#[derive(Debug)]
struct Lane {
    all: Arc<Semaphore>,
    background: Arc<Semaphore>,
}

pub(super) struct Transport {
    options: Arc<RegistryOptions>,
    /// For hosts without TLS options of their own.
    common: reqwest::Client,
    /// For this machine's own addresses: never through a proxy.
    local: reqwest::Client,
    /// By the name under which the options were given.
    special: HashMap<String, reqwest::Client>,
    lanes: Mutex<LruCache<String, Arc<Lane>>>,
    steps: Steps,
}

impl Transport {
    pub(super) fn new(options: Arc<RegistryOptions>, steps: Steps) -> Result<Self, RegistryError> {
        let build = |host: &str, builder: reqwest::ClientBuilder| {
            builder
                .build()
                .map_err(|error| RegistryError::Configuration {
                    host: host.to_owned(),
                    problem: describe(&error),
                })
        };
        let common = build("any", base(&options))?;
        let local = build("localhost", base(&options).no_proxy())?;
        let mut special = HashMap::new();
        for (host, wanted) in &options.hosts {
            if wanted.ca_files.is_empty() && !wanted.insecure_skip_verify {
                continue;
            }
            let mut builder =
                base(&options).danger_accept_invalid_certs(wanted.insecure_skip_verify);
            if is_plain_http_default(host) {
                builder = builder.no_proxy();
            }
            for path in &wanted.ca_files {
                let refuse = |problem: String| RegistryError::Configuration {
                    host: host.clone(),
                    problem: format!("CA file {}: {problem}", path.display()),
                };
                let pem = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
                let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                    .map_err(|error| refuse(describe(&error)))?;
                if certificates.is_empty() {
                    return Err(refuse("holds no certificate".into()));
                }
                for certificate in certificates {
                    builder = builder.add_root_certificate(certificate);
                }
            }
            special.insert(host.clone(), build(host, builder)?);
        }
        Ok(Transport {
            options,
            common,
            local,
            special,
            lanes: Mutex::new(LruCache::new(LANES)),
            steps,
        })
    }

    /// Sends `call`, following redirects. `home` is the registry's own endpoint: `authorization` goes
    /// there and nowhere else, and no more once a redirect has led away.
    pub(super) async fn send(
        &self,
        context: &ReadContext,
        call: &Call,
        home: &Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<Answer, RegistryError> {
        let mut url = call.url.clone();
        let mut left_home = false;
        for _ in 0..=MAX_REDIRECTS {
            left_home |= url.origin() != home.origin();
            let header = authorization.filter(|_| !left_home);
            let own = (!left_home).then_some(&call.own);
            let (response, permit) = self.send_once(context, call, &url, header, own).await?;
            let endpoint = endpoint_of(&url);
            let follows = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308)
                && (call.method == Method::GET || call.method == Method::HEAD);
            if !follows {
                let redirected = left_home.then_some(url);
                return Ok(Answer {
                    response,
                    permit,
                    endpoint,
                    redirected,
                });
            }
            let location = response
                .headers()
                .get(LOCATION)
                .and_then(|value| value.to_str().ok());
            url = self.next_url(&url, location)?;
        }
        Err(RegistryError::Redirect {
            endpoint: endpoint_of(home),
            problem: format!("more than {MAX_REDIRECTS} redirects"),
        })
    }

    /// Sends `call` as it is, to its own URL, following nothing.
    pub(super) async fn send_here(
        &self,
        context: &ReadContext,
        call: &Call,
    ) -> Result<Answer, RegistryError> {
        let own = Some(&call.own);
        let (response, permit) = self.send_once(context, call, &call.url, None, own).await?;
        let endpoint = endpoint_of(&call.url);
        Ok(Answer {
            response,
            permit,
            endpoint,
            redirected: None,
        })
    }

    /// Where a `Location` leads, if it may be followed.
    pub(super) fn next_url(
        &self,
        from: &Url,
        location: Option<&str>,
    ) -> Result<Url, RegistryError> {
        let refuse = |problem: &str| RegistryError::Redirect {
            endpoint: endpoint_of(from),
            problem: problem.to_owned(),
        };
        let location = location.ok_or_else(|| refuse("no Location"))?;
        let mut to = from
            .join(location)
            .map_err(|_| refuse("malformed Location"))?;
        if !matches!(to.scheme(), "http" | "https") || to.host_str().is_none() {
            return Err(refuse("neither http nor https"));
        }
        if from.scheme() == "https"
            && to.scheme() == "http"
            && !self.options.is_configured_plain(&host_of(&to))
        {
            return Err(refuse("from https to plain http"));
        }
        // Credentials in a URL would be sent by the HTTP library.
        if to.set_username("").is_err() || to.set_password(None).is_err() {
            return Err(refuse("malformed Location"));
        }
        Ok(to)
    }

    async fn send_once(
        &self,
        context: &ReadContext,
        call: &Call,
        url: &Url,
        authorization: Option<&HeaderValue>,
        own: Option<&Own>,
    ) -> Result<(reqwest::Response, Permit), RegistryError> {
        context.check()?;
        let permit = self.permit(context, url).await?;
        let host = host_of(url);
        let configured = self.options.host(&host);
        let special = configured.and_then(|(name, _)| self.special.get(name));
        let client = match own.and_then(|own| own.client.as_ref()).or(special) {
            Some(client) => client,
            None if is_plain_http_default(&host) => &self.local,
            None => &self.common,
        };
        let progress = Arc::new(AtomicU64::new(0));
        let mut request = client
            .request(call.method.clone(), url.clone())
            .headers(call.headers.clone());
        if let Some(own) = own {
            request = request.headers(own.headers.clone());
        }
        if let Some(value) = authorization {
            request = request.header(AUTHORIZATION, value);
        }
        if call.body.len() > BODY_PIECE_BYTES {
            let pieces = pieces(call.body.clone(), Arc::clone(&progress));
            request = request
                .header(CONTENT_LENGTH, call.body.len())
                .body(reqwest::Body::wrap_stream(pieces));
        } else if !call.body.is_empty() || call.method == Method::PUT || call.method == Method::POST
        {
            request = request
                .header(CONTENT_LENGTH, call.body.len())
                .body(call.body.clone());
        }
        let subject = format!("{} at {}", call.what, endpoint_of(url));
        let whom = priority_word(context.priority);
        let step = self.steps.enter(HEAD_STEP, whom, subject);
        let answer = self.head(request.send(), &progress);
        let answer = context.bound(answer).await;
        drop(step);
        match answer? {
            Some(Ok(response)) => Ok((response, permit)),
            Some(Err(error)) => Err(connect_error(endpoint_of(url), &error)),
            None => Err(RegistryError::NoAnswer {
                endpoint: endpoint_of(url),
                what: call.what.clone(),
                after: self.options.header_timeout,
            }),
        }
    }

    /// Waits for the head of an answer as long as the request's body makes progress; `None` = too late.
    async fn head<T>(&self, answer: impl Future<Output = T>, progress: &AtomicU64) -> Option<T> {
        let mut answer = std::pin::pin!(answer);
        let mut seen = 0;
        loop {
            match tokio::time::timeout(self.options.header_timeout, &mut answer).await {
                Ok(answer) => return Some(answer),
                Err(_) => {
                    let sent = progress.load(Ordering::Relaxed);
                    if sent == seen {
                        return None;
                    }
                    seen = sent;
                }
            }
        }
    }

    async fn permit(&self, context: &ReadContext, url: &Url) -> Result<Permit, RegistryError> {
        let endpoint = endpoint_of(url);
        let lane = self.lane(&endpoint, &host_of(url));
        let acquire = async {
            let background = match context.priority {
                Priority::Background => Some(Arc::clone(&lane.background).acquire_owned().await?),
                Priority::Foreground | Priority::Boot => None,
            };
            let all = Arc::clone(&lane.all).acquire_owned().await?;
            Ok::<_, tokio::sync::AcquireError>(Permit {
                _all: all,
                _background: background,
            })
        };
        // Background requests stand in line for as long as there is other work.
        let _step = (context.priority != Priority::Background).then(|| {
            let whom = priority_word(context.priority);
            self.steps.enter(QUEUE_STEP, whom, endpoint.clone())
        });
        match context
            .bound(tokio::time::timeout(QUEUE_TIMEOUT, acquire))
            .await?
        {
            Ok(Ok(permit)) => Ok(permit),
            // A semaphore that nobody closes.
            Ok(Err(_)) => Err(RegistryError::Cancelled),
            Err(_) => Err(RegistryError::NoAnswer {
                endpoint,
                what: "a free place among the requests in flight".into(),
                after: QUEUE_TIMEOUT,
            }),
        }
    }

    fn lane(&self, endpoint: &str, host: &str) -> Arc<Lane> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = lanes.get_or_insert(endpoint.to_owned(), || {
            let configured = self.options.host(host);
            let configured = configured.and_then(|(_, options)| options.max_in_flight);
            let all = configured
                .unwrap_or(self.options.max_in_flight)
                .clamp(1, 1024);
            let background = all.saturating_sub(self.options.kept_for_readers).max(1);
            Arc::new(Lane {
                all: Arc::new(Semaphore::new(all)),
                background: Arc::new(Semaphore::new(background)),
            })
        });
        Arc::clone(lane)
    }

    /// Reads a body of at most `cap_bytes` into memory.
    pub(super) async fn read_body(
        &self,
        context: &ReadContext,
        answer: Answer,
        cap_bytes: u64,
        what: &str,
    ) -> Result<Bytes, RegistryError> {
        let too_large = || RegistryError::TooLarge {
            what: what.to_owned(),
            limit_bytes: cap_bytes,
        };
        let cap = usize::try_from(cap_bytes).unwrap_or(usize::MAX);
        let announced = answer.response.content_length();
        if announced.is_some_and(|length| length > cap_bytes) {
            return Err(too_large());
        }
        let mut all = BytesMut::new();
        let mut body = std::pin::pin!(self.body(context, answer, 0, announced.unwrap_or(0)));
        while let Some(piece) = body.next().await {
            let piece = piece?;
            if all.len().saturating_add(piece.len()) > cap {
                return Err(too_large());
            }
            all.extend_from_slice(&piece);
        }
        Ok(all.freeze())
    }

    /// The body as a stream that ends with an error when it stalls, breaks, or the caller leaves.
    /// `start` and `end` place it in the blob, for errors.
    pub(super) fn body(
        &self,
        context: &ReadContext,
        answer: Answer,
        start: u64,
        end: u64,
    ) -> impl Stream<Item = Result<Bytes, SourceError>> + Send + use<> {
        self.body_within(context, answer, start, end, self.options.stall_timeout)
    }

    /// As [`Self::body`], with a time-out of its own for stalls.
    pub(super) fn body_within(
        &self,
        context: &ReadContext,
        answer: Answer,
        start: u64,
        end: u64,
        stall: Duration,
    ) -> impl Stream<Item = Result<Bytes, SourceError>> + Send + use<> {
        let Answer {
            response,
            permit,
            endpoint,
            ..
        } = answer;
        let body = Box::pin(response.bytes_stream());
        let whom = priority_word(context.priority);
        let subject = format!("bytes {start}..{end} from {endpoint}");
        let step = self.steps.enter(BODY_STEP, whom, subject);
        step.rest();
        let state = (body, (permit, step), context.clone(), start);
        stream::try_unfold(state, move |(mut body, held, context, at)| async move {
            held.1.begin();
            let next = context.bound(tokio::time::timeout(stall, body.next()));
            let next = next.await;
            // Who reads no further does not wait for the registry.
            held.1.rest();
            match next? {
                Err(_) => Err(SourceError::Stalled {
                    after: stall,
                    offset: at,
                }),
                Ok(None) => Ok(None),
                Ok(Some(Err(error))) => Err(SourceError::Interrupted {
                    offset: at,
                    expected_end: end,
                    reason: describe(&error),
                }),
                Ok(Some(Ok(piece))) => {
                    let after = at.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
                    Ok(Some((piece, (body, held, context, after))))
                }
            }
        })
    }

    /// Passes an answer whose status is among `accepted`, turns any other into its error.
    pub(super) async fn accept(
        &self,
        context: &ReadContext,
        answer: Answer,
        accepted: &[u16],
        what: &str,
    ) -> Result<Answer, RegistryError> {
        let status = answer.status().as_u16();
        if accepted.contains(&status) {
            return Ok(answer);
        }
        let (endpoint, what) = (answer.endpoint.clone(), what.to_owned());
        let retry_after = answer
            .response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| parse_retry_after(value, SystemTime::now()));
        match status {
            404 => Err(RegistryError::NotFound { endpoint, what }),
            429 => Err(RegistryError::Throttled {
                endpoint,
                what,
                retry_after,
            }),
            408 | 500..=599 if status != 501 => Err(RegistryError::Unavailable {
                endpoint,
                what,
                status,
                retry_after,
            }),
            401 | 403 => Err(RegistryError::Denied {
                endpoint,
                what,
                status,
                credentials: "by the target of a redirect".into(),
            }),
            _ => {
                let detail = match self
                    .read_body(context, answer, ERROR_BODY_BYTES, "error")
                    .await
                {
                    Ok(body) => detail_of(&body),
                    Err(RegistryError::Cancelled) => return Err(RegistryError::Cancelled),
                    Err(_) => String::new(),
                };
                Err(RegistryError::Refused {
                    endpoint,
                    what,
                    status,
                    detail,
                })
            }
        }
    }
}

/// What all clients have in common.
pub(super) fn base(options: &RegistryOptions) -> reqwest::ClientBuilder {
    let rules = options.proxies.clone();
    reqwest::Client::builder()
        // Ours instead of the library's reading of the environment.
        .no_proxy()
        .proxy(reqwest::Proxy::custom(move |url| {
            rules.proxy_for(url).cloned()
        }))
        // A body that is not read (background, while a reader receives) keeps its window of an HTTP/2
        // connection full, and with it the readers' bodies that share the connection. Over HTTP/1.1
        // each body has a connection of its own.
        .http1_only()
        .user_agent(options.user_agent.clone())
        .redirect(redirect::Policy::none())
        .connect_timeout(options.connect_timeout)
        .pool_idle_timeout(Duration::from_secs(60))
        .tcp_nodelay(true)
        .referer(false)
}

/// A body in pieces; `progress` counts those taken by the connection.
fn pieces(
    body: Bytes,
    progress: Arc<AtomicU64>,
) -> impl Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static {
    stream::unfold(body, move |mut rest| {
        let progress = Arc::clone(&progress);
        async move {
            if rest.is_empty() {
                return None;
            }
            let piece = rest.split_to(BODY_PIECE_BYTES.min(rest.len()));
            progress.fetch_add(1, Ordering::Relaxed);
            Some((Ok(piece), rest))
        }
    })
}

/// `scheme://host[:port]`, all of a URL that may be shown.
pub(super) fn endpoint_of(url: &Url) -> String {
    url.origin().ascii_serialization()
}

/// `host[:port]` as configuration writes it; the default port is left out.
pub(super) fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn connect_error(endpoint: String, error: &reqwest::Error) -> RegistryError {
    let reason = describe(error);
    // The TLS library's own words; a wrong certificate does not pass with time.
    if reason.contains("invalid peer certificate") {
        return RegistryError::Certificate { endpoint, reason };
    }
    RegistryError::Connect { endpoint, reason }
}

/// The error and its causes, without the URL (its query may hold a signature).
pub(super) fn describe(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(present) = cause {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&present.to_string());
        cause = present.source();
    }
    if text.is_empty() {
        "request failed".to_owned()
    } else {
        text
    }
}

/// `Retry-After` in seconds or as an HTTP date (RFC 9110, section 10.2.3); a date gone by is zero.
pub(super) fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// The registry's own words: the first error of the specification's error body, shortened.
fn detail_of(body: &[u8]) -> String {
    let text = |value: &serde_json::Value, key: &str| value[key].as_str().unwrap_or("").to_owned();
    let Ok(body) = serde_json::from_slice::<serde_json::Value>(body) else {
        return String::new();
    };
    let first = &body["errors"][0];
    let words = format!("{} {}", text(first, "code"), text(first, "message"));
    let words: String = words
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(DETAIL_CHARS)
        .collect();
    if words.is_empty() {
        words
    } else {
        format!(": {words}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let cases = [
            ("0", Some(0)),
            (" 17 ", Some(17)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Some(0)),
            ("-1", None),
            ("soon", None),
        ];
        for (value, seconds) in cases {
            assert_eq!(
                parse_retry_after(value, now),
                seconds.map(Duration::from_secs),
                "{value}"
            );
        }
    }

    #[test]
    fn error_bodies_are_shortened() {
        let body = br#"{"errors":[{"code":"DIGEST_INVALID","message":"no\nmatch"}]}"#;
        assert_eq!(detail_of(body), ": DIGEST_INVALID nomatch");
        assert_eq!(detail_of(b"<html>"), "");
        assert_eq!(detail_of(b"{}"), "");
    }

    #[test]
    fn redirects_keep_to_the_rules() {
        let mut options = RegistryOptions::default();
        options.host_mut("plain.example").plain_http = Some(true);
        let transport = Transport::new(Arc::new(options), Steps::new()).unwrap();
        let cases = [
            ("https://a.example/x", Some("/y"), Ok("https://a.example/y")),
            (
                "https://a.example/x",
                Some("https://b.example/y?s=1"),
                Ok("https://b.example/y?s=1"),
            ),
            (
                "https://a.example/x",
                Some("http://b.example/y"),
                Err("from https to plain http"),
            ),
            (
                "https://a.example/x",
                Some("http://localhost/y"),
                Err("from https to plain http"),
            ),
            (
                "https://a.example/x",
                Some("http://plain.example/y"),
                Ok("http://plain.example/y"),
            ),
            (
                "http://a.example/x",
                Some("http://b.example/y"),
                Ok("http://b.example/y"),
            ),
            (
                "https://a.example/x",
                Some("file:///etc/passwd"),
                Err("neither http nor https"),
            ),
            (
                "https://a.example/x",
                Some("https://u:p@b.example/y"),
                Ok("https://b.example/y"),
            ),
            ("https://a.example/x", None, Err("no Location")),
        ];
        for (from, location, expected) in cases {
            let got = transport.next_url(&Url::parse(from).unwrap(), location);
            match (got, expected) {
                (Ok(url), Ok(expected)) => assert_eq!(url.as_str(), expected),
                (Err(RegistryError::Redirect { problem, .. }), Err(expected)) => {
                    assert_eq!(problem, expected);
                }
                (got, expected) => panic!("{from} -> {location:?}: {got:?}, expected {expected:?}"),
            }
        }
    }
    #[tokio::test]
    async fn no_connection_is_shared_by_bodies() {
        use tokio::io::AsyncReadExt as _;
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0))
            .await
            .unwrap();
        let port = listener.local_addr().unwrap().port();
        let greeting = async {
            let (mut connection, _) = listener.accept().await.unwrap();
            let mut hello = vec![0; 4096];
            let count = connection.read(&mut hello).await.unwrap();
            hello.truncate(count);
            hello
        };
        let client = base(&RegistryOptions::default())
            .no_proxy()
            .build()
            .unwrap();
        let request = client.get(format!("https://127.0.0.1:{port}/")).send();
        let (hello, answer) = tokio::join!(greeting, request);
        assert!(answer.is_err());
        // The names of protocols in the greeting of TLS: none, or HTTP/1.1 alone.
        let offers = |name: &[u8]| hello.windows(name.len()).any(|it| it == name);
        assert!(
            hello.starts_with(&[0x16, 3]) && !offers(b"\x02h2"),
            "{hello:?}"
        );
    }
}
