// SPDX-License-Identifier: Apache-2.0
//! The `meta` file of a layer device: what is durably known about it.
//!
//! A fixed record of [`META_BYTES`] bytes, little-endian, closed by a crc32. It is only ever replaced
//! as a whole (temporary name, write, fsync, rename, fsync of the directory), so a reader sees the
//! old record or the new one. `docs/formats/store.md` has the byte table.

use sluice_blockindex::digest::DiffId;

/// Bytes of the record.
pub(crate) const META_BYTES: usize = 128;

const MAGIC: [u8; 8] = *b"SLUIMETA";
const VERSION: u32 = 1;

const FLAG_CLEAN: u32 = 1;
const FLAG_SEALED: u32 = 2;
const FLAG_FAILED: u32 = 4;
/// Of a seal: only the chunks' digests were proven.
const FLAG_CHUNKS: u32 = 8;

const AT_VERSION: usize = 8;
const AT_COMPATIBLE: usize = 12;
const AT_READ_ONLY: usize = 16;
const AT_INCOMPATIBLE: usize = 20;
const AT_BOOT: usize = 24;
const AT_FLAGS: usize = 40;
const AT_SEALED_AT: usize = 48;
const AT_FAILED_AT: usize = 56;
const AT_ACTUAL: usize = 64;
const AT_CRC: usize = META_BYTES - 4;

/// Which run of the kernel wrote something: `/proc/sys/kernel/random/boot_id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// That of no kernel: what was written under it is checked under every one.
    pub(crate) const NONE: Self = Self([0; 16]);

    /// The boot ID of the running kernel.
    ///
    /// **Errors** when `/proc` is not there or says something else than a UUID.
    pub fn current() -> std::io::Result<Self> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Self::parse(&text).ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::InvalidData, "boot_id is not a UUID")
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
        let mut bytes = [0; 16];
        hex::decode_to_slice(digits, &mut bytes).ok()?;
        Some(Self(bytes))
    }
}

/// What proved that a device is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealProof {
    /// All of it digests to its diff ID: it is this layer, whatever index it has.
    DiffId,
    /// Each chunk has the digest that its index names: it is what the image's manifest pins, and no source for
    /// another index of the same diff ID.
    Chunks,
}

/// That a layer device was found complete and right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealRecord {
    /// When, in seconds since 1970.
    pub at_unix_seconds: u64,
    /// By what.
    pub proof: SealProof,
}

/// That a complete layer device did not have the digest that its diff ID says, or that its index was wrong about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureRecord {
    /// When, in seconds since 1970.
    pub at_unix_seconds: u64,
    /// What its bytes digest to: its diff ID, if it was the index.
    pub actual: DiffId,
}

impl FailureRecord {
    /// What is wrong with a layer that should be `expected`, for people.
    #[must_use]
    pub fn described(&self, expected: DiffId) -> String {
        match self.actual == expected {
            false => format!("its bytes have {}", self.actual),
            true => "its index has other files than its bytes".to_owned(),
        }
    }
}

/// The record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    /// The kernel run in which bits were last set.
    pub(crate) boot: BootId,
    /// Everything the bitmap says was on disk when this was written, and nothing was added since.
    pub(crate) clean: bool,
    /// Complete and digested.
    pub(crate) sealed: Option<SealRecord>,
    /// Complete and found to be something else.
    pub(crate) failed: Option<FailureRecord>,
}

impl Meta {
    /// The record of a device that is new in this kernel run.
    pub(crate) fn fresh(boot: BootId) -> Self {
        Self {
            boot,
            clean: false,
            sealed: None,
            failed: None,
        }
    }

    /// Its bytes.
    pub(crate) fn encode(&self) -> [u8; META_BYTES] {
        let mut out = [0; META_BYTES];
        let mut flags = 0;
        put(&mut out, 0, &MAGIC);
        put(&mut out, AT_VERSION, &VERSION.to_le_bytes());
        put(&mut out, AT_BOOT, &self.boot.0);
        if self.clean {
            flags |= FLAG_CLEAN;
        }
        if let Some(seal) = self.sealed {
            flags |= FLAG_SEALED;
            if seal.proof == SealProof::Chunks {
                flags |= FLAG_CHUNKS;
            }
            put(&mut out, AT_SEALED_AT, &seal.at_unix_seconds.to_le_bytes());
        }
        if let Some(failure) = self.failed {
            flags |= FLAG_FAILED;
            put(
                &mut out,
                AT_FAILED_AT,
                &failure.at_unix_seconds.to_le_bytes(),
            );
            put(&mut out, AT_ACTUAL, failure.actual.as_bytes());
        }
        put(&mut out, AT_FLAGS, &flags.to_le_bytes());
        let crc = crc32fast::hash(&out[..AT_CRC]);
        put(&mut out, AT_CRC, &crc.to_le_bytes());
        out
    }

