// SPDX-License-Identifier: Apache-2.0
//! The mount record: all that a new worker must know of a mount besides its `/dev/fuse` descriptor.
//!
//! It stands in a memfd, so that it lives as long as anybody holds the descriptor and can be kept by
//! somebody who understands nothing of it. Bytes (docs/formats/shim.md has the same table):
//!
//! ```text
//!  0  magic "SLUMOUNT"      12  compatible features        24  state (RecordState)
//!  8  version u32, 1        16  read-only features         28  payload length u32
//!                           20  incompatible features      32  crc32 of the payload
//! 36  reserved, 0           40  payload: protobuf MountRecord
//! ```
//!
//! Life: `Prepared -> Serving -> Leaving`. The one rule that settles races: `Prepared` is written
//! before the mount is made, `Serving` before anybody is told of it. So what a dead worker left
//! `Prepared` is used by nobody and is taken down; anything else is served on.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use prost::Message;
use sluice_proto::shim as wire;

const MAGIC: &[u8; 8] = b"SLUMOUNT";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
const AT_STATE: u64 = 24;
/// Cap on the payload, checked before anything is allocated.
const PAYLOAD_BYTES: u32 = 1 << 20;

/// How far a mount has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordState {
    /// The descriptor is open; the mount may or may not have been made. Nobody uses it.
    Prepared,
    /// Mounted and announced.
    Serving,
    /// Unmounted from its mountpoint, but something still uses it.
    Leaving,
}

impl RecordState {
    const ALL: [RecordState; 3] = [
        RecordState::Prepared,
        RecordState::Serving,
        RecordState::Leaving,
    ];

    fn number(self) -> u32 {
        match self {
            RecordState::Prepared => 1,
            RecordState::Serving => 2,
            RecordState::Leaving => 3,
        }
    }
}

/// A record in its memfd.
#[derive(Debug)]
pub struct Record(File);

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("mount record: {what}"))
}

impl Record {
    /// A new record, [`RecordState::Prepared`].
    pub fn create(payload: &wire::MountRecord) -> io::Result<Record> {
        let record = Record(memfd_create("sluice-mount", MFdFlags::MFD_CLOEXEC)?.into());
        record.write(payload)?;
        Ok(record)
    }

    /// Takes over a record's descriptor and reads it.
    pub fn open(fd: OwnedFd) -> io::Result<(Record, RecordState, wire::MountRecord)> {
        let file = File::from(fd);
        let mut header = [0u8; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let word = |at: usize| {
            let mut bytes = [0u8; 4];
            bytes.copy_from_slice(&header[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        if &header[..8] != MAGIC {
            return Err(damaged("wrong magic"));
        }
        if word(8) != VERSION || word(16) != 0 || word(20) != 0 {
            return Err(damaged("a version or feature that we do not know"));
        }
        let state = RecordState::ALL
            .into_iter()
            .find(|state| state.number() == word(24));
        let state = state.ok_or(damaged("unknown state"))?;
        if word(28) > PAYLOAD_BYTES {
            return Err(damaged("payload too long"));
        }
        let mut payload = vec![0u8; usize::try_from(word(28)).map_err(io::Error::other)?];
        file.read_exact_at(&mut payload, HEADER_BYTES as u64)?;
        if crc32fast::hash(&payload) != word(32) {
            return Err(damaged("crc differs"));
        }
        let payload = wire::MountRecord::decode(payload.as_slice()).map_err(io::Error::other)?;
        Ok((Record(file), state, payload))
    }

    /// Replaces the payload. Only while the record is [`RecordState::Prepared`]: a cut write makes
    /// it unreadable, and then it must be one that nobody needs.
    pub fn write(&self, payload: &wire::MountRecord) -> io::Result<()> {
        let payload = payload.encode_to_vec();
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|&length| length <= PAYLOAD_BYTES);
        let length = length.ok_or(damaged("payload too long"))?;
        let words = [VERSION, 0, 0, 0, RecordState::Prepared.number(), length];
        let mut bytes = MAGIC.to_vec();
        for word in words.into_iter().chain([crc32fast::hash(&payload), 0]) {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&payload);
        self.0.write_all_at(&bytes, 0)
    }

    /// Moves the record on.
    pub fn set_state(&self, state: RecordState) -> io::Result<()> {
        self.0.write_all_at(&state.number().to_le_bytes(), AT_STATE)
    }
}

impl AsFd for Record {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(connection: u32) -> wire::MountRecord {
        wire::MountRecord {
            mount: Some(wire::Mount {
                key: "k".into(),
                ..Default::default()
            }),
            connection,
        }
    }

    fn reopen(record: &Record) -> io::Result<(Record, RecordState, wire::MountRecord)> {
        Record::open(record.as_fd().try_clone_to_owned()?)
    }

    #[test]
    fn a_record_outlives_its_writer() {
        let record = Record::create(&payload(0)).unwrap();
        record.write(&payload(7)).unwrap();
        let kept = record.as_fd().try_clone_to_owned().unwrap();
        record.set_state(RecordState::Serving).unwrap();
        drop(record);
        let (record, state, read) = Record::open(kept).unwrap();
        assert_eq!((state, read), (RecordState::Serving, payload(7)));
        record.set_state(RecordState::Leaving).unwrap();
        assert_eq!(reopen(&record).unwrap().1, RecordState::Leaving);
    }

    #[test]
    fn a_damaged_record_is_refused() {
        for (at, what) in [
            (0, "magic"),
            (8, "version"),
            (20, "feature"),
            (24, "state"),
            (41, "crc"),
        ] {
            let record = Record::create(&payload(1)).unwrap();
            record.0.write_all_at(&[0xee], at).unwrap();
            let error = reopen(&record).unwrap_err().to_string();
            assert!(error.contains(what), "{at}: {error}");
        }
        let record = Record::create(&payload(1)).unwrap();
        record.0.write_all_at(&[0xff; 4], 28).unwrap();
        assert!(reopen(&record).is_err());
        record.0.set_len(10).unwrap();
        assert!(reopen(&record).is_err());
    }

    /// The example of docs/formats/shim.md.
    #[test]
    fn the_documented_example_is_what_we_write() {
        let record = Record::create(&payload(7)).unwrap();
        let mut bytes = vec![0u8; 47];
        record.0.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(
            hex::encode(bytes),
            "534c554d4f554e54010000000000000000000000000000000100000007000000692ea0dd000000000a030a016b1007"
        );
    }
}
