// SPDX-License-Identifier: Apache-2.0
//! Where bytes come from and where they are kept.
//!
//! - [`source`]: the trait `BlobSource` and its implementations.
//! - [`registry`]: the client of OCI registries.

pub mod registry;
pub mod source;
