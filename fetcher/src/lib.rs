// SPDX-License-Identifier: Apache-2.0
//! Where bytes come from and where they are kept.
//!
//! - [`source`]: the trait `BlobSource` and its implementations.
//! - [`registry`]: the client of OCI registries.
//! - [`store`]: the chunk store, the node's cache of layer devices.
//! - [`clock`]: time, in one place.

pub mod clock;
#[cfg(test)]
mod fixture;
pub mod registry;
pub mod source;
pub mod store;
mod sys;
