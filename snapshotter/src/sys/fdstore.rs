// SPDX-License-Identifier: Apache-2.0
//! systemd's store for file descriptors: what stands in it comes back with the service's next process.
//!
//! A descriptor's name there is `<place>.<entry>`. systemd allows no colon in it; our entries have none.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use sd_notify::NotifyState;

/// Where the service manager keeps descriptors for us.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum FdStore {
    /// Nowhere.
    #[default]
    None,
    /// With who listens at `$NOTIFY_SOCKET`.
    Manager,
}

/// What a store gave back.
#[derive(Debug, Default)]
pub struct Stored(BTreeMap<String, BTreeMap<usize, OwnedFd>>);

impl Stored {
    /// Entries by name; those with a gap, of which some descriptors are missing, are closed.
    #[must_use]
    pub fn into_entries(self) -> BTreeMap<String, Vec<OwnedFd>> {
        let whole = |fds: &BTreeMap<usize, OwnedFd>| fds.keys().copied().eq(0..fds.len());
        let entries = self.0.into_iter().filter(|(_, fds)| whole(fds));
        entries
            .map(|(name, fds)| (name, fds.into_values().collect()))
            .collect()
    }

    fn add(&mut self, name: &str, fd: OwnedFd) {
        match parse(name) {
            Some((place, entry)) => {
                self.0
                    .entry(entry.to_owned())
                    .or_default()
                    .insert(place, fd);
            }
            None => tracing::warn!(name, "a stored descriptor that is none of ours"),
        }
    }
}

fn name_of(place: usize, entry: &str) -> String {
    format!("{place}.{entry}")
}

fn parse(name: &str) -> Option<(usize, &str)> {
    let (place, entry) = name.split_once('.')?;
    let place = place.parse().ok()?;
    (!entry.is_empty()).then_some((place, entry))
}

impl FdStore {
    /// The manager's, if this process was started by one, and what it had kept for us.
    ///
    /// To be called once: what it had kept is owned by who gets it.
    #[must_use]
    pub fn take() -> (FdStore, Stored) {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            return (FdStore::None, Stored::default());
        }
        let mut stored = Stored::default();
        match sd_notify::listen_fds_with_names() {
            Ok(fds) => {
                for (number, name) in fds {
                    // SAFETY: handed to this process by who started it, by the protocol of sd_listen_fds(3), and
                    // taken once.
                    stored.add(&name, unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
            Err(error) => tracing::warn!(%error, "read what the service manager kept"),
        }
        (FdStore::Manager, stored)
    }

    /// Stores the descriptors of an entry. A full store drops them, and nobody learns of it.
    pub fn keep(self, entry: &str, fds: &[OwnedFd]) {
        if self == FdStore::None {
            return;
        }
        let stored = fds.iter().enumerate().try_for_each(|(place, fd)| {
            let name = name_of(place, entry);
            let state = [NotifyState::FdStore, NotifyState::FdName(&name)];
            let fd: [BorrowedFd<'_>; 1] = [fd.as_fd()];
            sd_notify::notify_with_fds(&state, &fd)
        });
        if let Err(error) = stored {
            tracing::warn!(entry, %error, "the service manager keeps no descriptor");
        }
    }

    /// Takes an entry of so many descriptors out of the store.
    pub fn forget(self, entry: &str, fds: usize) {
        if self == FdStore::None {
            return;
        }
        for place in 0..fds {
            let name = name_of(place, entry);
            let state = [NotifyState::FdStoreRemove, NotifyState::FdName(&name)];
            if let Err(error) = sd_notify::notify(&state) {
                tracing::warn!(entry, %error, "the service manager keeps a descriptor for nothing");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn entries_come_back_whole_or_not_at_all() {
        let fd = || OwnedFd::from(File::open("/dev/null").unwrap());
        let mut stored = Stored::default();
        for name in ["1.a#1", "0.a#1", "1.gap", "0.b.c", "stored", "x.y", "0."] {
            stored.add(name, fd());
        }
        let entries = stored.into_entries();
        let counts: Vec<(&str, usize)> = entries
            .iter()
            .map(|(name, fds)| (name.as_str(), fds.len()))
            .collect();
        assert_eq!(counts, [("a#1", 2), ("b.c", 1)]);
    }

    #[test]
    fn names_come_back() {
        let name = name_of(2, "ab#17.3");
        assert_eq!(
            (name.as_str(), parse(&name)),
            ("2.ab#17.3", Some((2, "ab#17.3")))
        );
    }
}
