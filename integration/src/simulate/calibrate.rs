// SPDX-License-Identifier: Apache-2.0
//! The simulator against real runs.
//!
//! A file tells what was measured: the lines and the image as a scenario, how long a lone node took, and
//! what runs of several nodes cost. The one thing that is fitted is what a lone node does besides waiting
//! for the network: time to compute between requests; or, if the network alone takes longer than the node
//! did, the part of the requests that it reads ahead. Everything else is predicted, and the error printed.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::figures::Figures;
use super::scenario::{Image, Links, Scenario};
use super::world::World;

/// What was measured.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Lines, image, policy: what is not said is as by default.
    #[serde(default)]
    pub scenario: Scenario,
    /// Seconds that a lone node took to start.
    pub lone_start: f64,
    /// Runs of several nodes.
    pub runs: Vec<Run>,
}

/// A run of several nodes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// How many.
    pub nodes: u32,
    /// Bytes that left the registry, those of the background included where there is one.
    pub egress: u64,
    /// Seconds that the median node took to start.
    pub start: f64,
    /// Seconds that the slowest took, if known.
    pub start_max: Option<f64>,
}

/// What `docs/benchmarks/cluster-real.json` tells of the runs of a cluster.
///
/// **Errors** when something is missing there.
pub fn of_real(document: &Value) -> Result<Measured> {
    let cluster = &document["cluster"];
    let number = |value: &Value, key: &str| {
        let number = value[key].as_f64();
        number.with_context(|| format!("a number {key:?} is missing"))
    };
    let whole = |value: &Value, key: &str| {
        let number = value[key].as_u64();
        number.with_context(|| format!("a number {key:?} is missing"))
    };
    let runs = cluster["runs"].as_array().context("runs of a cluster")?;
    let lone = runs.iter().find(|run| run["n"] == 1);
    let lone = lone.context("a run of one node")?;
    let shape = &cluster["shape"];
    let mbit = |key: &str| Ok::<_, anyhow::Error>(number(shape, key)? / 1e6);
    let node_mbit = mbit("node_bits_per_second")?;
    let scenario = Scenario {
        image: Image {
            bytes: whole(lone, "image_bytes")?,
            start_bytes: whole(lone, "lone_egress_bytes_first_output")?,
            requests: u32::try_from(whole(lone, "requests_first_output")?)?,
            start_pieces: u32::try_from(whole(lone, "requests_first_output")?)?,
            ..Image::default()
        },
        links: Links {
            down_mbit: node_mbit,
            up_mbit: node_mbit,
            registry_mbit: mbit("registry_bits_per_second")?,
            registry_ms: number(shape, "round_trip_seconds")? * 1e3,
            ..Links::default()
        },
        ..Scenario::default()
    };
    let runs = runs.iter().map(|run| {
        let starts = run["start_seconds"].as_array().context("start_seconds")?;
        let mut starts: Vec<f64> = starts.iter().filter_map(Value::as_f64).collect();
        starts.sort_by(f64::total_cmp);
        let middle = starts.get(starts.len() / 2);
        Ok(Run {
            nodes: u32::try_from(whole(run, "n")?)?,
            egress: whole(run, "egress_bytes_sealed")?,
            start: *middle.context("a start")?,
            start_max: starts.last().copied(),
        })
    });
    Ok(Measured {
        scenario,
        lone_start: number(lone, "lone_start_seconds")?,
        runs: runs.collect::<Result<_>>()?,
    })
}

/// Halvings of the fitted interval: a thousandth of it is left.
const HALVINGS: u32 = 10;

/// What a scenario predicts for so many nodes.
#[must_use]
pub fn predict(scenario: &Scenario, nodes: u32) -> Figures {
    let scenario = Scenario {
        nodes,
        ..scenario.clone()
    };
    World::new(scenario).run()
}

/// The scenario with which a lone node takes `seconds`.
///
/// **Errors** when the lines are too slow for that, whatever is read ahead.
pub fn fit(scenario: &Scenario, seconds: f64) -> Result<Scenario> {
    let mut fitted = scenario.clone();
    let lone = |scenario: &Scenario| predict(scenario, 1).start.p50;
    fitted.image.compute_ms = 0.0;
    fitted.image.read_ahead = 0.0;
    let network = lone(&fitted);
    if network <= seconds {
        let left = seconds - network;
        fitted.image.compute_ms = 1e3 * left / f64::from(fitted.image.requests.max(1));
        return Ok(fitted);
    }
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        fitted.image.read_ahead = middle;
        if lone(&fitted) > seconds {
            low = middle;
        } else {
            high = middle;
        }
    }
    fitted.image.read_ahead = high;
    let best = lone(&fitted);
    ensure!(
        best <= seconds * 1.05,
        "a lone node cannot start in {seconds:.2} s on these lines: {best:.2} s with all read ahead"
    );
    Ok(fitted)
}

