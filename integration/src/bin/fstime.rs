// SPDX-License-Identifier: Apache-2.0
//! `fstime stat|read DIR`: walks DIR once, `lstat`s or reads every file. `fstime read DIR READERS`: the same, read by
//! so many at once when the walk is over. `fstime file FILE`: opens and reads one. `fstime random FILE READS`: reads
//! 4 KiB at so many places of one, after all of it. Prints seconds, files or reads, bytes.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

/// What one read of a file asks for.
const BUFFER: usize = 1 << 17;
/// What a read at a random place asks for: a page, which is what a page fault would.
const PAGE: usize = 4096;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let usage = "usage: fstime stat|read DIR, fstime read DIR READERS, fstime file FILE, fstime random FILE READS";
    let mode = arguments.next().context(usage)?;
    let path = PathBuf::from(arguments.next().context(usage)?);
    let number = match arguments.next() {
        Some(number) => Some(number.to_str().context(usage)?.parse().context(usage)?),
        None => None,
    };
    let mode = mode.to_str().context(usage)?;
    if mode == "random" {
        return random(&path, number.context(usage)?);
    }
    let start = Instant::now();
    let (mut count, mut bytes) = (0, 0);
    let mut buffer = vec![0; BUFFER];
    match (mode, number) {
        ("file", None) => (count, bytes) = (1, read(&path, &mut buffer)?),
        ("stat", None) => walk(&path, &mut |_, _| {
            count += 1;
            Ok(())
        })?,
        ("read", None) => walk(&path, &mut |file, regular| {
            count += 1;
            if regular {
                bytes += read(&file, &mut buffer)?;
            }
            Ok(())
        })?,
        ("read", Some(readers)) => {
            let mut files = Vec::new();
            walk(&path, &mut |file, regular| {
                count += 1;
                files.extend(regular.then_some(file));
                Ok(())
            })?;
            bytes = read_all(&files, readers)?;
        }
        _ => bail!(usage),
    }
    report(start, count, bytes);
    Ok(())
}

fn report(start: Instant, count: usize, bytes: u64) {
    println!("{:.6} {count} {bytes}", start.elapsed().as_secs_f64());
}

/// Visits every entry below a directory with its path and whether it is a regular file, as it comes.
fn walk(directory: &Path, visit: &mut dyn FnMut(PathBuf, bool) -> Result<()>) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let meta = std::fs::symlink_metadata(&path)?;
        if meta.is_dir() {
            visit(path.clone(), false)?;
            walk(&path, visit)?;
        } else {
            visit(path, meta.is_file())?;
        }
    }
    Ok(())
}

/// Reads all of them, each reader the next one that nobody has begun; gives their bytes.
fn read_all(files: &[PathBuf], readers: usize) -> Result<u64> {
    let next = AtomicUsize::new(0);
    let reader = || -> Result<u64> {
        let (mut buffer, mut bytes) = (vec![0; BUFFER], 0);
        while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            bytes += read(file, &mut buffer)?;
        }
        Ok(bytes)
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..readers).map(|_| scope.spawn(reader)).collect();
        let bytes = readers.into_iter().map(|it| match it.join() {
            Ok(bytes) => bytes,
            Err(_) => bail!("a reader panicked"),
        });
        bytes.sum()
    })
}

/// Reads a whole file; gives how long it is.
fn read(path: &Path, buffer: &mut [u8]) -> Result<u64> {
    let mut file = File::open(path)?;
    let mut bytes = 0;
    loop {
        let n = file.read(buffer)?;
        if n == 0 {
            return Ok(bytes);
        }
        bytes += n as u64;
    }
}

/// Reads at random places, the same ones each time, of a file that was read before: what is measured is the way to
/// what is in memory.
fn random(path: &Path, reads: usize) -> Result<()> {
    let bytes = read(path, &mut vec![0; BUFFER])?;
    let pages = bytes / PAGE as u64;
    ensure!(pages > 0, "the file is smaller than a page");
    let mut generator = StdRng::seed_from_u64(4);
    let places: Vec<u64> = (0..reads)
        .map(|_| generator.random_range(0..pages) * PAGE as u64)
        .collect();
    let (file, mut page) = (File::open(path)?, [0; PAGE]);
    let start = Instant::now();
    for place in &places {
        file.read_exact_at(&mut page, *place)?;
    }
    report(start, reads, reads as u64 * PAGE as u64);
    Ok(())
}
