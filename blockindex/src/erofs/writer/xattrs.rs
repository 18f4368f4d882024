// SPDX-License-Identifier: Apache-2.0
//! Puts xattrs behind an inode.

use zerocopy::IntoBytes;

use super::{InodeFault, Sink};
use crate::erofs::format::{
    XATTR_ALIGN, XATTR_ENTRY_BYTES, XATTR_HEADER_BYTES, XATTR_PREFIXES, XattrEntry, XattrHeader,
};
use crate::tree::{
    IMPLICIT_XATTR, Inode, MARK_VALUE, MAX_NAME_BYTES, OPAQUE_XATTR, RESERVED_XATTR_PREFIXES,
};

/// Most bytes of xattrs that an inode can have: a 16-bit count of four-byte units.
const MAX_XATTR_BYTES: usize = XATTR_HEADER_BYTES + (u16::MAX as usize - 1) * XATTR_ALIGN;

/// Splits a name into the number of its prefix and the rest.
fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|(number, prefix)| {
        let suffix = name.strip_prefix(*prefix)?;
        // A name space needs a name in it; the two ACLs are whole names.
        (prefix.ends_with(b".") != suffix.is_empty()).then_some((*number, suffix))
    })
}

/// The xattrs to write, the mark of an implicit directory among them.
fn xattrs(inode: &Inode) -> impl Iterator<Item = (&[u8], &[u8])> {
    let marked = inode.implicit && inode.is_directory();
    let mark = marked.then_some((IMPLICIT_XATTR, MARK_VALUE));
    inode
        .xattrs
        .iter()
        .map(|(name, value)| (&**name, &**value))
        .chain(mark)
}

pub(super) fn check_xattrs(inode: &Inode) -> Result<(), InodeFault> {
    for (name, value) in &inode.xattrs {
        let reserved = RESERVED_XATTR_PREFIXES
            .iter()
            .any(|prefix| name.starts_with(prefix));
        let opaque = **name == *OPAQUE_XATTR && inode.is_directory() && inode.is_opaque();
        if reserved && !opaque {
            return Err(InodeFault::XattrReserved(name.clone()));
        }
        if split_name(name).is_none() || name.len() > MAX_NAME_BYTES || name.contains(&0) {
            return Err(InodeFault::XattrName(name.clone()));
        }
        if u16::try_from(value.len()).is_err() {
            return Err(InodeFault::XattrBytes(value.len()));
        }
    }
    match xattr_bytes(inode) {
        bytes if bytes > MAX_XATTR_BYTES => Err(InodeFault::XattrBytes(bytes)),
        _ => Ok(()),
    }
}

/// Bytes of an inode's xattr area, 0 when it has none.
pub(super) fn xattr_bytes(inode: &Inode) -> usize {
    let bytes: usize = xattrs(inode)
        .filter_map(|(name, value)| Some((split_name(name)?.1, value)))
        .map(|(suffix, value)| {
            (XATTR_ENTRY_BYTES + suffix.len() + value.len()).next_multiple_of(XATTR_ALIGN)
        })
        .sum();
    if bytes == 0 {
        0
    } else {
        XATTR_HEADER_BYTES + bytes
    }
}

/// The inode field that stands for so many bytes of xattrs.
pub(super) fn xattr_count(bytes: usize) -> u16 {
    match bytes.checked_sub(XATTR_HEADER_BYTES) {
        // `check_xattrs` has seen that this fits.
        Some(entries) => u16::try_from(1 + entries / XATTR_ALIGN).unwrap_or(u16::MAX),
        None => 0,
    }
}

pub(super) fn put_xattrs(inode: &Inode, sink: &mut impl Sink) {
    if xattr_bytes(inode) == 0 {
        return;
    }
    let header = XattrHeader {
        name_filter: 0.into(),
        shared_count: 0,
        reserved: [0; 7],
    };
    sink.put(header.as_bytes());
    for (name, value) in xattrs(inode) {
        let Some((prefix, suffix)) = split_name(name) else {
            continue;
        };
        let entry = XattrEntry {
            name_bytes: u8::try_from(suffix.len()).unwrap_or(u8::MAX),
            prefix,
            value_bytes: u16::try_from(value.len()).unwrap_or(u16::MAX).into(),
        };
        sink.put(entry.as_bytes());
        sink.put(suffix);
        sink.put(value);
        sink.pad_to(sink.position().next_multiple_of(XATTR_ALIGN as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_split_at_the_prefixes_that_kernels_know() {
        for (name, expected) in [
            (&b"user.a"[..], Some((1, &b"a"[..]))),
            (b"system.posix_acl_access", Some((2, b""))),
            (b"system.posix_acl_default", Some((3, b""))),
            (b"trusted.overlay.opaque", Some((4, b"overlay.opaque"))),
            (b"security.capability", Some((6, b"capability"))),
            (b"user.", None),
            (b"user", None),
            (b"system.posix_acl_access2", None),
            (b"system.nfs4_acl", None),
            (b"lustre.x", None),
            (b"", None),
        ] {
            assert_eq!(
                split_name(name),
                expected,
                "{}",
                String::from_utf8_lossy(name)
            );
        }
    }
}
