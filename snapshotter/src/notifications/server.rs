// SPDX-License-Identifier: Apache-2.0
//! The address that registries send notifications to.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::post;
use sha2::{Digest as _, Sha256};
use sluice_fetcher::cluster::node::{Role, View};
use sluice_fetcher::registry::ImageReference;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::event::{Told, read};
use super::{NotificationMetrics, NotificationOptions};
use crate::listen::listen;
use crate::prewarm::{Prewarms, Scope};
use crate::snapshots::BlobOrigin;
use crate::trust::Trust;

/// The most bytes of a body.
pub const BODY_MAX_BYTES: usize = 1 << 20;
/// How long a body may take to come.
const BODY_DEADLINE: Duration = Duration::from_secs(10);
/// Requests that are answered at once.
const REQUESTS: usize = 16;
/// The shortest token that counts as one.
const TOKEN_MIN_BYTES: usize = 16;
/// The longest.
const TOKEN_MAX_BYTES: usize = 4096;

/// Why notifications cannot be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiverError {
    /// The token's file cannot be read.
    #[error("read notifications.token {path:?}: {source}")]
    Token {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It holds no token, or everybody may read it.
    #[error("notifications.token {path:?}: {problem}")]
    Unfit {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// The digest of a token, which is all that is kept of it.
#[derive(Clone, Copy)]
struct Token([u8; 32]);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    fn of(text: &[u8]) -> Self {
        Self(Sha256::digest(text).into())
    }

    /// Reads the file. Blocks.
    fn read(path: &Path) -> Result<Self, ReceiverError> {
        let failed = |source| ReceiverError::Token {
            path: path.to_owned(),
            source,
        };
        let unfit = |problem: String| ReceiverError::Unfit {
            path: path.to_owned(),
            problem,
        };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if metadata.permissions().mode() & 0o007 != 0 {
            return Err(unfit("others may read it: want mode 0600".to_owned()));
        }
        let text = std::fs::read(path).map_err(failed)?;
        let text = text.trim_ascii();
        match text.len() {
            TOKEN_MIN_BYTES..=TOKEN_MAX_BYTES => Ok(Self::of(text)),
            bytes => Err(unfit(format!(
                "{bytes} bytes, want {TOKEN_MIN_BYTES} to {TOKEN_MAX_BYTES}"
            ))),
        }
    }

    /// In a time that does not depend on how much of it is right: digests are compared, all of their bytes.
    fn is(self, shown: &[u8]) -> bool {
        let shown = Self::of(shown);
        let differ = self.0.iter().zip(shown.0);
        differ.fold(0, |all, (left, right)| all | (left ^ right)) == 0
    }
}

/// Takes notifications.
#[derive(Clone, Debug)]
pub struct Receiver(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    options: NotificationOptions,
    token: Token,
    prewarms: Prewarms,
    trust: Trust,
    cluster: Option<watch::Receiver<Arc<View>>>,
    metrics: NotificationMetrics,
    turns: tokio::sync::Semaphore,
}

impl Receiver {
    /// Reads the token, once: a new one counts after a restart. Blocks.
    ///
    /// **Errors** [`ReceiverError`].
    pub fn new(
        options: NotificationOptions,
        prewarms: Prewarms,
        trust: Trust,
        cluster: Option<watch::Receiver<Arc<View>>>,
        metrics: NotificationMetrics,
    ) -> Result<Self, ReceiverError> {
        Ok(Self(Arc::new(Parts {
            token: Token::read(&options.token)?,
            options,
            prewarms,
            trust,
            cluster,
            metrics,
            turns: tokio::sync::Semaphore::new(REQUESTS),
        })))
    }

    /// Serves until told to stop, as soon as the address can be had.
    pub async fn serve(self, stop: CancellationToken) {
        let address = self.0.options.listen;
        let listening = listen(address, "notifications", |_| {});
        if let Some(listener) = stop.run_until_cancelled(listening).await {
            self.serve_on(listener, stop).await;
        }
    }

    pub(super) async fn serve_on(self, listener: TcpListener, stop: CancellationToken) {
        let router = axum::Router::new()
            .route("/notifications", post(take))
            .with_state(self);
        let served = axum::serve(listener, router);
        // Connections that are open do not hold a stop up: events are sent again.
        let served = stop.run_until_cancelled(served.into_future()).await;
        if let Some(Err(error)) = served {
            tracing::error!("notifications ended: {error}");
        }
    }

    fn is_let_in(&self, headers: &HeaderMap) -> bool {
        let value = headers.get(header::AUTHORIZATION).map(|it| it.as_bytes());
        // Harbor sends what it is given, distribution what its configuration says.
        let shown = value.map(|it| it.strip_prefix(b"Bearer ").unwrap_or(it));
        shown.is_some_and(|shown| self.0.token.is(shown.trim_ascii()))
    }

    /// Whether this node brings what was pushed.
    fn acts(&self) -> bool {
        let view = self.0.cluster.as_ref().map(watch::Receiver::borrow);
        self.0.options.prewarm || view.is_some_and(|it| it.me.role == Role::Supernode)
    }

    /// What becomes of an event; an error is for the registry to send it again.
    fn act(&self, told: Told) -> Result<&'static str, String> {
        let image: ImageReference = match told {
            Told::Image(image) => image,
            Told::Nothing(word) => return Ok(word),
            Told::Malformed(problem) => {
                tracing::info!("pass over a notification: {problem}");
                return Ok("malformed");
            }
        };
        let origin = BlobOrigin::from(image.place());
        if !self.0.trust.allows(&origin) {
            tracing::info!(%image, "pass over a notification: [trust] lazy does not allow it");
            return Ok("untrusted");
        }
        if !self.acts() {
            return Ok("not_supernode");
        }
        // Detached: nobody watches it but the log and `sluice prewarm` of the same image.
        match self.0.prewarms.start(image, Scope::Full, true) {
            Ok(watching) => drop(watching),
            Err(refused) => return Err(refused.to_string()),
        }
        Ok("prewarmed")
    }

    async fn answer(&self, headers: &HeaderMap, body: Body) -> (StatusCode, String) {
        let metrics = &self.0.metrics;
        if !self.is_let_in(headers) {
            metrics.count("denied");
            return (StatusCode::UNAUTHORIZED, "no valid token\n".to_owned());
        }
        let Ok(_turn) = self.0.turns.try_acquire() else {
            metrics.count("busy");
            return (StatusCode::SERVICE_UNAVAILABLE, "busy\n".to_owned());
        };
        let body = axum::body::to_bytes(body, BODY_MAX_BYTES);
        let body = match tokio::time::timeout(BODY_DEADLINE, body).await {
            Ok(Ok(body)) => body,
            Ok(Err(_)) => {
                metrics.count("malformed");
                let text = format!("more than {BODY_MAX_BYTES} bytes, or cut off\n");
                return (StatusCode::PAYLOAD_TOO_LARGE, text);
            }
            Err(_) => {
                metrics.count("malformed");
                return (StatusCode::REQUEST_TIMEOUT, "too slow\n".to_owned());
            }
        };
        let told = match read(&body, &self.0.options.hosts) {
            Ok(told) => told,
            Err(problem) => {
                metrics.count("malformed");
                return (StatusCode::BAD_REQUEST, format!("{problem}\n"));
            }
        };
        let mut refused = None;
        for event in told {
            match self.act(event) {
                Ok(word) => metrics.count(word),
                Err(error) => {
                    metrics.count("busy");
                    refused = Some(error);
                }
            }
        }
        match refused {
            // What was begun is joined when the body comes again.
            Some(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
            None => (StatusCode::OK, String::new()),
        }
    }
}

async fn take(
    State(receiver): State<Receiver>,
    headers: HeaderMap,
    body: Body,
) -> (StatusCode, String) {
    receiver.answer(&headers, body).await
}

#[cfg(test)]
mod tests;
