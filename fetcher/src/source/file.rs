// SPDX-License-Identifier: Apache-2.0
//! A blob in a local file, such as a layer in an OCI layout.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::{BlobSource, BlobStream, ReadContext, SourceError, SourceKind};

/// Bytes read at once: large enough that the hop to a blocking thread does not matter.
const READ_BYTES: u64 = 256 * 1024;

/// Reads a blob from a file, which is opened once and read with `pread` on blocking threads.
pub struct FileSource {
    file: Arc<File>,
    path: PathBuf,
    label: String,
    size_bytes: u64,
}

impl fmt::Debug for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileSource")
            .field("path", &self.path)
            .field("size_bytes", &self.size_bytes)
            .finish_non_exhaustive()
    }
}

impl FileSource {
    /// Opens the file; its present length is the blob's size.
    ///
    /// **Errors** [`SourceError::Io`].
    pub fn open_path(path: &Path) -> Result<Self, SourceError> {
        let file = File::open(path).map_err(|error| io_error(path, &error))?;
        let size_bytes = file
            .metadata()
            .map_err(|error| io_error(path, &error))?
            .len();
        Ok(FileSource {
            file: Arc::new(file),
            path: path.to_owned(),
            label: path.display().to_string(),
            size_bytes,
        })
    }
}

fn io_error(path: &Path, error: &io::Error) -> SourceError {
    SourceError::Io {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

#[async_trait]
impl BlobSource for FileSource {
    fn label(&self) -> &str {
        &self.label
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Local
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        context.check()?;
        if extent.end() > self.size_bytes {
            return Err(SourceError::BeyondEnd { asked: extent });
        }
        let state = (
            Arc::clone(&self.file),
            self.path.clone(),
            context.clone(),
            extent.start(),
        );
        let body = stream::try_unfold(state, move |(file, path, context, at)| async move {
            if at >= extent.end() {
                return Ok(None);
            }
            let len_bytes = READ_BYTES.min(extent.end() - at);
            let reader = Arc::clone(&file);
            let read = tokio::task::spawn_blocking(move || read_at(&reader, at, len_bytes));
            let piece: Bytes = match context.bound(read).await? {
                Ok(piece) => piece.map_err(|error| io_error(&path, &error))?,
                // Only at shutdown: the runtime refuses new blocking work.
                Err(_) => return Err(SourceError::Cancelled),
            };
            if piece.is_empty() {
                return Err(SourceError::ShortBody {
                    offset: at,
                    expected_end: extent.end(),
                });
            }
            let after = at + u64::try_from(piece.len()).unwrap_or(len_bytes);
            Ok(Some((piece, (file, path, context, after))))
        });
        Ok(BlobStream::new(extent, body))
    }
}

/// At most `len_bytes` at `at`; empty at the end of the file.
fn read_at(file: &File, at: u64, len_bytes: u64) -> io::Result<Bytes> {
    let mut piece = vec![0; usize::try_from(len_bytes).map_err(io::Error::other)?];
    let mut filled = 0;
    while filled < piece.len() {
        let offset = at + u64::try_from(filled).map_err(io::Error::other)?;
        match file.read_at(&mut piece[filled..], offset) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    piece.truncate(filled);
    Ok(Bytes::from(piece))
}
