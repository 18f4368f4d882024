// SPDX-License-Identifier: Apache-2.0
//! Which blobs are kept, and which go when there is no room. No I/O.
//!
//! A slot whose seat somebody holds stays. One that goes is marked first and forgotten when its files are
//! gone: meanwhile the blob is read past the cache, so that nobody makes files that are being removed.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Weak};

use lru::LruCache;
use sluice_blockindex::digest::BlobDigest;
use tokio::sync::OnceCell;

use super::files::Found;
use super::live::Live;
use super::record;

/// Blobs that are remembered to have been wrong once.
const BAD_REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// A blob in use: opened once, by whoever comes first.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) blob: BlobDigest,
    pub(super) size_bytes: u64,
    /// It was whole when it was seated.
    pub(super) whole: bool,
    pub(super) live: OnceCell<Arc<Live>>,
}

#[derive(Debug)]
struct Slot {
    size_bytes: u64,
    whole: bool,
    used: u64,
    going: bool,
    seat: Weak<Seat>,
}

/// What a reader finds.
#[derive(Debug)]
pub(super) enum Place {
    /// The blob's seat; the files of these others are to be removed.
    Seated(Arc<Seat>, Vec<BlobDigest>),
    /// There is no room, or the blob is just going.
    Uncached,
    /// It is here with this size.
    OtherSize(u64),
}

#[derive(Debug)]
pub(super) struct Table {
    budget_bytes: u64,
    slots: HashMap<BlobDigest, Slot>,
    clock: u64,
    bad: LruCache<BlobDigest, ()>,
}

impl Table {
    pub(super) fn new(budget_bytes: u64, mut found: Vec<Found>) -> Self {
        found.sort_by_key(|it| it.used);
        let mut table = Table {
            budget_bytes,
            slots: HashMap::new(),
            clock: 0,
            bad: LruCache::new(BAD_REMEMBERED),
        };
        for it in found {
            table.insert(it.blob, it.size_bytes, it.whole, Weak::new());
        }
        table
    }

    fn insert(&mut self, blob: BlobDigest, size_bytes: u64, whole: bool, seat: Weak<Seat>) {
        self.clock += 1;
        let slot = Slot {
            size_bytes,
            whole,
            used: self.clock,
            going: false,
            seat,
        };
        self.slots.insert(blob, slot);
    }

    pub(super) fn held_bytes(&self) -> u64 {
        self.slots.values().map(|slot| slot.size_bytes).sum()
    }

    pub(super) fn whole_bytes(&self, blob: BlobDigest) -> Option<u64> {
        let slot = self.slots.get(&blob)?;
        (slot.whole && !slot.going).then_some(slot.size_bytes)
    }

    /// The blob as far as it is open.
    pub(super) fn live(&self, blob: BlobDigest) -> Option<Arc<Live>> {
        let seat = self.slots.get(&blob)?.seat.upgrade()?;
        seat.live.get().cloned()
    }

    /// A seat for a reader of this blob.
    pub(super) fn seat(&mut self, blob: BlobDigest, size_bytes: u64) -> Place {
        if !record::fits(size_bytes) {
            return Place::Uncached;
        }
        self.clock += 1;
        let now = self.clock;
        if let Some(slot) = self.slots.get_mut(&blob) {
            if slot.whole && slot.size_bytes != size_bytes {
                return Place::OtherSize(slot.size_bytes);
            }
            if slot.going {
                return Place::Uncached;
            }
            if slot.size_bytes != size_bytes {
                // Somebody was told another size. Who is right shows when one of them is whole.
                if slot.seat.strong_count() > 0 {
                    return Place::Uncached;
                }
                self.slots.remove(&blob);
            } else {
                slot.used = now;
                if let Some(seat) = slot.seat.upgrade() {
                    return Place::Seated(seat, Vec::new());
                }
                let seat = new_seat(blob, size_bytes, slot.whole);
                slot.seat = Arc::downgrade(&seat);
                return Place::Seated(seat, Vec::new());
            }
        }
        let Some(going) = self.make_room(size_bytes) else {
            return Place::Uncached;
        };
        let seat = new_seat(blob, size_bytes, false);
        self.insert(blob, size_bytes, false, Arc::downgrade(&seat));
        Place::Seated(seat, going)
    }