    /// Reads a record; `None` for anything that is not one of this version, whole and undamaged.
    ///
    /// Bits of the compatible feature set may be set; any bit of the other two makes it unreadable.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; META_BYTES] = bytes.try_into().ok()?;
        let good = bytes[..8] == MAGIC
            && u32_at(bytes, AT_VERSION) == VERSION
            && u32_at(bytes, AT_READ_ONLY) == 0
            && u32_at(bytes, AT_INCOMPATIBLE) == 0
            && u32_at(bytes, AT_CRC) == crc32fast::hash(&bytes[..AT_CRC]);
        if !good {
            return None;
        }
        // Bytes 12..16 are the compatible set: whatever is in it, this version may go on.
        const { assert!(AT_COMPATIBLE + 4 == AT_READ_ONLY) };
        let flags = u32_at(bytes, AT_FLAGS);
        let mut boot = [0; 16];
        boot.copy_from_slice(&bytes[AT_BOOT..AT_BOOT + 16]);
        let mut actual = [0; 32];
        actual.copy_from_slice(&bytes[AT_ACTUAL..AT_ACTUAL + 32]);
        Some(Self {
            boot: BootId(boot),
            clean: flags & FLAG_CLEAN != 0,
            sealed: (flags & FLAG_SEALED != 0).then(|| SealRecord {
                at_unix_seconds: u64_at(bytes, AT_SEALED_AT),
                proof: match flags & FLAG_CHUNKS {
                    0 => SealProof::DiffId,
                    _ => SealProof::Chunks,
                },
            }),
            failed: (flags & FLAG_FAILED != 0).then(|| FailureRecord {
                at_unix_seconds: u64_at(bytes, AT_FAILED_AT),
                actual: DiffId::from_bytes(actual),
            }),
        })
    }
}

fn put(out: &mut [u8; META_BYTES], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u32_at(bytes: &[u8; META_BYTES], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8; META_BYTES], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Meta {
        Meta {
            boot: BootId([7; 16]),
            clean: true,
            sealed: Some(SealRecord {
                at_unix_seconds: 3,
                proof: SealProof::DiffId,
            }),
            failed: Some(FailureRecord {
                at_unix_seconds: 4,
                actual: DiffId::of(b"x"),
            }),
        }
    }

    #[test]
    fn records_round_trip() {
        let by_chunks = Meta {
            sealed: Some(SealRecord {
                at_unix_seconds: 9,
                proof: SealProof::Chunks,
            }),
            ..Meta::fresh(BootId([2; 16]))
        };
        for meta in [example(), by_chunks, Meta::fresh(BootId([1; 16]))] {
            assert_eq!(Meta::decode(&meta.encode()), Some(meta));
        }
    }

    #[test]
    fn any_flipped_bit_makes_it_unreadable() {
        let good = example().encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Meta::decode(&bad), None, "bit {bit}");
        }
        for len in [0, 1, META_BYTES - 1] {
            assert_eq!(Meta::decode(&good[..len]), None, "{len}");
        }
    }

    #[test]
    fn unknown_incompatible_features_are_refused_and_compatible_ones_are_not() {
        for (at, readable) in [
            (AT_COMPATIBLE, true),
            (AT_READ_ONLY, false),
            (AT_INCOMPATIBLE, false),
        ] {
            let mut bytes = example().encode();
            bytes[at] = 1;
            let crc = crc32fast::hash(&bytes[..AT_CRC]);
            bytes[AT_CRC..].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(Meta::decode(&bytes).is_some(), readable, "{at}");
        }
    }

    #[test]
    fn boot_ids_are_uuids() {
        let text = "6fd5ad1b-0d3c-4a4e-8f43-2a86b57d2f19\n";
        assert_eq!(BootId::parse(text).unwrap().0[0], 0x6f);
        assert_eq!(BootId::parse("nope"), None);
        assert!(BootId::current().is_ok());
    }
}
