// SPDX-License-Identifier: Apache-2.0
//! Giving up what root may do and the shim does not need.
//!
//! The shim mounts, unmounts and opens groups of pre-content events: all three are CAP_SYS_ADMIN, which is kept.
//! Where requests are kept in a journal, their sockets need more room than the system allows for: CAP_NET_ADMIN.
//! Everything else goes, for good: from the bounding set too, and with no_new_privs, so that no program that it
//! starts gets any of it back. Files below our directories belong to root, who opens what is his.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

/// What a process of the shim goes on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// What any worker may need, and CAP_SETPCAP, by which that bounds itself.
    Holder,
    /// What mounts need.
    Mounts,
    /// What mounts need whose requests are kept, too.
    JournaledMounts,
}

impl Kept {
    fn capabilities(self) -> CapabilitySet {
        match self {
            Kept::Holder => Kept::JournaledMounts.capabilities() | CapabilitySet::SETPCAP,
            Kept::Mounts => CapabilitySet::SYS_ADMIN,
            Kept::JournaledMounts => CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN,
        }
    }
}

/// Gives up all capabilities but these, as far as this process has them. To be called before other threads
/// start: the kernel changes the calling thread only, and those that it starts from then on. Again is fine.
///
/// **Errors** the first of the kernel's; the rest is given up all the same.
pub fn keep_only(kept: Kept) -> io::Result<()> {
    let kept = kept.capabilities();
    // First the bounding set: that needs a capability.
    let bounded = bound_by(kept);
    let cleared = clear_ambient_capability_set();
    let kept = kept & capabilities(None)?.permitted;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets)?;
    set_no_new_privs(true)?;
    Ok(bounded.and(cleared)?)
}

fn bound_by(kept: CapabilitySet) -> Result<(), Errno> {
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        match capability_is_in_bounding_set(one) {
            Ok(true) if !kept.contains(one) => remove_capability_from_bounding_set(one)?,
            Ok(_) => {}
            // The kernel knows no more.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
