// SPDX-License-Identifier: Apache-2.0
//! The report as Markdown.

use std::fmt::Write as _;

use super::figures::Figures;
use crate::bench::report::Entry;

const HEAD: &str = "\
# Chunks into the store

<!-- Written by `make bench BENCH=fill`: do not edit. -->

How fast an image is completed when no line bounds it: the daemon's scheduler, registry client and store fetch all chunks of
a converted image from a registry in the same process, over loopback, verify each, write it, and seal the layers against their diff
IDs. Client and registry share the processors; what each took of them is told apart by its threads. Stores are new and on ext4; the
files are in the page cache until the seal puts them on the disk. Medians. Gbit/s are 10^9 bits.
";

/// The goal: a line of 10 Gbit/s is full.
const GOAL_GBIT: f64 = 10.0;

/// The whole report.
#[must_use]
pub fn markdown(entry: &Entry<Figures>) -> String {
    let (kernel, cores, figures) = (&entry.kernel, entry.cores, &entry.figures);
    let mut out = HEAD.to_owned();
    let _ = writeln!(
        out,
        "\nLinux {kernel}, {cores} cores, load {:.1}. All figures are in [fill.json](fill.json).\n",
        figures.load
    );
    out += &table(figures);
    out += &verdict(figures, cores);
    if !figures.profiles.is_empty() {
        out += "\n## Where the processors' time goes\n\nSampled by `perf`, client and registry together; conversion beside it.\n";
    }
    for (name, profile) in &figures.profiles {
        let _ = writeln!(
            out,
            "\n![flame graph](flame-{name}.svg)\n\n| {name} | of {} samples |\n| --- | ---: |",
            profile.samples
        );
        for (group, share) in &profile.shares {
            let _ = writeln!(out, "| {group} | {:.1} % |", share * 100.0);
        }
    }
    out
}

/// What was measured.
#[must_use]
pub fn table(figures: &Figures) -> String {
    let (stages, mega) = (&figures.stages, 1e6);
    let mut out = format!(
        "{}: {} layers, {} chunks, {:.1} MB come and {:.1} MB are written.\n\n",
        figures.image,
        figures.layers,
        figures.chunks,
        figures.blob_bytes as f64 / mega,
        figures.device_bytes as f64 / mega
    );
    out += "| | s | from .. to | Gbit/s of the line | Gbit/s written |\n| --- | ---: | ---: | ---: | ---: |\n";
    for (name, times) in [
        ("all present", &figures.present),
        ("all sealed", &figures.sealed),
    ] {
        let speed = figures.present.median_s / times.median_s;
        let _ = writeln!(
            out,
            "| {name} | {:.3} | {:.3} .. {:.3} | {:.2} | {:.2} |",
            times.median_s,
            times.min_s,
            times.max_s,
            figures.line_gbit() * speed,
            figures.device_gbit() * speed
        );
    }
    let _ = writeln!(
        out,
        "\nProcessor time until all is present: {:.3} s of ours, {:.3} s of the registry.\n",
        figures.ours_cpu_s, figures.registry_cpu_s
    );
    out += "| one thread, all chunks | s | MB/s written |\n| --- | ---: | ---: |\n";
    for (name, seconds) in [
        ("decompress and verify", stages.decode_s),
        ("of it verify: crc32 and BLAKE3", stages.verify_s),
        ("write into a new store", stages.commit_s),
        ("seal: sha256, and onto the disk", stages.seal_s),
    ] {
        let speed = figures.device_bytes as f64 / mega / seconds;
        let _ = writeln!(out, "| {name} | {seconds:.3} | {speed:.0} |");
    }
    out
}

fn verdict(figures: &Figures, cores: usize) -> String {
    let line = figures.line_gbit();
    let bound = figures.bound_s(cores);
    let most = line * figures.present.median_s / bound;
    let reached = if line >= GOAL_GBIT {
        "reached"
    } else {
        "**missed**"
    };
    format!(
        "\nGoal, a line of {GOAL_GBIT:.0} Gbit/s is full: {reached}, {line:.1} Gbit/s come ({:.1} are written). Decompressing, verifying \
         and writing alone take {cores} cores {bound:.3} s, which is {most:.1} Gbit/s; the sockets' two ends have the rest.\n",
        figures.device_gbit()
    )
}

#[cfg(test)]
mod tests {
    use super::super::figures::sketch;
    use super::*;

    #[test]
    fn the_report_says_how_fast_it_was_and_what_bounds_it() {
        let entry = Entry {
            kernel: "6.18".to_owned(),
            cores: 2,
            figures: sketch(),
        };
        let text = markdown(&entry);
        for part in [
            "python: 5 layers, 2000 chunks, 125.0 MB come and 375.0 MB are written.",
            "| all present | 0.500 | 0.500 .. 0.500 | 2.00 | 6.00 |",
            "| all sealed | 0.750 | 0.750 .. 0.750 | 1.33 | 4.00 |",
            "| write into a new store | 0.200 | 1875 |",
            "**missed**, 2.0 Gbit/s come (6.0 are written)",
            "take 2 cores 0.300 s, which is 3.3 Gbit/s",
            "![flame graph](flame-fill.svg)",
            "| blake3 | 25.0 % |",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
