// SPDX-License-Identifier: Apache-2.0
//! Curves over the number of nodes, as SVG.

use std::fmt::Write as _;

use super::figures::Figures;
use crate::svg;

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 52.0;
const TOP: f64 = 34.0;
/// From panel to panel.
const STEP: f64 = WIDTH + 90.0;
const COLOURS: [&str; 4] = ["#1f5fa8", "#c4501b", "#3b8752", "#7a7a7a"];

/// A line in a panel.
struct Curve {
    name: &'static str,
    values: Vec<f64>,
}

struct Panel<'a> {
    title: &'a str,
    nodes: &'a [f64],
    curves: Vec<Curve>,
}

/// Egress and start time over the number of nodes.
#[must_use]
pub fn svg(figures: &[Figures]) -> String {
    let nodes: Vec<f64> = figures.iter().map(|it| f64::from(it.nodes)).collect();
    let curve = |name, value: fn(&Figures) -> f64| Curve {
        name,
        values: figures.iter().map(value).collect(),
    };
    let panels = [
        Panel {
            title: "registry egress, multiples of one node's",
            nodes: &nodes,
            curves: vec![
                curve("starts", |it| it.starts),
                curve("whole images", |it| it.images),
            ],
        },
        Panel {
            title: "start time, seconds",
            nodes: &nodes,
            curves: vec![
                curve("p50", |it| it.start.p50),
                curve("p99", |it| it.start.p99),
                curve("max", |it| it.start.max),
            ],
        },
    ];
    let (width, height) = (2.0 * STEP + 10.0, TOP + HEIGHT + 50.0);
    let mut out = svg::open(width, height);
    for (panel, at) in panels.iter().zip(0u8..) {
        let x = LEFT + STEP * f64::from(at);
        let _ = writeln!(out, "<g transform=\"translate({x} {TOP})\">");
        panel.draw(&mut out);
        out += "</g>\n";
    }
    out + svg::CLOSE
}

impl Panel<'_> {
    fn draw(&self, out: &mut String) {
        let top = self.top();
        let (first, last) = (
            self.nodes.first().copied().unwrap_or(1.0),
            self.nodes.last().copied().unwrap_or(1.0),
        );
        let x = |nodes: f64| {
            let span = (last / first).ln().max(f64::MIN_POSITIVE);
            WIDTH * (nodes / first).ln() / span
        };
        let y = |value: f64| HEIGHT * (1.0 - value / top);
        let _ = writeln!(
            out,
            "<text x=\"0\" y=\"-14\" font-size=\"14\">{}</text>",
            self.title
        );
        for tick in 0..=4 {
            let value = top * f64::from(tick) / 4.0;
            let _ = writeln!(
                out,
                "<path d=\"M0 {0:.1}H{WIDTH}\" stroke=\"#ddd\"/>\
                 <text x=\"-6\" y=\"{1:.1}\" text-anchor=\"end\">{value}</text>",
                y(value),
                y(value) + 4.0,
            );
        }
        for nodes in self.nodes {
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{nodes}</text>",
                x(*nodes),
                HEIGHT + 18.0,
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">nodes</text>",
            WIDTH / 2.0,
            HEIGHT + 38.0,
        );
        for ((curve, colour), line) in self.curves.iter().zip(COLOURS).zip(0u8..) {
            let points: Vec<String> = self
                .nodes
                .iter()
                .zip(&curve.values)
                .map(|(nodes, value)| format!("{:.1},{:.1}", x(*nodes), y(*value)))
                .collect();
            // Curves that coincide stay visible as dashes of different length.
            let _ = writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
                 stroke-dasharray=\"{}\"/>",
                points.join(" "),
                ["none", "7 4", "2 4", "1 6"][usize::from(line)],
            );
            let _ = writeln!(
                out,
                "<text x=\"{}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
                WIDTH - 80.0,
                HEIGHT - 12.0 - 16.0 * f64::from(line),
                curve.name,
            );
        }
    }

    /// The top of the scale: a round number above all values.
    fn top(&self) -> f64 {
        let values = self.curves.iter().flat_map(|curve| &curve.values);
        let most = values.copied().fold(0.0, f64::max);
        let steps = [1.0, 2.0, 4.0, 6.0, 8.0, 10.0];
        let mut scale = 1.0;
        loop {
            let fits = steps
                .iter()
                .map(|step| step * scale)
                .find(|it| *it >= most * 1.05);
            match fits {
                Some(top) => return top,
                None => scale *= 10.0,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::Percentiles;
    use super::*;

    #[test]
    fn draws_each_curve_within_its_panel() {
        let mut all = Vec::new();
        for (nodes, seconds) in [(10, 3.0), (100, 3.5), (1000, 14.0)] {
            let start = Percentiles {
                p50: seconds,
                p95: seconds,
                p99: seconds,
                max: seconds,
            };
            all.push(Figures {
                nodes,
                starts: 1.0,
                images: 1.02,
                start,
                ..Figures::default()
            });
        }
        let drawn = svg(&all);
        assert_eq!(drawn.matches("<polyline").count(), 5);
        // 10 is at the left, 100 in the middle, 14 of 20 s at 0.3 of the height.
        assert!(
            drawn.contains("points=\"0.0,221.0 210.0,214.5 420.0,78.0\""),
            "{drawn}"
        );
        assert!(drawn.starts_with("<svg") && drawn.ends_with("</svg>\n"));
    }
}
