// SPDX-License-Identifier: Apache-2.0
//! How results and progress look: bars on a terminal, plain lines elsewhere, JSON for machines.
//!
//! Names, reasons and platforms come from images, which anybody may have made: what is shown to people
//! goes through [`printable`], so that it cannot move the cursor or forge lines.
//!
//! Progress goes to standard error, so that standard output holds results only; with `--json` each
//! event is one JSON object on a line of standard output, the last one the summary.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::pace::Pace;
use super::show_index;
use crate::report::{Event, Pulled, Reporter, Silent, Summary, Transfer};

/// What is shown.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct ShowArguments {
    /// One JSON object per line on standard output.
    #[arg(long, conflicts_with = "quiet")]
    pub(super) json: bool,
    /// Errors only.
    #[arg(long, short)]
    pub(super) quiet: bool,
}

impl ShowArguments {
    /// Who shows events.
    pub(super) fn reporter(self) -> Arc<dyn Reporter> {
        if self.json {
            Arc::new(JsonLines::default())
        } else if self.quiet {
            Arc::new(Silent)
        } else if io::stderr().is_terminal() {
            Arc::new(Bars::default())
        } else {
            Arc::new(Lines)
        }
    }
}

/// One JSON object per event.
#[derive(Debug, Default)]
struct JsonLines {
    pace: Mutex<Pace>,
}

impl JsonLines {
    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write_json(event: &Event) {
    if let Ok(line) = serde_json::to_string(event) {
        let _ = writeln!(io::stdout().lock(), "{line}");
    }
}

impl Reporter for JsonLines {
    fn event(&self, event: &Event) {
        self.pace().event(event, Instant::now());
        write_json(event);
    }

    fn progress(&self, source: &str, bytes: u64) {
        let event = self.pace().read(source, bytes, Instant::now());
        event.iter().for_each(write_json);
    }

    fn uploading(&self, source: &str, sent_bytes: u64, total_bytes: u64) {
        let sent = (sent_bytes, total_bytes);
        let event = self.pace().sent(source, sent, Instant::now());
        event.iter().for_each(write_json);
    }
}

/// One line per event, for logs.
#[derive(Debug)]
struct Lines;

impl Reporter for Lines {
    fn event(&self, event: &Event) {
        if let Some(line) = describe(event) {
            let _ = match is_result(event) {
                true => writeln!(io::stdout().lock(), "{line}"),
                false => writeln!(io::stderr().lock(), "{line}"),
            };
        }
    }

