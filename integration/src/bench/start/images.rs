// SPDX-License-Identifier: Apache-2.0
//! The images that are started, made once and kept below `target/images/bench`.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::parents;
use super::probe::Probe;
use crate::harness::{command, tools};

/// The longest that making an image may take: Debian and language packages are fetched.
const DEADLINE: Duration = Duration::from_secs(3600);

/// An image and what it runs.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Image {
    /// nginx with a page.
    Nginx,
    /// Flask, requests and numpy.
    Python,
    /// Express.
    Node,
    /// A class on OpenJDK.
    Java,
    /// A database with its data.
    Postgres,
    /// pandas and scikit-learn, with what stands beside them in such an image.
    Ml,
}

impl Image {
    /// Its word in tables and repositories.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Python => "python",
            Self::Node => "node",
            Self::Java => "java",
            Self::Postgres => "postgres",
            Self::Ml => "ml",
        }
    }

    /// What says that it is ready.
    #[must_use]
    pub fn probe(self) -> Probe {
        match self {
            Self::Nginx | Self::Python | Self::Node | Self::Java => Probe::Http,
            Self::Postgres => Probe::Select,
            Self::Ml => Probe::Output("import done"),
        }
    }

    /// Its OCI layout, made when missing.
    pub fn layout(self) -> Result<PathBuf> {
        let directory = tools::target().join("images/bench");
        let layout = directory.join(self.name());
        if !layout.join(".complete").exists() {
            println!("   making the image {} (minutes)", self.name());
            let script = tools::workspace().join("integration/scripts/bench-image.sh");
            command::run_ok(
                Command::new(script).arg(&directory).arg(self.name()),
                DEADLINE,
            )?;
        }
        let whole = layout.join(".parents");
        if !whole.exists() {
            parents::complete(&layout)?;
            std::fs::write(whole, "")?;
        }
        Ok(layout)
    }
}
