// SPDX-License-Identifier: Apache-2.0
//! One connection of a worker: Hello, answers to our calls, fills.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sluice_fetcher::scheduler::Filled;
use sluice_proto::shim as wire;
use sluice_proto::shim::envelope::Body;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::{FillRequest, FillService, ListedMount, Presence, Shared, ShimPeer};
use crate::mount::MountSpec;
use crate::mount::errno::FillErrno;
use crate::shim::protocol::{self, ProtocolError, Unframer};
use crate::shim::{OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION};

/// A fill that ends by its own deadline is not to be cut off by ours, which began a moment before.
const OVERRUN: Duration = Duration::from_secs(1);

/// Takes connections for as long as the client lives. Each runs in a task of its own; a newer Hello
/// replaces an older connection.
pub(super) async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve(stream, shared.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "accept a shim connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
        }
    }
}

async fn serve(stream: UnixStream, shared: Arc<Shared>) {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw() => {}
        other => {
            tracing::warn!(?other, "refuse a shim connection of another user");
            return;
        }
    }
    let (reader, writer) = stream.into_split();
    let (outgoing, queue) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    tasks.spawn(write_all(writer, queue));
    let mut connection = Connection {
        shared: shared.clone(),
        outgoing,
        unframer: Unframer::default(),
        tasks,
    };
    if let Err(error) = connection.run(reader).await {
        tracing::warn!(%error, "shim connection ends");
    }
    connection.detach();
}

/// Writes what is queued. The queue is unbounded in form; its length is bounded by our own calls and
/// by the fills that the worker waits for, each of which gets one answer, with bytes only where the store keeps
/// nothing.
async fn write_all(mut writer: OwnedWriteHalf, mut queue: mpsc::UnboundedReceiver<Vec<u8>>) {
    while let Some(bytes) = queue.recv().await {
        if let Err(error) = writer.write_all(&bytes).await {
            tracing::debug!(%error, "write to the shim");
            return;
        }
    }
}

struct Connection {
    shared: Arc<Shared>,
    outgoing: mpsc::UnboundedSender<Vec<u8>>,
    unframer: Unframer,
    /// Writer and fills of this connection; they end with it.
    tasks: JoinSet<()>,
}

impl Connection {
    async fn run(&mut self, mut reader: OwnedReadHalf) -> Result<(), ProtocolError> {
        let mut buffer = vec![0u8; 64 * 1024];
        loop {
            let count = match reader.read(&mut buffer).await {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) => {
                    tracing::debug!(%error, "read from the shim");
                    return Ok(());
                }
            };
            self.unframer.push(&buffer[..count]);
            while let Some(envelope) = self.unframer.take()? {
                self.take(envelope)?;
            }
            while self.tasks.try_join_next().is_some() {}
        }
    }

    fn take(&mut self, envelope: wire::Envelope) -> Result<(), ProtocolError> {
        let id = envelope.id;
        match envelope.body {
            Some(Body::Hello(hello)) => self.greet(id, hello),
            Some(Body::Fill(fill)) => self.fill(id, fill)?,
            Some(
                answer @ (Body::MountReply(_)
                | Body::UnmountReply(_)
                | Body::ListReply(_)
                | Body::CheckReply(_)
                | Body::ReadsReply(_)
                | Body::UpgradeReply(_)
                | Body::WatchReply(_)
                | Body::UnwatchReply(_)
                | Body::WatchesReply(_)
                | Body::StepsReply(_)
                | Body::ShutdownReply(_)),
            ) => {
                // A call that gave up has taken its waiter away.
                if let Some(waiter) = self.shared.state().waiting.remove(&id) {
                    let _gone = waiter.send(answer);
                }
            }
            // What a newer worker may add. Requests that only we send are as meaningless.
            None
            | Some(
                Body::HelloReply(_)
                | Body::FillReply(_)
                | Body::Mount(_)
                | Body::Unmount(_)
                | Body::List(_)
                | Body::Check(_)
                | Body::Reads(_)
                | Body::Upgrade(_)
                | Body::Watch(_)
                | Body::Unwatch(_)
                | Body::Watches(_)
                | Body::Steps(_)
                | Body::Shutdown(_),
            ) => tracing::debug!(id, "ignore a message that is not for us"),
        }
        Ok(())
    }

    /// Makes this the current connection.
    fn greet(&mut self, id: u64, hello: wire::Hello) {
        let theirs = (hello.oldest_version, hello.version);
        let common = protocol::common_version(
            OLDEST_PROTOCOL_VERSION..=PROTOCOL_VERSION,
            theirs.0..=theirs.1,
        );
        let Some(version) = common else {
            tracing::error!(?theirs, "the running shim speaks another protocol version");
            let error = format!(
                "this daemon speaks versions {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"
            );
            self.answer(id, Body::HelloReply(wire::HelloReply { version: 0, error }));
            self.shared
                .current
                .send_replace(Presence::WrongVersion(theirs.0, theirs.1));
            return;
        };
        self.answer(
            id,
            Body::HelloReply(wire::HelloReply {
                version,
                error: String::new(),
            }),
        );
        let peer = ShimPeer {
            version,
            build: hello.build,
            program: hello.program,
            worker_pid: hello.worker_pid,
            holder_pid: hello.holder_pid,
            mounts: hello.mounts,
        };
        tracing::info!(
            worker = peer.worker_pid,
            holder = peer.holder_pid,
            mounts = peer.mounts,
            "shim attached"
        );
        {
            let mut state = self.shared.state();
            state.waiting.clear(); // their calls send again, to us
            state.outgoing = Some(self.outgoing.clone());
        }
        self.shared.current.send_replace(Presence::Attached(peer));
    }

    fn fill(&mut self, id: u64, fill: wire::Fill) -> Result<(), ProtocolError> {
        let bad = |field| ProtocolError::BadField { field };
        let request = FillRequest {
            diff_id: fill.diff_id.parse().map_err(|_| bad("diff_id"))?,
            index_digest: fill.index_digest.parse().map_err(|_| bad("index_digest"))?,
            extent: protocol::fill_extent(&fill)?,
            deadline: protocol::deadline_from_wire(fill.deadline_ms),
            takes_bytes: fill.takes_bytes,
        };
        let shared = self.shared.clone();
        let outgoing = self.outgoing.clone();
        self.tasks.spawn(async move {
            let reply = match run_fill(&shared.permits, shared.fills.as_ref(), request).await {
                Ok(Filled::Present) => wire::FillReply::default(),
                Ok(Filled::Passed(bytes)) => wire::FillReply {
                    bytes,
                    ..wire::FillReply::default()
                },
                Err(failure) => wire::FillReply {
                    errno: failure.number().unsigned_abs(),
                    error: format!("{failure:?}"),
                    bytes: Bytes::new(),
                },
            };
            let _gone = outgoing.send(protocol::frame(id, Body::FillReply(reply)));
        });
        Ok(())
    }

    fn answer(&self, id: u64, body: Body) {
        // Fails only when the writer is gone, and then the reader sees the end too.
        let _gone = self.outgoing.send(protocol::frame(id, body));
    }

    /// Gives the place up, unless a newer connection has it.
    fn detach(&self) {
        let mut state = self.shared.state();
        let ours = state
            .outgoing
            .as_ref()
            .is_some_and(|o| o.same_channel(&self.outgoing));
        if ours {
            state.outgoing = None;
            state.waiting.clear();
            self.shared.current.send_replace(Presence::Absent);
        } else if matches!(*self.shared.current.borrow(), Presence::WrongVersion(..)) {
            drop(state);
            self.shared.current.send_replace(Presence::Absent);
        }
    }
}

