// SPDX-License-Identifier: Apache-2.0
//! Where the programs under test and their tools are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The checkout's root.
#[must_use]
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(PathBuf::new, Path::to_path_buf)
}

/// The build directory (`CARGO_TARGET_DIR`, by default `target/` of the checkout).
#[must_use]
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// A binary of this workspace: `sluice`, `sluiced`, `sluice-shim`.
///
/// Looked for beside the running test or demo, so that one profile is used throughout.
pub fn binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let candidates = me.ancestors().skip(1).take(2).map(|d| d.join(name));
    for path in candidates {
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("{name} is not built: run `cargo build --workspace` first")
}

/// A Go program built by `integration/scripts/go-tools.sh`.
pub fn go_tool(name: &str) -> Result<PathBuf> {
    let path = target().join("tools").join(name);
    if !path.is_file() {
        bail!("{} is missing: run `make tools`", path.display());
    }
    Ok(path)
}

/// A program on `PATH`.
pub fn on_path(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").context("PATH is not set")?;
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|d| d.join(name))
        .find(|p| p.is_file())
        .with_context(|| format!("{name} is not installed: run `make setup`"))
}
