// SPDX-License-Identifier: Apache-2.0
//! A tar with GNU or PAX sparse files, written out in full.
//!
//! The scanner maps files to runs of the tar, so it refuses sparse ones. Here a tar is copied entry by
//! entry; a sparse entry becomes an ordinary one whose holes are holes of the output file. Formats:
//! old GNU (type `S`, map in the header and its extension blocks), PAX 0.0 and 0.1 (map in records),
//! PAX 1.0 (map before the data). All else is copied as it is. Blocks.
//!
//! **Source** GNU tar manual, "Sparse Formats".

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::{LayerUnpackError, Until};

const BLOCK: usize = 512;
const BLOCK_BYTES: u64 = 512;
/// Records and maps beyond this are refused: the scanner refuses such records as well.
const RECORD_CAP_BYTES: u64 = 1 << 20;
/// More entries in a sparse map than this are refused.
const MAP_CAP: usize = 1 << 20;

/// A piece of data of a sparse file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    offset: u64,
    bytes: u64,
}

/// What makes an entry sparse.
#[derive(Debug, Default)]
struct Sparse {
    pieces: Vec<Piece>,
    real_bytes: u64,
    /// Bytes of the map before the data.
    map_bytes: u64,
    name: Option<Vec<u8>>,
}

struct Expander<'a> {
    from: &'a File,
    to: File,
    at: u64,
    /// Bytes of the tar.
    end: u64,
    out: u64,
    cap_bytes: u64,
    until: &'a Until,
}

