// SPDX-License-Identifier: Apache-2.0
//! Tar scanner: a layer's uncompressed tar in, its tree and the runs of its files out, in one pass.
//!
//! [`Scanner::push`] takes the bytes in pieces of any size and keeps at most one header (or one PAX
//! or GNU record, up to 1 MiB) besides the tree. It is a state machine without I/O:
//!
//! ```text
//!            zero block          zero block
//!   Header ------------> Zero --------------> Trailer (all that follows is ignored)
//!    | ^ \
//!    | |  x, g, L, K --> Special --> Padding
//!    v |                                |
//!   Content --> Padding -----------> Header
//! ```
//!
//! What an entry means is decided as containerd's archive apply decides it for an overlayfs
//! snapshotter (`apply.rs`), and headers are read as Go's `archive/tar` reads them (`header.rs`,
//! `pax.rs`): a lazily mounted layer and an unpacked one must not differ. What that apply refuses,
//! and what cannot be mapped to runs of the tar, is [`NotLazy`] with a reason; so is what would take
//! more memory or time than a layer may (`budget.rs`).
//!
//! Invariants: the bytes given to a [`TarSink`] are exactly the bytes pushed, in order, until `push`
//! fails; the outcome does not depend on how the tar was cut into pieces; no input panics.

mod apply;
mod budget;
mod header;
mod path;
mod pax;

use std::fmt;

use crate::extent::{DeviceSpace, Extent};
use crate::tree::{Timestamp, Tree};

pub use apply::Entry;
pub(crate) use apply::{Applied, Apply};
use header::{BLOCK, RawHeader};

/// The most bytes of one PAX or GNU record that is read; Go's reader has the same limit.
const SPECIAL_MAX_BYTES: u64 = 1024 * 1024;

/// Why a layer cannot be mounted lazily although its tar is well formed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotLazy {
    /// The content of a GNU or PAX sparse file is not one run of the tar.
    #[error("{path}: sparse file")]
    Sparse {
        /// Its path.
        path: String,
    },
    /// containerd does not unpack entries of this type.
    #[error("{path}: entry of type {kind:?}")]
    EntryType {
        /// Its path.
        path: String,
        /// The type flag.
        kind: char,
    },
    /// A hard link to what is not in this layer, or is no file.
    #[error("{path}: hard link to {target}, which this layer does not have as a file")]
    HardLinkTarget {
        /// The link's path.
        path: String,
        /// Its target.
        target: String,
    },
    /// A parent of the entry is no directory.
    #[error("{path}: a parent is no directory")]
    ParentNotDirectory {
        /// Its path.
        path: String,
    },
    /// More symlinks on the way than containerd follows.
    #[error("{path}: too many symlinks")]
    TooManyLinks {
        /// Its path.
        path: String,
    },
    /// Longer than any path on Linux.
    #[error("{path}: path too long")]
    PathTooLong {
        /// Its path, cut.
        path: String,
    },
    /// A component of the path is no valid file name.
    #[error("{path}: not a valid file name")]
    Name {
        /// Its path.
        path: String,
    },
    /// A whiteout that names nothing.
    #[error("{path}: not a valid whiteout")]
    Whiteout {
        /// Its path.
        path: String,
    },
    /// A whiteout for what this very layer has: containerd refuses it.
    #[error("{path}: whiteout for an entry of the same layer")]
    WhiteoutOfOwn {
        /// Its path.
        path: String,
    },
    /// A symlink whose target is empty or too long.
    #[error("{path}: symlink target of {bytes} bytes")]
    SymlinkTarget {
        /// Its path.
        path: String,
        /// Length of its target.
        bytes: usize,
    },
    /// An owner or group that is no 32-bit ID.
    #[error("{path}: owner {uid}:{gid}")]
    Owner {
        /// Its path.
        path: String,
        /// The user.
        uid: i64,
        /// The group.
        gid: i64,
    },
    /// A device number that Linux does not have.
    #[error("{path}: device {major}:{minor}")]
    DeviceNumber {
        /// Its path.
        path: String,
        /// The major number.
        major: i64,
        /// The minor number.
        minor: i64,
    },
    /// An extended attribute that the tree cannot hold.
    #[error("{path}: extended attribute {name} of {bytes} bytes")]
    Xattr {
        /// Its path.
        path: String,
        /// The attribute's name.
        name: String,
        /// Length of its value.
        bytes: usize,
    },
    /// A directory of the tar is no longer there at its end; containerd refuses that.
    #[error("{path}: directory replaced later in the layer")]
    DirectoryGone {
        /// Its path.
        path: String,
    },
    /// More of something than one layer may have.
    #[error("more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// More than a tree can hold.
    #[error("tree: {reason}")]
    Tree {
        /// What the tree says.
        reason: String,
    },
}

