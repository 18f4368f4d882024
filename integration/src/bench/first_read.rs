// SPDX-License-Identifier: Apache-2.0
//! The first read of a small file over each back-end, against a plain request for the same bytes by the same line.
//!
//! Files stand in groups that fill a chunk each, far from each other, so that each is the first to be read of its
//! chunk. A sample asks the registry for the chunk's frame over a connection that stays open, then opens and reads a
//! file of it through the mount: what that takes longer is Sluice's. Further files of the chunk are then read from the
//! chunk store, as no container has done before, and beside them the same from unpacked layers.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::seq::SliceRandom as _;
use rand::{SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};
use sluice_blockindex::extent::{BlobSpace, Extent};
use sluice_blockindex::index::UncheckedIndex;

use super::report::Times;
use super::{DEADLINE, NAMESPACE, files, incomplete_over, synthetic};
use crate::harness::containerd::Release;
use crate::harness::http;
use crate::harness::proxy::Line;
use crate::harness::rootfs::Rootfs;
use crate::harness::site::Site;

/// Reads that count, of each kind.
const SAMPLES: usize = 30;
/// Reads before them: connections are made, programs read from the disk.
const WARM_UP: usize = 3;
/// What was read ahead of one sample has gone over the line before the next.
const PAUSE: Duration = Duration::from_millis(250);
/// Name of the image in the registry.
const REPOSITORY: &str = "groups";
/// The file of a group that is read when nothing of its chunk is here; when it is, in the page cache; when it is, on
/// the disk.
const COLD: usize = 0;
const PRESENT: usize = 6;
const ON_DISK: usize = 12;

/// Measures over each back-end in turn.
pub fn measure() -> Result<Value> {
    let line = Line::WIDE_AREA;
    let mut figures = json!({
        "line_bits_per_second": line.bytes_per_second * 8,
        "latency_s": line.latency.as_secs_f64(),
        "file_bytes": synthetic::GROUP_FILE_BYTES,
        "samples": SAMPLES,
    });
    println!(
        "\nfirst read of a file of {} bytes, {} Mbit/s and {:?}, {SAMPLES} files",
        synthetic::GROUP_FILE_BYTES,
        line.bytes_per_second * 8 / 1_000_000,
        line.latency
    );
    // What is configured, and what serves then.
    for (wish, backend) in [("fuse", "fuse"), ("auto", "erofs-fuse"), ("erofs", "erofs")] {
        figures[backend] = over(wish, backend, line)?;
    }
    Ok(figures)
}

fn over(wish: &str, backend: &str, line: Line) -> Result<Value> {
    let site = Site::start("bench", Release::V1, line, &incomplete_over(wish))?;
    let groups = SAMPLES + WARM_UP;
    let layout = synthetic::groups(&site.root.directory("layout")?, groups)?;
    let [original, converted] = site.push_and_convert(&layout, REPOSITORY)?;
    site.pull_ordinarily(NAMESPACE, &original)?;
    site.pull_lazily(NAMESPACE, &converted)?;
    let direct = site.registry.direct();
    let chain_id = http::chain_id(&direct, REPOSITORY, "sluice")?;
    let mount = |snapshotter: &str| {
        let target = site.root.directory(&format!("fs-{snapshotter}"))?;
        Rootfs::mount(&site.containerd, NAMESPACE, snapshotter, &chain_id, &target)
    };
    let (native, ours) = (mount("overlayfs")?, mount("sluice")?);
    let shown = site.status()?["mounts"][0]["backend"].clone();
    ensure!(shown == backend, "mounted over {shown}, not {backend}");
    let frames = frames(&site)?;
    ensure!(frames.len() == groups, "{} chunks of groups", frames.len());
    let mut plain = PlainClient::connect(&site)?;

    let mut order: Vec<usize> = (0..groups).collect();
    // A reader who comes by in order would have more and more read ahead.
    order.shuffle(&mut StdRng::seed_from_u64(2));
    let read = |rootfs: &Rootfs<'_>, group: usize, file: usize| -> Result<f64> {
        let path = rootfs.path().join(synthetic::group_file(group, file));
        Ok(files::fstime("file", &path)?.0)
    };
    let (mut requests, mut cold) = (Vec::new(), Vec::new());
    for group in &order {
        std::thread::sleep(PAUSE);
        requests.push(plain.get(frames[*group])?.as_secs_f64());
        std::thread::sleep(PAUSE);
        cold.push(read(&ours, *group, COLD)?);
    }
    let mut kinds = json!({});
    let (requests, cold) = (counted(requests)?, counted(cold)?);
    let own = cold.median_s - requests.median_s;
    println!(
        " {backend} back-end, a chunk of {:.0} kB",
        frames_bytes(&frames) / 1e3
    );
    show("plain request for the chunk's bytes", &requests);
    show("read through the mount, chunk not here", &cold);
    println!("   of it Sluice's own: {:.2} ms", own * 1e3);
    kinds["plain_request"] = json!(requests);
    kinds["chunk_missing"] = json!(cold);
    kinds["own_s"] = json!(own);
    for (name, kind, file) in [
        (
            "chunk here, in the page cache",
            "chunk_in_page_cache",
            PRESENT,
        ),
        ("chunk here, on the disk", "chunk_on_disk", ON_DISK),
    ] {
        if file == ON_DISK {
            files::drop_caches()?;
        }
        let mut times = [Vec::new(), Vec::new()];
        for group in &order {
            for (times, rootfs) in times.iter_mut().zip([&native, &ours]) {
                times.push(read(rootfs, *group, file)?);
            }
        }
        let [theirs, ours] = times.map(counted);
        let (theirs, ours) = (theirs?, ours?);
        show(
            &format!("overlayfs, {}", name.trim_start_matches("chunk here, ")),
            &theirs,
        );
        show(&format!("read through the mount, {name}"), &ours);
        kinds[kind] = json!({"overlayfs": theirs, "sluice": ours});
    }
    kinds["chunk_blob_bytes"] = json!(frames_bytes(&frames));
    Ok(kinds)
}

