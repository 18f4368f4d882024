// SPDX-License-Identifier: Apache-2.0
//! The part of the disk that is kept free: for what other programs write, and for what readers wait for.
//!
//! Below it background completion stands still and eviction begins. Readers get their bytes all the same:
//! a reserve that stopped them would be a full disk.

use std::path::{Path, PathBuf};

/// Bytes that shall be free on the disk of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskReserve {
    directory: PathBuf,
    wanted_bytes: u64,
}

impl DiskReserve {
    /// So many bytes on the disk of `directory`; 0: none.
    #[must_use]
    pub fn new(directory: &Path, wanted_bytes: u64) -> Self {
        Self {
            directory: directory.to_owned(),
            wanted_bytes,
        }
    }

    /// What it shall be.
    #[must_use]
    pub fn wanted_bytes(&self) -> u64 {
        self.wanted_bytes
    }

    /// How much is missing now. A disk that does not say how full it is counts as empty. **Blocks**
    /// (shortly).
    #[must_use]
    pub fn missing_bytes(&self) -> u64 {
        if self.wanted_bytes == 0 {
            return 0;
        }
        match nix::sys::statvfs::statvfs(&self.directory) {
            Ok(space) => {
                let free = space
                    .blocks_available()
                    .saturating_mul(space.fragment_size());
                self.wanted_bytes.saturating_sub(free)
            }
            Err(error) => {
                tracing::warn!("failed to look how full the disk is: {error}");
                0
            }
        }
    }

    /// Whether anything is missing now.
    pub async fn is_broken(&self) -> bool {
        if self.wanted_bytes == 0 {
            return false;
        }
        let reserve = self.clone();
        let missing = tokio::task::spawn_blocking(move || reserve.missing_bytes());
        missing.await.is_ok_and(|missing| missing > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reserve_is_broken_when_less_is_free() {
        let dir = tempfile::tempdir().unwrap();
        for (wanted, broken) in [(0, false), (1, false), (u64::MAX, true)] {
            let reserve = DiskReserve::new(dir.path(), wanted);
            assert_eq!(reserve.is_broken().await, broken, "{wanted}");
            assert_eq!(reserve.missing_bytes() > 0, broken, "{wanted}");
        }
        let nowhere = DiskReserve::new(Path::new("/no/such/directory"), u64::MAX);
        assert_eq!(nowhere.missing_bytes(), 0);
    }
}