/// Writes `tar` to `to` with sparse files in full.
///
/// **Errors** also when the work is called off.
pub(super) fn expand(
    tar: &File,
    to: File,
    cap_bytes: u64,
    until: &Until,
) -> Result<File, LayerUnpackError> {
    let failed = LayerUnpackError::io("expand sparse files");
    let end = match tar.metadata() {
        Ok(metadata) => metadata.len(),
        Err(error) => return Err(failed(error)),
    };
    let mut expander = Expander {
        from: tar,
        to,
        at: 0,
        end,
        out: 0,
        cap_bytes,
        until,
    };
    match expander.run() {
        Ok(()) => Ok(expander.to),
        Err(error) => {
            until.check()?;
            Err(failed(error))
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("tar with sparse files: {what}"),
    )
}

impl Expander<'_> {
    fn run(&mut self) -> io::Result<()> {
        // PAX headers of the entry to come: where each lies, and its records.
        let mut pending: Vec<(u64, u64)> = Vec::new();
        let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        while self.end - self.at >= BLOCK_BYTES {
            let header = self.block(self.at)?;
            if header.iter().all(|byte| *byte == 0) {
                break;
            }
            let size = number(&header[124..136])?;
            let start = self.at;
            let data = start + BLOCK_BYTES;
            match header[156] {
                b'x' => {
                    records.extend(self.records(data, size)?);
                    self.at = self.after(data, size)?;
                    pending.push((start, self.at));
                }
                b'g' | b'L' | b'K' => {
                    self.at = self.after(data, size)?;
                    self.copy(start, self.at)?;
                }
                b'S' => {
                    let (sparse, data) = self.old_gnu(&header, data)?;
                    self.flush(&mut pending, &records, false)?;
                    records.clear();
                    self.entry(&header, sparse, data, size)?;
                }
                _ => {
                    let size = record(&records, b"size").map_or(Ok(size), decimal)?;
                    match self.pax(&records, data)? {
                        Some(sparse) => {
                            self.flush(&mut pending, &records, true)?;
                            records.clear();
                            let data_start = data + sparse.map_bytes;
                            let stored = size.saturating_sub(sparse.map_bytes);
                            self.entry(&header, sparse, data_start, stored)?;
                        }
                        None => {
                            self.flush(&mut pending, &records, false)?;
                            records.clear();
                            let size = if has_content(header[156]) { size } else { 0 };
                            self.at = self.after(data, size)?;
                            self.copy(start, self.at)?;
                        }
                    }
                }
            }
        }
        self.out += 2 * BLOCK_BYTES;
        self.to.set_len(self.out)
    }

    /// Writes the PAX headers of an entry: as they are, or without what speaks of sparseness.
    fn flush(
        &mut self,
        pending: &mut Vec<(u64, u64)>,
        records: &[(Vec<u8>, Vec<u8>)],
        strip: bool,
    ) -> io::Result<()> {
        if !strip {
            for (start, end) in pending.drain(..) {
                self.copy(start, end)?;
            }
            return Ok(());
        }
        let Some((start, _)) = pending.first().copied() else {
            return Ok(());
        };
        pending.clear();
        let mut body = Vec::new();
        for (key, value) in records {
            if !key.starts_with(b"GNU.sparse.") && key != b"size" {
                body.extend(pax_record(key, value));
            }
        }
        if let Some(name) = record(records, b"GNU.sparse.name") {
            body.extend(pax_record(b"path", name));
        }
        let mut header = self.block(start)?;
        set_number(&mut header[124..136], body.len() as u64);
        set_checksum(&mut header);
        self.write(&header)?;
        self.write(&body)?;
        self.pad()
    }

    fn entry(
        &mut self,
        header: &[u8; BLOCK],
        sparse: Sparse,
        data: u64,
        stored_bytes: u64,
    ) -> io::Result<()> {
        let total: u64 = sparse.pieces.iter().try_fold(0u64, |sum, piece| {
            sum.checked_add(piece.bytes)
                .ok_or_else(|| invalid("a map overflows"))
        })?;
        if total > stored_bytes {
            return Err(invalid("a map names more data than there is"));
        }
        let mut header = *header;
        header[156] = b'0';
        if let Some(name) = &sparse.name {
            let count = name.len().min(100);
            header[..100].fill(0);
            header[..count].copy_from_slice(&name[..count]);
        }
        // An old GNU header keeps times and its map where ustar has the prefix of the name.
        header[345..500].fill(0);
        set_number(&mut header[124..136], sparse.real_bytes);
        set_checksum(&mut header);
        self.write(&header)?;
        let start = self.out;
        let end = start
            .checked_add(sparse.real_bytes)
            .filter(|end| *end <= self.cap_bytes)
            .ok_or_else(|| invalid("a sparse file is too large"))?;
        let mut from = data;
        for piece in &sparse.pieces {
            let stop = piece.offset.checked_add(piece.bytes);
            if stop.is_none_or(|stop| stop > sparse.real_bytes) {
                return Err(invalid("a map leaves its file"));
            }
            self.out = start + piece.offset;
            // The pieces together are no more than `stored_bytes`.
            let next = from
                .checked_add(piece.bytes)
                .ok_or_else(|| invalid("an entry leaves the tar"))?;
            self.copy(from, next)?;
            from = next;
        }
        self.out = end;
        self.to.set_len(end)?;
        self.at = self.after(data, stored_bytes)?;
        self.pad()
    }

    fn go_on(&self) -> io::Result<()> {
        let called_off = |_| io::Error::from(io::ErrorKind::TimedOut);
        self.until.check().map_err(called_off)
    }

    /// Where the block after `bytes` of data begins. A tar that ends within the padding ends there.
    ///
    /// **Errors** when the data leaves the tar: a size is whatever its author wrote.
    fn after(&self, data: u64, bytes: u64) -> io::Result<u64> {
        data.checked_add(bytes)
            .filter(|end| *end <= self.end)
            .ok_or_else(|| invalid("an entry leaves the tar"))?;
        Ok((data + padded(bytes)?).min(self.end))
    }

    fn old_gnu(&self, header: &[u8; BLOCK], data: u64) -> io::Result<(Sparse, u64)> {
        let mut sparse = Sparse {
            real_bytes: number(&header[483..495])?,
            ..Default::default()
        };
        let mut more = header[482] != 0;
        pieces(&header[386..482], &mut sparse.pieces)?;
        let mut data = data;
        while more {
            let block = self.block(data)?;
            data += BLOCK_BYTES;
            pieces(&block[..504], &mut sparse.pieces)?;
            more = block[504] != 0;
            if sparse.pieces.len() > MAP_CAP {
                return Err(invalid("a map is too long"));
            }
        }
        Ok((sparse, data))
    }

    fn pax(&self, records: &[(Vec<u8>, Vec<u8>)], data: u64) -> io::Result<Option<Sparse>> {
        let name = record(records, b"GNU.sparse.name").map(<[u8]>::to_vec);
        if let Some(map) = record(records, b"GNU.sparse.map") {
            let numbers: Vec<u64> = map
                .split(|byte| *byte == b',')
                .map(decimal)
                .collect::<io::Result<_>>()?;
            let real_bytes = required(records, b"GNU.sparse.size")?;
            return Ok(Some(Sparse {
                pieces: pairs(&numbers)?,
                real_bytes,
                map_bytes: 0,
                name,
            }));
        }
        if record(records, b"GNU.sparse.major") == Some(b"1") {
            let real_bytes = required(records, b"GNU.sparse.realsize")?;
            let (pieces, map_bytes) = self.map_before_data(data)?;
            return Ok(Some(Sparse {
                pieces,
                real_bytes,
                map_bytes,
                name,
            }));
        }
        if record(records, b"GNU.sparse.size").is_some() {
            let numbers: Vec<u64> = records
                .iter()
                .filter(|(key, _)| key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes")
                .map(|(_, value)| decimal(value))
                .collect::<io::Result<_>>()?;
            let real_bytes = required(records, b"GNU.sparse.size")?;
            return Ok(Some(Sparse {
                pieces: pairs(&numbers)?,
                real_bytes,
                map_bytes: 0,
                name,
            }));
        }
        Ok(None)
    }

    /// Decimal lines: the count, then offset and size of each piece; padded to a block.
    fn map_before_data(&self, data: u64) -> io::Result<(Vec<Piece>, u64)> {
        let mut numbers: Vec<u64> = Vec::new();
        let mut line = Vec::new();
        let mut read = 0;
        loop {
            let block = self.block(data + read)?;
            read += BLOCK_BYTES;
            for byte in block {
                if byte != b'\n' {
                    line.push(byte);
                    if line.len() > 20 {
                        return Err(invalid("a map is malformed"));
                    }
                    continue;
                }
                numbers.push(decimal(&line)?);
                line.clear();
                let count = usize::try_from(numbers[0]).unwrap_or(usize::MAX);
                if count > MAP_CAP {
                    return Err(invalid("a map is too long"));
                }
                if numbers.len() == 1 + 2 * count {
                    return Ok((pairs(&numbers[1..])?, read));
                }
            }
        }
    }

    fn records(&self, data: u64, size: u64) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        if size > RECORD_CAP_BYTES {
            return Err(invalid("a PAX header is too long"));
        }
        let mut body = vec![0; usize::try_from(size).unwrap_or(0)];
        self.from.read_exact_at(&mut body, data)?;
        let mut rest = &body[..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let malformed = || invalid("a PAX record is malformed");
            let space = rest.iter().position(|b| *b == b' ').ok_or_else(malformed)?;
            let length = usize::try_from(decimal(&rest[..space])?).unwrap_or(usize::MAX);
            let line = rest.get(space + 1..length).ok_or_else(malformed)?;
            let line = line.strip_suffix(b"\n").ok_or_else(malformed)?;
            let equals = line.iter().position(|b| *b == b'=').ok_or_else(malformed)?;
            records.push((line[..equals].to_vec(), line[equals + 1..].to_vec()));
            rest = &rest[length..];
        }
        Ok(records)
    }

    fn block(&self, at: u64) -> io::Result<[u8; BLOCK]> {
        self.go_on()?;
        let mut block = [0; BLOCK];
        self.from.read_exact_at(&mut block, at)?;
        Ok(block)
    }

    fn copy(&mut self, start: u64, end: u64) -> io::Result<()> {
        let mut buffer = vec![0; 128 << 10];
        let mut at = start;
        while at < end {
            self.go_on()?;
            let part = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            self.from.read_exact_at(&mut buffer[..part], at)?;
            self.write(&buffer[..part])?;
            at += part as u64;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all_at(bytes, self.out)?;
        self.out += bytes.len() as u64;
        if self.out > self.cap_bytes {
            return Err(invalid("the layer is too large"));
        }
        Ok(())
    }

    fn pad(&mut self) -> io::Result<()> {
        self.out = padded(self.out)?;
        self.to.set_len(self.out)
    }
}

/// Links, devices, directories and FIFOs have none, whatever their size field says.
fn has_content(kind: u8) -> bool {
    !matches!(kind, b'1'..=b'6')
}

fn padded(bytes: u64) -> io::Result<u64> {
    bytes
        .checked_next_multiple_of(BLOCK_BYTES)
        .ok_or_else(|| invalid("a size overflows"))
}

fn record<'a>(records: &'a [(Vec<u8>, Vec<u8>)], key: &[u8]) -> Option<&'a [u8]> {
    records
        .iter()
        .rev()
        .find(|(name, _)| name == key)
        .map(|(_, value)| &value[..])
}

