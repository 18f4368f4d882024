// SPDX-License-Identifier: Apache-2.0
//! Beside figures that others published.
//!
//! Theirs were measured on their machines with their images, ours are simulated: what is compared is the
//! order of magnitude. Every assumption that ours rest on stands in the table.

use std::fmt::Write as _;

use super::figures::Figures;
use super::scenario::{Failures, Image, Links, Policy, Scenario};
use super::world::World;

/// A figure of others, and our scenario for it.
#[derive(Clone, Debug)]
pub struct Case {
    /// Who published what.
    pub theirs: &'static str,
    /// What ours assumes.
    pub assumed: &'static str,
    /// Ours.
    pub scenario: Scenario,
}

/// The cases.
#[must_use]
pub fn cases(seed: u64) -> Vec<Case> {
    let base = Scenario {
        seed,
        failures: Failures::default(),
        ..Scenario::default()
    };
    let ten_gigabit = Links {
        down_mbit: 10_000.0,
        up_mbit: 10_000.0,
        registry_mbit: 10_000.0,
        ..Links::default()
    };
    let lazily = Image {
        background: false,
        ..Image::default()
    };
    vec![
        Case {
            theirs: "DADI (USENIX ATC 2020): 10,000 containers on 1,000 hosts within 4 s",
            assumed: "1,000 hosts of 10 Gbit/s, 10 containers each that share the host's store; registry of \
                      10 Gbit/s at 20 ms; 130 requests for 30.3 MB, each after the one before, 5 ms between them",
            scenario: Scenario {
                nodes: 1000,
                containers: 10,
                links: ten_gigabit.clone(),
                image: lazily.clone(),
                ..base.clone()
            },
        },
        Case {
            theirs: "the same",
            assumed: "the same, the 130 requests known from a boot list, 16 at once",
            scenario: Scenario {
                nodes: 1000,
                containers: 10,
                links: ten_gigabit,
                image: Image {
                    boot_window: 16,
                    ..lazily.clone()
                },
                ..base.clone()
            },
        },
        Case {
            theirs: "FaaSNet (USENIX ATC 2021): 2,500 functions on 1,000 VMs in 8.3 s",
            assumed: "1,000 VMs of 1 Gbit/s, 3 functions each; registry of 1 Gbit/s at 20 ms; the same start",
            scenario: Scenario {
                nodes: 1000,
                containers: 3,
                image: lazily,
                ..base.clone()
            },
        },
        Case {
            theirs: "Kraken (README): an image of 3 GB on 2,600 hosts, limited to 300 MB/s each: p50 10 s, p99 18 s",
            assumed: "2,600 hosts of 2,400 Mbit/s, registry of 12,000 Mbit/s (theirs had 5 origins); the whole image, \
                      no start; pieces of 4 MiB; 8 pieces at once",
            scenario: Scenario {
                nodes: 2600,
                links: Links {
                    down_mbit: 2400.0,
                    up_mbit: 2400.0,
                    registry_mbit: 12_000.0,
                    ..Links::default()
                },
                image: Image {
                    bytes: 3_000_000_000,
                    start_bytes: 0,
                    requests: 0,
                    piece_bytes: 4 << 20,
                    ..Image::default()
                },
                policy: Policy {
                    background_window: 8,
                    ..Policy::default()
                },
                ..base
            },
        },
    ]
}

fn ours(figures: &Figures) -> String {
    let all = |what: &str, times: &super::figures::Percentiles| {
        format!(
            "{what} p50 {:.2} s, p99 {:.2} s, max {:.2} s",
            times.p50, times.p99, times.max
        )
    };
    if figures.images > 0.0 {
        let egress = format!("; egress {:.3} images", figures.images);
        all("complete:", &figures.complete) + &egress
    } else {
        let egress = format!("; egress {:.3} starts", figures.starts);
        all("started:", &figures.start) + &egress
    }
}

/// Runs the cases and writes a table.
#[must_use]
pub fn table(cases: &[Case]) -> String {
    let mut table = "| published | simulated | assumed |\n| --- | --- | --- |\n".to_owned();
    for case in cases {
        let figures = World::new(case.scenario.clone()).run();
        let _ = writeln!(
            table,
            "| {} | {} | {} |",
            case.theirs,
            ours(&figures),
            case.assumed
        );
    }
    table
}
