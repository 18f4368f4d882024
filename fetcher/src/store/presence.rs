// SPDX-License-Identifier: Apache-2.0
//! The `present` file of a layer device: which of its chunks are in the `data` file.
//!
//! It is mapped shared by the daemon, which sets bits, and by the shim, which reads them and then
//! reads the `data` file itself. The file also carries where each chunk ends, so that the shim needs
//! no layer index to answer "is this range here?".
//!
//! # Rules
//! - A bit is set with Release after all bytes of the chunk are written to `data`; it is read with
//!   Acquire before they are read. Who sees the bit sees the bytes.
//! - The geometry (everything but the state word and the two bitmaps) never changes after creation
//!   and is covered by a crc.
//! - *Suspect* bits are chunks that were present in an earlier run of the kernel that did not end
//!   with a clean stop. They are not present: nobody may read them until the daemon has compared
//!   their crc32 and moved the bit over.
//! - When the state is [`DeviceState::Failed`] no bit is set, and nothing of the device may be served.
//!
//! `docs/formats/store.md` has the byte table.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use sluice_blockindex::extent::{DeviceSpace, Extent};

use crate::sys::SharedWords;

const MAGIC: [u8; 8] = *b"SLUIPRES";
const VERSION: u32 = 1;

/// Bytes before the table of chunk ends: one page, so that later versions find room.
const HEADER_BYTES: usize = 4096;
const WORD_BYTES: usize = 8;
/// Bits of one word of a bitmap.
const WORD_BITS: u32 = 64;
/// Bitmaps start on a cache line: readers of one do not share a line with writers of another.
const BITMAP_ALIGN_WORDS: usize = 8;

const AT_VERSION: usize = 8;
const AT_READ_ONLY: usize = 16;
const AT_INCOMPATIBLE: usize = 20;
const AT_COUNT: usize = 24;
const AT_DEVICE_BYTES: usize = 32;
const AT_STATE: usize = 40;
const AT_ENDS: usize = 48;
const AT_PRESENT: usize = 56;
const AT_SUSPECT: usize = 64;
const AT_FILE_BYTES: usize = 72;
const AT_CRC: usize = 80;

/// What may be done with a device, as far as the presence file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Chunks whose bit is set may be read; others must be filled first.
    Open,
    /// Complete and equal to its diff ID: all bits are set and stay so.
    Sealed,
    /// It is not what its diff ID says: every read fails.
    Failed,
}

impl DeviceState {
    const fn code(self) -> u64 {
        match self {
            Self::Open => 0,
            Self::Sealed => 1,
            Self::Failed => 2,
        }
    }

    /// An unknown state of a later version is treated as the one in which nothing is readable.
    const fn from_code(code: u64) -> Self {
        match code {
            0 => Self::Open,
            1 => Self::Sealed,
            _ => Self::Failed,
        }
    }
}

/// Why a presence file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PresenceError {
    /// It cannot be opened or mapped.
    #[error("map presence file: {0}")]
    Map(#[from] std::io::Error),
    /// It is not a presence file, of another version, or damaged.
    #[error("presence file is not usable: {0}")]
    Format(&'static str),
}

/// The words of a presence file: a shared mapping, or memory in stores that have no files.
#[derive(Debug)]
pub(crate) enum Words {
    /// A mapped file.
    Mapped(SharedWords),
    /// Memory of this process.
    Owned(Box<[AtomicU64]>),
}

impl Words {
    /// Memory that holds `bytes`, the content of a presence file.
    pub(crate) fn owned(bytes: &[u8]) -> Self {
        let words = bytes.chunks_exact(WORD_BYTES).map(|chunk| {
            let mut word = [0; WORD_BYTES];
            word.copy_from_slice(chunk);
            // Kept as the mapping would show it: little-endian whatever the machine.
            AtomicU64::new(u64::from_le_bytes(word).to_le())
        });
        Self::Owned(words.collect())
    }
}

impl Deref for Words {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        match self {
            Self::Mapped(map) => map.words(),
            Self::Owned(words) => words,
        }
    }
}

