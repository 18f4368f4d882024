// SPDX-License-Identifier: Apache-2.0
//! An HTTP proxy that does nothing but CONNECT, for machines that tests make: `connect-proxy ADDRESS`. It says on standard
//! output whom it connected.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// Of a head and of a connection without any byte.
const DEADLINE: Duration = Duration::from_secs(60);
/// How many lines of a head are read.
const LINES: usize = 100;

fn main() -> Result<()> {
    let address = std::env::args().nth(1);
    let address = address.context("usage: connect-proxy ADDRESS")?;
    let listener = TcpListener::bind(&address).with_context(|| format!("listen at {address}"))?;
    for client in listener.incoming() {
        let client = client?;
        std::thread::spawn(move || {
            if let Err(e) = serve(client) {
                println!("failed {e:#}");
            }
        });
    }
    Ok(())
}

fn serve(mut client: TcpStream) -> Result<()> {
    client.set_read_timeout(Some(DEADLINE))?;
    let mut head = BufReader::new(client.try_clone()?);
    let mut request = String::new();
    head.read_line(&mut request)?;
    for _ in 0..LINES {
        let mut line = String::new();
        head.read_line(&mut line)?;
        if line.trim_end().is_empty() {
            break;
        }
    }
    let mut words = request.split(' ');
    let (Some("CONNECT"), Some(target)) = (words.next(), words.next()) else {
        client.write_all(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")?;
        bail!("asked for {request:?}");
    };
    let mut server = TcpStream::connect(target).with_context(|| target.to_owned())?;
    server.set_read_timeout(Some(DEADLINE))?;
    println!("connected {target}");
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    // A client says nothing before the answer, so that the reader of the head holds nothing back.
    let (mut up, mut there) = (client.try_clone()?, server.try_clone()?);
    let forth = std::thread::spawn(move || {
        std::io::copy(&mut up, &mut there).ok();
        there.shutdown(Shutdown::Write).ok();
    });
    std::io::copy(&mut server, &mut client).ok();
    client.shutdown(Shutdown::Write).ok();
    forth.join().ok();
    Ok(())
}
