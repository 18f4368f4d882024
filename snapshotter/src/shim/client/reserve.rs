// SPDX-License-Identifier: Apache-2.0
//! The daemon's duplicates of what the holder keeps: worker and holder may die at the same moment.
//!
//! A worker that attaches hands all of it over, and from then on each change. When there is no shim any more, the
//! next holder is given what is here. Where systemd runs the daemon, each descriptor stands in its store as well
//! ([`FdStore`]) and comes back with the next daemon: then all three may die.
//!
//! **Lifecycle** a thread that accepts, and one for each worker; the newest worker's word counts. They end
//! with [`Keeping`].

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use prost::Message as _;
use sluice_proto::shim as wire;
use sluice_proto::shim::holder_packet::Body;

use crate::shim::holder::{Entries, hand_over, packet};
use crate::sys::fdpass::{PacketListener, PacketSocket};
use crate::sys::fdstore::{FdStore, Stored};

/// What is kept.
#[derive(Debug, Default)]
pub struct Reserve {
    table: Mutex<Table>,
    store: FdStore,
    kept: Gauge,
}

#[derive(Debug, Default)]
struct Table {
    entries: Entries,
    /// Counts connections: the newest one is the worker's.
    connections: u64,
}

impl Reserve {
    /// What an earlier daemon had put into `store`, and nothing else yet.
    #[must_use]
    pub fn restored(store: FdStore, stored: Stored) -> Self {
        let table = Table {
            entries: stored.into_entries(),
            connections: 0,
        };
        Reserve {
            table: Mutex::new(table),
            store,
            kept: Gauge::default(),
        }
    }

    /// Makes the number of entries a metric.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "shim_kept_entries",
            "Mounts whose descriptors the daemon keeps beside the shim",
            self.kept.clone(),
        );
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every critical section leaves the table whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table().entries.is_empty()
    }

    /// Whether an entry of this name is kept.
    #[must_use]
    pub fn holds(&self, name: &str) -> bool {
        self.table().entries.contains_key(name)
    }

    /// Sends all that is kept to a new holder; how many entries that were.
    pub fn hand_over(&self, socket: &PacketSocket) -> std::io::Result<usize> {
        let table = self.table();
        hand_over(socket, &table.entries)?;
        Ok(table.entries.len())
    }

    /// Does what a worker says, until it ends or another one comes.
    fn serve(&self, number: u64, socket: &PacketSocket) {
        // What it has not named by its InheritEnd is not there any more.
        let mut named = BTreeSet::new();
        loop {
            let received = match socket.recv() {
                Ok(Some(received)) => received,
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "read what the shim keeps");
                    return;
                }
            };
            let body = wire::HolderPacket::decode(received.bytes.as_slice());
            let Some(body) = body.ok().and_then(|packet| packet.body) else {
                continue;
            };
            let mut table = self.table();
            if table.connections != number {
                return;
            }
            let name = match body {
                Body::Keep(keep) => {
                    self.store.keep(&keep.name, &received.fds);
                    table.entries.insert(keep.name.clone(), received.fds);
                    named.insert(keep.name.clone());
                    keep.name
                }
                Body::Forget(forget) => {
                    let fds = table
                        .entries
                        .remove(&forget.name)
                        .map_or(0, |fds| fds.len());
                    self.store.forget(&forget.name, fds);
                    forget.name
                }
                Body::InheritEnd(_) => {
                    let gone: Vec<String> = table
                        .entries
                        .keys()
                        .filter(|name| !named.contains(*name))
                        .cloned()
                        .collect();
                    for name in gone {
                        let fds = table.entries.remove(&name).map_or(0, |fds| fds.len());
                        self.store.forget(&name, fds);
                    }
                    String::new()
                }
                Body::Inherit(_) | Body::Done(_) | Body::Retire(_) => continue,
            };
            let kept = table.entries.len();
            self.kept.set(i64::try_from(kept).unwrap_or(i64::MAX));
            drop(table);
            let error = String::new();
            let done = packet(Body::Done(wire::Done { name, error }));
            if socket.send(&done, &[]).is_err() {
                return;
            }
        }
    }
}

/// Serves a [`Reserve`] until it is dropped.
#[derive(Debug)]
pub(super) struct Keeping {
    listener: Arc<PacketListener>,
    current: Arc<Mutex<Option<Arc<PacketSocket>>>>,
}

impl Keeping {
    /// Starts to accept workers. A daemon that cannot keep descriptors says so, and all else goes on.
    pub(super) fn start(listener: PacketListener, reserve: Arc<Reserve>) -> Self {
        let keeping = Keeping {
            listener: Arc::new(listener),
            current: Arc::default(),
        };
        let (listener, current) = (Arc::clone(&keeping.listener), Arc::clone(&keeping.current));
        let accepting = move || {
            while let Ok(Some(socket)) = listener.accept() {
                let socket = Arc::new(socket);
                let number = {
                    let mut table = reserve.table();
                    table.connections += 1;
                    table.connections
                };
                let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(before) = current.replace(Arc::clone(&socket)) {
                    before.end();
                }
                drop(current);
                let reserve = Arc::clone(&reserve);
                let serving = move || reserve.serve(number, &socket);
                if let Err(error) = thread("kept", serving) {
                    tracing::error!(%error, "keep descriptors of the shim");
                }
            }
        };
        if let Err(error) = thread("keep", accepting) {
            tracing::error!(%error, "keep descriptors of the shim");
        }
        keeping
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    builder.spawn(body).map(drop)
}

impl Drop for Keeping {
    fn drop(&mut self) {
        self.listener.end();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(socket) = current.take() {
            socket.end();
        }
    }
}