/// Where things stand in the file, in words.
#[derive(Clone, Copy, Debug)]
struct Layout {
    count: u32,
    device_bytes: u64,
    ends: usize,
    present: usize,
    suspect: usize,
    total: usize,
}

impl Layout {
    /// The one layout that this version writes for `count` chunks.
    fn of(count: u32, device_bytes: u64) -> Option<Self> {
        let chunks = usize::try_from(count).ok()?;
        let bitmap = chunks.div_ceil(64).next_multiple_of(BITMAP_ALIGN_WORDS);
        let ends = HEADER_BYTES / WORD_BYTES;
        let present = ends
            .checked_add(chunks)?
            .next_multiple_of(BITMAP_ALIGN_WORDS);
        let suspect = present.checked_add(bitmap)?;
        let total = suspect.checked_add(bitmap)?;
        Some(Self {
            count,
            device_bytes,
            ends,
            present,
            suspect,
            total,
        })
    }
}

/// Which chunks of a layer device are present: the read side, for any process.
///
/// Cheap to ask; every method sees changes that the daemon makes meanwhile.
#[derive(Debug)]
pub struct PresenceMap {
    words: Words,
    layout: Layout,
}

impl PresenceMap {
    /// Maps the presence file at `path` read-only and checks its geometry.
    ///
    /// **Errors**: the file is not there, or is not a whole presence file of this version.
    pub fn open(path: &Path) -> Result<Self, PresenceError> {
        let file = File::open(path)?;
        Self::from_words(Words::Mapped(SharedWords::map(&file, false)?))
    }

    /// Checks the geometry of `words`.
    pub(crate) fn from_words(words: Words) -> Result<Self, PresenceError> {
        let bad = PresenceError::Format;
        if words.len() < HEADER_BYTES / WORD_BYTES {
            return Err(bad("shorter than its header"));
        }
        let field = |at: usize| u64::from_le(words[at / WORD_BYTES].load(Ordering::Relaxed));
        let half = |at: usize| {
            let word = field(at & !7);
            if at.is_multiple_of(WORD_BYTES) {
                word & 0xffff_ffff
            } else {
                word >> 32
            }
        };
        if field(0) != u64::from_le_bytes(MAGIC) {
            return Err(bad("wrong magic"));
        }
        if half(AT_VERSION) != u64::from(VERSION) {
            return Err(bad("unknown version"));
        }
        if half(AT_READ_ONLY) != 0 || half(AT_INCOMPATIBLE) != 0 {
            return Err(bad("unknown features"));
        }
        let count = u32::try_from(half(AT_COUNT)).map_err(|_| bad("chunk count"))?;
        let layout = Layout::of(count, field(AT_DEVICE_BYTES)).ok_or(bad("chunk count"))?;
        let says = |at: usize, word: usize| {
            u64::try_from(word)
                .ok()
                .and_then(|word| word.checked_mul(8))
                == Some(field(at))
        };
        let placed = layout.total == words.len()
            && says(AT_ENDS, layout.ends)
            && says(AT_PRESENT, layout.present)
            && says(AT_SUSPECT, layout.suspect)
            && says(AT_FILE_BYTES, layout.total);
        if !placed {
            return Err(bad("sections are not where they should be"));
        }
        let crc = half(AT_CRC);
        let map = Self { words, layout };
        if crc != u64::from(map.geometry_crc()) {
            return Err(bad("crc of the geometry differs"));
        }
        map.check_ends()?;
        Ok(map)
    }

    /// Chunk ends rise strictly from above 0 to the device's size.
    fn check_ends(&self) -> Result<(), PresenceError> {
        let mut before = 0;
        for chunk in 0..self.layout.count {
            let end = self.end_of(chunk);
            if end <= before {
                return Err(PresenceError::Format("chunk ends do not rise"));
            }
            before = end;
        }
        if before != self.layout.device_bytes {
            return Err(PresenceError::Format("chunks do not fill the device"));
        }
        Ok(())
    }

