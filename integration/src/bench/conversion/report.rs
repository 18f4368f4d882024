// SPDX-License-Identifier: Apache-2.0
//! The report as Markdown.

use std::fmt::Write as _;

use super::figures::{Figures, Measured};
use super::way::Way;
use crate::bench::report::Entry;

const HEAD: &str = "\
# Conversion and indexing, side by side

<!-- Written by `make bench BENCH=conversion`: do not edit. -->

What it takes to make a gzip image lazy. For each image the ways take turns in each round, from sources in memory, one
program at a time. Medians; peak RSS is that of a way's largest process, the highest of all rounds. MB are 10^6 bytes of layers. *Load*:
of the machine in the last minute, by all that ran; compare within one image only.
";

/// The whole report.
#[must_use]
pub fn markdown(entry: &Entry<Figures>) -> String {
    let mut out = HEAD.to_owned();
    let (kernel, cores, figures) = (&entry.kernel, entry.cores, &entry.figures);
    let _ = writeln!(
        out,
        "\nLinux {kernel}, {cores} cores. All figures are in [conversion.json](conversion.json)."
    );
    for (name, measured) in &figures.images {
        out += &tables(name, measured);
    }
    out += "\n## What is timed\n\n";
    for way in Way::ALL {
        match (figures.versions.get(&way), figures.absent.get(&way)) {
            (Some(version), _) => {
                let _ = writeln!(out, "- {}: {} ({version})", way.title(), way.timed());
            }
            (None, Some(why)) => {
                let why = why.lines().next().unwrap_or_default();
                let _ = writeln!(out, "- {}: not there: {why}", way.title());
            }
            (None, None) => (),
        }
    }
    out
}

/// One image.
#[must_use]
pub fn tables(name: &str, measured: &Measured) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "\n## {name}: {} layers, {:.1} MB gzip; load {:.1}",
        measured.layers,
        measured.gzip_bytes as f64 / 1e6,
        measured.load
    );
    out += &table(measured, &Way::CONVERT, Way::Sluice);
    out += &table(measured, &Way::INDEX, Way::Gunzip);
    let goals = measured.goals();
    if !goals.is_empty() {
        out += "\n| goal | measured | |\n| --- | ---: | --- |\n";
    }
    for (goal, figure, reached) in goals {
        let word = if reached { "reached" } else { "**missed**" };
        let _ = writeln!(out, "| {goal} | {figure} | {word} |");
    }
    out
}

fn table(measured: &Measured, ways: &[Way], reference: Way) -> String {
    let mut out = format!(
        "\n| | rounds | s | from .. to | of {} | MB made | of gzip | peak RSS MiB |\n",
        reference.title()
    );
    out += "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n";
    for way in ways {
        let Some(figure) = measured.ways.get(way) else {
            continue;
        };
        let ratio = measured.ratio(*way, reference);
        let ratio = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let made = figure.output_bytes.map(|bytes| bytes as f64);
        let [mega, share] = [1e6, measured.gzip_bytes as f64]
            .map(|unit| made.map_or("-".to_owned(), |bytes| format!("{:.2}", bytes / unit)));
        let times = &figure.times;
        let _ = writeln!(
            out,
            "| {} | {} | {:.2} | {:.2} .. {:.2} | {ratio} | {mega} | {share} | {:.0} |",
            way.title(),
            times.samples,
            times.median_s,
            times.min_s,
            times.max_s,
            figure.peak_rss_bytes as f64 / f64::from(1 << 20)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::figures::sketch;
    use super::*;

    #[test]
    fn the_report_says_what_was_measured_and_who_was_not_there() {
        let measured = sketch(&[(Way::Pipeline, 2.0), (Way::Sluice, 2.2), (Way::Gunzip, 1.0)]);
        let mut figures = Figures::default();
        figures.images.insert("nginx".to_owned(), measured);
        figures.versions.insert(Way::Sluice, "0.1.0".to_owned());
        let why = "no program\nmore".to_owned();
        figures.absent.insert(Way::Nydus, why);
        let entry = Entry {
            kernel: "6.18".to_owned(),
            cores: 2,
            figures,
        };
        let text = markdown(&entry);
        for part in [
            "## nginx: 4 layers, 100.0 MB gzip; load 0.5",
            "| pipeline | 1 | 2.00 | 2.00 .. 2.00 | 0.91 | 90.00 | 0.90 | 100 |",
            "| convert: at most 1.15 times the pipeline's time | 1.10 times | reached |",
            "- sluice convert: `sluice convert oci:A oci:B`",
            "- nydus: not there: no program\n",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(!text.contains("- eStargz:"), "{text}");
    }
}