fn required(records: &[(Vec<u8>, Vec<u8>)], key: &[u8]) -> io::Result<u64> {
    decimal(record(records, key).ok_or_else(|| invalid("a record is missing"))?)
}

fn decimal(text: &[u8]) -> io::Result<u64> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| invalid("a number is malformed"))
}

/// Octal text or, with the first bit set, a big-endian number.
fn number(field: &[u8]) -> io::Result<u64> {
    if field[0] & 0x80 != 0 {
        return field[1..]
            .iter()
            .try_fold(u64::from(field[0] & 0x3f), |value, byte| {
                value
                    .checked_mul(256)
                    .and_then(|value| value.checked_add(u64::from(*byte)))
                    .ok_or_else(|| invalid("a number overflows"))
            });
    }
    let text: Vec<u8> = field
        .iter()
        .copied()
        .filter(|byte| *byte != 0 && *byte != b' ')
        .collect();
    if text.is_empty() {
        return Ok(0);
    }
    let text = std::str::from_utf8(&text).map_err(|_| invalid("a number is malformed"))?;
    u64::from_str_radix(text, 8).map_err(|_| invalid("a number is malformed"))
}

fn pieces(fields: &[u8], into: &mut Vec<Piece>) -> io::Result<()> {
    for pair in fields.as_chunks::<24>().0 {
        if pair[0] == 0 {
            break;
        }
        into.push(Piece {
            offset: number(&pair[..12])?,
            bytes: number(&pair[12..])?,
        });
    }
    Ok(())
}

