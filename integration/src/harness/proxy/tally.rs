// SPDX-License-Identifier: Apache-2.0
//! What a line carried, by client address, and how much of it was for nothing.
//!
//! Two kinds of waste are told apart, so that a test can say which of it a fault explains. An answer
//! whose connection ends before its last byte was *cut*: its client died or gave up; what it had got by
//! then is counted as `cut_bytes`. Bytes of a blob that somebody got before since the last
//! [`Tally::new_round`] are *repeated*, whoever got them. Only answers that say their length can be
//! known to be cut, and only blobs of a registry's pull API can be known to be repeated.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};

/// What one client, or all of them, got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes towards the client, heads of answers included.
    pub bytes: u64,
    /// Requests.
    pub requests: u64,
    /// Bytes of answers that were cut.
    pub cut_bytes: u64,
    /// Bytes of blobs that had been sent before.
    pub repeated_bytes: u64,
}

impl Traffic {
    fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.requests += other.requests;
        self.cut_bytes += other.cut_bytes;
        self.repeated_bytes += other.repeated_bytes;
    }

    /// What came since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            bytes: self.bytes - earlier.bytes,
            requests: self.requests - earlier.requests,
            cut_bytes: self.cut_bytes - earlier.cut_bytes,
            repeated_bytes: self.repeated_bytes - earlier.repeated_bytes,
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    clients: BTreeMap<IpAddr, Traffic>,
    /// What was sent of each blob.
    sent: HashMap<String, Covered>,
}

/// The counts of all clients.
#[derive(Debug, Default)]
pub struct Tally {
    counts: Mutex<Counts>,
}

impl Tally {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().expect("no holder panics")
    }

    fn client(&self, client: IpAddr, change: impl FnOnce(&mut Traffic)) {
        change(self.counts().clients.entry(client).or_default());
    }

    pub(super) fn connection(&self, client: IpAddr) -> Answer<'_> {
        Answer {
            tally: self,
            client,
            piece: None,
            head_bytes: 0,
            got: 0,
            left: 0,
        }
    }

    /// All clients together.
    #[must_use]
    pub fn total(&self) -> Traffic {
        let mut total = Traffic::default();
        self.counts().clients.values().for_each(|it| total.add(*it));
        total
    }

    /// One client.
    #[must_use]
    pub fn of(&self, client: IpAddr) -> Traffic {
        self.counts()
            .clients
            .get(&client)
            .copied()
            .unwrap_or_default()
    }

    /// From now on no byte counts as sent before.
    pub fn new_round(&self) {
        self.counts().sent.clear();
    }
}

/// What a request asks for: a blob's path, from an offset on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    blob: String,
    start: u64,
}

impl Piece {
    /// From a request's head; nothing if it is not for a blob.
    pub(super) fn parse(request: &[u8]) -> Option<Self> {
        let mut lines = request.split(|byte| *byte == b'\n');
        let line = std::str::from_utf8(lines.next()?).ok()?;
        let blob = line.strip_prefix("GET ")?.split(' ').next()?;
        blob.contains("/blobs/").then_some(())?;
        let start = lines
            .filter_map(|line| std::str::from_utf8(line).ok()?.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("range"))
            .and_then(|(_, value)| value.trim().strip_prefix("bytes=")?.split_once('-'))
            .map_or(Some(0), |(start, _)| start.parse().ok())?;
        Some(Self {
            blob: blob.to_owned(),
            start,
        })
    }
}

/// The answer that a connection carries at the moment; dropped with the connection.
#[derive(Debug)]
pub(super) struct Answer<'a> {
    tally: &'a Tally,
    client: IpAddr,
    piece: Option<Piece>,
    head_bytes: u64,
    got: u64,
    left: u64,
}

impl Answer<'_> {
    /// A request was made; its answer begins with `bytes`.
    pub(super) fn begin(&mut self, piece: Option<Piece>, bytes: &[u8]) {
        let (head_bytes, body_bytes) = lengths(bytes).unwrap_or((0, 0));
        self.piece = piece.filter(|_| body_bytes > 0);
        self.head_bytes = head_bytes;
        self.got = 0;
        self.left = head_bytes + body_bytes;
        self.tally.client(self.client, |it| it.requests += 1);
    }

    /// `bytes` of it were sent.
    pub(super) fn carry(&mut self, bytes: u64) {
        let before = self.got;
        self.got += bytes;
        self.left = self.left.saturating_sub(bytes);
        let body = |got: u64| got.saturating_sub(self.head_bytes);
        let (from, to) = (body(before), body(self.got));
        let mut counts = self.tally.counts();
        let repeated_bytes = self.piece.as_ref().map_or(0, |piece| {
            let sent = counts.sent.entry(piece.blob.clone()).or_default();
            (to - from) - sent.add(piece.start + from, piece.start + to)
        });
        counts.clients.entry(self.client).or_default().add(Traffic {
            bytes,
            repeated_bytes,
            ..Traffic::default()
        });
    }
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        if self.left > 0 {
            self.tally
                .client(self.client, |it| it.cut_bytes += self.got);
        }
    }
}

