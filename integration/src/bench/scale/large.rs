// SPDX-License-Identifier: Apache-2.0
//! An image of large files, made faster than it could be compressed.
//!
//! A file is a sequence of pieces of 64 KiB. Each begins with random bytes that stand nowhere else in the image, so that
//! no two are equal to whoever looks for what he has already; the rest is one of a pool of blocks that were compressed
//! once, each by itself and up to a byte's end, so that their compressed forms can be put one after another in one
//! member of gzip as they are. What is left to do is to copy, and to compute digests.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use flate2::{Compress, Compression, Crc, FlushCompress, Status};
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};
use tar::EntryType;

use super::images::{Making, base, tar_header};
use super::side_by_side::side_by_side;
use crate::harness::layout::blob::Blob;

/// Bytes of a file.
pub const FILE_BYTES: u64 = 1 << 30;
/// Files of a layer.
const LAYER_FILES: u64 = 4;
/// What a piece holds.
const PIECE_BYTES: usize = 64 << 10;
/// Its bytes that stand nowhere else: 2 KiB of 64 make 3 % of the image what it takes in the registry at least.
const UNIQUE_BYTES: usize = 2 << 10;
/// Blocks of the pool: enough that none is near the last use of it.
const POOL: usize = 256;
/// A block repeats this many random bytes with some of them changed each time, which takes it to a twentieth or so.
const PATTERN_BYTES: usize = 1536;
/// Bytes that change with each repetition.
const CHANGED: usize = 12;
/// How much of a file is read.
pub const READ_BYTES: u64 = 4096;

/// A block of the pool, as it is and compressed.
struct Block {
    plain: Vec<u8>,
    deflated: Vec<u8>,
}

/// Writes an image of so many files of a GiB below `directory`; its program reads a piece of each.
pub fn write(directory: &Path, files: u64) -> Result<Making> {
    let mut random = StdRng::seed_from_u64(4);
    let pool = (0..POOL).map(|_| block(&mut random));
    let pool = pool.collect::<Result<Vec<_>>>()?;
    let mut list = String::new();
    for file in 0..files {
        let place = random.random_range(0..FILE_BYTES / READ_BYTES);
        list += &format!("/{} {place}\n", name(file));
    }
    let script = "while read -r file place; do\n  dd if=\"$file\" bs=4096 skip=\"$place\" count=1 2>/dev/null\n\
         done </srv/list | wc -c | sed 's/^/scale: read /'\n";
    let base = base(script, &list, &mut random)?;
    let mut layers = vec![base.blob(directory)?];
    let numbers: Vec<u64> = (0..files.div_ceil(LAYER_FILES)).collect();
    layers.extend(side_by_side(&numbers, |number| {
        let first = number * LAYER_FILES;
        layer(directory, &pool, first..files.min(first + LAYER_FILES))
    })?);
    Ok(Making {
        layers,
        entries: None,
    })
}

/// What the program must have read of so many files.
#[must_use]
pub fn read_bytes(files: u64) -> u64 {
    files * READ_BYTES
}

fn name(file: u64) -> String {
    format!("data/model{file:03}.bin")
}

fn block(random: &mut StdRng) -> Result<Block> {
    let mut pattern = vec![0; PATTERN_BYTES];
    random.fill_bytes(&mut pattern);
    let bytes = PIECE_BYTES - UNIQUE_BYTES;
    let mut plain = Vec::with_capacity(bytes + PATTERN_BYTES);
    while plain.len() < bytes {
        for _ in 0..CHANGED {
            pattern[random.random_range(0..PATTERN_BYTES)] = random.random();
        }
        plain.extend_from_slice(&pattern);
    }
    plain.truncate(bytes);
    let mut deflated = Vec::with_capacity(2 * bytes);
    let mut compress = Compress::new(Compression::new(6), false);
    let status = compress.compress_vec(&plain, &mut deflated, FlushCompress::Full)?;
    ensure!(status == Status::Ok && compress.total_in() == bytes as u64);
    Ok(Block { plain, deflated })
}