/// A tar that cannot be scanned to its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScanError {
    /// A header whose checksum does not match, or bytes that are no header.
    #[error("tar header at {offset}: wrong checksum")]
    Checksum {
        /// First byte of the header.
        offset: u64,
    },
    /// A header or PAX field that is no number, or out of range.
    #[error("tar header at {offset}: field {field} is no valid number")]
    Number {
        /// First byte of the header.
        offset: u64,
        /// Which field.
        field: &'static str,
    },
    /// PAX records that break their syntax.
    #[error("tar header at {offset}: malformed PAX record")]
    PaxRecord {
        /// First byte of the header.
        offset: u64,
    },
    /// A PAX or GNU record above the cap.
    #[error("tar header at {offset}: record of {bytes} bytes")]
    RecordTooLarge {
        /// First byte of the header.
        offset: u64,
        /// Bytes of the record.
        bytes: u64,
    },
    /// A block of zeros that another header follows.
    #[error("tar at {offset}: data after one block of zeros")]
    AfterZeroBlock {
        /// First byte after the zeros.
        offset: u64,
    },
    /// The tar ends inside a header or a content.
    #[error("tar ends at {offset}, {missing} bytes too early")]
    Truncated {
        /// Where it ends.
        offset: u64,
        /// How many bytes the header or content lacks.
        missing: u64,
    },
    /// Well formed, but not to be mounted lazily.
    #[error(transparent)]
    NotLazy(#[from] NotLazy),
    /// `push` after an error.
    #[error("tar scan continued after an error")]
    Stopped,
}

/// Receives the bytes of a tar while it is scanned.
pub trait TarSink {
    /// Bytes that are not the content of a file: headers, records, padding, the end.
    fn structure(&mut self, bytes: &[u8]);
    /// The content of a file begins; it is never empty and starts on a block of the device.
    fn content_start(&mut self, run: Extent<DeviceSpace>);
    /// Bytes of that content.
    fn content(&mut self, bytes: &[u8]);
    /// The content is complete.
    fn content_end(&mut self);
    /// All bytes of an entry's header and records were passed on, and it was applied; its content, if it
    /// has any, comes next. `again` when the same path had an entry before.
    fn entry(&mut self, _entry: &Entry, _again: bool) {}
}

impl TarSink for () {
    fn structure(&mut self, _bytes: &[u8]) {}
    fn content_start(&mut self, _run: Extent<DeviceSpace>) {}
    fn content(&mut self, _bytes: &[u8]) {}
    fn content_end(&mut self) {}
}

#[derive(Debug)]
enum State {
    /// A header block is gathered in `block`.
    Header,
    /// One block of zeros was read.
    Zero,
    /// A PAX or GNU record is gathered in `special`.
    Special {
        kind: u8,
        remaining: u64,
        padding: u64,
    },
    /// The content of an entry passes; `run` when it belongs to a file of the sink.
    Content {
        remaining: u64,
        padding: u64,
        run: bool,
    },
    /// The rest of the last block passes.
    Padding { remaining: u64 },
    /// Two blocks of zeros were read.
    Trailer,
    /// `push` failed.
    Stopped,
}

/// Streaming scanner of one tar.
#[derive(Debug)]
pub struct Scanner {
    state: State,
    offset: u64,
    block: [u8; BLOCK],
    filled: usize,
    special: Vec<u8>,
    header_offset: u64,
    pending: Pending,
    apply: Apply,
    has_global_records: bool,
}

/// What records said of the next entry.
#[derive(Debug, Default)]
struct Pending {
    records: pax::Records,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

impl Default for Scanner {
    fn default() -> Self {
        Self::new()
    }
}

impl Scanner {
    /// A scanner at the start of a tar.
    pub fn new() -> Self {
        Self {
            state: State::Header,
            offset: 0,
            block: [0; BLOCK],
            filled: 0,
            special: Vec::new(),
            header_offset: 0,
            pending: Pending::default(),
            apply: Apply::default(),
            has_global_records: false,
        }
    }

    /// Whether there was a global PAX header, which is no entry here and is one for some readers.
    pub fn has_global_records(&self) -> bool {
        self.has_global_records
    }

    /// How many bytes were taken.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// About how many bytes the tree takes by now.
    pub fn held_bytes(&self) -> u64 {
        self.apply.budget.held_bytes()
    }

