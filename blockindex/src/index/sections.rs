// SPDX-License-Identifier: Apache-2.0
//! Header and section table of an index file.

use std::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use super::IndexError;
use super::format::{
    CONTENTS, FLAG_REQUIRED, MAGIC, RawHeader, RawSection, SECTION_ALIGN, SECTION_CHUNKS,
    SECTION_FILES, SECTION_METADATA, SECTION_RESTARTS, SECTION_TREE, SECTIONS_MAX, UNMODIFIED,
    VERSION,
};
use crate::chunkmap::DeviceForm;

/// A section that lies inside the file.
#[derive(Debug, Clone)]
pub(super) struct Section {
    pub(super) id: u32,
    pub(super) range: Range<usize>,
    pub(super) crc32: u32,
}

pub(super) fn slice<'a>(bytes: &'a [u8], range: &Range<usize>) -> &'a [u8] {
    bytes.get(range.clone()).unwrap_or_default()
}

/// Also the device of an unmodified blob; none for an index of one that Sluice wrote.
pub(super) fn parse_sections(
    bytes: &[u8],
) -> Result<(Vec<Section>, Option<DeviceForm>), IndexError> {
    let (header, rest) = RawHeader::ref_from_prefix(bytes).map_err(|_| IndexError::Magic)?;
    if header.magic != MAGIC {
        return Err(IndexError::Magic);
    }
    if header.version.get() != VERSION {
        return Err(IndexError::Version {
            version: header.version.get(),
        });
    }
    let features = header.incompatible.get();
    let unmodified = match features {
        0 => None,
        UNMODIFIED => Some(DeviceForm::Tar),
        features if features == UNMODIFIED | CONTENTS => Some(DeviceForm::Contents),
        _ => return Err(IndexError::Features { features }),
    };
    let (expected, actual) = (header.file_bytes.get(), bytes.len() as u64);
    if expected != actual {
        return Err(IndexError::Length { expected, actual });
    }
    let count = header.section_count.get();
    let table_bytes = usize::try_from(count)
        .ok()
        .filter(|_| count <= SECTIONS_MAX)
        .and_then(|count| count.checked_mul(size_of::<RawSection>()))
        .filter(|bytes| *bytes <= rest.len())
        .ok_or(IndexError::SectionPlace {
            ordinal: count,
            offset: 0,
            bytes: 0,
        })?;
    let (table, _) = rest.split_at(table_bytes);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header.as_bytes()[..60]);
    hasher.update(table);
    let (expected, actual) = (header.crc32.get(), hasher.finalize());
    if expected != actual {
        return Err(IndexError::Crc32 {
            id: 0,
            expected,
            actual,
        });
    }
    if header.reserved != [0; 12] {
        return Err(IndexError::Reserved { place: "header" });
    }
    let table = <[RawSection]>::ref_from_bytes(table).map_err(|_| IndexError::Magic)?;
    let mut end = size_of::<RawHeader>() + table_bytes;
    let mut sections: Vec<Section> = Vec::new();
    for (ordinal, raw) in (0..).zip(table) {
        let section = place(raw, bytes, end).ok_or(IndexError::SectionPlace {
            ordinal,
            offset: raw.offset.get(),
            bytes: raw.bytes.get(),
        })?;
        let unknown_flags = raw.flags.get() & !FLAG_REQUIRED != 0;
        if unknown_flags
            || raw.reserved.get() != 0
            || bytes[end..section.range.start].iter().any(|b| *b != 0)
        {
            return Err(IndexError::Reserved {
                place: "section table or padding",
            });
        }
        end = section.range.end;
        let id = section.id;
        let known = matches!(
            id,
            SECTION_TREE | SECTION_CHUNKS | SECTION_FILES | SECTION_METADATA
        ) || unmodified.is_some() && id == SECTION_RESTARTS;
        let refused = !known && raw.flags.get() & FLAG_REQUIRED != 0;
        if refused || sections.iter().any(|earlier| earlier.id == id) {
            return Err(IndexError::Section { id });
        }
        sections.push(section);
    }
    if end != bytes.len() {
        return Err(IndexError::Length {
            expected: end as u64,
            actual: bytes.len() as u64,
        });
    }
    Ok((sections, unmodified))
}

/// A section that is aligned, begins at `end` or later, and lies inside the file.
fn place(raw: &RawSection, bytes: &[u8], end: usize) -> Option<Section> {
    let offset = raw.offset.get();
    let start = usize::try_from(offset).ok()?;
    let stop = start.checked_add(usize::try_from(raw.bytes.get()).ok()?)?;
    let sound = start >= end && stop <= bytes.len() && offset.is_multiple_of(SECTION_ALIGN);
    sound.then(|| Section {
        id: raw.id.get(),
        range: start..stop,
        crc32: raw.crc32.get(),
    })
}
