// SPDX-License-Identifier: Apache-2.0
//! What nodes give each other: chunks, layer indexes and boot lists, named by their digests.
//!
//! - [`wire`]: messages as meant; what comes from outside is checked there and nowhere else.
//! - `route`: whom a transfer asks, in which order: pure.
//! - [`client`]: [`Peers`], the other nodes as the scheduler sees them.
//! - [`server`]: what this node gives to others.
//! - `lists`: boot lists, which are hints and not payload.
//! - [`blobs`]: pieces of raw blobs, for pulls that are not lazy.
//! - [`indexes`]: indexes that nodes made of blobs that nobody converted.
//! - `prewarm`: images that nodes ask each other to bring.
//! - `frames`: frames of the blob that came lately, which are passed on as they are.
//!
//! # How a chunk comes
//! Each piece of a layer has a home ([`crate::cluster::home`]). The home asks the origin; all others
//! ask the home, which fetches each chunk once and sends it to everybody as it lands. A home whose
//! upload slots are taken names nodes that it has served or is serving: load spreads as a tree. When
//! the home dies, is slow or refuses, the second home is asked, and last the origin itself: a way to
//! it always remains.
//!
//! # Invariants
//! - What a peer sends is verified like anything else before it enters the store.
//! - A request that came from a peer is answered from the store, from what is on its way, or from the
//!   origin; where zones share what they fetch, one from a node of the own zone also from another zone. It is
//!   never passed on further: nobody waits in a circle.

pub mod blobs;
pub mod client;
pub(crate) mod frames;
pub mod indexes;
mod links;
mod lists;
mod prewarm;
pub(crate) mod route;
pub mod server;
pub mod wire;

pub use blobs::{BlobNodes, WantedPiece};
pub use client::{PeerOptions, Peers};
pub use indexes::{GivenIndex, HeldIndex, IndexShelf};
pub use links::{Connect, LinkError, endpoint, plain};
pub use lists::GivenList;
pub use prewarm::{Reports, WantedPrewarm};
pub use route::Reach;
pub use server::{PeerServer, Refused, Shelf};

/// The newest version of the peer protocol that this program speaks.
pub const PROTOCOL: u32 = 2;
/// The oldest one.
pub const OLDEST_PROTOCOL: u32 = 1;
/// The first one with indexes of blobs that nobody converted. Who speaks an older one is not asked for them.
pub const BLOB_INDEX_PROTOCOL: u32 = 2;

#[cfg(test)]
mod tests;
