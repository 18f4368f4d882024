// SPDX-License-Identifier: Apache-2.0
//! Tables.

use std::fmt::Write as _;

use serde::Serialize;

use super::figures::Figures;
use super::scenario::Scenario;

/// Runs that belong together, as they are written to a file.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was simulated, but for the number of nodes.
    pub scenario: Scenario,
    /// What came of it, by number of nodes.
    pub figures: Vec<Figures>,
}

/// The head of the table that [`row`] fills.
pub const HEAD: &str = "\
| nodes | egress of starts, × one start | egress, × image | start p50 s | p95 | p99 | max | complete p50 s | p99 | sent by a node, mean MB | max | requests to peers per fetch |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
";

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// One line of the table, with `name` in its first column.
#[must_use]
pub fn row(name: &str, figures: &Figures) -> String {
    let Figures {
        start, complete, ..
    } = figures;
    let or_dash = |known: bool, value: f64, digits: usize| {
        if known {
            format!("{value:.digits$}")
        } else {
            "–".to_owned()
        }
    };
    let whole = figures.images > 0.0;
    format!(
        "| {name} | {} | {} | {:.2} | {:.2} | {:.2} | {:.2} | {} | {} | {:.0} | {:.0} | {:.2} |\n",
        or_dash(figures.starts > 0.0, figures.starts, 3),
        or_dash(whole, figures.images, 3),
        start.p50,
        start.p95,
        start.p99,
        start.max,
        or_dash(whole, complete.p50, 2),
        or_dash(whole, complete.p99, 2),
        megabytes(figures.sent_mean),
        megabytes(figures.sent_max),
        figures.asked_per_fetch(),
    )
}

impl Report {
    /// The report as a Markdown table.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut table = HEAD.to_owned();
        for figures in &self.figures {
            table += &row(&figures.nodes.to_string(), figures);
        }
        table
    }
}

/// What went wrong in a run, for people; empty when nothing did.
#[must_use]
pub fn complaints(figures: &Figures) -> String {
    let mut text = String::new();
    let counts = &figures.counts;
    for (count, what) in [
        (figures.unfinished, "did not finish"),
        (counts.fallbacks, "went to the origin without being home"),
        (counts.lost, "lost a feeder"),
        (counts.stalled, "left a feeder that sent nothing"),
        (counts.lacked, "asked in vain"),
    ] {
        if count > 0 {
            let _ = write!(
                text,
                "{}{count} {what}",
                if text.is_empty() { "" } else { ", " }
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_as_many_columns_as_the_head() {
        let scenario = Scenario {
            nodes: 4,
            ..Scenario::default()
        };
        let figures = super::super::world::World::new(scenario.clone()).run();
        let report = Report {
            scenario,
            figures: vec![figures],
        };
        let table = report.markdown();
        let columns: Vec<usize> = table
            .lines()
            .map(|line| line.matches('|').count())
            .collect();
        assert_eq!(columns, [13; 3], "{table}");
        assert!(table.contains("| 4 | 1.000 | 1.000 |"), "{table}");
        assert_eq!(complaints(&report.figures[0]), "");
    }
}
