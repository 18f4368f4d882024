// SPDX-License-Identifier: Apache-2.0
//! What is wrong with registries, disks and clocks, and what the reader of a lazy image, the log and the
//! metrics make of it.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

#[path = "faults/disk.rs"]
mod disk;
#[path = "faults/host.rs"]
mod host;
#[path = "faults/image.rs"]
mod image;
#[path = "faults/registry.rs"]
mod registry;
