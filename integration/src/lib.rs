// SPDX-License-Identifier: Apache-2.0
//! Drives the built binaries on real software: containerd, runc, a registry, kernel mounts.
//!
//! Everything runs below one temporary root and is taken down by drop guards, also when a test
//! fails. This process never touches a mount itself: whoever reads a mount is a child with a
//! deadline, so that a wedged mount can't wedge the harness. Synchronous code and threads only.

#![forbid(unsafe_code)]

pub mod bench;
pub mod cluster;
pub mod harness;
pub mod oddities;
pub mod pages;
pub mod simulate;
mod svg;
pub mod tree;
