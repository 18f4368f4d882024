// SPDX-License-Identifier: Apache-2.0
//! Packets with file descriptors beside them, over a `SOCK_SEQPACKET` pair.
//!
//! One `send` is one `recv`: the kernel keeps message boundaries, so there is no framing, and the
//! descriptors of a packet can never be mixed up with those of another.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag,
    SockType, UnixAddr, accept4, bind, connect, listen, recvmsg, sendmsg, shutdown, socket,
    socketpair,
};

/// Largest packet. All our packets hold a name and a few numbers; bulk stands in memfds.
pub const PACKET_BYTES: usize = 4096;

/// Most descriptors beside one packet.
pub const PACKET_FDS: usize = 4;

/// One end of a packet socket pair.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

/// A socket below a path, to which others connect.
#[derive(Debug)]
pub struct PacketListener(OwnedFd);

/// Connections that wait to be accepted.
const BACKLOG: i32 = 8;

fn unconnected() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

impl PacketListener {
    /// Listens below `path`, which is not there yet.
    pub fn bind(path: &Path) -> io::Result<PacketListener> {
        let socket = unconnected()?;
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&socket, Backlog::new(BACKLOG)?)?;
        Ok(PacketListener(socket))
    }

    /// Waits for the next connection; `None` when [`Self::end`] was called.
    pub fn accept(&self) -> io::Result<Option<PacketSocket>> {
        loop {
            match accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                // SAFETY: the kernel has just installed this number for us; nobody else knows it.
                Ok(fd) => return Ok(Some(PacketSocket(unsafe { OwnedFd::from_raw_fd(fd) }))),
                Err(nix::errno::Errno::EINTR | nix::errno::Errno::ECONNABORTED) => continue,
                Err(nix::errno::Errno::EINVAL) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Accepts nobody any more, and wakes who waits for it.
    pub fn end(&self) {
        let _ended = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}

/// A packet as received.
#[derive(Debug)]
pub struct Packet {
    /// The message.
    pub bytes: Vec<u8>,
    /// The descriptors that came beside it, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

impl PacketSocket {
    /// A connected pair, both ends close-on-exec.
    pub fn pair() -> io::Result<(PacketSocket, PacketSocket)> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((PacketSocket(a), PacketSocket(b)))
    }

    /// Connects to a [`PacketListener`].
    pub fn connect(path: &Path) -> io::Result<PacketSocket> {
        let socket = unconnected()?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(PacketSocket(socket))
    }

    /// Another handle on the same end.
    pub fn try_clone(&self) -> io::Result<PacketSocket> {
        self.0.try_clone().map(PacketSocket)
    }

    /// Ends the connection for both ends, also for who waits on it now.
    pub fn end(&self) {
        // One that has ended already is fine.
        let _ended = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }

    /// Takes over a descriptor that is one end of a pair.
    pub fn from_owned(fd: OwnedFd) -> PacketSocket {
        PacketSocket(fd)
    }

    /// Gives the descriptor up, for instance as a child's standard input.
    pub fn into_owned(self) -> OwnedFd {
        self.0
    }

    /// Sends one packet; waits while the socket's buffer is full.
    ///
    /// **Errors** `EPIPE` when the other end is gone (never a signal).
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.len() > PACKET_BYTES || fds.len() > PACKET_FDS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        loop {
            let sent = sendmsg::<()>(
                self.0.as_raw_fd(),
                &[IoSlice::new(bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            match sent {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the next packet; `None` when the other end is gone.
    ///
    /// **Errors** `InvalidData` for a packet that was cut, whose descriptors are then closed.
    pub fn recv(&self) -> io::Result<Option<Packet>> {
        let mut bytes = vec![0u8; PACKET_BYTES];
        let mut control = cmsg_space!([RawFd; PACKET_FDS]);
        let (length, flags, fds) = loop {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let received = recvmsg::<()>(
                self.0.as_raw_fd(),
                &mut slices,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            );
            match received {
                Ok(message) => {
                    let mut fds = Vec::new();
                    for one in message.cmsgs()? {
                        if let ControlMessageOwned::ScmRights(raw) = one {
                            // SAFETY: the kernel has just installed these numbers for us; nobody
                            // else knows them.
                            fds.extend(raw.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                        }
                    }
                    break (message.bytes, message.flags, fds);
                }
                Err(nix::errno::Errno::EINTR) => continue,
                Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        };
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "packet was cut"));
        }
        if length == 0 && fds.is_empty() {
            return Ok(None);
        }
        bytes.truncate(length);
        Ok(Some(Packet { bytes, fds }))
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn packets_keep_their_bounds_and_descriptors() {
        let (a, b) = PacketSocket::pair().unwrap();
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        a.send(b"one", &[]).unwrap();
        a.send(b"two", &[reader.as_fd(), writer.as_fd()]).unwrap();
        assert_eq!(b.recv().unwrap().unwrap().bytes, b"one");
        let two = b.recv().unwrap().unwrap();
        assert_eq!((two.bytes.as_slice(), two.fds.len()), (&b"two"[..], 2));
        let mut fds = two.fds.into_iter();
        let mut passed_reader = File::from(fds.next().unwrap());
        drop(fds);
        writer.write_all(b"x").unwrap();
        let mut got = [0u8];
        passed_reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"x");
        let flags = nix::fcntl::fcntl(&passed_reader, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        drop(writer);
        assert_eq!(reader.read(&mut got).unwrap(), 0);
        drop(a);
        assert!(b.recv().unwrap().is_none());
        assert_eq!(
            b.send(b"late", &[]).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn who_connects_is_accepted_until_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = PacketListener::bind(&path).unwrap();
        let client = PacketSocket::connect(&path).unwrap();
        let server = listener.accept().unwrap().unwrap();
        client.send(b"hello", &[]).unwrap();
        assert_eq!(server.recv().unwrap().unwrap().bytes, b"hello");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| listener.accept().unwrap().is_none());
            let reading = scope.spawn(|| server.recv().unwrap().is_none());
            std::thread::sleep(std::time::Duration::from_millis(20));
            listener.end();
            server.end();
            assert!(waiting.join().unwrap() && reading.join().unwrap());
        });
        assert!(client.recv().unwrap().is_none());
        assert!(PacketListener::bind(&path).is_err(), "the path is taken");
    }

    #[test]
    fn a_packet_over_the_limit_is_refused() {
        let (a, _b) = PacketSocket::pair().unwrap();
        assert!(a.send(&vec![0; PACKET_BYTES + 1], &[]).is_err());
    }
}
