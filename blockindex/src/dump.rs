// SPDX-License-Identifier: Apache-2.0
//! A tree as text: for tests, for `sluice inspect`, and for people.
//!
//! One line per name, a directory before what is in it, names in the order of their bytes:
//!
//! ```text
//! / d 0755 0:0 @0.000000000
//! /a f 0644 1:2 @-5.000000001 12 bytes at device 1 block 3 user.k="v"
//! /b = /a
//! /l l 0777 0:0 @0.000000000 -> a
//! /n c 0600 0:0 @0.000000000 1:3
//! ```
//!
//! Bytes other than visible ASCII, and the backslash and quote, are written `\xNN`. A further name
//! of an inode refers to the first. Positions in the image do not appear.

use std::collections::HashMap;
use std::fmt::{self, Write};

use crate::erofs::{
    FileType, InodeView, MAX_DEPTH, NameBudget, Nid, ReadDir, TreeError, TreeReader,
};

/// Writes a tree as text.
///
/// **Errors**: any [`TreeError`] of bytes that were not validated, then in bounded time. Memory: the text, and a name per inode with several.
pub fn dump(reader: TreeReader<'_>) -> Result<String, TreeError> {
    let mut text = String::new();
    let mut linked: HashMap<Nid, String> = HashMap::new();
    let mut budget = NameBudget::new(&reader);
    let root = reader.inode(reader.root())?;
    line(&mut text, &reader, "/", &root)?;
    // The listings on the way to the current directory, each with the length of its path.
    let mut path = String::new();
    let mut stack: Vec<(ReadDir<'_>, usize)> = vec![(reader.read_dir_of(&root, 0)?, 0)];
    while let Some((listing, path_bytes)) = stack.last_mut() {
        path.truncate(*path_bytes);
        let Some(entry) = listing.next().transpose()? else {
            stack.pop();
            continue;
        };
        if matches!(entry.name, b"." | b"..") {
            continue;
        }
        budget.spend()?;
        let _ = write!(path, "/{}", Escaped(entry.name));
        let view = reader.inode(entry.nid)?;
        if let Some(first) = linked.get(&entry.nid) {
            let _ = writeln!(text, "{path} = {first}");
            continue;
        }
        line(&mut text, &reader, &path, &view)?;
        if view.file_type == FileType::Directory {
            if stack.len() as u64 > u64::from(MAX_DEPTH) {
                let (actual, limit) = (stack.len() as u64, u64::from(MAX_DEPTH));
                return Err(TreeError::Limit {
                    what: "depth",
                    actual,
                    limit,
                });
            }
            stack.push((reader.read_dir_of(&view, 0)?, path.len()));
        } else if view.links > 1 {
            linked.insert(entry.nid, path.clone());
        }
    }
    Ok(text)
}

fn line(
    text: &mut String,
    reader: &TreeReader<'_>,
    path: &str,
    view: &InodeView,
) -> Result<(), TreeError> {
    let letter = match view.file_type {
        FileType::Regular => 'f',
        FileType::Directory => 'd',
        FileType::CharDevice => 'c',
        FileType::BlockDevice => 'b',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
        FileType::Symlink => 'l',
    };
    let InodeView {
        permissions,
        uid,
        gid,
        mtime,
        ..
    } = view;
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "{path} {letter} {permissions:04o} {uid}:{gid} @{}.{:09}",
        mtime.seconds, mtime.nanoseconds
    );
    match view.file_type {
        FileType::Regular => {
            let _ = write!(text, " {} bytes", view.size_bytes);
            if let Some(run) = reader.run_of(view)? {
                let _ = write!(text, " at device {} block {}", run.device, run.start_block);
            }
        }
        FileType::Symlink => {
            let _ = write!(text, " -> {}", Escaped(reader.symlink_of(view)?));
        }
        FileType::CharDevice | FileType::BlockDevice => {
            let _ = write!(text, " {:?}", view.device_number);
        }
        FileType::Directory | FileType::Fifo | FileType::Socket => {}
    }
    for xattr in reader.xattrs_of(view)? {
        let (name, value) = xattr?;
        let (prefix, suffix) = (Escaped(name.prefix), Escaped(name.suffix));
        let _ = write!(text, " {prefix}{suffix}=\"{}\"", Escaped(value));
    }
    text.push('\n');
    Ok(())
}

struct Escaped<'a>(&'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            match byte {
                b'\\' | b'"' => write!(f, "\\x{byte:02x}")?,
                0x21..=0x7e => f.write_char(char::from(*byte))?,
                _ => write!(f, "\\x{byte:02x}")?,
            }
        }
        Ok(())
    }
}