    /// crc32 of all bytes that never change.
    fn geometry_crc(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        let fixed = |index: usize| index != AT_STATE / WORD_BYTES && index != AT_CRC / WORD_BYTES;
        for (index, word) in self.words[..self.layout.present].iter().enumerate() {
            if fixed(index) {
                hasher.update(&u64::from_le(word.load(Ordering::Relaxed)).to_le_bytes());
            }
        }
        hasher.finalize()
    }

    fn end_of(&self, chunk: u32) -> u64 {
        u64::from_le(self.words[self.layout.ends + index(chunk)].load(Ordering::Relaxed))
    }

    /// How many chunks the device has.
    pub fn count(&self) -> u32 {
        self.layout.count
    }

    /// Size of the device in bytes.
    pub fn device_bytes(&self) -> u64 {
        self.layout.device_bytes
    }

    /// What may be done with the device.
    pub fn state(&self) -> DeviceState {
        let word = self.words[AT_STATE / WORD_BYTES].load(Ordering::Acquire);
        DeviceState::from_code(u64::from_le(word))
    }

    /// Whether the bytes of `chunk` are in the data file. Beyond the last chunk: false.
    pub fn is_present(&self, chunk: u32) -> bool {
        self.bit(self.layout.present, chunk)
    }

    /// Whether `chunk` waits to be checked after an unclean stop.
    pub(crate) fn is_suspect(&self, chunk: u32) -> bool {
        self.bit(self.layout.suspect, chunk)
    }

    fn bit(&self, bitmap: usize, chunk: u32) -> bool {
        if chunk >= self.layout.count {
            return false;
        }
        let (word, mask) = place(bitmap, chunk);
        u64::from_le(self.words[word].load(Ordering::Acquire)) & mask != 0
    }

    /// How many chunks are present. Who finds all of them may read all of them.
    pub fn present_chunks(&self) -> u32 {
        let words = index(self.layout.count).div_ceil(64);
        self.words[self.layout.present..self.layout.present + words]
            .iter()
            .map(|word| word.load(Ordering::Acquire).count_ones())
            .sum()
    }

    /// Whether any chunk waits to be checked.
    pub(crate) fn any_suspect(&self) -> bool {
        self.words[self.layout.suspect..]
            .iter()
            .any(|word| word.load(Ordering::Relaxed) != 0)
    }

    /// The chunk that holds byte `offset` of the device; `None` beyond its end.
    pub fn chunk_at(&self, offset: u64) -> Option<u32> {
        if offset >= self.layout.device_bytes {
            return None;
        }
        let (mut low, mut high) = (0, self.layout.count);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.end_of(middle) <= offset {
                low = middle + 1
            } else {
                high = middle
            }
        }
        Some(low)
    }

    /// The device bytes of `chunk`; `None` beyond the last.
    pub fn extent(&self, chunk: u32) -> Option<Extent<DeviceSpace>> {
        if chunk >= self.layout.count {
            return None;
        }
        let start = if chunk == 0 {
            0
        } else {
            self.end_of(chunk - 1)
        };
        Extent::new(start, self.end_of(chunk))
    }

    /// The first part of `wanted` that is not present, in whole chunks; `None` when all of it is.
    ///
    /// **Shape**: from the first missing chunk up to, not including, the next present one, cut to the
    /// chunks that `wanted` touches. What lies beyond the device's end counts as present: there is
    /// nothing to fill.
    pub fn missing(&self, wanted: Extent<DeviceSpace>) -> Option<Extent<DeviceSpace>> {
        let mut chunk = self.chunk_at(wanted.start())?;
        let inside = |chunk| {
            self.extent(chunk)
                .filter(|extent| extent.start() < wanted.end())
        };
        let mut gap = loop {
            let extent = inside(chunk)?;
            if !self.is_present(chunk) {
                break extent;
            }
            chunk += 1;
        };
        while let Some(next) = inside(chunk + 1) {
            if self.is_present(chunk + 1) {
                break;
            }
            gap = gap.hull(next);
            chunk += 1;
        }
        Some(gap)
    }

    /// Whether every byte of `wanted` that the device has is present.
    pub fn holds(&self, wanted: Extent<DeviceSpace>) -> bool {
        self.missing(wanted).is_none()
    }
}