    fn progress(&self, _: &str, _: u64) {}
    fn uploading(&self, _: &str, _: u64, _: u64) {}
}

/// A bar per layer that is being read or sent.
#[derive(Debug, Default)]
struct Bars {
    all: MultiProgress,
    bars: Mutex<HashMap<String, ProgressBar>>,
}

impl Bars {
    fn with<T>(&self, work: impl FnOnce(&mut HashMap<String, ProgressBar>) -> T) -> T {
        work(&mut self.bars.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Reporter for Bars {
    fn event(&self, event: &Event) {
        match event {
            Event::LayerStarted { source, bytes } => {
                let template = "{prefix} {bar:30} {binary_bytes:>11}/{binary_total_bytes:11} {binary_bytes_per_sec}";
                let style = ProgressStyle::with_template(template)
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
                let bar = self.all.add(ProgressBar::new(*bytes).with_style(style));
                bar.set_prefix(short(source).to_owned());
                self.with(|bars| bars.insert(source.clone(), bar));
            }
            Event::LayerDone { source, .. } | Event::LayerIndexed { source, .. } => {
                if let Some(bar) = self.with(|bars| bars.remove(source)) {
                    bar.finish_and_clear();
                    self.all.remove(&bar);
                }
            }
            Event::LayerPulled { blob, .. } => {
                if let Some(bar) = self.with(|bars| bars.remove(blob)) {
                    bar.finish_and_clear();
                    self.all.remove(&bar);
                }
            }
            Event::LayerProgress { .. }
            | Event::ManifestDone { .. }
            | Event::DiffIdsChanged { .. }
            | Event::Signed { .. }
            | Event::Summary(_)
            | Event::ImageFailed { .. }
            | Event::Total { .. }
            | Event::ArtifactDone { .. }
            | Event::IndexSummary(_)
            | Event::PullSummary { .. } => {}
        }
        if let Some(line) = describe(event) {
            if is_result(event) {
                let show = || writeln!(io::stdout().lock(), "{line}");
                let _ = self.all.suspend(show);
            } else {
                let _ = self.all.println(line);
            }
        }
    }

    fn progress(&self, source: &str, bytes: u64) {
        if let Some(bar) = self.with(|bars| bars.get(source).cloned()) {
            bar.inc(bytes);
        }
    }

    fn uploading(&self, source: &str, sent_bytes: u64, total_bytes: u64) {
        if let Some(bar) = self.with(|bars| bars.get(source).cloned()) {
            bar.set_prefix(format!("{} upload", short(source)));
            bar.set_length(total_bytes);
            bar.set_position(sent_bytes);
        }
    }
}

/// Whether somebody who keeps what the call gives must not miss it.
fn is_result(event: &Event) -> bool {
    matches!(event, Event::DiffIdsChanged { .. })
}

/// An event in words; nothing for those that only start something.
fn describe(event: &Event) -> Option<String> {
    let line = match event {
        Event::LayerStarted { .. } | Event::LayerProgress { .. } => return None,
        Event::LayerDone {
            source,
            source_bytes,
            blob,
            blob_bytes,
            reason,
            converted,
            transfer,
            ..
        } => {
            let mut line = format!("layer {}: ", short(source));
            let _ = match converted {
                true => write!(
                    line,
                    "{} -> {} {}",
                    bytes(*source_bytes),
                    short(blob),
                    bytes(*blob_bytes)
                ),
                false => write!(line, "{}", bytes(*blob_bytes)),
            };
            line.push_str(match transfer {
                Transfer::Uploaded => ", written",
                Transfer::Present => ", already there",
                Transfer::Mounted => ", mounted from another repository",
                Transfer::Foreign => ", left where it is",
            });
            if let Some(reason) = reason {
                let _ = write!(line, ", not lazy: {reason}");
            }
            line
        }
        Event::ManifestDone {
            platform, digest, ..
        } => format!("image {platform}: {digest}"),
        Event::DiffIdsChanged {
            platform,
            layers,
            config_before,
            config,
        } => format!(
            "image {platform}: the diff IDs of {layers} layers change: config {config_before} -> {config}"
        ),
        Event::Signed {
            image,
            manifest,
            signers,
            destination,
            digest,
        } => {
            let signers = signers.join(" and ");
            let advice = match image.strip_prefix("docker://") {
                Some(name) => format!(", or make the image lazy as it is: sluice index {name}"),
                None => String::new(),
            };
            format!(
                "signed: {manifest} of {image} is signed by {signers}, and a signature does not carry \
                 over; sign {digest} of {destination}{advice}"
            )
        }
        Event::Summary(summary) => summarise(summary),
        Event::ImageFailed {
            source,
            destination,
            error,
        } => format!("{source} -> {destination}: FAILED: {error}"),
        Event::Total {
            images,
            failed,
            seconds,
        } => {
            let done = images - failed;
            format!("{done} of {images} images converted in {seconds:.1} s")
        }
        Event::LayerIndexed { .. } | Event::ArtifactDone { .. } | Event::IndexSummary(_) => {
            show_index::describe(event)?
        }
        Event::LayerPulled {
            diff_id,
            how,
            bytes: count,
            ..
        } => {
            let how = match how {
                Pulled::Present => "already there".to_owned(),
                Pulled::Lazy => "lazy".to_owned(),
                Pulled::Unpacked => format!("not lazy, {} unpacked", bytes(*count)),
            };
            format!("layer {}: {how}", short(diff_id))
        }
        Event::PullSummary {
            image,
            digest,
            layers,
            lazy,
            bytes: count,
            seconds,
        } => {
            let count = bytes(*count);
            format!("{image} = {digest}: {layers} layers, {lazy} lazy; {count} in {seconds:.1} s")
        }
    };
    Some(printable(&line).into_owned())
}

/// Text on one line as a terminal may see it: control characters, and those that turn the direction
/// of writing, are spelt out.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    let hides =
        |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if !text.contains(hides) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match hides(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    Cow::Owned(out)
}

fn summarise(summary: &Summary) -> String {
    let mut text = format!("{} = {}", summary.destination, summary.digest);
    let _ = match summary.uploads {
        0 => write!(text, ": nothing to upload"),
        uploads => write!(
            text,
            ": {uploads} uploads, {}",
            bytes(summary.uploaded_bytes)
        ),
    };
    let _ = write!(
        text,
        "; {} layers ({} converted, {} reused, {} shared, {} not lazy), {} -> {} in {:.1} s",
        summary.layers,
        summary.layers_converted,
        summary.layers_reused,
        summary.layers_shared,
        summary.layers_not_lazy,
        bytes(summary.source_bytes),
        bytes(summary.blob_bytes),
        summary.seconds,
    );
    text
}

/// The first twelve hex digits, as docker shows digests.
pub(super) fn short(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..12).unwrap_or(hex)
}

/// A size for people, in binary units.
pub(super) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// Rows under a header, in columns as wide as they need.
#[derive(Debug)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this header.
    pub(super) fn new(header: &[&str]) -> Self {
        Self {
            rows: vec![header.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells.into_iter();
        self.rows
            .push(cells.map(|cell| printable(&cell).into_owned()).collect());
    }

    /// Writes it. The last column is not padded.
    pub(super) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(line, "{cell:width$}  ");
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let mut table = Table::new(&["A", "LONG"]);
        table.row(["wide cell".to_owned(), "x".to_owned()]);
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "A          LONG\nwide cell  x\n"
        );
    }

    #[test]
    fn what_images_say_cannot_steer_the_terminal() {
        for (text, expected) in [
            ("plain ä 漢 \"quoted\" \\", "plain ä 漢 \"quoted\" \\"),
            ("a\u{1b}[2Jb", "a\\u{1b}[2Jb"),
            ("a\nsealed: yes\r", "a\\nsealed: yes\\r"),
            ("\u{9b}1m\u{202e}x", "\\u{9b}1m\\u{202e}x"),
        ] {
            assert_eq!(printable(text), expected);
        }
        let mut table = Table::new(&["A"]);
        table.row(["x\u{1b}[31m".to_owned()]);
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        assert!(!out.contains(&0x1b));
        let event = Event::ManifestDone {
            platform: "linux/\u{1b}]0;title\u{7}".into(),
            source: String::new(),
            digest: String::new(),
        };
        let line = describe(&event).unwrap();
        assert!(!line.contains(char::is_control), "{line:?}");
    }

    #[test]
    fn a_run_with_nothing_to_do_says_so() {
        let summary = Summary {
            destination: "oci:x".into(),
            digest: "d".into(),
            ..Summary::default()
        };
        assert!(summarise(&summary).starts_with("oci:x = d: nothing to upload; 0 layers"));
    }

    #[test]
    fn a_signed_image_is_told_what_to_sign_and_what_changes_nothing() {
        let event = |image: &str| Event::Signed {
            image: image.into(),
            manifest: "sha256:old".into(),
            signers: vec!["cosign"],
            destination: "docker://r.test/a:2".into(),
            digest: "sha256:new".into(),
        };
        let line = describe(&event("docker://r.test/a:1")).unwrap();
        for part in [
            "cosign",
            "sign sha256:new of docker://r.test/a:2",
            "sluice index r.test/a:1",
        ] {
            assert!(line.contains(part), "{line}");
        }
        let line = describe(&event("oci:x")).unwrap();
        assert!(!line.contains("sluice index"), "{line}");
    }

    #[test]
    fn every_event_is_one_line_of_json() {
        let event = Event::LayerDone {
            source: "sha256:aa".into(),
            source_bytes: 1,
            blob: "sha256:bb".into(),
            blob_bytes: 2,
            lazy: true,
            reason: None,
            converted: true,
            shared: false,
            transfer: Transfer::Uploaded,
        };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"event":"layer-done","source":"sha256:aa","source_bytes":1,"blob":"sha256:bb","blob_bytes":2,"lazy":true,"converted":true,"transfer":"uploaded"}"#
        );
        let summary = serde_json::to_value(Event::Summary(Summary::default())).unwrap();
        assert_eq!(
            (&summary["event"], &summary["uploads"]),
            (&"summary".into(), &0.into())
        );
    }
}
