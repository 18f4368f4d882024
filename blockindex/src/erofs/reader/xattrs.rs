// SPDX-License-Identifier: Apache-2.0
//! Extended attributes in place.
//!
//! They follow the inode: a header, then entries at multiples of four bytes, each with its name
//! (without a prefix that a number stands for) and its value.

use super::{InodeView, Nid, TreeReader, record, slice};
use crate::erofs::TreeError;
use crate::erofs::format::{
    INODE_BYTES, XATTR_ALIGN, XATTR_ENTRY_BYTES, XATTR_HEADER_BYTES, XATTR_PREFIXES, XattrEntry,
    XattrHeader,
};

/// The name of an xattr, in the two parts in which it stands on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrName<'a> {
    /// The beginning, with its dot where it has one.
    pub prefix: &'static [u8],
    /// The rest; may be empty.
    pub suffix: &'a [u8],
}

impl XattrName<'_> {
    /// Bytes of the full name.
    pub fn bytes(&self) -> usize {
        self.prefix.len() + self.suffix.len()
    }

    /// Whether this is the name.
    pub fn is(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix) == Some(self.suffix)
    }

    /// Whether the full name begins so.
    pub fn begins_with(&self, beginning: &[u8]) -> bool {
        match beginning.strip_prefix(self.prefix) {
            Some(rest) => self.suffix.starts_with(rest),
            None => self.prefix.starts_with(beginning),
        }
    }

    /// The full name; allocates.
    pub fn to_boxed(&self) -> Box<[u8]> {
        [self.prefix, self.suffix].concat().into()
    }
}

/// The xattrs of an inode, in the order on disk; ends after the first error.
#[derive(Debug, Clone)]
pub struct Xattrs<'a> {
    nid: Nid,
    entries: &'a [u8],
    at: usize,
}

impl<'a> Xattrs<'a> {
    fn parse(&mut self) -> Result<(XattrName<'a>, &'a [u8]), &'static str> {
        let outside = "an entry lies outside the xattrs";
        let rest = &self.entries[self.at..];
        let entry: &XattrEntry = record(rest, 0, "").map_err(|_| outside)?;
        let prefix = XATTR_PREFIXES
            .iter()
            .find(|(number, _)| *number == entry.prefix)
            .ok_or("an entry has an unknown prefix")?
            .1;
        let name_end = XATTR_ENTRY_BYTES + usize::from(entry.name_bytes);
        let value_end = name_end + usize::from(entry.value_bytes.get());
        let suffix = rest.get(XATTR_ENTRY_BYTES..name_end).ok_or(outside)?;
        let value = rest.get(name_end..value_end).ok_or(outside)?;
        // The kernel wants the padding inside too.
        let end = value_end.next_multiple_of(XATTR_ALIGN);
        if end > rest.len() {
            return Err(outside);
        }
        self.at += end;
        Ok((XattrName { prefix, suffix }, value))
    }
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = Result<(XattrName<'a>, &'a [u8]), TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.entries.len() {
            return None;
        }
        let at = self.at as u64;
        let parsed = self.parse();
        Some(parsed.map_err(|fault| {
            self.at = self.entries.len();
            TreeError::Xattr {
                nid: self.nid,
                at,
                fault,
            }
        }))
    }
}

impl<'a> TreeReader<'a> {
    /// Lists the xattrs of an inode.
    pub fn xattrs(&self, nid: Nid) -> Result<Xattrs<'a>, TreeError> {
        self.xattrs_of(&self.inode(nid)?)
    }

    /// Lists the xattrs of an inode that is at hand.
    pub fn xattrs_of(&self, inode: &InodeView) -> Result<Xattrs<'a>, TreeError> {
        let nid = inode.nid;
        if inode.has_no_xattrs() {
            return Ok(Xattrs {
                nid,
                entries: &[],
                at: 0,
            });
        }
        let start = inode.offset() + INODE_BYTES as u64;
        let area = slice(self.bytes, start, inode.xattr_bytes as u64, "xattrs")?;
        let header: &XattrHeader = record(area, 0, "xattr header")?;
        if header.shared_count != 0 {
            return Err(TreeError::Xattr {
                nid,
                at: 0,
                fault: "there are shared xattrs",
            });
        }
        Ok(Xattrs {
            nid,
            entries: &area[XATTR_HEADER_BYTES..],
            at: 0,
        })
    }

    /// The value of one xattr.
    pub fn xattr(&self, nid: Nid, name: &[u8]) -> Result<Option<&'a [u8]>, TreeError> {
        self.xattr_of(&self.inode(nid)?, name)
    }

    /// The value of one xattr of an inode that is at hand.
    pub fn xattr_of(&self, inode: &InodeView, name: &[u8]) -> Result<Option<&'a [u8]>, TreeError> {
        for entry in self.xattrs_of(inode)? {
            let (found, value) = entry?;
            if found.is(name) {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}
