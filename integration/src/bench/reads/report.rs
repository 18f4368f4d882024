// SPDX-License-Identifier: Apache-2.0
//! The report as Markdown.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::figures::{Figures, Scene};
use super::reader::{Operation, Reader};
use crate::bench::report::Entry;

const HEAD: &str = "\
# Reads of complete images, side by side

<!-- Written by `make bench BENCH=reads`: do not edit. -->

What reading a container's files costs once its image is on the node as a whole: unpacked (overlayfs), completed and sealed
(Sluice), or all files read once and the background fetch over (stargz, SOCI). Each contender has a containerd 2 of its own; the
image was started there once, the container's processes are gone, and a further container's root is mounted. *Cold*: page cache and
names dropped before; *warm*: again right after. *Read*: all entries listed, then all files read by a few readers at once. *Stat*:
all entries listed. *Random*: pages of the image's largest file, which is in memory, at the same random places. Contenders take
turns in each operation of each round, nine of them for *random*, and list and read what is warm three times in a turn. Medians, and in
parentheses the time by that of overlayfs. *Load*: of the machine in the last minute, by all that ran; compare within one table only.

Backend `auto` is shown as a container has it that was started before its image was complete: what is mounted stays with what
serves it, and from its next mount on a complete image is the kernel's alone, as with `erofs`.
";

/// The whole report.
#[must_use]
pub fn markdown(entry: &Entry<Figures>) -> String {
    let mut out = HEAD.to_owned();
    let (kernel, cores) = (&entry.kernel, entry.cores);
    let _ = writeln!(
        out,
        "\nLinux {kernel}, {cores} cores. Shortest and longest times are in [reads.json](reads.json)."
    );
    for (name, scene) in &entry.figures {
        out += &table(name, scene);
    }
    out + &versions(&entry.figures)
}

/// One image.
#[must_use]
pub fn table(name: &str, scene: &Scene) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "\n## {name}: {} entries, {:.0} MB; {} rounds, {} readers, load {:.1}\n",
        scene.files,
        scene.bytes as f64 / 1e6,
        scene.rounds,
        scene.readers,
        scene.load
    );
    out += "| | mounted over | cold read s | warm read s | cold stat s | warm stat s | random 4 KiB µs | peak RSS MB |\n";
    out += "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n";
    for (reader, outcome) in &scene.outcomes {
        let served_by = match (&outcome.served_by, reader) {
            (Some(backend), _) => backend,
            (None, Reader::Overlayfs) => "-",
            (None, _) => "fuse",
        };
        let _ = write!(out, "| {} | {served_by} ", reader.title());
        for operation in Operation::ALL {
            out += &cell(scene, *reader, operation);
        }
        let _ = writeln!(out, "| {:.0} |", outcome.peak_rss_bytes as f64 / 1e6);
    }
    let _ = writeln!(
        out,
        "\nAt random: {} reads of `{}` ({:.0} MB).",
        scene.random_reads,
        scene.large_file,
        scene.large_file_bytes as f64 / 1e6
    );
    out + &verdict(scene)
}

fn cell(scene: &Scene, reader: Reader, operation: Operation) -> String {
    let (Some(median), Some(ratio)) = (
        scene.median_s(reader, operation),
        scene.ratio(reader, operation),
    ) else {
        return "| - ".to_owned();
    };
    match operation {
        Operation::RandomRead => {
            let micros = median / scene.random_reads as f64 * 1e6;
            format!("| {micros:.2} ({ratio:.2}) ")
        }
        _ => format!("| {median:.3} ({ratio:.2}) "),
    }
}

/// Whether the kernel's mount is as fast as everything else, and who still fetched.
fn verdict(scene: &Scene) -> String {
    let mut out = String::new();
    if scene.outcomes.contains_key(&Reader::SluiceErofs) {
        let slower: Vec<String> = scene
            .slower()
            .iter()
            .map(|(operation, other, ratio)| {
                let (operation, other) = (operation.title(), other.title());
                format!("{operation} {ratio:.2} times {other}'s")
            })
            .collect();
        let said = match slower.as_slice() {
            [] => "reached".to_owned(),
            some => format!("**missed**: {}", some.join(", ")),
        };
        let _ = writeln!(
            out,
            "Goal, EROFS in no operation slower than overlayfs or a peer: {said}."
        );
    }
    for (reader, outcome) in &scene.outcomes {
        if outcome.line_bytes > 0 {
            let (who, kilo) = (reader.title(), outcome.line_bytes as f64 / 1e3);
            let _ = writeln!(
                out,
                "While {who} was measured, the line carried {kilo:.0} kB."
            );
        }
    }
    out
}

fn versions(figures: &Figures) -> String {
    let mut versions: BTreeMap<Reader, &str> = BTreeMap::new();
    let mut absent: BTreeMap<Reader, &str> = BTreeMap::new();
    for scene in figures.values() {
        let outcomes = scene.outcomes.iter();
        versions.extend(outcomes.map(|(reader, it)| (*reader, it.version.as_str())));
        let reasons = scene.absent.iter();
        absent.extend(reasons.map(|(reader, why)| (*reader, why.as_str())));
    }
    let mut out = String::from("\n## Contenders\n\n");
    for (reader, version) in versions {
        let _ = writeln!(out, "- {}: {version}", reader.title());
    }
    for (reader, why) in absent {
        let why = why.lines().next().unwrap_or_default();
        let _ = writeln!(out, "- {}: not always there: {why}", reader.title());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::figures::sketch;
    use super::*;

    #[test]
    fn the_report_compares_with_overlayfs_and_says_what_is_missed() {
        let mut scene = sketch(&[
            (Reader::Overlayfs, 1.0),
            (Reader::SluiceErofs, 1.25),
            (Reader::Stargz, 3.0),
        ]);
        let soci = "no program\nmore".to_owned();
        scene.absent.insert(Reader::Soci, soci);
        let entry = Entry {
            kernel: "6.18".to_owned(),
            cores: 2,
            figures: BTreeMap::from([("node".to_owned(), scene)]),
        };
        let text = markdown(&entry);
        for part in [
            "## node: 3000 entries, 200 MB; 1 rounds, 4 readers, load 0.5",
            "| overlayfs | - | 1.000 (1.00) |",
            "| Sluice, backend erofs | erofs | 1.250 (1.25) |",
            "| 30.00 (3.00) | 52 |",
            "**missed**: cold read 1.25 times overlayfs's, warm read",
            "- SOCI, index v2: not always there: no program\n",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
