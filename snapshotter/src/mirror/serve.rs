// SPDX-License-Identifier: Apache-2.0
//! Connections of clients, and their bounds.
//!
//! **Bounds** connections: [`CONNECTIONS`], further ones wait in the kernel's queue; a head of a request:
//! [`HEAD_BYTES`] within [`HEAD_PATIENCE`]; an answer that is not taken: [`STALL`]. HTTP/1.1, as every
//! registry client speaks it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::Mirror;
use super::stall::Stalling;
use crate::listen::listen;

/// Connections at a time. A client opens up to some ten for one image.
const CONNECTIONS: usize = 512;
/// The longest head of a request: an `Authorization` of 16 KiB and the rest.
const HEAD_BYTES: usize = 32 << 10;
/// How long a client takes to send one, and to think of the next request on a connection.
const HEAD_PATIENCE: Duration = Duration::from_secs(60);
/// How long a client may take nothing of an answer: longer than one waits for a slow disk.
const STALL: Duration = Duration::from_secs(60);
/// After an accept that failed for want of something, such as descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long answers under way may go on when the daemon stops: a client repeats or resumes what is cut.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// Serves until the daemon stops, as soon as the address can be had: a port that somebody else holds must
/// not keep containers from starting.
pub async fn serve_at(mirror: Mirror) {
    let address = mirror.address();
    let stop = mirror.shared.stop.clone();
    let listening = listen(address, "pulls", |error| {
        mirror.set_state(false, &format!("listen at {address}: {error}"));
    });
    let Some(listener) = stop.run_until_cancelled(listening).await else {
        return;
    };
    tracing::info!(%address, "serving pulls as a mirror");
    mirror.set_state(true, "");
    serve(&mirror, listener).await;
    mirror.set_state(false, "the daemon stops");
    mirror.stop().await;
}

/// Serves on a listener until the daemon stops.
pub(super) async fn serve(mirror: &Mirror, listener: TcpListener) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let tasks = TaskTracker::new();
    let stop = mirror.shared.stop.clone();
    loop {
        let next = async {
            // Never closed.
            let permit = Arc::clone(&connections).acquire_owned().await.ok();
            (listener.accept().await, permit)
        };
        let Some((accepted, permit)) = stop.run_until_cancelled(next).await else {
            break;
        };
        match accepted {
            Ok((stream, _)) => {
                let mirror = mirror.clone();
                tasks.spawn(async move {
                    let _permit = permit;
                    connection(mirror, stream).await;
                });
            }
            Err(error) => {
                tracing::warn!("failed to accept a client's connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

async fn connection(mirror: Mirror, stream: TcpStream) {
    let stop = mirror.shared.stop.clone();
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(Stalling::new(stream, STALL));
    let service = service_fn(move |request: Request<Incoming>| {
        let mirror = mirror.clone();
        // No request that is answered has a body; one that comes is not read.
        let (head, _) = request.into_parts();
        async move { Ok::<_, Infallible>(mirror.answer(Request::from_parts(head, ())).await) }
    });
    let mut served = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_PATIENCE)
            .max_buf_size(HEAD_BYTES)
            .serve_connection(io, service)
    );
    let ended = tokio::select! {
        ended = &mut served => Some(ended),
        () = stop.cancelled() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            served.as_mut().graceful_shutdown();
            match tokio::time::timeout(STOP_PATIENCE, served).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a client's connection ended: {error}");
    }
}
