// SPDX-License-Identifier: Apache-2.0
//! The report as Markdown.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::figures::{Cost, Document, Figures, Outcome};
use crate::bench::start::contender::Contender;

const HEAD: &str = "\
# Many containers, many layers, many files, large files

<!-- Written by `make bench BENCH=scale`: do not edit. -->

One node on which containerd, the snapshotter and all they keep are new and the page cache is dropped before each run. The
registry stands behind one line for all connections, with 20 ms for each new connection and for the first byte of each
answer. Times begin with the pull. Contenders take turns in each round; medians. The formats that others need are made
beforehand and pulled from the same registry. containerd 2 and nerdctl 2 for all.

Processes of the snapshotter are all of them: with Sluice the daemon and both of its shim's, with others their one daemon.
PSS, descriptors and threads are what they had when the last container was done, peak RSS the most of each, CPU what they
took in the run. containerd unpacks for overlayfs and, of the other contenders, what they do not do lazily; its own figures
stand beside. What the kernel holds for mounts is in none of these.
";

/// The whole report.
#[must_use]
pub fn markdown(document: &Document) -> String {
    let mut out = HEAD.to_owned();
    let (kernel, cores) = (&document.kernel, document.cores);
    let _ = writeln!(
        out,
        "\nLinux {kernel}, {cores} cores. The benchmark and what it starts have precedence by a control group. All \
         samples are in [scale.json](scale.json)."
    );
    for figures in document.scenes.values() {
        out += &section(figures);
    }
    let mut versions: BTreeMap<Contender, &str> = BTreeMap::new();
    for figures in document.scenes.values() {
        let outcomes = figures.outcomes.iter();
        versions.extend(outcomes.map(|(contender, it)| (*contender, it.version.as_str())));
    }
    out += "\n## Contenders\n\n";
    for (contender, version) in versions {
        let _ = writeln!(out, "- {}: {version}", contender.title());
    }
    out
}

/// One scene.
#[must_use]
pub fn section(figures: &Figures) -> String {
    let mut out = String::new();
    let load = figures.load.map_or(String::new(), |load| {
        format!(" Load of the machine at the end: {load:.1}.")
    });
    let _ = writeln!(
        out,
        "\n## {}\n\n{} {} layers, {:.0} MB in the registry as gzip; the line carries {} Mbit/s.{load}\n",
        figures.title,
        figures.scene.description(),
        figures.layers,
        figures.image_bytes as f64 / 1e6,
        figures.mbit_per_second
    );
    times(figures, &mut out);
    costs(figures, &mut out);
    if !figures.absent.is_empty() {
        out.push('\n');
    }
    for (contender, why) in &figures.absent {
        let why = why.lines().next().unwrap_or_default();
        let _ = writeln!(out, "- {}: {why}", contender.title());
    }
    out
}

fn times(figures: &Figures, out: &mut String) {
    let steps = figures.scene.steps();
    let _ = writeln!(
        out,
        "| contender | prepared in s | runs | {} | from .. to | failed containers | MB | requests |",
        steps.join(" | ")
    );
    *out += "| --- |";
    *out += &" ---: |".repeat(steps.len() + 6);
    out.push('\n');
    let last = |outcome: &Outcome| outcome.median.steps.last().copied();
    let best = figures.outcomes.values().filter_map(last);
    let best = best.fold(f64::INFINITY, f64::min);
    for (contender, outcome) in &figures.outcomes {
        let it = &outcome.median;
        let count = it.steps.len();
        let seconds = it.steps.iter().enumerate().map(|(step, seconds)| {
            if step + 1 == count && *seconds <= best {
                format!("**{seconds:.2}**")
            } else {
                format!("{seconds:.2}")
            }
        });
        let seconds: Vec<String> = seconds.collect();
        let failed = match outcome.failed {
            0 => String::new(),
            failed => format!(" ({failed} failed)"),
        };
        let [least, most] = outcome.range_s;
        let _ = writeln!(
            out,
            "| {} | {:.1} | {}{failed} | {} | {least:.2} .. {most:.2} | {} | {:.1} | {} |",
            contender.title(),
            outcome.prepared_s,
            outcome.samples.len(),
            seconds.join(" | "),
            it.failures,
            it.bytes as f64 / 1e6,
            it.requests
        );
    }
}

fn costs(figures: &Figures, out: &mut String) {
    *out += "\n| processes | PSS MB | peak RSS MB | descriptors | threads | CPU s |\n";
    *out += "| --- | ---: | ---: | ---: | ---: | ---: |\n";
    let mut row = |name: &str, cost: &Cost| {
        let _ = writeln!(
            out,
            "| {name} | {:.1} | {:.1} | {} | {} | {:.2} |",
            cost.pss_bytes as f64 / 1e6,
            cost.peak_rss_bytes as f64 / 1e6,
            cost.descriptors,
            cost.threads,
            cost.cpu_s
        );
    };
    for (contender, outcome) in &figures.outcomes {
        if let Some(cost) = &outcome.median.snapshotter {
            row(contender.title(), cost);
        }
        let name = format!("{}: containerd", contender.title());
        row(&name, &outcome.median.containerd);
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::Sample;
    use super::super::scenes::{Scene, Stage};
    use super::*;

    #[test]
    fn the_report_has_the_fastest_the_costs_and_who_was_not_there() {
        let stage = Stage {
            scene: Scene::Layers,
            images: vec!["layers0".to_owned()],
            containers: 1,
            layers: 127,
            bytes: 20_000_000,
            expected: None,
        };
        let mut figures = Figures::new(&stage, "127 layers".to_owned(), 1000);
        for (contender, factor) in [(Contender::Overlayfs, 4.0), (Contender::Sluice, 1.0)] {
            let cost = Cost {
                pss_bytes: 2_500_000,
                cpu_s: 0.25,
                threads: 7,
                ..Cost::default()
            };
            let sample = Sample {
                steps: vec![factor, 2.0 * factor, 3.0 * factor],
                bytes: 1_000_000,
                requests: 9,
                snapshotter: contender.is_ours().then_some(cost),
                ..Sample::default()
            };
            let outcome = Outcome::of("1.0".to_owned(), 5.0, vec![sample], 0).unwrap();
            figures.outcomes.insert(contender, outcome);
        }
        let why = "conversion took longer than 10 min\nmore".to_owned();
        figures.absent.insert(Contender::Stargz, why);
        let mut document = Document::default();
        document.scenes.insert(Scene::Layers, figures);
        let text = markdown(&document);
        for part in [
            "| Sluice, converted | 5.0 | 1 | 1.00 | 2.00 | **3.00** | 3.00 .. 3.00 | 0 | 1.0 | 9 |",
            "| overlayfs | 5.0 | 1 | 4.00 | 8.00 | 12.00 |",
            "| Sluice, converted | 2.5 | 0.0 | 0 | 7 | 0.25 |",
            "| overlayfs: containerd | 0.0 |",
            "- stargz, eStargz: conversion took longer than 10 min\n",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