/// The write side, for the daemon alone.
#[derive(Debug)]
pub(crate) struct Presence(PresenceMap);

impl Deref for Presence {
    type Target = PresenceMap;
    fn deref(&self) -> &PresenceMap {
        &self.0
    }
}

impl Presence {
    /// The content of a new presence file for chunks with these ends; no bit is set.
    ///
    /// `None` when the ends do not rise strictly or the table would not fit the address space.
    pub(crate) fn encode(ends: impl Iterator<Item = u64>) -> Option<Vec<u8>> {
        let ends: Vec<u64> = ends.collect();
        let count = u32::try_from(ends.len()).ok()?;
        let layout = Layout::of(count, ends.last().copied().unwrap_or(0))?;
        let mut bytes = vec![0; layout.total.checked_mul(WORD_BYTES)?];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        let place = |word: usize| {
            u64::try_from(word * WORD_BYTES)
                .unwrap_or(u64::MAX)
                .to_le_bytes()
        };
        put(0, &MAGIC);
        put(AT_VERSION, &VERSION.to_le_bytes());
        put(AT_COUNT, &count.to_le_bytes());
        put(AT_DEVICE_BYTES, &layout.device_bytes.to_le_bytes());
        put(AT_ENDS, &place(layout.ends));
        put(AT_PRESENT, &place(layout.present));
        put(AT_SUSPECT, &place(layout.suspect));
        put(AT_FILE_BYTES, &place(layout.total));
        for (chunk, end) in ends.iter().enumerate() {
            put((layout.ends + chunk) * WORD_BYTES, &end.to_le_bytes());
        }
        let map = PresenceMap {
            words: Words::owned(&bytes),
            layout,
        };
        map.check_ends().ok()?;
        let crc = map.geometry_crc();
        bytes[AT_CRC..AT_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        Some(bytes)
    }

    /// Takes `words`, which must be writable, after the checks of [`PresenceMap::open`].
    pub(crate) fn from_words(words: Words) -> Result<Self, PresenceError> {
        PresenceMap::from_words(words).map(Self)
    }

    /// Whether the chunks end exactly where `ends` says.
    pub(crate) fn fits(&self, ends: impl Iterator<Item = u64>) -> bool {
        (0..self.count()).map(|chunk| self.end_of(chunk)).eq(ends)
    }

    /// Says that the bytes of `chunk` are in the data file. True when they were not before.
    ///
    /// **Order**: everything written before this call is visible to who sees the bit.
    pub(crate) fn set(&self, chunk: u32) -> bool {
        debug_assert!(chunk < self.count(), "chunk {chunk} is beyond the last");
        let (word, mask) = place(self.layout.present, chunk);
        u64::from_le(self.words[word].fetch_or(mask.to_le(), Ordering::Release)) & mask == 0
    }

    /// Says that all chunks are present, as a sealed record proves. Where it says so already, no page
    /// of the file becomes dirty.
    pub(crate) fn set_all(&self) {
        for chunk in 0..self.count() {
            if !self.is_present(chunk) {
                self.set(chunk);
            }
        }
    }

    /// Says that `chunk` is not present any more. True when it was before.
    pub(crate) fn clear(&self, chunk: u32) -> bool {
        debug_assert!(chunk < self.count(), "chunk {chunk} is beyond the last");
        let (word, mask) = place(self.layout.present, chunk);
        u64::from_le(self.words[word].fetch_and(!mask.to_le(), Ordering::AcqRel)) & mask != 0
    }

    /// Says that `chunk` need not be checked any more.
    pub(crate) fn clear_suspect(&self, chunk: u32) {
        let (word, mask) = place(self.layout.suspect, chunk);
        self.words[word].fetch_and(!mask.to_le(), Ordering::AcqRel);
    }

    /// Makes every present chunk suspect: nothing is present afterwards.
    ///
    /// Killed half-way, a chunk is suspect, or suspect and still present; the caller writes the new
    /// boot ID only afterwards, so the next opening does it again.
    pub(crate) fn distrust_all(&self) {
        let words = self.layout.suspect - self.layout.present;
        for word in 0..words {
            let bits = self.words[self.layout.present + word].load(Ordering::Acquire);
            self.words[self.layout.suspect + word].fetch_or(bits, Ordering::AcqRel);
            self.words[self.layout.present + word].store(0, Ordering::Release);
        }
    }

    /// Forgets all chunks, present and suspect.
    pub(crate) fn clear_all(&self) {
        for word in &self.words[self.layout.present..self.layout.total] {
            word.store(0, Ordering::Release);
        }
    }

    /// Says what may be done with the device.
    pub(crate) fn set_state(&self, state: DeviceState) {
        let word = &self.words[AT_STATE / WORD_BYTES];
        if u64::from_le(word.load(Ordering::Acquire)) == state.code() {
            return;
        }
        word.store(state.code().to_le(), Ordering::Release);
    }

    /// Writes the bitmap back to the disk and waits for it; nothing where there is no file.
    pub(crate) fn sync(&self) -> std::io::Result<()> {
        match &self.0.words {
            Words::Mapped(map) => map.sync(),
            Words::Owned(_) => Ok(()),
        }
    }

    /// The words as they stand, for the model of a disk.
    #[cfg(test)]
    pub(crate) fn snapshot(&self) -> Vec<u64> {
        self.words
            .iter()
            .map(|word| u64::from_le(word.load(Ordering::Acquire)))
            .collect()
    }
}

fn index(chunk: u32) -> usize {
    // Counts were checked against the address space by `Layout::of`.
    usize::try_from(chunk).unwrap_or(usize::MAX)
}

/// The word and the bit of `chunk` in the bitmap that starts at word `bitmap`.
fn place(bitmap: usize, chunk: u32) -> (usize, u64) {
    (bitmap + index(chunk / WORD_BITS), 1 << (chunk % WORD_BITS))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn presence(ends: &[u64]) -> Presence {
        let bytes = Presence::encode(ends.iter().copied()).unwrap();
        Presence::from_words(Words::owned(&bytes)).unwrap()
    }

    fn device(start: u64, end: u64) -> Extent<DeviceSpace> {
        Extent::new(start, end).unwrap()
    }

    #[test]
    fn offsets_find_their_chunk() {
        let map = presence(&[10, 30, 31]);
        let found: Vec<_> = [0, 9, 10, 29, 30, 31].map(|at| map.chunk_at(at)).into();
        assert_eq!(found, [Some(0), Some(0), Some(1), Some(1), Some(2), None]);
        assert_eq!(map.extent(1), Some(device(10, 30)));
        assert_eq!(map.extent(3), None);
    }

    #[test]
    fn missing_is_the_first_gap_in_whole_chunks() {
        let map = presence(&[10, 20, 30, 40, 50]);
        map.set(0);
        map.set(3);
        assert_eq!(map.missing(device(0, 10)), None);
        assert_eq!(map.missing(device(5, 11)), Some(device(10, 20)));
        assert_eq!(map.missing(device(5, 50)), Some(device(10, 30)));
        assert_eq!(map.missing(device(35, 50)), Some(device(40, 50)));
        assert_eq!(map.missing(device(49, 5000)), Some(device(40, 50)));
        assert_eq!(map.missing(device(50, 60)), None);
        assert!(!map.holds(device(0, 50)));
    }

    #[test]
    fn an_empty_device_holds_everything() {
        let map = presence(&[]);
        assert_eq!((map.count(), map.device_bytes()), (0, 0));
        assert!(map.holds(device(0, 100)));
    }

    #[test]
    fn distrust_moves_bits_aside() {
        let map = presence(&(1..=200).collect::<Vec<_>>());
        assert!(map.set(3) && map.set(199) && !map.set(3));
        assert_eq!(map.present_chunks(), 2);
        map.distrust_all();
        assert_eq!(map.present_chunks(), 0);
        assert!(map.is_suspect(3) && map.is_suspect(199) && !map.is_suspect(4));
        map.clear_suspect(3);
        assert!(map.any_suspect());
        map.clear_suspect(199);
        assert!(!map.any_suspect());
    }

    #[test]
    fn a_file_is_shared_between_writer_and_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("present");
        std::fs::write(&path, Presence::encode([100, 200].into_iter()).unwrap()).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let words = Words::Mapped(SharedWords::map(&file, true).unwrap());
        let writer = Presence::from_words(words).unwrap();
        let reader = PresenceMap::open(&path).unwrap();
        assert!(!reader.is_present(1));
        writer.set(1);
        writer.set_state(DeviceState::Sealed);
        assert!(reader.is_present(1) && !reader.is_present(2));
        assert_eq!(reader.state(), DeviceState::Sealed);
    }

