// SPDX-License-Identifier: Apache-2.0
//! Where bytes come from and where they are kept.
//!
//! - [`source`]: the trait `BlobSource` and its implementations.
//! - [`registry`]: the client of OCI registries.
//! - [`store`]: the chunk store, the node's cache of layer devices.
//! - [`blob_cache`]: blobs as registries store them, for ordinary pulls.
//! - [`scheduler`]: brings missing chunks into the store, the most urgent first.
//! - [`boot`]: loads what a container reads while it starts, in one burst.
//! - [`peer`]: what nodes give each other.
//! - [`prefetch`]: completes images in the background.
//! - [`reuse`]: makes chunks of files that the node has already.
//! - [`block_source`]: reads a layer device through all of that.
//! - [`index_artifact`]: what makes an image lazy that nobody converted.
//! - [`metrics`]: what is counted.
//! - [`steps`]: what is under way, and the watchdog that names what is stuck.
//! - [`cluster`]: many nodes, each byte once.
//! - [`clock`]: time, in one place.

mod backoff;
pub mod blob_cache;
pub mod block_source;
pub mod boot;
mod bounded;
mod byte_lru;
pub mod clock;
pub mod cluster;
#[cfg(test)]
mod fixture;
pub mod index_artifact;
pub mod metrics;
pub mod peer;
pub mod prefetch;
pub mod registry;
pub mod reuse;
pub mod scheduler;
pub mod source;
pub mod steps;
pub mod store;
mod sys;