fn layer(directory: &Path, pool: &[Block], files: std::ops::Range<u64>) -> Result<Blob> {
    Blob::stream(directory, |out| {
        let mut random = StdRng::seed_from_u64(1000 + files.start);
        let mut gzip = Gzip::begin(out)?;
        gzip.stored(tar_header("data/", EntryType::Directory, 0)?.as_bytes())?;
        let mut unique = vec![0; UNIQUE_BYTES];
        for file in files {
            let header = tar_header(&name(file), EntryType::Regular, FILE_BYTES)?;
            gzip.stored(header.as_bytes())?;
            for _ in 0..FILE_BYTES / PIECE_BYTES as u64 {
                random.fill_bytes(&mut unique);
                gzip.stored(&unique)?;
                gzip.block(&pool[random.random_range(0..pool.len())])?;
            }
        }
        gzip.stored(&[0; 1024])?;
        gzip.finish()
    })
}

/// One member of gzip, made of parts that end with a byte.
struct Gzip<'a> {
    out: &'a mut dyn Write,
    crc: Crc,
    digest: Sha256,
}

impl<'a> Gzip<'a> {
    fn begin(out: &'a mut dyn Write) -> Result<Self> {
        // RFC 1952: deflate, no flags, no time, no system.
        out.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff])?;
        let (crc, digest) = (Crc::new(), Sha256::new());
        Ok(Self { out, crc, digest })
    }

    /// RFC 1951, 3.2.4: a block that is not compressed.
    fn stored(&mut self, bytes: &[u8]) -> Result<()> {
        let length = u16::try_from(bytes.len()).context("too long for a stored block")?;
        self.out.write_all(&[0])?;
        self.out.write_all(&length.to_le_bytes())?;
        self.out.write_all(&(!length).to_le_bytes())?;
        self.out.write_all(bytes)?;
        self.seen(bytes);
        Ok(())
    }

    fn block(&mut self, block: &Block) -> Result<()> {
        self.out.write_all(&block.deflated)?;
        self.seen(&block.plain);
        Ok(())
    }

    fn seen(&mut self, plain: &[u8]) {
        self.crc.update(plain);
        self.digest.update(plain);
    }

    /// Ends it, and gives the digest of what is in it.
    fn finish(self) -> Result<String> {
        // An empty last block, of fixed codes.
        self.out.write_all(&[3, 0])?;
        self.out.write_all(&self.crc.sum().to_le_bytes())?;
        // The length modulo 2^32, which is what it counts.
        self.out.write_all(&self.crc.amount().to_le_bytes())?;
        Ok(hex::encode(self.digest.finalize()))
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn parts_make_one_member_of_what_they_hold() {
        let mut random = StdRng::seed_from_u64(7);
        let blocks: Vec<Block> = (0..3).map(|_| block(&mut random).unwrap()).collect();
        let (mut bytes, mut plain) = (Vec::new(), Vec::new());
        let mut gzip = Gzip::begin(&mut bytes).unwrap();
        for number in [0, 2, 1, 0] {
            gzip.stored(b"between").unwrap();
            gzip.block(&blocks[number]).unwrap();
            plain.extend_from_slice(b"between");
            plain.extend_from_slice(&blocks[number].plain);
        }
        let digest = gzip.finish().unwrap();
        assert_eq!(digest, hex::encode(Sha256::digest(&plain)));
        let mut decoder = GzDecoder::new(&bytes[..]);
        let mut read = Vec::new();
        decoder.read_to_end(&mut read).unwrap();
        assert!(read == plain, "{} of {}", read.len(), plain.len());
        assert_eq!(decoder.into_inner(), b"", "nothing behind it");
        assert!(
            bytes.len() < plain.len() / 8,
            "{} of {}",
            bytes.len(),
            plain.len()
        );
    }
}
