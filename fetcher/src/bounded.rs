// SPDX-License-Identifier: Apache-2.0
//! Reads files that others write, and that should be small.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// All of a file. **Blocks**.
///
/// **Errors** [`io::ErrorKind::FileTooLarge`] above `most_bytes`, of which no more than that is read.
pub(crate) fn read(path: &Path, most_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let length = File::open(path)?
        .take(most_bytes.saturating_add(1))
        .read_to_end(&mut bytes)?;
    match u64::try_from(length).is_ok_and(|length| length <= most_bytes) {
        true => Ok(bytes),
        false => Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("larger than {most_bytes} bytes"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_bound() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        let error = read(&path, 4).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(error.to_string(), "larger than 4 bytes");
        let error = read(&directory.path().join("none"), 5).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
