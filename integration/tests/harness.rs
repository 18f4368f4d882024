// SPDX-License-Identifier: Apache-2.0
//! The harness itself: the line counts and shapes, guards end what they started.

#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use sluice_integration::harness::command;
use sluice_integration::harness::proxy::{Line, Mode, Proxy};

fn echo_server() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().take(4) {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut wanted = [0u8; 4];
                while stream.read_exact(&mut wanted).is_ok() {
                    let n = u32::from_le_bytes(wanted) as usize;
                    if stream.write_all(&vec![7u8; n]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

fn ask(stream: &mut TcpStream, n: u32) -> std::io::Result<Duration> {
    let start = Instant::now();
    stream.write_all(&n.to_le_bytes())?;
    let mut buffer = vec![0u8; n as usize];
    stream.read_exact(&mut buffer)?;
    Ok(start.elapsed())
}

#[test]
fn the_line_counts_shapes_and_goes_black() {
    let line = Line {
        bytes_per_second: 1_000_000,
        latency: Duration::from_millis(20),
    };
    let proxy = Proxy::start(echo_server(), line).unwrap();
    let mut stream = TcpStream::connect(proxy.address()).unwrap();
    let elapsed = ask(&mut stream, 300_000).unwrap();
    assert!(
        elapsed >= Duration::from_millis(300),
        "{elapsed:?} for 300 kB at 1 MB/s"
    );
    assert_eq!(proxy.bytes(), 300_000);
    assert_eq!(proxy.requests(), 1);
    proxy.set_mode(Mode::BlackHole);
    stream
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    assert!(ask(&mut stream, 10).is_err());
    proxy.set_mode(Mode::Forward);
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let mut buffer = [0u8; 10];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(buffer, [7; 10]);
}

#[test]
fn a_command_past_its_deadline_is_ended() {
    let start = Instant::now();
    let error =
        command::run(Command::new("sleep").arg("60"), Duration::from_millis(200)).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(error.to_string().contains("still ran"), "{error:#}");
}

#[test]
fn output_and_first_output_are_seen() {
    let output = command::run_ok(
        Command::new("sh").args(["-c", "echo one; sleep 0.3; echo two"]),
        Duration::from_secs(10),
    )
    .unwrap();
    assert_eq!(output.stdout, "one\ntwo\n");
    assert!(
        output.first_output.unwrap() < Duration::from_millis(250),
        "{:?}",
        output.first_output
    );
}
