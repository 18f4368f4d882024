// SPDX-License-Identifier: Apache-2.0
//! The shim's log, which must not fill the disk: the run directory is often a small tmpfs, and what
//! fails may fail for every read of a node.
//!
//! Holder and worker write to one file, open for appending as standard output and error. Who finds it
//! too large copies it to `shim.log.old` and cuts it; the other's next line then stands at the beginning.
//! Lines that are written between copy and cut are lost.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::LOG_NAME;

/// Size at which the log is put aside: days of an unhealthy node.
pub(super) const LOG_BYTES: u64 = 8 << 20;

/// Standard error that is put aside when it is too large. Cheap to clone.
#[derive(Debug, Clone)]
pub struct BoundedLog {
    file: Arc<File>,
    path: PathBuf,
    limit_bytes: u64,
}

impl BoundedLog {
    /// Standard error, which is the log of the run directory; anything else is only written to.
    pub fn of_stderr(run_dir: &Path) -> io::Result<BoundedLog> {
        let file = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        Ok(BoundedLog {
            file: Arc::new(file),
            path: run_dir.join(LOG_NAME),
            limit_bytes: LOG_BYTES,
        })
    }

    fn keep_small(&self) -> io::Result<()> {
        let ours = self.file.metadata()?;
        if ours.len() <= self.limit_bytes {
            return Ok(());
        }
        let named = std::fs::metadata(&self.path)?;
        if (ours.dev(), ours.ino()) == (named.dev(), named.ino()) {
            std::fs::copy(&self.path, self.path.with_extension("log.old"))?;
            self.file.set_len(0)?;
        }
        Ok(())
    }
}

impl Write for BoundedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // What cannot be put aside, on a full disk for instance, is written all the same.
        let _kept = self.keep_small();
        (&*self.file).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&*self.file).flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_stays_small_and_keeps_what_came_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LOG_NAME);
        let open = || File::options().create(true).append(true).open(&path);
        let log = |name: &str| BoundedLog {
            file: Arc::new(open().unwrap()),
            path: dir.path().join(name),
            limit_bytes: 1000,
        };
        let (mut holder, mut worker) = (log(LOG_NAME), log(LOG_NAME));
        for number in 0..500 {
            let writer = match number % 2 {
                0 => &mut holder,
                _ => &mut worker,
            };
            // As the log is written: a line at a time.
            let line = format!("line {number:03}\n");
            writer.write_all(line.as_bytes()).unwrap();
            assert!(path.metadata().unwrap().len() <= 1000 + 20);
        }
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        let (old, new) = (read(&path.with_extension("log.old")), read(&path));
        let lines: Vec<_> = old.lines().chain(new.lines()).collect();
        assert!(lines.len() > 100 && lines.last() == Some(&"line 499"));
        assert!(lines.windows(2).all(|pair| pair[0] < pair[1]));
        // Another file than that of the run directory is not touched.
        let mut elsewhere = log("other.log");
        std::fs::write(dir.path().join("other.log"), b"theirs").unwrap();
        for _ in 0..200 {
            writeln!(elsewhere, "line").unwrap();
        }
        assert!(path.metadata().unwrap().len() > 1000);
        assert_eq!(read(&dir.path().join("other.log")), "theirs");
    }
}
