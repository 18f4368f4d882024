// SPDX-License-Identifier: Apache-2.0
//! `/metrics` in Prometheus' text format and `/healthz`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::listen::listen;

/// Whether the daemon answers containerd; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<AtomicBool>);

impl Health {
    /// Says whether it does.
    pub fn set(&self, serving: bool) {
        self.0.store(serving, Ordering::Relaxed);
    }
}

/// Serves at an address until told to stop, as soon as the address can be had: a port that somebody
/// else holds must not keep containers from starting.
pub async fn serve_at(
    address: SocketAddr,
    registry: Arc<Registry>,
    health: Health,
    stop: CancellationToken,
) -> io::Result<()> {
    let listening = listen(address, "telemetry", |_| {});
    let Some(listener) = stop.run_until_cancelled(listening).await else {
        return Ok(());
    };
    serve(listener, registry, health, stop).await
}

/// Serves until told to stop.
async fn serve(
    listener: TcpListener,
    registry: Arc<Registry>,
    health: Health,
    stop: CancellationToken,
) -> io::Result<()> {
    let router = axum::Router::new()
        .route("/metrics", get(metrics).with_state(registry))
        .route("/healthz", get(healthz).with_state(health));
    axum::serve(listener, router)
        .with_graceful_shutdown(async move { stop.cancelled().await })
        .await
}

async fn metrics(State(registry): State<Arc<Registry>>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn healthz(State(health): State<Health>) -> (StatusCode, &'static str) {
    if health.0.load(Ordering::Relaxed) {
        (StatusCode::OK, "serving\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not serving\n")
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;
    use crate::telemetry::{PrepareOutcome, SnapshotMetrics};

    #[tokio::test]
    async fn metrics_and_health_over_http() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut registry = Registry::default();
        let metrics = SnapshotMetrics::register(&mut registry);
        let (health, stop) = (Health::default(), CancellationToken::new());
        let server = tokio::spawn(serve(
            listener,
            Arc::new(registry),
            health.clone(),
            stop.clone(),
        ));
        let get = |path: &'static str| async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        assert!(get("/healthz").await.starts_with("HTTP/1.1 503"));
        health.set(true);
        assert!(get("/healthz").await.starts_with("HTTP/1.1 200"));
        metrics.prepared(PrepareOutcome::Lazy);
        metrics.requested("Stat", "Ok".into(), std::time::Duration::from_millis(3));
        let text = get("/metrics").await;
        for line in [
            "sluice_prepares_total{outcome=\"Lazy\"} 1",
            "sluice_snapshots_requests_total{method=\"Stat\",code=\"Ok\"} 1",
            "sluice_snapshots_request_seconds_bucket{le=\"0.005\",method=\"Stat\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        assert!(get("/other").await.starts_with("HTTP/1.1 404"));
        stop.cancel();
        server.await.unwrap().unwrap();
    }
}
