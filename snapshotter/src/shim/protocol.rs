// SPDX-License-Identifier: Apache-2.0
//! Framing of the shim protocol, and its messages as our own types. Pure.

use std::path::PathBuf;
use std::time::Duration;

use prost::Message;
use sluice_blockindex::extent::{DeviceSpace, Extent};
use sluice_proto::shim as wire;
use thiserror::Error;

use crate::mount::{DeviceSpec, FirstRead, FirstReads, MountSpec};

/// Largest message: the bytes of the largest read, and what goes with them. A mount of 127 devices with long
/// paths is below 100 KiB.
pub const MESSAGE_BYTES: usize = (1 << 20) + (64 << 10);

/// What is wrong with a message.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// The length before a message is beyond [`MESSAGE_BYTES`].
    #[error("a message of {length} bytes, the limit is {MESSAGE_BYTES}")]
    TooLong {
        /// What the other side announced.
        length: u64,
    },
    /// The length before a message is no varint.
    #[error("the length before a message cannot be read")]
    BadLength,
    /// The message cannot be decoded.
    #[error("a message cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    /// A field does not hold what it must.
    #[error("field {field} of a message is wrong")]
    BadField {
        /// Which one.
        field: &'static str,
    },
}

/// Bytes of an envelope, its length before it.
pub fn frame(id: u64, body: wire::envelope::Body) -> Vec<u8> {
    wire::Envelope {
        id,
        body: Some(body),
    }
    .encode_length_delimited_to_vec()
}

/// Cuts a byte stream into envelopes.
#[derive(Debug, Default)]
pub struct Unframer {
    bytes: Vec<u8>,
    taken: usize,
}

impl Unframer {
    /// Takes in what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message; `None` until more bytes are there. After an error the stream is lost.
    pub fn take(&mut self) -> Result<Option<wire::Envelope>, ProtocolError> {
        let rest = &self.bytes[self.taken..];
        let Some((length, width)) = varint(rest)? else {
            return Ok(None);
        };
        let length = usize::try_from(length)
            .ok()
            .filter(|&length| length <= MESSAGE_BYTES)
            .ok_or(ProtocolError::TooLong { length })?;
        let Some(message) = rest.get(width..width + length) else {
            return Ok(None);
        };
        let envelope = wire::Envelope::decode(message)?;
        self.taken += width + length;
        Ok(Some(envelope))
    }
}

/// The varint at the start and its width.
fn varint(bytes: &[u8]) -> Result<Option<(u64, usize)>, ProtocolError> {
    let mut value = 0u64;
    // Five bytes hold 35 bits, more than any length we accept.
    for (at, &byte) in bytes.iter().take(5).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some((value, at + 1)));
        }
    }
    if bytes.len() >= 5 {
        Err(ProtocolError::BadLength)
    } else {
        Ok(None)
    }
}

/// The newest version that both sides speak.
pub fn common_version(
    ours: std::ops::RangeInclusive<u32>,
    theirs: std::ops::RangeInclusive<u32>,
) -> Option<u32> {
    let newest = *ours.end().min(theirs.end());
    (newest >= *ours.start() && newest >= *theirs.start()).then_some(newest)
}

/// A deadline as the wire has it: milliseconds, 0 for none. A deadline below one millisecond is one.
pub fn deadline_to_wire(deadline: Option<Duration>) -> u64 {
    deadline.map_or(0, |d| {
        u64::try_from(d.as_millis()).unwrap_or(u64::MAX).max(1)
    })
}

/// The reverse of [`deadline_to_wire`].
pub fn deadline_from_wire(milliseconds: u64) -> Option<Duration> {
    (milliseconds > 0).then(|| Duration::from_millis(milliseconds))
}

