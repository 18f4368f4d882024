// SPDX-License-Identifier: Apache-2.0
//! What `make bench` measures on one node.
//!
//! - `conversion`: against the pipeline that does the least of the same work, and the converters of others; indexing
//!   against gunzip.
//! - `fill`: chunks into the store when no line bounds them, and where the processors' time goes (`flame`).
//! - `files`: a complete image, mounted, against its unpacked layers.
//! - `reads`: the same of real images, against what users would pick instead.
//! - `memory`: what the shim takes per 100 layers mounted, and the daemon with 100 images.
//! - `first_read`: the first read of a small file, against the registry's own round trip.
//! - `start`: cold starts of real images, against what users would pick instead.
//! - `scale`: many containers, layers and files, and large ones, against the same.
//!
//! Contenders take turns in one set-up and medians are compared: the machine may be shared. Mounts are read
//! by `fstime`, a child with a deadline.

pub mod conversion;
pub mod files;
pub mod fill;
pub mod first_read;
pub mod flame;
pub mod memory;
pub mod meter;
pub mod process;
pub mod reads;
pub mod report;
pub mod scale;
pub mod start;
pub mod synthetic;
pub mod update;

/// Containerd's namespace of all benchmarks.
const NAMESPACE: &str = "bench";
/// The longest that any one step may take.
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(300);

/// A `[mount]` table whose mounts go as soon as nothing uses them, and no completion in the background.
fn incomplete_over(backend: &str) -> String {
    format!(
        "[mount]\nbackend = \"{backend}\"\ngrace = \"1s\"\n\n[store]\ngrace = \"1s\"\n\n[prefetch]\nenabled = false\n\n[boot]\nenabled = false\n"
    )
}
