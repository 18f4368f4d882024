// SPDX-License-Identifier: Apache-2.0
//! Bars of the time to ready, by image and contender, as SVG.

use std::fmt::Write as _;

use super::contender::Contender;
use super::figures::{Document, Scene};
use crate::svg;

const LABELS: f64 = 190.0;
const BARS: f64 = 360.0;
/// Right of the bars, for the longest one's number.
const NUMBERS: f64 = 60.0;
const PANEL: f64 = LABELS + BARS + NUMBERS;
const BAR: f64 = 14.0;
const STEP: f64 = 19.0;
const TITLE: f64 = 30.0;
const GAP: f64 = 16.0;
const LEGEND: f64 = 26.0;
const PHASES: [&str; 4] = ["pull", "create", "first output", "ready"];
const OURS: [&str; 4] = ["#8db4e2", "#5b8fd0", "#2f6cb5", "#17457e"];
const THEIRS: [&str; 4] = ["#cfcfcf", "#a8a8a8", "#848484", "#5e5e5e"];

/// A column for each speed, a panel for each image.
#[must_use]
pub fn svg(document: &Document) -> String {
    let speeds = document.by_speed();
    let heights = speeds
        .values()
        .map(|scenes| scenes.iter().map(|it| height(it)).sum::<f64>());
    let height = LEGEND + heights.fold(0.0, f64::max) + GAP;
    let width = PANEL * f64::from(u32::try_from(speeds.len().max(1)).unwrap_or(1));
    let mut out = svg::open(width, height);
    for ((name, colour), at) in PHASES.iter().zip(OURS).zip(0u8..) {
        let x = 10.0 + 110.0 * f64::from(at);
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"8\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"18\">{name}</text>",
            x + 17.0
        );
    }
    for (scenes, column) in speeds.values().zip(0u32..) {
        let mut top = LEGEND;
        for scene in scenes {
            let _ = writeln!(
                out,
                "<g transform=\"translate({} {top})\">",
                PANEL * f64::from(column)
            );
            panel(scene, &mut out);
            out += "</g>\n";
            top += self::height(scene);
        }
    }
    out + svg::CLOSE
}

fn height(scene: &Scene) -> f64 {
    let bars = u32::try_from(scene.outcomes.len()).unwrap_or(0);
    TITLE + STEP * f64::from(bars) + GAP
}

fn panel(scene: &Scene, out: &mut String) {
    let _ = writeln!(
        out,
        "<text x=\"10\" y=\"20\" font-size=\"14\">{}, {} Mbit/s, seconds to ready</text>",
        scene.image.name(),
        scene.mbit_per_second
    );
    let longest = scene.outcomes.values().map(|it| it.median.ready_s);
    let longest = longest.fold(f64::MIN_POSITIVE, f64::max);
    for ((contender, outcome), row) in scene.outcomes.iter().zip(0u32..) {
        let y = TITLE + STEP * f64::from(row);
        let it = &outcome.median;
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LABELS - 6.0,
            y + BAR - 2.0,
            contender.title()
        );
        let x = |seconds: f64| LABELS + BARS * seconds / longest;
        let mut from = 0.0;
        let phases = [it.pull_s, it.create_s, it.output_s, it.ready_s];
        for (until, colour) in phases.into_iter().zip(colours(*contender)) {
            let _ = writeln!(
                out,
                "<rect x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>",
                x(from),
                (x(until) - x(from)).max(0.0)
            );
            from = until.max(from);
        }
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\">{:.2}</text>",
            x(it.ready_s) + 5.0,
            y + BAR - 2.0,
            it.ready_s
        );
    }
}

fn colours(contender: Contender) -> [&'static str; 4] {
    if contender.is_ours() { OURS } else { THEIRS }
}

#[cfg(test)]
mod tests {
    use super::super::figures::sketch;
    use super::super::images::Image;
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_time() {
        let mut document = Document::default();
        let ready = [(Contender::Overlayfs, 8.0), (Contender::Sluice, 2.0)];
        document.put(sketch(Image::Nginx, &ready));
        let drawn = svg(&document);
        // The slowest fills the width: its pull is a quarter of it. The other takes a quarter of it in all.
        let first = "<rect x=\"190.0\" y=\"30.0\" width=\"90.0\"";
        assert!(drawn.contains(first), "{drawn}");
        let last = "<rect x=\"257.5\" y=\"49.0\" width=\"22.5\"";
        assert!(drawn.contains(last), "{drawn}");
        assert!(drawn.contains("<text x=\"285.0\" y=\"61.0\">2.00</text>"));
        assert!(drawn.starts_with("<svg") && drawn.ends_with("</svg>\n"));
    }
}
