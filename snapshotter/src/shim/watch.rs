// SPDX-License-Identifier: Apache-2.0
//! Watches: the worker answers the kernel's events of the devices below a run that the kernel mounts
//! while not all of it is here (the `erofs` back-end).
//!
//! ```text
//!   reader ── reads a file ──> EROFS ── reads a device ──> event ──> a slot in shared memory
//!                                                                      │ one thread per watch
//!      <── allow ── present <─────────────────────────────────────────┤
//!      <── allow or deny ── waiting reads <── daemon <── missing <────┘
//! ```
//!
//! A watch has one fanotify group. Its descriptor, the slots ([`EventSlots`]) and a record
//! ([`super::record`]) are with the holder, and the daemon has duplicates: when the LAST descriptor of
//! a group is closed, the kernel asks nobody any more, and holes are read as zeros. So:
//!
//! - a device is marked before the daemon has the kernel mount it, and until it is sealed, or nothing
//!   has the file system open any more;
//! - every event is answered: allowed when every chunk of its range is present, else denied, by
//!   whoever drops it at the latest;
//! - an event that finds all slots but one taken is answered at once: denied if it would have to wait;
//! - a slot is cleared after its answer and before its descriptor is closed. So of two events that are
//!   unanswered no two have one number, and a slot that stands names the event that it was read for.
//!
//! **Taking over** from a dead worker: the numbers of unanswered events are occupied before anything
//! else is opened ([`reserve`]), and served with those that come. An event that its worker died over
//! before it had noted the device waits for its range on every device of the watch.
//!
//! The daemon and this process read and write devices by themselves, marked or not: their events are
//! allowed unseen.
//!
//! **Locks** each for map operations only; none is held with another.

mod events;
mod own;
mod table;

pub use events::EventReply;
pub use table::{WATCH_PREFIX, Watches, reserve};
