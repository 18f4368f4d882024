// SPDX-License-Identifier: Apache-2.0
//! `fstime stat|read DIR`: walks DIR once, `lstat`s or reads every file. `fstime file FILE`: opens and reads one.
//! Prints seconds, files, bytes.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

fn main() -> anyhow::Result<()> {
    let mode = std::env::args().nth(1).unwrap_or_default();
    let root = PathBuf::from(std::env::args().nth(2).unwrap_or_default());
    anyhow::ensure!(
        ["stat", "read", "file"].contains(&mode.as_str()),
        "usage: fstime stat|read DIR, fstime file FILE"
    );
    let mut buffer = vec![0; 1 << 17];
    let mut totals = (0u64, 0u64);
    let start = Instant::now();
    if mode == "file" {
        totals = (1, read(&root, &mut buffer)?);
    } else {
        walk(&root, mode == "read", &mut buffer, &mut totals)?;
    }
    println!(
        "{:.6} {} {}",
        start.elapsed().as_secs_f64(),
        totals.0,
        totals.1
    );
    Ok(())
}

fn walk(
    directory: &Path,
    contents: bool,
    buffer: &mut [u8],
    totals: &mut (u64, u64),
) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let meta = std::fs::symlink_metadata(&path)?;
        totals.0 += 1;
        if meta.is_dir() {
            walk(&path, contents, buffer, totals)?;
        } else if contents && meta.is_file() {
            totals.1 += read(&path, buffer)?;
        }
    }
    Ok(())
}

/// Reads a whole file; gives how long it is.
fn read(path: &Path, buffer: &mut [u8]) -> anyhow::Result<u64> {
    let mut file = std::fs::File::open(path)?;
    let mut bytes = 0;
    loop {
        let n = file.read(buffer)?;
        if n == 0 {
            return Ok(bytes);
        }
        bytes += n as u64;
    }
}
