// SPDX-License-Identifier: Apache-2.0
//! Where the processors' time goes: what `perf` samples of a process, as a flame graph.
//!
//! Frames of the standard library and of the runtime stand between any two of ours and say nothing: they are left out,
//! but for a sample's innermost.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::command;
use crate::svg;

/// Samples of each processor in a second: no multiple of what timers go by.
const FREQUENCY: &str = "997";
/// How much of a stack a sample keeps, from which its frames are found.
const STACK: &str = "dwarf,16384";
/// The longest that reading what was recorded may take.
const READS: Duration = Duration::from_secs(300);
const PLUMBING: [&str; 14] = [
    "<alloc::",
    "<core::",
    "<futures",
    "<std::",
    "<tokio::",
    "alloc::",
    "clone3",
    "core::",
    "futures",
    "start_thread",
    "std::",
    "tokio::",
    "tracing::",
    "__libc_start",
];
const WIDTH: f64 = 1200.0;
const ROW: f64 = 17.0;
const TITLE: f64 = 30.0;
/// Of so many samples a frame has one at least, or is not drawn.
const LEAST: u64 = 250;
/// About the width of a letter.
const LETTER: f64 = 6.6;

/// Samples by who called whom, from the thread inwards.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Frames {
    /// Samples in it and in what it called.
    pub samples: u64,
    /// What it called.
    pub inner: BTreeMap<String, Frames>,
}

/// `perf` while it samples a process. Dropped, it is killed.
#[derive(Debug)]
pub struct Recording(Child);

impl Recording {
    /// Samples `pid` with all its threads, into a file. `None` where there is no perf.
    ///
    /// **Errors**: when it ends at once, since it may not sample.
    pub fn of(pid: Pid, into: &Path) -> Result<Option<Self>> {
        if !is_there() {
            return Ok(None);
        }
        let mut perf = perf(into);
        perf.arg("-p").arg(pid.to_string());
        let mut child = perf.spawn().context("start perf")?;
        // It says nothing when it has begun.
        std::thread::sleep(Duration::from_millis(500));
        ensure!(child.try_wait()?.is_none(), "perf does not record");
        Ok(Some(Self(child)))
    }