fn counted(mut seconds: Vec<f64>) -> Result<Times> {
    Times::of(seconds.split_off(WARM_UP))
}

fn show(name: &str, times: &Times) {
    let [median, min, max] = [times.median_s, times.min_s, times.max_s].map(|it| it * 1e3);
    println!("   {name:<60} {median:>8.2} ms [{min:.2} .. {max:.2}]");
}

/// The frames of the groups' chunks, in order of the groups.
fn frames(site: &Site) -> Result<Vec<Extent<BlobSpace>>> {
    let indexes = site.daemon.state().join("indexes");
    let mut files = std::fs::read_dir(indexes)?;
    let file = files.next().context("an index")??;
    let index = UncheckedIndex::parse(std::fs::read(file.path())?)?.reopen()?;
    // A chunk of a gap may have a header too many, one of a group has a header for each file.
    let group = synthetic::GROUP_FILES * (synthetic::GROUP_FILE_BYTES + 256);
    let group = u64::try_from(group)?;
    let chunks = index.chunk_map().chunks().flatten();
    let groups = chunks.filter(|chunk| chunk.device.len() > group);
    Ok(groups.map(|chunk| chunk.blob).collect())
}

/// Bytes of a frame on average.
fn frames_bytes(frames: &[Extent<BlobSpace>]) -> f64 {
    let bytes: u64 = frames.iter().map(|frame| frame.len()).sum();
    bytes as f64 / frames.len() as f64
}

/// Asks the registry for ranges of a blob, over the line and one connection.
struct PlainClient {
    stream: BufReader<TcpStream>,
    path: String,
    host: String,
}

impl PlainClient {
    fn connect(site: &Site) -> Result<Self> {
        let manifest = http::manifest(&site.registry.direct(), REPOSITORY, "sluice")?;
        let digest = manifest["layers"][0]["digest"]
            .as_str()
            .context("a layer")?;
        let host = site.registry.host();
        let stream = TcpStream::connect(&host)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        Ok(Self {
            stream: BufReader::new(stream),
            path: format!("/v2/{REPOSITORY}/blobs/{digest}"),
            host,
        })
    }

    /// From the request to the last byte of the answer.
    fn get(&mut self, frame: Extent<BlobSpace>) -> Result<Duration> {
        let (path, host) = (&self.path, &self.host);
        let (first, last) = (frame.start(), frame.end() - 1);
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nRange: bytes={first}-{last}\r\n\r\n");
        let begun = Instant::now();
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            let read = self.stream.read_line(&mut head)?;
            ensure!(read > 0, "the registry closed the connection: {head}");
        }
        ensure!(head.starts_with("HTTP/1.1 206"), "no range: {head}");
        let mut lines = head.lines().filter_map(|line| line.split_once(':'));
        let length = lines.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let length: u64 = length.context("a length")?.1.trim().parse()?;
        ensure!(length == frame.len(), "{length} bytes, not {}", frame.len());
        let mut body = vec![0; usize::try_from(length)?];
        self.stream.read_exact(&mut body)?;
        Ok(begun.elapsed())
    }
}
