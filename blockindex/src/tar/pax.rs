// SPDX-License-Identifier: Apache-2.0
//! PAX extended header records: `<length> <keyword>=<value>\n`.
//!
//! **Source**: POSIX.1-2017 `pax`, "pax Extended Header". Go's reader decides the doubtful cases: an
//! empty value keeps what the ustar header says, the last record of a keyword wins.

use std::collections::BTreeMap;

use super::ScanError;
use crate::tree::Timestamp;

/// Keywords that begin so carry an xattr; containerd reads no others (not `LIBARCHIVE.xattr.`).
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";
/// Keywords that begin so describe a sparse file.
const SPARSE_PREFIX: &[u8] = b"GNU.sparse.";
/// Records whose value is a name and therefore has no NUL.
const NAMES: [&[u8]; 4] = [b"path", b"linkpath", b"uname", b"gname"];

/// The records of one extended header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Records(BTreeMap<Vec<u8>, Vec<u8>>);

/// Reads the payload of the extended header whose header block is at `offset`.
pub(super) fn parse(mut payload: &[u8], offset: u64) -> Result<Records, ScanError> {
    let mut records = BTreeMap::new();
    while !payload.is_empty() {
        let (keyword, value, rest) = record(payload).ok_or(ScanError::PaxRecord { offset })?;
        records.insert(keyword.to_vec(), value.to_vec());
        payload = rest;
    }
    Ok(Records(records))
}

/// Splits the first record off: keyword, value, rest.
fn record(payload: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = payload.iter().position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&payload[..space])?).ok()?;
    if length <= space + 1 || length > payload.len() {
        return None;
    }
    let (record, rest) = payload.split_at(length);
    let record = record[space + 1..].strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let (keyword, value) = (&record[..equals], &record[equals + 1..]);
    let with_nul = if NAMES.contains(&keyword) {
        value
    } else {
        keyword
    };
    if keyword.is_empty() || with_nul.contains(&0) {
        return None;
    }
    Some((keyword, value, rest))
}

/// A decimal number as Go's `ParseInt` takes it: an optional sign, then digits.
fn decimal(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

impl Records {
    /// The value of `keyword`, unless it is empty.
    pub(super) fn get(&self, keyword: &str) -> Option<&[u8]> {
        self.0
            .get(keyword.as_bytes())
            .map(Vec::as_slice)
            .filter(|value| !value.is_empty())
    }

    /// The number that `keyword` carries.
    pub(super) fn number(
        &self,
        keyword: &'static str,
        offset: u64,
    ) -> Result<Option<i64>, ScanError> {
        self.get(keyword)
            .map(|value| {
                decimal(value).ok_or(ScanError::Number {
                    offset,
                    field: keyword,
                })
            })
            .transpose()
    }

    /// The time that `keyword` carries, cut to nanoseconds.
    pub(super) fn time(
        &self,
        keyword: &'static str,
        offset: u64,
    ) -> Result<Option<Timestamp>, ScanError> {
        self.get(keyword)
            .map(|value| {
                time(value).ok_or(ScanError::Number {
                    offset,
                    field: keyword,
                })
            })
            .transpose()
    }

    /// Whether any record says that the file is sparse.
    pub(super) fn is_sparse(&self) -> bool {
        self.0
            .keys()
            .any(|keyword| keyword.starts_with(SPARSE_PREFIX))
    }

    /// The xattrs: name and value, in the order of their names.
    pub(super) fn xattrs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0.iter().filter_map(|(keyword, value)| {
            Some((keyword.strip_prefix(XATTR_PREFIX)?, value.as_slice()))
        })
    }
}

/// Seconds with an optional fraction; the sign holds for both.
fn time(text: &[u8]) -> Option<Timestamp> {
    let dot = text
        .iter()
        .position(|byte| *byte == b'.')
        .unwrap_or(text.len());
    let seconds = decimal(&text[..dot])?;
    let fraction = text.get(dot + 1..).unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction
        .iter()
        .copied()
        .chain(std::iter::repeat(b'0'))
        .take(9);
    let nanoseconds = digits.fold(0u32, |value, digit| value * 10 + u32::from(digit - b'0'));
    if nanoseconds != 0 && text.first() == Some(&b'-') {
        let seconds = seconds.checked_sub(1)?;
        return Some(Timestamp {
            seconds,
            nanoseconds: 1_000_000_000 - nanoseconds,
        });
    }
    Some(Timestamp {
        seconds,
        nanoseconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_split() {
        let records = parse(
            b"12 path=a=b\n7 uid=\n27 SCHILY.xattr.user.x=\0=\n\n12 path=ccc\n",
            0,
        );
        let records = records.unwrap();
        assert_eq!(records.get("path"), Some(&b"ccc"[..]));
        assert_eq!(records.get("uid"), None);
        assert_eq!(
            records.xattrs().collect::<Vec<_>>(),
            [(&b"user.x"[..], &b"\0=\n"[..])]
        );
    }

    #[test]
    fn bad_records_are_refused() {
        let cases: [&[u8]; 11] = [
            b"12 path=a=b",
            b"13 path=a=b\n",
            b"11 path=a=b\n",
            b"4 a=\n",
            b"0 a=\n",
            b"-5 a=\n",
            b"99999999999999999999 a=\n",
            b"a=\n",
            b"6 =b\n\n",
            b"8 path\n\n",
            b"10 path=\0\n",
        ];
        for payload in cases {
            assert_eq!(
                parse(payload, 7),
                Err(ScanError::PaxRecord { offset: 7 }),
                "{payload:?}"
            );
        }
    }

    #[test]
    fn times_have_fractions_and_signs() {
        let cases = [
            (&b"0"[..], Some((0, 0))),
            (b"1.5", Some((1, 500_000_000))),
            (b"1.", Some((1, 0))),
            (b"1.0000000019", Some((1, 1))),
            (b"-1.5", Some((-2, 500_000_000))),
            (b"-0.5", Some((-1, 500_000_000))),
            (b"-1", Some((-1, 0))),
            (b"1.x", None),
            (b".5", None),
            (b"", None),
            (b"9223372036854775808", None),
        ];
        for (text, expected) in cases {
            let expected = expected.map(|(seconds, nanoseconds)| Timestamp {
                seconds,
                nanoseconds,
            });
            assert_eq!(time(text), expected, "{text:?}");
        }
    }
}
