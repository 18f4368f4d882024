// SPDX-License-Identifier: Apache-2.0
//! Bringing a file of an older schema to the present one.
//!
//! Each version has one step, to the next. All steps that a file needs run in the one transaction that opens
//! it: the file is of the old version or of the present one, whatever happens amid them. Before that the old
//! file is copied beside it, as `metadata.redb.v<version>`, for whoever wants to go back to the older program;
//! a copy that cannot be made refuses the migration, and an older copy of that version is replaced. A file
//! of a later version is refused and left as it is.
//!
//! A change that older programs cannot read needs a version and a step; one that they may ignore, such as a
//! further table, needs none: [`super::tables::create`] makes what is missing.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use redb::WriteTransaction;

use super::StoreError;

/// What a step does with the file that it finds.
pub(super) type Change = fn(&WriteTransaction) -> Result<(), StoreError>;

/// The step from each version, beginning with version 1, to the next.
pub(super) const STEPS: &[Change] = &[];

/// The steps that a file of version `found` needs, in order.
///
/// **Errors** [`StoreError::Schema`] for one of a version later than `STEPS` lead to, and for version 0.
pub(super) fn needed(found: u64, steps: &[Change]) -> Result<&[Change], StoreError> {
    let refused = || StoreError::Schema { found, features: 0 };
    let done = found.checked_sub(1).ok_or_else(refused)?;
    let done = usize::try_from(done).map_err(|_| refused())?;
    steps.get(done..).ok_or_else(refused)
}

/// The version that the steps lead to.
pub(super) const fn version_after(steps: &[Change]) -> u64 {
    // A step a release: their number fits.
    steps.len() as u64 + 1
}

/// Where the file of an older version is kept.
pub(super) fn kept_path(path: &Path, version: u64) -> PathBuf {
    path.with_extension(format!("redb.v{version}"))
}

/// Keeps a copy of the file, durably, wholly or not at all.
pub(super) fn keep_copy(path: &Path, version: u64) -> io::Result<PathBuf> {
    let kept = kept_path(path, version);
    let unnamed = kept.with_extension("new");
    std::fs::copy(path, &unnamed)?;
    File::open(&unnamed)?.sync_all()?;
    std::fs::rename(&unnamed, &kept)?;
    if let Some(directory) = path.parent() {
        File::open(directory)?.sync_all()?;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing(_: &WriteTransaction) -> Result<(), StoreError> {
        Ok(())
    }

    #[test]
    fn a_file_needs_the_steps_from_its_version_on() {
        let steps: [Change; 2] = [nothing; 2];
        let count = |found| needed(found, &steps).map(<[Change]>::len);
        assert_eq!(count(1).unwrap(), 2);
        assert_eq!(count(2).unwrap(), 1);
        assert_eq!(count(3).unwrap(), 0);
        for refused in [0, 4, u64::MAX] {
            let error = count(refused).unwrap_err();
            assert!(matches!(error, StoreError::Schema { found, .. } if found == refused));
        }
    }

    #[test]
    fn the_present_version_is_where_the_steps_lead() {
        assert_eq!(super::super::SCHEMA_VERSION, version_after(STEPS));
    }
}