impl From<&MountSpec> for wire::Mount {
    fn from(spec: &MountSpec) -> wire::Mount {
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        wire::Mount {
            key: spec.key.clone(),
            mountpoint: text(&spec.mountpoint),
            tree: text(&spec.tree),
            devices: spec
                .devices
                .iter()
                .map(|device| wire::Device {
                    diff_id: device.diff_id.to_string(),
                    index_digest: device.index_digest.to_string(),
                    directory: text(&device.directory),
                })
                .collect(),
            read_deadline_ms: deadline_to_wire(spec.read_deadline),
            record_ms: deadline_to_wire(spec.record),
            over_fuse: false,
        }
    }
}

impl TryFrom<wire::Mount> for MountSpec {
    type Error = ProtocolError;

    fn try_from(mount: wire::Mount) -> Result<MountSpec, ProtocolError> {
        let bad = |field| ProtocolError::BadField { field };
        let mut devices = Vec::with_capacity(mount.devices.len());
        for device in mount.devices {
            devices.push(DeviceSpec {
                diff_id: device.diff_id.parse().map_err(|_| bad("diff_id"))?,
                index_digest: device
                    .index_digest
                    .parse()
                    .map_err(|_| bad("index_digest"))?,
                directory: device.directory.into(),
            });
        }
        let spec = MountSpec {
            key: mount.key,
            mountpoint: mount.mountpoint.into(),
            tree: mount.tree.into(),
            devices,
            read_deadline: deadline_from_wire(mount.read_deadline_ms),
            record: deadline_from_wire(mount.record_ms),
        };
        spec.check().map_err(|_| bad("mount"))?;
        Ok(spec)
    }
}

impl From<FirstReads> for wire::ReadsReply {
    fn from(page: FirstReads) -> wire::ReadsReply {
        let milliseconds = |after: Duration| u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
        let reads = page.reads.iter();
        wire::ReadsReply {
            recorded: page.recorded,
            complete: page.complete,
            devices: reads.clone().map(|read| read.device.into()).collect(),
            chunks: reads.clone().map(|read| read.chunk).collect(),
            after_ms: reads.map(|read| milliseconds(read.after)).collect(),
            recording: page.recording,
        }
    }
}

impl TryFrom<wire::ReadsReply> for FirstReads {
    type Error = ProtocolError;

    fn try_from(reply: wire::ReadsReply) -> Result<FirstReads, ProtocolError> {
        let bad = |field| ProtocolError::BadField { field };
        if reply.chunks.len() != reply.devices.len() || reply.after_ms.len() != reply.devices.len()
        {
            return Err(bad("reads"));
        }
        let lists = reply.devices.into_iter().zip(reply.chunks);
        let reads = lists
            .zip(reply.after_ms)
            .map(|((device, chunk), after)| {
                Ok(FirstRead {
                    device: u16::try_from(device).map_err(|_| bad("device"))?,
                    chunk,
                    after: Duration::from_millis(after.into()),
                })
            })
            .collect::<Result<_, ProtocolError>>()?;
        Ok(FirstReads {
            recorded: reply.recorded,
            recording: reply.recording,
            complete: reply.complete,
            reads,
        })
    }
}

/// What a request wants, in words; for logs.
pub fn describe(body: &wire::envelope::Body) -> String {
    use wire::envelope::Body;
    match body {
        Body::Mount(mount) => format!("mount {}", mount.key),
        Body::Unmount(unmount) => format!("unmount {}", unmount.key),
        Body::Check(check) => format!("check {}", check.key),
        Body::Reads(reads) => format!("first reads of {}", reads.key),
        Body::Watch(watch) => {
            let key = watch.mount.as_ref().map_or("", |mount| &mount.key);
            format!("watch {key}")
        }
        Body::Unwatch(unwatch) => format!("unwatch {}", unwatch.key),
        Body::Upgrade(upgrade) => format!("go on as {}", upgrade.binary),
        Body::Watches(_) => "list watches".to_owned(),
        Body::List(_) => "list mounts".to_owned(),
        Body::Steps(_) => "list stuck steps".to_owned(),
        Body::Shutdown(_) => "shut down".to_owned(),
        // Those of the worker, and answers.
        _ => "another message".to_owned(),
    }
}