/// The service keeps the reader's deadline and says why nothing came; the worker keeps it, too, so nobody waits for what
/// is left over here: a bound for a service that hangs.
async fn run_fill(
    permits: &Semaphore,
    fills: &dyn FillService,
    request: FillRequest,
) -> Result<Filled, FillErrno> {
    let (deadline, subject) = (request.deadline, request.clone());
    let filled = async {
        // Closed never: the semaphore lives as long as the client.
        let _permit = permits.acquire().await.map_err(|_| FillErrno::Io)?;
        fills.fill(request).await
    };
    match deadline {
        Some(deadline) => tokio::time::timeout(deadline + OVERRUN, filled)
            .await
            .unwrap_or_else(|_| {
                tracing::error!(
                    diff_id = %subject.diff_id, extent = %subject.extent,
                    "a fill did not end within {deadline:?}, nor soon after"
                );
                Err(FillErrno::Deadline)
            }),
        None => filled.await,
    }
}

/// Mounts as the wire has them; one that we cannot read is left out and logged.
pub(super) fn listed(mounts: Vec<wire::ListedMount>) -> Vec<ListedMount> {
    let mut listed = Vec::with_capacity(mounts.len());
    for wire::ListedMount { mount, leaving } in mounts {
        let mount = mount.unwrap_or_default();
        let key = mount.key.clone();
        match MountSpec::try_from(mount) {
            Ok(spec) => listed.push(ListedMount { spec, leaving }),
            Err(error) => {
                tracing::error!(%key, %error, "the shim names a mount that we cannot read");
            }
        }
    }
    listed
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use sluice_blockindex::extent::Extent;
    use tokio::time::Instant;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(15);

    /// Begins to count a little later than who asks, as a service on a busy machine does.
    #[derive(Debug)]
    struct Late {
        hangs: bool,
    }

    #[async_trait]
    impl FillService for Late {
        async fn fill(&self, request: FillRequest) -> Result<Filled, FillErrno> {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if self.hangs {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(request.deadline.unwrap()).await;
            // Told apart from a fill that was cut off.
            Err(FillErrno::NoSpace)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_fill_tells_of_its_deadline_itself_unless_it_hangs() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let request = FillRequest {
            diff_id: digest.parse().unwrap(),
            index_digest: digest.parse().unwrap(),
            extent: Extent::new(0, 1).unwrap(),
            deadline: Some(DEADLINE),
            takes_bytes: false,
        };
        let permits = Semaphore::new(1);
        for (hangs, expected) in [(false, FillErrno::NoSpace), (true, FillErrno::Deadline)] {
            let began = Instant::now();
            let filled = run_fill(&permits, &Late { hangs }, request.clone()).await;
            assert_eq!(filled.unwrap_err(), expected);
            assert!(began.elapsed() <= DEADLINE + OVERRUN, "{hangs}");
        }
    }
}
