// SPDX-License-Identifier: Apache-2.0
//! Parts of files as the bodies of blobs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::extent::Extent;

use super::{BlobBody, ImageError};

/// Bytes read at a time: as large as a network read, small against any layer.
const READ_BYTES: u64 = 256 * 1024;

/// Address space of a file that holds several contents.
#[derive(Debug, Clone, Copy)]
pub(super) struct FileSpace;

/// A content within a file.
pub(super) type FileExtent = Extent<FileSpace>;

/// Runs blocking file work off the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.map_err(|e| ImageError::failed("run", "file task", e))?
}

/// All of `extent`. Blocks. **Errors**: the file is shorter.
pub(super) fn read(file: &File, extent: FileExtent) -> io::Result<Bytes> {
    let length = usize::try_from(extent.len()).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, extent.start())?;
    Ok(bytes.into())
}

/// All of `extent`, as it comes. `what` names it in messages.
pub(super) fn body(file: Arc<File>, extent: FileExtent, what: String) -> BlobBody {
    let state = Some((file, extent.start(), what));
    Box::pin(futures::stream::unfold(state, move |state| async move {
        let (file, position, what) = state?;
        let end = extent.end().min(position.saturating_add(READ_BYTES));
        let part = Extent::new(position, end).filter(|part| !part.is_empty())?;
        let same = Arc::clone(&file);
        let failed = what.clone();
        let part =
            blocking(move || read(&same, part).map_err(|e| ImageError::failed("read", failed, e)));
        match part.await {
            Ok(bytes) => Some((Ok(bytes), Some((file, end, what)))),
            Err(e) => Some((Err(e), None)),
        }
    }))
}
