// SPDX-License-Identifier: Apache-2.0
//! Unix sockets that only root may connect to.

use std::fs::Permissions;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// Why a socket cannot be bound.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// Somebody answers on it.
    #[error("socket {path:?} is in use by another process")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket has its name.
    #[error("{path:?} exists and is no socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("bind socket {path:?}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Binds a socket with mode 0600 in a directory that only its owner may enter. A socket that a
/// dead process left is replaced; one on which somebody answers is not.
///
/// Must be called on a runtime.
pub fn bind_private(path: &Path) -> Result<UnixListener, SocketError> {
    let io = |source| SocketError::Io {
        path: path.into(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => (),
        Err(error) => return Err(io(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.into() });
        }
        Ok(_) => match UnixStream::connect(path) {
            // Only this answer means that nobody listens; a full queue, say, does not.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(io)?;
            }
            Ok(_) => return Err(SocketError::InUse { path: path.into() }),
            Err(error) => return Err(io(error)),
        },
    }
    let listener = UnixListener::bind(path).map_err(io)?;
    // Until here the directory alone, mode 0700, keeps others out.
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(io)?;
    Ok(listener)
}
