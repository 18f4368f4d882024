// SPDX-License-Identifier: Apache-2.0
//! Which device goes when the store must become smaller: pure.
//!
//! Whole devices go, the least recently used first, never one that is pinned. A device is small
//! against a store, and a layer that is not there at all is fetched again in few requests; holes
//! here and there would cost as many requests as they save bytes.

use std::time::SystemTime;

use super::DeviceKey;

/// A device, when room is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldDevice {
    /// Its name.
    pub key: DeviceKey,
    /// Bytes that it really takes.
    pub held_bytes: u64,
    /// When it was last in use, by the wall clock: it has to order what happened before a restart
    /// too. A clock that was set makes the order worse, and nothing unsafe.
    pub last_used: SystemTime,
    /// In use: it must stay.
    pub pinned: bool,
}

/// Bytes of all devices, and of those that must stay.
pub(crate) fn sums(devices: &[HeldDevice]) -> (u64, u64) {
    let sum = |pinned: bool| {
        devices
            .iter()
            .filter(|device| device.pinned || !pinned)
            .map(|device| device.held_bytes)
            .fold(0, u64::saturating_add)
    };
    (sum(false), sum(true))
}

/// The place of the next device to evict, so that in the end `free_bytes` more are free; `None` when
/// that is reached, or nothing may go.
pub(crate) fn next_victim(devices: &[HeldDevice], free_bytes: u64) -> Option<usize> {
    if free_bytes == 0 {
        return None;
    }
    devices
        .iter()
        .enumerate()
        .filter(|(_, device)| !device.pinned && device.held_bytes > 0)
        .min_by_key(|(_, device)| (device.last_used, device.key))
        .map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sluice_blockindex::digest::{DiffId, IndexDigest};

    use super::*;

    fn device(name: u8, held_bytes: u64, used: u64, pinned: bool) -> HeldDevice {
        HeldDevice {
            key: DeviceKey {
                diff_id: DiffId::of(&[name]),
                index: IndexDigest::of(&[name]),
            },
            held_bytes,
            last_used: SystemTime::UNIX_EPOCH + Duration::from_secs(used),
            pinned,
        }
    }

    /// Evicts until enough is free; the bytes of what went, in that order.
    fn evicted(mut devices: Vec<HeldDevice>, budget: u64) -> Vec<u64> {
        let mut gone = Vec::new();
        loop {
            let excess = sums(&devices).0.saturating_sub(budget);
            let Some(at) = next_victim(&devices, excess) else {
                return gone;
            };
            gone.push(devices.remove(at).held_bytes);
        }
    }

    #[test]
    fn the_least_recently_used_go_until_the_budget_holds() {
        let all = || {
            vec![
                device(1, 10, 300, false),
                device(2, 20, 100, false),
                device(3, 40, 50, true),
                device(4, 80, 200, false),
                device(5, 0, 1, false),
            ]
        };
        assert_eq!(sums(&all()), (150, 40));
        let cases: [(u64, &[u64]); 7] = [
            (u64::MAX, &[]),
            (150, &[]),
            (149, &[20]),
            (130, &[20]),
            (129, &[20, 80]),
            (45, &[20, 80, 10]),
            (0, &[20, 80, 10]),
        ];
        for (budget, expected) in cases {
            assert_eq!(evicted(all(), budget), expected, "{budget}");
        }
        assert_eq!(evicted(Vec::new(), 0), [0; 0]);
    }
}
