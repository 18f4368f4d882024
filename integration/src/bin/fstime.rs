// SPDX-License-Identifier: Apache-2.0
//! `fstime stat|read DIR`: walks DIR once, `lstat`s or reads every file, prints seconds, files, bytes.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

fn main() -> anyhow::Result<()> {
    let mode = std::env::args().nth(1).unwrap_or_default();
    let root = PathBuf::from(std::env::args().nth(2).unwrap_or_default());
    anyhow::ensure!(
        mode == "stat" || mode == "read",
        "usage: fstime stat|read DIR"
    );
    let start = Instant::now();
    let mut totals = (0u64, 0u64);
    walk(&root, mode == "read", &mut vec![0; 1 << 17], &mut totals)?;
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
    read: bool,
    buffer: &mut [u8],
    totals: &mut (u64, u64),
) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let meta = std::fs::symlink_metadata(&path)?;
        totals.0 += 1;
        if meta.is_dir() {
            walk(&path, read, buffer, totals)?;
        } else if read && meta.is_file() {
            let mut file = std::fs::File::open(&path)?;
            loop {
                let n = file.read(buffer)?;
                if n == 0 {
                    break;
                }
                totals.1 += n as u64;
            }
        }
    }
    Ok(())
}