/// The range of a fill.
pub fn fill_extent(fill: &wire::Fill) -> Result<Extent<DeviceSpace>, ProtocolError> {
    Extent::new(fill.start, fill.end).ok_or(ProtocolError::BadField { field: "extent" })
}

#[cfg(test)]
mod tests {
    use sluice_blockindex::digest::{DiffId, IndexDigest};
    use sluice_proto::shim::envelope::Body;

    use super::*;

    #[test]
    fn messages_survive_any_cut() {
        let mut stream = frame(7, Body::Shutdown(wire::Shutdown {}));
        stream.extend(frame(
            8,
            Body::MountReply(wire::MountReply {
                error: "e".repeat(300),
            }),
        ));
        for cut in 1..stream.len() {
            let mut unframer = Unframer::default();
            let mut got = Vec::new();
            for part in stream.chunks(cut) {
                unframer.push(part);
                while let Some(envelope) = unframer.take().unwrap() {
                    got.push(envelope.id);
                }
            }
            assert_eq!(got, [7, 8], "cut at {cut}");
        }
    }

    #[test]
    fn absurd_lengths_are_refused() {
        let mut unframer = Unframer::default();
        unframer.push(&[0xff, 0xff, 0xff, 0x7f]);
        assert!(matches!(
            unframer.take(),
            Err(ProtocolError::TooLong { .. })
        ));
        let mut unframer = Unframer::default();
        unframer.push(&[0xff; 5]);
        assert!(matches!(unframer.take(), Err(ProtocolError::BadLength)));
        let mut unframer = Unframer::default();
        unframer.push(&[2, 0xff, 0xff]);
        assert!(matches!(unframer.take(), Err(ProtocolError::Decode(_))));
    }

    #[test]
    fn versions_meet_where_they_can() {
        assert_eq!(common_version(1..=1, 1..=1), Some(1));
        assert_eq!(common_version(1..=3, 2..=5), Some(3));
        assert_eq!(common_version(4..=5, 1..=3), None);
        assert_eq!(common_version(1..=3, 4..=5), None);
    }

    #[test]
    fn a_mount_survives_the_wire() {
        let spec = MountSpec {
            key: "sha256:ab".into(),
            mountpoint: "/mnt/a b".into(),
            tree: "/t".into(),
            devices: vec![DeviceSpec {
                diff_id: DiffId::of(b"d"),
                index_digest: IndexDigest::of(b"i"),
                directory: "/d".into(),
            }],
            read_deadline: Some(Duration::from_micros(10)),
            record: Some(Duration::from_secs(7)),
        };
        let back = MountSpec::try_from(wire::Mount::from(&spec)).unwrap();
        assert_eq!(back.read_deadline, Some(Duration::from_millis(1)));
        assert_eq!(
            MountSpec {
                read_deadline: spec.read_deadline,
                ..back
            },
            spec
        );
        let page = FirstReads {
            recorded: true,
            recording: "k#1.2".into(),
            complete: true,
            reads: vec![FirstRead {
                device: 3,
                chunk: 70_000,
                after: Duration::from_millis(1200),
            }],
        };
        let reply = wire::ReadsReply::from(page.clone());
        assert_eq!(FirstReads::try_from(reply.clone()).unwrap(), page);
        for broken in [
            wire::ReadsReply {
                chunks: vec![1, 2],
                ..reply.clone()
            },
            wire::ReadsReply {
                devices: vec![65_536],
                ..reply
            },
        ] {
            assert!(FirstReads::try_from(broken).is_err());
        }
        let mut broken = wire::Mount::from(&spec);
        broken.devices[0].diff_id = "sha256:zz".into();
        assert!(MountSpec::try_from(broken).is_err());
    }
}
