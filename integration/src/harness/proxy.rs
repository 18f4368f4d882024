// SPDX-License-Identifier: Apache-2.0
//! A TCP proxy in front of the registry that shapes the line, counts bytes and can go bad.
//!
//! One token bucket is shared by all connections; a new connection and the first byte of each
//! answer wait for the latency. Counting happens here, outside of what is measured.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The speed and delay of the line.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    /// Bytes per second towards the clients, all connections together.
    pub bytes_per_second: u64,
    /// Added to each new connection and to the first byte of each answer.
    pub latency: Duration,
}

impl Line {
    /// 100 Mbit/s and 20 ms: the line of the published comparisons.
    pub const WIDE_AREA: Self = Self {
        bytes_per_second: 12_500_000,
        latency: Duration::from_millis(20),
    };
    /// No limit that matters.
    pub const OPEN: Self = Self {
        bytes_per_second: 4_000_000_000,
        latency: Duration::ZERO,
    };
}

/// What the line does with traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// Forwards.
    Forward = 0,
    /// Accepts connections and answers nothing; bytes under way stop.
    BlackHole = 1,
    /// Closes every connection at once.
    Refuse = 2,
    /// Swallows requests for a range (lazy reads); others pass.
    HoldRanges = 3,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    line: Mutex<Line>,
    bucket: Mutex<Bucket>,
    mode: AtomicU8,
    down: AtomicU64,
    requests: AtomicU64,
    stop: AtomicBool,
}

#[derive(Debug)]
struct Bucket {
    free_at: Instant,
}

/// A running proxy; it stops when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1 and forwards to `target`.
    pub fn start(target: SocketAddr, line: Line) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("bind the proxy")?;
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            target,
            line: Mutex::new(line),
            bucket: Mutex::new(Bucket {
                free_at: Instant::now(),
            }),
            mode: AtomicU8::new(Mode::Forward as u8),
            down: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let acceptor = {
            let shared = shared.clone();
            std::thread::spawn(move || accept(&listener, &shared))
        };
        Ok(Self {
            address,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes sent to clients since the start.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shared.down.load(Ordering::Relaxed)
    }

    /// Turns from client to server seen since the start: for HTTP/1.1 without pipelining, the requests.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Changes the line.
    pub fn set_line(&self, line: Line) {
        *self.shared.line.lock().expect("no holder panics") = line;
    }

    /// Changes what happens to traffic, also on open connections.
    pub fn set_mode(&self, mode: Mode) {
        self.shared.mode.store(mode as u8, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().ok();
        }
    }
}

impl Shared {
    fn mode(&self) -> Mode {
        match self.mode.load(Ordering::SeqCst) {
            0 => Mode::Forward,
            1 => Mode::BlackHole,
            3 => Mode::HoldRanges,
            _ => Mode::Refuse,
        }
    }

    /// Waits until the line has carried `bytes`.
    fn carry(&self, bytes: usize) {
        let rate = self.line.lock().expect("no holder panics").bytes_per_second;
        let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let wait = {
            let mut bucket = self.bucket.lock().expect("no holder panics");
            let now = Instant::now();
            bucket.free_at = bucket.free_at.max(now) + cost;
            bucket.free_at - now
        };
        if wait > Duration::from_micros(200) {
            std::thread::sleep(wait);
        }
    }

    fn latency(&self) -> Duration {
        self.line.lock().expect("no holder panics").latency
    }

    /// Holds while the line is a black hole; false when the connection shall end.
    fn pass(&self) -> bool {
        loop {
            match self.mode() {
                Mode::Forward | Mode::HoldRanges => return !self.stop.load(Ordering::SeqCst),
                Mode::Refuse => return false,
                Mode::BlackHole => {
                    if self.stop.load(Ordering::SeqCst) {
                        return false;
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut connections: Vec<JoinHandle<()>> = Vec::new();
    while !shared.stop.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((client, _)) => {
                if shared.mode() == Mode::Refuse {
                    continue;
                }
                let shared = shared.clone();
                connections.push(std::thread::spawn(move || serve(&client, &shared)));
                connections.retain(|c| !c.is_finished());
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1))
            }
            Err(_) => break,
        }
    }
    for connection in connections {
        connection.join().ok();
    }
}

fn serve(client: &TcpStream, shared: &Arc<Shared>) {
    std::thread::sleep(shared.latency());
    if !shared.pass() {
        return;
    }
    let Ok(server) = TcpStream::connect(shared.target) else {
        return;
    };
    for stream in [client, &server] {
        stream.set_nonblocking(false).ok();
        stream.set_nodelay(true).ok();
        stream
            .set_read_timeout(Some(Duration::from_millis(100)))
            .ok();
    }
    let asked = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pump(client, &server, shared, |request| {
                if shared.mode() == Mode::HoldRanges && asks_for_range(request) {
                    while shared.mode() == Mode::HoldRanges && !shared.stop.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
                if !asked.swap(true, Ordering::SeqCst) {
                    shared.requests.fetch_add(1, Ordering::Relaxed);
                }
            });
            server.shutdown(Shutdown::Both).ok();
        });
        pump(&server, client, shared, |bytes| {
            if asked.swap(false, Ordering::SeqCst) {
                std::thread::sleep(shared.latency());
            }
            shared.carry(bytes.len());
            shared.down.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        });
        client.shutdown(Shutdown::Both).ok();
    });
}

fn asks_for_range(request: &[u8]) -> bool {
    request
        .windows(8)
        .any(|w| w.eq_ignore_ascii_case(b"\r\nrange:"))
}

fn pump(mut from: &TcpStream, mut to: &TcpStream, shared: &Shared, mut before: impl FnMut(&[u8])) {
    // Small pieces keep several connections fair to each other on the shared bucket.
    let mut buffer = [0u8; 16 * 1024];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => n,
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) =>
            {
                if shared.stop.load(Ordering::SeqCst) || shared.mode() == Mode::Refuse {
                    return;
                }
                continue;
            }
            Err(_) => return,
        };
        if !shared.pass() {
            return;
        }
        before(&buffer[..n]);
        if to.write_all(&buffer[..n]).is_err() {
            return;
        }
    }
}
