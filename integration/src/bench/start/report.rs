// SPDX-License-Identifier: Apache-2.0
//! The report as Markdown.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::contender::Contender;
use super::figures::{Document, Ratios, Scene};
use clap::ValueEnum as _;

const HEAD: &str = "\
# Cold starts, side by side

<!-- Written by `make bench BENCH=start`: do not edit. -->

From `nerdctl pull` to the first answer of what the container serves. Each start is cold: containerd, the snapshotter
and all they keep are new, the page cache is dropped. The registry stands behind one line for all connections, with
20 ms for each new connection and for the first byte of each answer; what the line has carried when the container is ready
is counted there. Contenders take turns in each round. Medians; times begin with the pull and each contains those before
it. The formats that others need are made beforehand and pulled from the same registry. containerd 2 and nerdctl 2 for all.

What a conversion takes stands in [conversion.md](conversion.md), how images are read that have come in [reads.md](reads.md).

![seconds to ready](start.svg)
";

/// The whole report.
#[must_use]
pub fn markdown(document: &Document) -> String {
    let mut out = HEAD.to_owned();
    let (kernel, cores) = (&document.kernel, document.cores);
    let _ = writeln!(
        out,
        "\nLinux {kernel}, {cores} cores, which other work shared: compare within one table only. The benchmark and what \
         it starts have precedence by a control group. All samples are in \
         [start.json](start.json)."
    );
    for (speed, scenes) in document.by_speed() {
        let _ = writeln!(out, "\n## {speed} Mbit/s");
        let scenes: Vec<Scene> = scenes.into_iter().cloned().collect();
        out += &ratios(&scenes);
        for scene in &scenes {
            out += &table(scene);
        }
    }
    out += &versions(document);
    out
}

/// One image at one speed.
#[must_use]
pub fn table(scene: &Scene) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "\n### {}, {} Mbit/s: {} layers, {:.0} MB; ready: {}\n",
        scene.image.name(),
        scene.mbit_per_second,
        scene.layers,
        scene.image_bytes as f64 / 1e6,
        scene.image.probe().description()
    );
    out += "| contender | runs | pull s | create s | first output s | ready s | from .. to | MB at ready | requests | peak RSS MB |\n";
    out += "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n";
    let best = scene.outcomes.values().map(|it| it.median.ready_s);
    let best = best.fold(f64::INFINITY, f64::min);
    for (contender, outcome) in &scene.outcomes {
        let it = &outcome.median;
        let ready = if it.ready_s <= best {
            format!("**{:.2}**", it.ready_s)
        } else {
            format!("{:.2}", it.ready_s)
        };
        let [least, most] = outcome.ready_range_s;
        let failed = match outcome.failed {
            0 => String::new(),
            failed => format!(" ({failed} failed)"),
        };
        let _ = writeln!(
            out,
            "| {} | {}{failed} | {:.2} | {:.2} | {:.2} | {ready} | {least:.2} .. {most:.2} | {:.1} | {} | {:.0} |",
            contender.title(),
            outcome.samples.len(),
            it.pull_s,
            it.create_s,
            it.output_s,
            it.bytes as f64 / 1e6,
            it.requests,
            it.peak_rss_bytes as f64 / 1e6
        );
    }
    out
}

/// The geometric means of scenes of one speed.
#[must_use]
pub fn ratios(scenes: &[Scene]) -> String {
    let mut out = String::from(
        "\n| time to ready, geometric mean | images | of overlayfs | of the best peer |\n| --- | ---: | ---: | ---: |\n",
    );
    let show = |ratio: Option<f64>| ratio.map_or("-".to_owned(), |it| format!("{it:.2}"));
    for contender in Contender::value_variants() {
        let ratios = Ratios::of(*contender, scenes.iter());
        if ratios.images > 0 && *contender != Contender::Overlayfs {
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} |",
                contender.title(),
                ratios.images,
                show(ratios.overlayfs),
                show(ratios.best_peer)
            );
        }
    }
    out
}

fn versions(document: &Document) -> String {
    let mut versions: BTreeMap<Contender, &str> = BTreeMap::new();
    let mut absent: BTreeMap<Contender, &str> = BTreeMap::new();
    for scene in document.scenes.values() {
        let outcomes = scene.outcomes.iter();
        versions.extend(outcomes.map(|(contender, it)| (*contender, it.version.as_str())));
        absent.extend(
            scene
                .absent
                .iter()
                .map(|(contender, why)| (*contender, why.as_str())),
        );
    }
    let mut out = String::from("\n## Contenders\n\n");
    for (contender, version) in &versions {
        let _ = writeln!(out, "- {}: {version}", contender.title());
    }
    for (contender, why) in absent {
        let sometimes = if versions.contains_key(&contender) {
            "not always there"
        } else {
            "not there"
        };
        let why = why.lines().next().unwrap_or_default();
        let _ = writeln!(out, "- {}: {sometimes}: {why}", contender.title());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::figures::sketch;
    use super::super::images::Image;
    use super::*;

    #[test]
    fn the_report_names_the_fastest_and_who_was_not_there() {
        let ready = [
            (Contender::Overlayfs, 8.0),
            (Contender::Sluice, 2.0),
            (Contender::Soci, 4.0),
        ];
        let mut scene = sketch(Image::Nginx, &ready);
        scene
            .absent
            .insert(Contender::Nydus, "no program\nmore".to_owned());
        let mut document = Document::default();
        document.put(scene);
        let text = markdown(&document);
        for part in [
            "| Sluice, converted | 1 | 0.50 | 1.00 | 1.50 | **2.00** | 2.00 .. 2.00 | 5.0 | 20 | 50 |",
            "| Sluice, converted | 1 | 0.25 | 0.50 |",
            "| SOCI, index v2 | 1 | 0.50 | 1.00 |",
            "- nydus: not there: no program\n",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