    #[test]
    fn damaged_geometry_is_refused() {
        let good = Presence::encode([100, 200].into_iter()).unwrap();
        let fixed_bytes = HEADER_BYTES + 16;
        for byte in 0..fixed_bytes {
            let reserved_half = (AT_CRC + 4..AT_CRC + 8).contains(&byte);
            let compatible = (AT_VERSION + 4..AT_READ_ONLY).contains(&byte);
            if (AT_STATE..AT_STATE + 8).contains(&byte) || reserved_half || compatible {
                continue;
            }
            let mut bad = good.clone();
            bad[byte] ^= 1;
            let map = PresenceMap::from_words(Words::owned(&bad));
            assert!(map.is_err(), "byte {byte}");
        }
        for len in [0, 8, 4088, good.len() - 8] {
            assert!(
                PresenceMap::from_words(Words::owned(&good[..len])).is_err(),
                "{len}"
            );
        }
        assert_eq!(Presence::encode([5, 5].into_iter()), None);
        assert_eq!(Presence::encode([0].into_iter()), None);
    }

    proptest! {
        /// The naive answer: look at each chunk.
        #[test]
        fn missing_equals_the_naive_answer(
            lengths in prop::collection::vec(1_u64..50, 1..150),
            set in prop::collection::vec(any::<prop::sample::Index>(), 0..150),
            from in 0_u64..4000, len in 1_u64..4000,
        ) {
            let ends: Vec<u64> = lengths.iter().scan(0, |at, len| { *at += len; Some(*at) }).collect();
            let map = presence(&ends);
            let mut model = vec![false; ends.len()];
            for index in set {
                let chunk = index.index(ends.len());
                model[chunk] = true;
                map.set(u32::try_from(chunk).unwrap());
            }
            let wanted = device(from, from + len);
            let touched = |chunk: usize| {
                let start = if chunk == 0 { 0 } else { ends[chunk - 1] };
                start < wanted.end() && ends[chunk] > wanted.start()
            };
            let first = (0..ends.len()).find(|chunk| touched(*chunk) && !model[*chunk]);
            let expected = first.map(|first| {
                let last = (first..ends.len()).take_while(|c| touched(*c) && !model[*c]).last().unwrap();
                device(if first == 0 { 0 } else { ends[first - 1] }, ends[last])
            });
            prop_assert_eq!(map.missing(wanted), expected);
        }
    }
}