    /// Marks what must go so that `size_bytes` fit; `None`, and nothing marked, where that cannot be.
    pub(super) fn make_room(&mut self, size_bytes: u64) -> Option<Vec<BlobDigest>> {
        let mut idle: Vec<(u64, BlobDigest, u64)> = self
            .slots
            .iter()
            .filter(|(_, slot)| !slot.going && slot.seat.strong_count() == 0)
            .map(|(blob, slot)| (slot.used, *blob, slot.size_bytes))
            .collect();
        idle.sort_unstable_by_key(|(used, ..)| *used);
        let going = self.slots.values().filter(|slot| slot.going);
        let mut held = self.held_bytes() - going.map(|slot| slot.size_bytes).sum::<u64>();
        let mut chosen = Vec::new();
        for (_, blob, bytes) in idle {
            if held.saturating_add(size_bytes) <= self.budget_bytes {
                break;
            }
            held -= bytes;
            chosen.push(blob);
        }
        // At a start nothing is in use and all may go.
        if held.saturating_add(size_bytes) > self.budget_bytes {
            return None;
        }
        for blob in &chosen {
            self.go(*blob);
        }
        Some(chosen)
    }

    /// From now on nobody is seated at this blob.
    pub(super) fn go(&mut self, blob: BlobDigest) {
        if let Some(slot) = self.slots.get_mut(&blob) {
            slot.going = true;
        }
    }

    /// The files of a blob that was to go are gone.
    pub(super) fn evicted(&mut self, blob: BlobDigest) {
        if self.slots.get(&blob).is_some_and(|slot| slot.going) {
            self.slots.remove(&blob);
        }
    }

    /// The blob was verified and is whole on disk.
    pub(super) fn sealed(&mut self, blob: BlobDigest) {
        if let Some(slot) = self.slots.get_mut(&blob) {
            slot.whole = true;
        }
        self.bad.pop(&blob);
    }

    /// The blob was complete and wrong: next time it comes from the origin only.
    pub(super) fn note_bad(&mut self, blob: BlobDigest) {
        self.bad.put(blob, ());
    }

    pub(super) fn was_bad(&self, blob: BlobDigest) -> bool {
        self.bad.contains(&blob)
    }
}

fn new_seat(blob: BlobDigest, size_bytes: u64, whole: bool) -> Arc<Seat> {
    Arc::new(Seat {
        blob,
        size_bytes,
        whole,
        live: OnceCell::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(name: &str) -> BlobDigest {
        BlobDigest::of(name.as_bytes())
    }

    fn seated(table: &mut Table, name: &str, bytes: u64) -> (Arc<Seat>, Vec<BlobDigest>) {
        match table.seat(blob(name), bytes) {
            Place::Seated(seat, going) => (seat, going),
            other => panic!("{name}: {other:?}"),
        }
    }

    #[test]
    fn the_least_recently_used_goes_and_what_is_in_use_stays() {
        let mut table = Table::new(100, Vec::new());
        let (a, _) = seated(&mut table, "a", 40);
        drop(seated(&mut table, "b", 40));
        // Used again: `b` is older now than `a`.
        drop(a);
        let (a, _) = seated(&mut table, "a", 40);
        let (_c, going) = seated(&mut table, "c", 40);
        assert_eq!(going, [blob("b")]);
        assert!(matches!(table.seat(blob("b"), 40), Place::Uncached));
        table.evicted(blob("b"));
        assert_eq!(table.held_bytes(), 80);
        // Both seats are taken.
        assert!(matches!(table.seat(blob("d"), 40), Place::Uncached));
        drop(a);
        let (_d, going) = seated(&mut table, "d", 40);
        assert_eq!(going, [blob("a")]);
        assert!(matches!(table.seat(blob("e"), 101), Place::Uncached));
        assert!(matches!(table.seat(blob("f"), 0), Place::Uncached));
    }

    #[test]
    fn sizes_must_agree() {
        let mut table = Table::new(100, Vec::new());
        let (a, _) = seated(&mut table, "a", 40);
        assert!(matches!(table.seat(blob("a"), 41), Place::Uncached));
        drop(a);
        drop(seated(&mut table, "a", 41));
        table.sealed(blob("a"));
        assert!(matches!(table.seat(blob("a"), 40), Place::OtherSize(41)));
        assert_eq!(table.whole_bytes(blob("a")), Some(41));
    }
}
