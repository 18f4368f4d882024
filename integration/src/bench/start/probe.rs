// SPDX-License-Identifier: Apache-2.0
//! Whether what a container serves answers.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};

/// The longest that one answer may take: a program that has begun to listen may still read its image.
const ANSWER: Duration = Duration::from_secs(60);
/// Version 3.0 of PostgreSQL's protocol.
const PROTOCOL: u32 = 3 << 16;

/// How it is known that a container is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// `GET /` is answered with 200.
    Http,
    /// A database answers `SELECT 1` with a row.
    Select,
    /// This stands in the output.
    Output(&'static str),
}

impl Probe {
    /// What the report says.
    #[must_use]
    pub fn description(self) -> String {
        match self {
            Self::Http => "HTTP 200".to_owned(),
            Self::Select => "`SELECT 1`".to_owned(),
            Self::Output(text) => format!("prints \u{201c}{text}\u{201d}"),
        }
    }

    /// Whether it answers at `address` now, or has printed what it should.
    #[must_use]
    pub fn holds(self, address: SocketAddr, output: &str) -> bool {
        match self {
            Self::Http => http(address).is_ok(),
            Self::Select => select(address).is_ok(),
            Self::Output(text) => output.contains(text),
        }
    }
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER))?;
    Ok(stream)
}

fn http(address: SocketAddr) -> Result<()> {
    let mut stream = connect(address)?;
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut status = [0; 12];
    stream.read_exact(&mut status)?;
    ensure!(status.starts_with(b"HTTP/1.") && status.ends_with(b" 200"));
    Ok(())
}

/// One row for `SELECT 1`, of a server that trusts whoever connects.
fn select(address: SocketAddr) -> Result<()> {
    let mut stream = connect(address)?;
    let mut startup = PROTOCOL.to_be_bytes().to_vec();
    startup.extend(b"user\0postgres\0database\0postgres\0\0");
    stream.write_all(&framed(None, &startup)?)?;
    until(&mut stream, b'Z')?;
    stream.write_all(&framed(Some(b'Q'), b"SELECT 1\0")?)?;
    until(&mut stream, b'D')?;
    // A connection that ends without a word is logged by the server.
    stream.write_all(&framed(Some(b'X'), b"")?)?;
    Ok(())
}

fn framed(kind: Option<u8>, body: &[u8]) -> Result<Vec<u8>> {
    let length = u32::try_from(body.len() + 4)?;
    let mut message: Vec<u8> = kind.into_iter().collect();
    message.extend(length.to_be_bytes());
    message.extend(body);
    Ok(message)
}

/// Reads messages until one of this kind; one of an error is an error.
fn until(stream: &mut TcpStream, kind: u8) -> Result<()> {
    loop {
        let mut head = [0; 5];
        stream.read_exact(&mut head)?;
        let [this, length @ ..] = head;
        let length = u32::from_be_bytes(length);
        ensure!(
            (4..1 << 16).contains(&length),
            "a message of {length} bytes"
        );
        let mut body = vec![0; usize::try_from(length - 4)?];
        stream.read_exact(&mut body)?;
        ensure!(
            this != b'E',
            "refused: {:?}",
            String::from_utf8_lossy(&body)
        );
        if this == kind {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A server that gives one answer to whoever comes, whatever he asks.
    fn answering(answer: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
                stream.write_all(answer).ok();
                // To close it with something unread would take the answer back.
                stream.shutdown(std::net::Shutdown::Write).ok();
                std::io::copy(&mut stream, &mut std::io::sink()).ok();
            }
        });
        address
    }

    #[test]
    fn only_success_counts_as_ready() {
        let cases: [(&[u8], bool); 3] = [
            (b"HTTP/1.1 200 OK\r\n\r\n", true),
            (b"HTTP/1.1 503 No\r\n\r\n", false),
            (b"HTTP", false),
        ];
        for (answer, ready) in cases {
            assert_eq!(Probe::Http.holds(answering(answer), ""), ready);
        }
        let unused = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        assert!(!Probe::Http.holds(unused, ""));
        assert!(Probe::Output("done").holds(unused, "all done\n"));
        assert!(!Probe::Output("done").holds(unused, "starting\n"));
    }

    #[test]
    fn a_database_is_ready_when_it_gives_a_row() {
        let ready = b"Z\0\0\0\x05I";
        let row = b"D\0\0\0\x0b\0\x01\0\0\0\x011";
        let answer: &'static [u8] = Vec::leak([&ready[..], &row[..]].concat());
        assert!(Probe::Select.holds(answering(answer), ""));
        // It is still starting.
        assert!(!Probe::Select.holds(answering(b"E\0\0\0\x0bSFATAL\0"), ""));
    }
}
