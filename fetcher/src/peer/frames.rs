// SPDX-License-Identifier: Apache-2.0
//! Compressed chunks that came lately, or were compressed for a peer: so that none is compressed twice.
//!
//! The store keeps device bytes, the wire is better used by frames. A home has just received the frame
//! of nearly every chunk that it is asked for; it passes those on as they are, which costs no
//! processor. Chunks that compression does not make smaller are remembered as such.

use std::sync::Mutex;

use bytes::Bytes;
use lru::LruCache;
use sluice_blockindex::digest::ChunkDigest;

use super::wire::Form;
use crate::store::lock;

/// What is counted for an entry besides its bytes.
const ENTRY_BYTES: usize = 128;

/// A cache of a bounded number of bytes, keyed by the strong digest of the device bytes.
#[derive(Debug)]
pub(crate) struct Frames {
    budget_bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    held_bytes: usize,
    /// Without bytes: not worth compressing.
    entries: LruCache<ChunkDigest, (Form, Bytes)>,
}

impl Frames {
    pub(crate) fn new(budget_bytes: usize) -> Self {
        let state = State {
            held_bytes: 0,
            entries: LruCache::unbounded(),
        };
        Self {
            budget_bytes,
            state: Mutex::new(state),
        }
    }

    /// Keeps a verified chunk in this form; [`Form::Raw`] with no bytes says that compression is
    /// worth nothing. The least recently used go for it.
    pub(crate) fn put(&self, digest: ChunkDigest, form: Form, bytes: Bytes) {
        let size = bytes.len() + ENTRY_BYTES;
        if size > self.budget_bytes {
            return;
        }
        // A frame is often a part of a larger buffer of the network, which it would keep.
        let bytes = Bytes::copy_from_slice(&bytes);
        let mut state = lock(&self.state);
        state.held_bytes += size;
        if let Some((_, old)) = state.entries.put(digest, (form, bytes)) {
            state.held_bytes -= old.len() + ENTRY_BYTES;
        }
        while state.held_bytes > self.budget_bytes {
            let Some((_, (_, old))) = state.entries.pop_lru() else {
                break;
            };
            state.held_bytes -= old.len() + ENTRY_BYTES;
        }
    }

    /// The chunk, if it is here.
    pub(crate) fn get(&self, digest: &ChunkDigest) -> Option<(Form, Bytes)> {
        lock(&self.state).entries.get(digest).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_go() {
        let frames = Frames::new(3 * (100 + ENTRY_BYTES));
        let digest = |n: u8| ChunkDigest([n; 32]);
        let bytes = |n: u8| Bytes::from(vec![n; 100]);
        for n in 0..3 {
            frames.put(digest(n), Form::Frame, bytes(n));
        }
        assert_eq!(frames.get(&digest(0)), Some((Form::Frame, bytes(0))));
        frames.put(digest(3), Form::Zstd, bytes(3));
        let there: Vec<bool> = (0..4).map(|n| frames.get(&digest(n)).is_some()).collect();
        assert_eq!(there, [true, false, true, true]);
        // Replaced and not counted twice; too large for it all.
        frames.put(digest(3), Form::Raw, Bytes::new());
        frames.put(digest(9), Form::Frame, vec![0; 1000].into());
        assert_eq!(frames.get(&digest(9)), None);
        assert_eq!(
            lock(&frames.state).held_bytes,
            2 * (100 + ENTRY_BYTES) + ENTRY_BYTES
        );
    }
}
