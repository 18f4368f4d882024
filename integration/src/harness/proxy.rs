// SPDX-License-Identifier: Apache-2.0
//! A TCP proxy in front of the registry that shapes the line, counts bytes and can go bad.
//!
//! One token bucket is shared by all connections; a new connection and the first byte of each
//! answer wait for the latency. Counting happens here, outside of what is measured, and by client
//! address ([`tally`]).

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};

use tally::{Piece, Tally};

pub mod tally;

/// A free port of 127.0.0.1.
pub const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// How long a thread that waits for a peer does not notice that the proxy stops or refuses.
const LOOK_AROUND: Duration = Duration::from_millis(100);

/// What the kernel keeps for a client that is not sent yet. Little, because it is counted already:
/// what a dead client will never get must not hide in it. Enough for 25 MB/s at 10 ms.
const SEND_BUFFER_BYTES: usize = 256 * 1024;

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
    tally: Tally,
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
        Self::listen(LOOPBACK, target, line)
    }

    /// Listens at `address` and forwards to `target`; both in the network of the calling thread.
    pub fn listen(address: SocketAddr, target: SocketAddr, line: Line) -> Result<Self> {
        let listener = TcpListener::bind(address).context("bind the proxy")?;
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            target,
            line: Mutex::new(line),
            bucket: Mutex::new(Bucket {
                free_at: Instant::now(),
            }),
            mode: AtomicU8::new(Mode::Forward as u8),
            tally: Tally::default(),
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
        self.shared.tally.total().bytes
    }

    /// Turns from server to client seen since the start: for HTTP/1.1 without pipelining, the requests that
    /// were answered.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.shared.tally.total().requests
    }

    /// What each client address got, and what was cut off.
    #[must_use]
    pub fn tally(&self) -> &Tally {
        &self.shared.tally
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

    /// Whether connections shall end.
    fn ends(&self) -> bool {
        self.stop.load(Ordering::SeqCst) || self.mode() == Mode::Refuse
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
            Ok((client, from)) => {
                if shared.mode() == Mode::Refuse {
                    continue;
                }
                let shared = shared.clone();
                connections.push(std::thread::spawn(move || {
                    serve(&client, from.ip(), &shared)
                }));
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

fn serve(client: &TcpStream, from: IpAddr, shared: &Arc<Shared>) {
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
        stream.set_read_timeout(Some(LOOK_AROUND)).ok();
        stream.set_write_timeout(Some(LOOK_AROUND)).ok();
    }
    setsockopt(client, sockopt::SndBuf, &SEND_BUFFER_BYTES).ok();
    // What was asked since the last answer began.
    let asked: Mutex<Option<Option<Piece>>> = Mutex::new(None);
    let mut answer = shared.tally.connection(from);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pump(client, &server, shared, |request| {
                if shared.mode() == Mode::HoldRanges && asks_for_range(request) {
                    while shared.mode() == Mode::HoldRanges && !shared.stop.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
                let mut asked = asked.lock().expect("no holder panics");
                asked.get_or_insert_with(|| Piece::parse(request));
            });
            server.shutdown(Shutdown::Both).ok();
        });
        pump(&server, client, shared, |bytes| {
            let piece = asked.lock().expect("no holder panics").take();
            if let Some(piece) = piece {
                std::thread::sleep(shared.latency());
                answer.begin(piece, bytes);
            }
            shared.carry(bytes.len());
            answer.carry(bytes.len() as u64);
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
            Err(e) if is_for_now(&e) => {
                if shared.ends() {
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
        let mut left = &buffer[..n];
        while !left.is_empty() {
            match to.write(left) {
                Ok(n) => left = &left[n..],
                // Whoever reads may be gone without a word, with its network.
                Err(e) if is_for_now(&e) && !shared.ends() => {}
                Err(_) => return,
            }
        }
    }
}

fn is_for_now(e: &std::io::Error) -> bool {
    matches!(
        e.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}