    /// Takes the next bytes of the tar and passes them on to `sink`.
    ///
    /// **Errors**: the tar is malformed or cannot be lazy. The sink then has all bytes up to and
    /// including the header, record or content at fault, and the scanner takes no more.
    pub fn push(&mut self, mut bytes: &[u8], sink: &mut impl TarSink) -> Result<(), ScanError> {
        while !bytes.is_empty() {
            let taken = match self.step(bytes, sink) {
                Ok(taken) => taken,
                Err(error) => {
                    self.state = State::Stopped;
                    return Err(error);
                }
            };
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    /// Ends the tar.
    ///
    /// A tar may lack its end blocks and the padding of its last entry.
    ///
    /// **Errors**: the tar ends inside a header or a content, or cannot be lazy.
    pub fn finish(self) -> Result<Tree, ScanError> {
        let missing = match self.state {
            State::Header | State::Zero if self.filled > 0 => (BLOCK - self.filled) as u64,
            State::Special { remaining, .. } | State::Content { remaining, .. } => remaining,
            State::Stopped => return Err(ScanError::Stopped),
            State::Header | State::Zero | State::Padding { .. } | State::Trailer => 0,
        };
        if missing > 0 {
            return Err(ScanError::Truncated {
                offset: self.offset,
                missing,
            });
        }
        Ok(self.apply.finish()?)
    }

    /// Takes at least one byte off the front of `bytes`; returns how many.
    fn step(&mut self, bytes: &[u8], sink: &mut impl TarSink) -> Result<usize, ScanError> {
        let (taken, complete) = match &mut self.state {
            State::Header | State::Zero => {
                let taken = bytes.len().min(BLOCK - self.filled);
                self.block[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
                self.filled += taken;
                (taken, self.filled == BLOCK)
            }
            State::Special { remaining, .. } => {
                let taken = at_most(bytes, *remaining);
                self.special.extend_from_slice(&bytes[..taken]);
                *remaining -= taken as u64;
                (taken, *remaining == 0)
            }
            State::Content { remaining, .. } | State::Padding { remaining } => {
                let taken = at_most(bytes, *remaining);
                *remaining -= taken as u64;
                (taken, *remaining == 0)
            }
            State::Trailer => (bytes.len(), false),
            State::Stopped => return Err(ScanError::Stopped),
        };
        if matches!(self.state, State::Content { run: true, .. }) {
            sink.content(&bytes[..taken]);
        } else {
            sink.structure(&bytes[..taken]);
        }
        self.offset += taken as u64;
        if let State::Trailer | State::Content { run: false, .. } = self.state {
            self.apply.budget.loose(&bytes[..taken])?;
        }
        if complete {
            self.advance(sink)?;
        }
        Ok(taken)
    }

    /// Leaves a state whose bytes are all there.
    fn advance(&mut self, sink: &mut impl TarSink) -> Result<(), ScanError> {
        self.state = match self.state {
            State::Header => {
                self.filled = 0;
                self.header_offset = self.offset - BLOCK as u64;
                if self.block == [0; BLOCK] {
                    State::Zero
                } else {
                    self.header(sink)?
                }
            }
            State::Zero => {
                self.filled = 0;
                if self.block != [0; BLOCK] {
                    let offset = self.offset - BLOCK as u64;
                    return Err(ScanError::AfterZeroBlock { offset });
                }
                State::Trailer
            }
            State::Special { kind, padding, .. } => {
                self.special(kind)?;
                after(padding)
            }
            State::Content { padding, run, .. } => {
                if run {
                    sink.content_end();
                }
                after(padding)
            }
            State::Padding { .. } => State::Header,
            State::Trailer => State::Trailer,
            State::Stopped => State::Stopped,
        };
        Ok(())
    }

    /// Reads a complete header block.
    fn header(&mut self, sink: &mut impl TarSink) -> Result<State, ScanError> {
        let offset = self.header_offset;
        let raw = header::parse(&self.block, offset)?;
        if let b'x' | b'g' | b'L' | b'K' = raw.kind {
            let (bytes, padding) = size(raw.size, offset)?;
            if bytes > SPECIAL_MAX_BYTES {
                return Err(ScanError::RecordTooLarge { offset, bytes });
            }
            self.special.clear();
            if bytes == 0 {
                self.special(raw.kind)?;
                return Ok(State::Header);
            }
            return Ok(State::Special {
                kind: raw.kind,
                remaining: bytes,
                padding,
            });
        }
        // Go looks at the size in the header block before the records may change it.
        if !is_header_only(raw.kind) {
            size(raw.size, offset)?;
        }
        let pending = std::mem::take(&mut self.pending);
        let entry = merge(raw, &pending, offset)?;
        let header_only = is_header_only(entry.kind);
        let (bytes, padding) = if header_only {
            (0, 0)
        } else {
            size(entry.size, offset)?
        };
        let content = Extent::from_length(self.offset, bytes)
            .filter(|run| run.end().checked_add(padding).is_some())
            .ok_or(ScanError::Number {
                offset,
                field: "size",
            })?;
        let applied = self.apply.entry(&entry, content)?;
        sink.entry(&entry, self.apply.again);
        if bytes == 0 {
            return Ok(State::Header);
        }
        let run = applied == Applied::File;
        if run {
            sink.content_start(content);
        }
        Ok(State::Content {
            remaining: bytes,
            padding,
            run,
        })
    }

    /// Takes a complete PAX or GNU record.
    fn special(&mut self, kind: u8) -> Result<(), ScanError> {
        match kind {
            b'x' => self.pending.records = pax::parse(&self.special, self.header_offset)?,
            b'g' => {
                // containerd ignores global records, and Go's reader forgets all before them.
                pax::parse(&self.special, self.header_offset)?;
                self.pending = Pending::default();
                self.has_global_records = true;
            }
            b'L' => self.pending.long_name = header::until_nul(&self.special).to_vec(),
            _ => self.pending.long_link = header::until_nul(&self.special).to_vec(),
        }
        Ok(())
    }
}

fn after(padding: u64) -> State {
    if padding == 0 {
        State::Header
    } else {
        State::Padding { remaining: padding }
    }
}

fn at_most(bytes: &[u8], limit: u64) -> usize {
    usize::try_from(limit).map_or(bytes.len(), |limit| bytes.len().min(limit))
}

/// A size and the padding after it.
fn size(size: i64, offset: u64) -> Result<(u64, u64), ScanError> {
    let size = u64::try_from(size).map_err(|_| ScanError::Number {
        offset,
        field: "size",
    })?;
    Ok((size, size.next_multiple_of(BLOCK as u64) - size))
}

/// Whether entries of this type have no content, whatever their size field says.
fn is_header_only(kind: u8) -> bool {
    matches!(kind, b'1'..=b'6')
}

/// What the records make of a header.
fn merge(raw: RawHeader, pending: &Pending, offset: u64) -> Result<Entry, ScanError> {
    let records = &pending.records;
    let mut other_fields = raw.other_times;
    for ignored in ["atime", "ctime"] {
        other_fields |= records.time(ignored, offset)?.is_some();
    }
    let or = |long: &[u8], keyword, short: Vec<u8>| match (long, records.get(keyword)) {
        ([], None) => short,
        ([], Some(value)) => value.to_vec(),
        (long, _) => long.to_vec(),
    };
    let name = or(&pending.long_name, "path", raw.name);
    let link_name = or(&pending.long_link, "linkpath", raw.link_name);
    let mtime = records.time("mtime", offset)?;
    // The old type of regular files stood for directories too, told by their names.
    let kind = match (raw.kind, name.last()) {
        (0, Some(b'/')) => b'5',
        (0, _) => b'0',
        (kind, _) => kind,
    };
    let size = records.number("size", offset)?.unwrap_or(raw.size);
    other_fields |= size != 0 && is_header_only(kind);
    Ok(Entry {
        kind,
        name,
        link_name,
        size,
        mode: raw.mode,
        uid: records.number("uid", offset)?.unwrap_or(raw.uid),
        gid: records.number("gid", offset)?.unwrap_or(raw.gid),
        mtime: mtime.unwrap_or(Timestamp {
            seconds: raw.mtime,
            nanoseconds: 0,
        }),
        major: raw.major,
        minor: raw.minor,
        xattrs: records
            .xattrs()
            .map(|(name, value)| (name.to_vec(), value.to_vec()))
            .collect(),
        sparse: raw.kind == b'S' || records.is_sparse(),
        other_fields,
    })
}

/// Name and size of the file whose header a tar begins with; `None` when it does not begin with one.
///
/// **Errors**: no header.
pub(crate) fn first_file(tar: &[u8]) -> Result<Option<(Vec<u8>, u64)>, ScanError> {
    let missing = |actual: usize| ScanError::Truncated {
        offset: actual as u64,
        missing: (BLOCK - actual.min(BLOCK)) as u64,
    };
    let block = tar.first_chunk().ok_or_else(|| missing(tar.len()))?;
    let raw = header::parse(block, 0)?;
    let (bytes, _) = size(raw.size, 0)?;
    Ok(matches!(raw.kind, b'0' | 0).then_some((raw.name, bytes)))
}

/// Bytes for a message: control characters escaped, cut to 200 characters.
pub(crate) fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .take(200)
        .flat_map(char::escape_debug)
        .collect()
}

impl fmt::Display for Scanner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tar scanner at {}", self.offset)
    }
}

#[cfg(test)]
pub(crate) mod tests;
