// SPDX-License-Identifier: Apache-2.0
//! Tells systemd how far the daemon is: one datagram to `$NOTIFY_SOCKET`, as sd_notify(3) does.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends a state such as `READY=1`, if systemd asked for it.
pub(super) fn systemd(state: &str) {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    if let Err(error) = send(&address, state) {
        tracing::warn!(%error, state, "systemd is not notified");
    }
}

fn send(address: &OsStr, state: &str) -> io::Result<()> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    // systemd's queue may be full; waiting for it would be worse than silence.
    socket.set_nonblocking(true)?;
    socket.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_arrives_by_path_and_by_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let by_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("sluice-notify-test-{}", std::process::id());
        let by_name =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        for (socket, address) in [
            (by_path, path.into_os_string()),
            (by_name, format!("@{name}").into()),
        ] {
            send(&address, "READY=1").unwrap();
            let mut received = [0; 32];
            let bytes = socket.recv(&mut received).unwrap();
            assert_eq!(&received[..bytes], b"READY=1");
        }
        assert!(send(OsStr::new("/nonexistent/notify"), "READY=1").is_err());
    }
}
