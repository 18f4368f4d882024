// SPDX-License-Identifier: Apache-2.0
//! Numbers of boot lists: little-endian base 128, the shortest form only, at most 64 bits.

use super::BootListError;
use crate::digest::DIGEST_BYTES;

/// The most bytes of a number: 10 times 7 bits.
const VARINT_BYTES_MAX: u32 = 10;

/// Bytes that are read from the front.
#[derive(Debug)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn byte(&mut self) -> Result<u8, BootListError> {
        let (first, rest) = self.0.split_first().ok_or(BootListError::Cut)?;
        self.0 = rest;
        Ok(*first)
    }

    pub(super) fn digest(&mut self) -> Result<[u8; DIGEST_BYTES], BootListError> {
        let (digest, rest) = self.0.split_first_chunk().ok_or(BootListError::Cut)?;
        self.0 = rest;
        Ok(*digest)
    }

    pub(super) fn varint(&mut self) -> Result<u64, BootListError> {
        let mut value = 0_u64;
        for place in 0..VARINT_BYTES_MAX {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            let shifted = bits << (7 * place);
            if shifted >> (7 * place) != bits {
                return Err(BootListError::Number);
            }
            value |= shifted;
            if byte & 0x80 == 0 {
                // A last byte of no bits would be a longer spelling of the same number.
                return if byte == 0 && place > 0 {
                    Err(BootListError::Number)
                } else {
                    Ok(value)
                };
            }
        }
        Err(BootListError::Number)
    }

    pub(super) fn end(self) -> Result<(), BootListError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(BootListError::Trailing)
        }
    }
}

pub(super) fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    loop {
        let [low, ..] = value.to_le_bytes();
        value >>= 7;
        if value == 0 {
            bytes.push(low & 0x7f);
            return;
        }
        bytes.push(low | 0x80);
    }
}

/// Small numbers for small distances, whichever way they go.
pub(super) fn zigzag(distance: i64) -> u64 {
    (distance.cast_unsigned() << 1) ^ (distance >> 63).cast_unsigned()
}

pub(super) fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}
