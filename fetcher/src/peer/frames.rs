// SPDX-License-Identifier: Apache-2.0
//! Compressed chunks that came lately, or were compressed for a peer: so that none is compressed twice.
//!
//! The store keeps device bytes, the wire is better used by frames. A home has just received the frame
//! of nearly every chunk that it is asked for; it passes those on as they are, which costs no
//! processor. Chunks that compression does not make smaller are remembered as such.

use bytes::Bytes;
use sluice_blockindex::digest::ChunkDigest;

use super::wire::Form;
use crate::byte_lru::ByteLru;

/// A cache of a bounded number of bytes, keyed by the strong digest of the device bytes.
#[derive(Debug)]
pub(crate) struct Frames(ByteLru<ChunkDigest, (Form, Bytes)>);

impl Frames {
    pub(crate) fn new(budget_bytes: usize) -> Self {
        Self(ByteLru::new(budget_bytes))
    }

    /// Keeps a verified chunk in this form; [`Form::Raw`] with no bytes says that compression is
    /// worth nothing. The least recently used go for it.
    pub(crate) fn put(&self, digest: ChunkDigest, form: Form, bytes: &[u8]) {
        // A frame is often a part of a larger buffer of the network, which it would keep.
        let bytes = Bytes::copy_from_slice(bytes);
        let size = bytes.len();
        self.0.put(digest, (form, bytes), size);
    }

    /// The chunk, if it is here.
    pub(crate) fn get(&self, digest: &ChunkDigest) -> Option<(Form, Bytes)> {
        self.0.get(digest)
    }
}