/// A table of what was measured, what is predicted, and the error.
///
/// **Errors** of [`fit`].
pub fn compare(measured: &Measured) -> Result<String> {
    let scenario = fit(&measured.scenario, measured.lone_start)?;
    let mut table = format!(
        "fitted to a lone start of {:.2} s: {:.1} ms between requests, {:.0} % read ahead\n\n\
         | nodes | egress MB, real | simulated | error | start p50 s, real | simulated | error | max s, real | simulated | error |\n\
         | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        measured.lone_start,
        scenario.image.compute_ms,
        scenario.image.read_ahead * 100.0,
    );
    let compared = |real: f64, simulated: f64, digits: usize| {
        let error = 100.0 * (simulated / real - 1.0);
        format!("{real:.digits$} | {simulated:.digits$} | {error:+.1} % |")
    };
    for run in &measured.runs {
        let figures = predict(&scenario, run.nodes);
        let max = run.start_max.map_or_else(
            || "– | – | – |".to_owned(),
            |max| compared(max, figures.start.max, 2),
        );
        let _ = writeln!(
            table,
            "| {} | {} {} {max}",
            run.nodes,
            compared(run.egress as f64 / 1e6, figures.egress as f64 / 1e6, 1),
            compared(run.start, figures.start.p50, 2),
        );
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fits_a_lone_node_by_computing_or_by_reading_ahead() {
        let scenario = Scenario::default();
        // The network alone takes 2.9 s.
        for (seconds, computes) in [(6.0, true), (2.0, false)] {
            let fitted = fit(&scenario, seconds).unwrap();
            assert_eq!(fitted.image.compute_ms > 0.0, computes, "{seconds}");
            assert_eq!(fitted.image.read_ahead == 0.0, computes, "{seconds}");
            let lone = predict(&fitted, 1).start.p50;
            assert!((lone / seconds - 1.0).abs() < 0.02, "{lone} for {seconds}");
        }
        assert!(fit(&scenario, 0.5).is_err());
    }

    #[test]
    fn real_runs_are_understood() {
        let text = r#"{"cluster": {"shape": {"registry_bits_per_second": 12000000,
            "node_bits_per_second": 36000000, "round_trip_seconds": 0.02}, "runs": [
            {"n": 1, "start_seconds": [10.0], "image_bytes": 35000000, "egress_bytes_sealed": 35000000,
             "lone_egress_bytes_first_output": 13000000, "requests_first_output": 32,
             "lone_start_seconds": 10.5},
            {"n": 2, "start_seconds": [12.0, 11.0], "egress_bytes_sealed": 35000001}]}}"#;
        let measured = of_real(&serde_json::from_str(text).unwrap()).unwrap();
        let scenario = &measured.scenario;
        assert_eq!(scenario.image.requests, 32);
        assert_eq!(
            (scenario.links.registry_mbit, scenario.links.up_mbit),
            (12.0, 36.0)
        );
        let run = &measured.runs[1];
        assert_eq!((run.nodes, run.start, run.start_max), (2, 12.0, Some(12.0)));
        assert_eq!(measured.lone_start, 10.5);
        let without = text.replace("egress_bytes_sealed", "x");
        assert!(of_real(&serde_json::from_str(&without).unwrap()).is_err());
    }

    #[test]
    fn tells_the_error_of_each_run() {
        let text = r#"{"scenario": {"image": {"background": false}}, "lone_start": 4.0,
            "runs": [{"nodes": 2, "egress": 60600000, "start": 2.0}]}"#;
        let measured: Measured = serde_json::from_str(text).unwrap();
        let table = compare(&measured).unwrap();
        let line = table.lines().last().unwrap();
        assert!(
            line.starts_with("| 2 | 60.6 | 30.3 | -50.0 % | 2.00 | "),
            "{table}"
        );
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let simulated: f64 = cells[6].parse().unwrap();
        assert!((simulated / 4.0 - 1.0).abs() < 0.05, "{table}");
        let error: f64 = cells[7].trim_end_matches(" %").parse().unwrap();
        assert!(
            (error - (simulated / 2.0 - 1.0) * 100.0).abs() < 1.0,
            "{table}"
        );
    }
}