/// Disjoint half-open ranges, by their starts.
#[derive(Debug, Default)]
struct Covered(BTreeMap<u64, u64>);

impl Covered {
    /// Covers `start..end`; returns how much of it was not covered yet.
    fn add(&mut self, start: u64, end: u64) -> u64 {
        if start >= end {
            return 0;
        }
        let touching: Vec<(u64, u64)> = self
            .0
            .range(..=end)
            .rev()
            .map(|(s, e)| (*s, *e))
            .take_while(|(_, e)| *e >= start)
            .collect();
        let (mut from, mut to, mut covered) = (start, end, 0);
        for (s, e) in touching {
            self.0.remove(&s);
            covered += e.min(end).saturating_sub(s.max(start));
            (from, to) = (from.min(s), to.max(e));
        }
        self.0.insert(from, to);
        end - start - covered
    }
}

/// How long head and body are of the answer that begins with `bytes`, when the whole head is there and says so.
fn lengths(bytes: &[u8]) -> Option<(u64, u64)> {
    let head_bytes = bytes.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..head_bytes]).ok()?;
    let body_bytes = head.lines().skip(1).find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse().ok())?
    })?;
    Some((u64::try_from(head_bytes).ok()?, body_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &[u8] = b"HTTP/1.1 206 Partial Content\r\ncontent-length: 100\r\nDate: now\r\n\r\n";
    const HEAD_BYTES: u64 = HEAD.len() as u64;

    fn piece(start: u64) -> Option<Piece> {
        Some(Piece {
            blob: "/v2/app/blobs/sha256:1".to_owned(),
            start,
        })
    }

    type Lengths = Option<(u64, u64)>;

    #[test]
    fn lengths_of_answers() {
        let cases: [(&[u8], Lengths); 4] = [
            (HEAD, Some((HEAD_BYTES, 100))),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
                Some((38, 5)),
            ),
            (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                None,
            ),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", None),
        ];
        for (bytes, expected) in cases {
            assert_eq!(
                lengths(bytes),
                expected,
                "{:?}",
                String::from_utf8_lossy(bytes)
            );
        }
    }

    #[test]
    fn pieces_of_requests() {
        let cases: [(&str, Option<Piece>); 5] = [
            (
                "GET /v2/app/blobs/sha256:1 HTTP/1.1\r\nHost: a:5000\r\nRange: bytes=7-9\r\n\r\n",
                piece(7),
            ),
            (
                "GET /v2/app/blobs/sha256:1 HTTP/1.1\r\nhost: a\r\n\r\n",
                piece(0),
            ),
            (
                "GET /v2/app/blobs/sha256:1 HTTP/1.1\r\nrange: bytes=-9\r\n\r\n",
                None,
            ),
            ("HEAD /v2/app/blobs/sha256:1 HTTP/1.1\r\n\r\n", None),
            ("GET /v2/app/manifests/latest HTTP/1.1\r\n\r\n", None),
        ];
        for (request, expected) in cases {
            assert_eq!(Piece::parse(request.as_bytes()), expected, "{request}");
        }
    }

    #[test]
    fn what_was_covered_before() {
        let mut covered = Covered::default();
        let cases = [
            (10, 20, 10),
            (10, 20, 0),
            (30, 40, 10),
            (15, 35, 10),
            (5, 10, 5),
            (0, 50, 15),
            (7, 7, 0),
        ];
        for (start, end, new) in cases {
            assert_eq!(covered.add(start, end), new, "{start}..{end}");
        }
        assert_eq!(covered.0, BTreeMap::from([(0, 50)]));
    }

    #[test]
    fn an_answer_is_cut_only_before_its_last_byte() {
        let tally = Tally::default();
        let [one, two] = ["198.18.0.1", "198.18.0.2"].map(|it| it.parse().unwrap());
        let whole = HEAD_BYTES + 100;
        for (client, start, sent) in [(one, 0, whole), (two, 60, whole - 1)] {
            let mut answer = tally.connection(client);
            answer.begin(piece(start), HEAD);
            answer.carry(HEAD_BYTES + 10);
            answer.carry(sent - HEAD_BYTES - 10);
        }
        assert_eq!(
            tally.of(one),
            Traffic {
                bytes: whole,
                requests: 1,
                ..Traffic::default()
            }
        );
        assert_eq!(tally.of(two).cut_bytes, whole - 1);
        assert_eq!(tally.of(two).repeated_bytes, 40);
        assert_eq!(tally.total().bytes, 2 * whole - 1);
        tally.new_round();
        let mut answer = tally.connection(one);
        answer.begin(piece(0), HEAD);
        answer.carry(whole);
        assert_eq!(tally.of(one).repeated_bytes, 0);
    }
}
