// SPDX-License-Identifier: Apache-2.0
//! Decompresses a blob whose compression its first bytes tell; media types lie too often.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};

use bytes::{Buf as _, Bytes};

use super::PackError;

/// Bytes of tar passed on at a time: large enough that channel costs vanish, small enough for caches.
pub(super) const PART_BYTES: usize = 256 * 1024;
/// The largest zstd window that a layer may ask for: 128 MiB, what `zstd -d` takes without options.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// The compression of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
    None,
}

/// Tells by the first four bytes. A skippable zstd frame may come first.
pub(super) fn detect(head: &[u8]) -> Compression {
    let skippable = head.len() >= 4 && head[0] & 0xf0 == 0x50 && head[1..4] == [0x2a, 0x4d, 0x18];
    if head.starts_with(GZIP_MAGIC) {
        Compression::Gzip
    } else if head.starts_with(ZSTD_MAGIC) || skippable {
        Compression::Zstd
    } else {
        Compression::None
    }
}

/// A channel as a reader.
#[derive(Debug)]
struct PartsReader {
    parts: Receiver<Bytes>,
    current: Bytes,
}

impl Read for PartsReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(out.len());
        out[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for PartsReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() {
            match self.parts.recv() {
                Ok(part) => self.current = part,
                Err(_) => break,
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, length: usize) {
        self.current.advance(length);
    }
}

/// Sends the decompressed bytes on, in parts, and returns how many there were.
///
/// Damaged bytes fail here first. `drain` is set for them before `parts` is dropped, so that whoever
/// sends the parts knows, as soon as it sees them dropped, that the blob itself may be the cause.
pub(super) fn inflate(
    parts: Receiver<Bytes>,
    cap: (u64, &'static str),
    output: SyncSender<Bytes>,
    drain: &AtomicBool,
) -> Result<u64, PackError> {
    let mut source = PartsReader {
        parts,
        current: Bytes::new(),
    };
    let result = inflate_from(&mut source, cap, output);
    if matches!(result, Err(PackError::Inflate { .. })) {
        drain.store(true, Ordering::Release);
    }
    drop(source);
    result
}

fn inflate_from(
    mut source: &mut PartsReader,
    (cap_bytes, cap): (u64, &'static str),
    output: SyncSender<Bytes>,
) -> Result<u64, PackError> {
    let failed = |e: io::Error| PackError::Inflate {
        reason: e.to_string(),
    };
    // Parts may be as small as the network likes; four bytes decide.
    let mut head = Vec::with_capacity(4);
    (&mut source)
        .take(4)
        .read_to_end(&mut head)
        .map_err(failed)?;
    let compression = detect(&head);
    let whole = Read::chain(io::Cursor::new(head), source);
    let mut reader: Box<dyn Read + '_> = match compression {
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        Compression::Zstd => {
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(BufReader::new(whole)).map_err(failed)?;
            decoder
                .window_log_max(ZSTD_WINDOW_LOG_MAX)
                .map_err(failed)?;
            Box::new(decoder)
        }
        Compression::None => Box::new(whole),
    };
    let mut total_bytes = 0_u64;
    loop {
        let mut part = vec![0; PART_BYTES];
        let length = read_full(&mut reader, &mut part).map_err(failed)?;
        if length == 0 {
            return Ok(total_bytes);
        }
        total_bytes += length as u64;
        if total_bytes > cap_bytes {
            return Err(PackError::TooLarge {
                limit_bytes: cap_bytes,
                limit: cap,
            });
        }
        part.truncate(length);
        output
            .send(Bytes::from(part))
            .map_err(|_| PackError::Stopped)?;
    }
}

/// Fills the buffer, or as much of it as there is.
fn read_full(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match reader.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::mpsc::sync_channel;

    fn run(blob: &[u8], cap: u64, part: usize) -> Result<Vec<u8>, PackError> {
        let (in_tx, in_rx) = sync_channel(10_000_000 / part.max(1));
        for part in blob.chunks(part) {
            in_tx.send(Bytes::copy_from_slice(part)).unwrap();
        }
        drop(in_tx);
        let (out_tx, out_rx) = sync_channel(1000);
        let total = inflate(in_rx, (cap, "--cap"), out_tx, &AtomicBool::new(false))?;
        let out: Vec<u8> = out_rx.into_iter().flatten().collect();
        assert_eq!(total, out.len() as u64);
        Ok(out)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn every_compression_gives_the_same_bytes() {
        let text: Vec<u8> = (0..700_000_u32)
            .map(|n| (n.wrapping_mul(n) >> 7).to_le_bytes()[0])
            .collect();
        let zstd = zstd::encode_all(text.as_slice(), 1).unwrap();
        let members = [gzip(&text[..1000]), gzip(&text[1000..])].concat();
        let frames = [&zstd[..], &[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9]].concat();
        for blob in [text.clone(), gzip(&text), members, zstd, frames] {
            for part in [1, 3, 100_000] {
                assert!(run(&blob, u64::MAX, part).unwrap() == text);
            }
        }
        assert!(run(&[], 0, 1).unwrap().is_empty());
        assert_eq!(run(b"abc", 3, 1).unwrap(), b"abc");
    }

    #[test]
    fn a_sender_that_is_refused_sees_the_cause() {
        let blob = [&gzip(&[1; 1000])[..], b"garbage"].concat();
        for _ in 0..300 {
            let drain = AtomicBool::new(false);
            let (in_tx, in_rx) = sync_channel(0);
            let (out_tx, _out_rx) = sync_channel(10);
            std::thread::scope(|scope| {
                scope.spawn(|| inflate(in_rx, (u64::MAX, "--cap"), out_tx, &drain));
                in_tx.send(Bytes::copy_from_slice(&blob)).unwrap();
                while in_tx.send(Bytes::from_static(b"more")).is_ok() {}
                assert!(drain.load(Ordering::Acquire), "the receiver went first");
            });
        }
    }

    #[test]
    fn damage_and_bombs_are_refused() {
        let blob = gzip(&vec![0; 1_000_000]);
        assert!(matches!(
            run(&blob, 999_999, 50),
            Err(PackError::TooLarge {
                limit_bytes: 999_999,
                ..
            })
        ));
        assert!(matches!(
            run(&blob[..blob.len() - 1], u64::MAX, 50),
            Err(PackError::Inflate { .. })
        ));
        let zstd = zstd::encode_all([7; 10_000].as_slice(), 1).unwrap();
        assert!(matches!(
            run(&zstd[..zstd.len() - 1], u64::MAX, 50),
            Err(PackError::Inflate { .. })
        ));
    }
}