fn pairs(numbers: &[u64]) -> io::Result<Vec<Piece>> {
    let (pairs, []) = numbers.as_chunks::<2>() else {
        return Err(invalid("a map is odd"));
    };
    Ok(pairs
        .iter()
        .map(|[offset, bytes]| Piece {
            offset: *offset,
            bytes: *bytes,
        })
        .collect())
}

/// `<length> <key>=<value>\n`, where the length counts itself.
fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// Twelve bytes: octal where it fits, else base 256.
fn set_number(field: &mut [u8], value: u64) {
    if value < 1 << 33 {
        field.copy_from_slice(format!("{value:011o}\0").as_bytes());
        return;
    }
    field.fill(0);
    field[0] = 0x80;
    let start = field.len() - 8;
    field[start..].copy_from_slice(&value.to_be_bytes());
}

fn set_checksum(header: &mut [u8; BLOCK]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    /// A tar of one header with this type and these bytes for the size, and one block of data.
    fn tar(kind: u8, size: &[u8; 12]) -> File {
        let mut header = [0; BLOCK];
        header[..4].copy_from_slice(b"name");
        header[124..136].copy_from_slice(size);
        header[156] = kind;
        set_checksum(&mut header);
        let mut file = tempfile::tempfile().unwrap();
        for block in [header, [1; BLOCK], [0; BLOCK], [0; BLOCK]] {
            file.write_all(&block).unwrap();
        }
        file
    }

    fn base_256(value: u64) -> [u8; 12] {
        let mut field = [0; 12];
        field[0] = 0x80;
        field[4..].copy_from_slice(&value.to_be_bytes());
        field
    }

    #[test]
    fn sizes_that_leave_the_tar_are_refused() {
        let mut whole = [0; 12];
        set_number(&mut whole, 512);
        let until = Until::default();
        let cases: [(u8, [u8; 12], bool); 8] = [
            (b'0', whole, true),
            (b'0', base_256(512), true),
            (b'0', base_256(1537), false),
            // Padded and added to where the data begins, it comes back to where it was.
            (b'0', base_256(u64::MAX - 511), false),
            (b'0', base_256(u64::MAX - 1023), false),
            (b'g', base_256(u64::MAX - 511), false),
            (b'L', base_256(u64::MAX), false),
            (b'S', base_256(u64::MAX - 511), false),
        ];
        for (number, (kind, size, good)) in cases.into_iter().enumerate() {
            let to = tempfile::tempfile().unwrap();
            let expanded = expand(&tar(kind, &size), to, 1 << 20, &until);
            assert_eq!(expanded.is_ok(), good, "case {number}: {expanded:?}");
        }
    }

    #[test]
    fn work_that_is_called_off_ends() {
        let until = Until::default();
        until.cancel.cancel();
        let to = tempfile::tempfile().unwrap();
        let expanded = expand(&tar(b'0', &base_256(512)), to, 1 << 20, &until);
        assert!(matches!(expanded, Err(LayerUnpackError::Cancelled)));
    }
}