    /// Ends it and reads `from` what it wrote.
    pub fn end(mut self, from: &Path) -> Result<Frames> {
        kill(Pid::from_raw(i32::try_from(self.0.id())?), Signal::SIGINT)?;
        self.0.wait()?;
        read(from)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command under `perf`. `None` where there is none.
pub fn of_command(it: &Command, into: &Path, deadline: Duration) -> Result<Option<Frames>> {
    if !is_there() {
        return Ok(None);
    }
    let mut recorded = perf(into);
    recorded.arg("--").arg(it.get_program()).args(it.get_args());
    for (name, value) in it.get_envs() {
        if let Some(value) = value {
            recorded.env(name, value);
        }
    }
    command::run_ok(&mut recorded, deadline)?;
    read(into).map(Some)
}

fn is_there() -> bool {
    Command::new("perf").arg("--version").output().is_ok()
}

fn perf(into: &Path) -> Command {
    let mut perf = Command::new("perf");
    // The processor's own counters are not there in a virtual machine.
    perf.args(["record", "--quiet", "-e", "cpu-clock", "-F", FREQUENCY]);
    perf.args(["--call-graph", STACK, "-o"]).arg(into);
    perf.stdout(Stdio::null()).stderr(Stdio::null());
    perf
}

fn read(from: &Path) -> Result<Frames> {
    let mut script = Command::new("perf");
    script.args(["script", "--no-inline", "-F", "comm,ip,sym", "-i"]);
    let output = command::run_ok(script.arg(from), READS)?;
    let frames = fold(&output.stdout);
    ensure!(frames.samples > 0, "perf has no samples");
    Ok(frames)
}

/// Samples as `perf script` prints them: the thread's name, a line for each frame from the innermost on, an empty line.
fn fold(script: &str) -> Frames {
    let mut all = Frames::default();
    for sample in script.split("\n\n") {
        let mut lines = sample.lines().filter(|line| !line.trim().is_empty());
        let Some(thread) = lines.next() else {
            continue;
        };
        let names: Vec<&str> = lines.filter_map(name).collect();
        let mut stack = vec![thread.trim()];
        let told =
            |at: usize, name: &str| at == 0 || !PLUMBING.iter().any(|it| name.starts_with(it));
        let kept = names.iter().enumerate().rev();
        stack.extend(
            kept.filter(|(at, name)| told(*at, name))
                .map(|(_, name)| *name),
        );
        all.samples += 1;
        let mut frame = &mut all;
        for name in stack {
            frame = frame.inner.entry(name.to_owned()).or_default();
            frame.samples += 1;
        }
    }
    all
}

/// The name in `ADDRESS NAME`, without what makes it unique.
fn name(line: &str) -> Option<&str> {
    let (_, name) = line.trim().split_once(' ')?;
    Some(match name.rsplit_once("::h") {
        Some((name, hash)) if hash.len() == 16 => name,
        _ => name,
    })
}

impl Frames {
    /// Which part of all samples has a frame of such a name.
    #[must_use]
    pub fn share(&self, is: &dyn Fn(&str) -> bool) -> f64 {
        self.having(is) as f64 / self.samples.max(1) as f64
    }

    fn having(&self, is: &dyn Fn(&str) -> bool) -> u64 {
        let inner = self.inner.iter();
        inner
            .map(|(name, frame)| {
                if is(name) {
                    frame.samples
                } else {
                    frame.having(is)
                }
            })
            .sum()
    }

    fn depth(&self, least: u64) -> u32 {
        let drawn = self.inner.values().filter(|it| it.samples >= least);
        drawn.map(|it| 1 + it.depth(least)).max().unwrap_or(0)
    }

    /// The graph.
    #[must_use]
    pub fn svg(&self, title: &str) -> String {
        let least = self.samples.div_ceil(LEAST);
        let height = TITLE + ROW * f64::from(self.depth(least)) + 4.0;
        let mut out = svg::open(WIDTH, height);
        let _ = writeln!(
            out,
            "<text x=\"10\" y=\"20\" font-size=\"14\">{} ({} samples)</text>",
            escaped(title),
            self.samples
        );
        self.draw(0.0, 0, least, self.samples, &mut out);
        out + svg::CLOSE
    }

    fn draw(&self, from: f64, row: u32, least: u64, all: u64, out: &mut String) {
        let mut x = from;
        for (name, frame) in &self.inner {
            let share = frame.samples as f64 / all as f64;
            let width = WIDTH * share;
            if frame.samples >= least {
                let y = TITLE + ROW * f64::from(row);
                let letters = name.chars().zip(1_u32..);
                let fits = |at: u32| f64::from(at) * LETTER < width - 4.0;
                let short: String = letters.take_while(|it| fits(it.1)).map(|it| it.0).collect();
                let _ = writeln!(
                    out,
                    "<g><title>{} {:.1} %</title><rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{}\" \
                     fill=\"{}\"/><text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">{}</text></g>",
                    escaped(name),
                    share * 100.0,
                    (width - 0.5).max(0.1),
                    ROW - 1.0,
                    colour(name),
                    x + 2.0,
                    y + ROW - 5.0,
                    escaped(&short)
                );
                frame.draw(x, row + 1, least, all, out);
            }
            x += width;
        }
    }
}

/// The same for the same name.
fn colour(name: &str) -> String {
    let sum = name.bytes().fold(7_u32, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(u32::from(byte))
    });
    let ours = name.contains("sluice");
    let hue = if ours { 200 + sum % 30 } else { 20 + sum % 35 };
    format!("hsl({hue},70%,{}%)", 68 + sum % 12)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str = "\
fill 
\t    5566 ZSTD_decompressBlock
\t    5567 sluice_fetcher::decode::h0123456789abcdef
\t    5568 std::thread::spawn
\t    5569 start_thread

fill 
\t    11 core::slice::copy
\t    12 sluice_fetcher::decode

serve 
\t    1 <a>

";

    #[test]
    fn stacks_are_folded_without_plumbing_and_drawn_as_wide_as_they_are_frequent() {
        let frames = fold(SCRIPT);
        assert_eq!(frames.samples, 3);
        let decode = &frames.inner["fill"].inner["sluice_fetcher::decode"];
        assert_eq!(decode.samples, 2);
        let inner: Vec<&str> = decode.inner.keys().map(String::as_str).collect();
        assert_eq!(inner, ["ZSTD_decompressBlock", "core::slice::copy"]);
        let share = frames.share(&|name| name.starts_with("ZSTD"));
        assert!((share - 1.0 / 3.0).abs() < 1e-9);
        let drawn = frames.svg("all");
        let expected = "<title>fill 66.7 %</title><rect x=\"0.0\" y=\"30.0\" width=\"799.5\"";
        assert!(drawn.contains(expected), "{drawn}");
        assert!(drawn.contains("<title>&lt;a&gt; 33.3 %</title><rect x=\"800.0\" y=\"47.0\""));
        assert!(drawn.starts_with("<svg") && drawn.ends_with("</svg>\n"));
    }
}
