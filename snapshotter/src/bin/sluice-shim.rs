// SPDX-License-Identifier: Apache-2.0
//! `sluice-shim`: the processes that serve mounts. Started by `sluiced` and by itself, not by people.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use sluice_snapshotter::shim::holder::{self, Origin};
use sluice_snapshotter::shim::log::BoundedLog;
use sluice_snapshotter::shim::worker;
use tracing_subscriber::EnvFilter;

#[derive(Debug, Parser)]
#[command(version, about = "Serves the mounts of sluiced, and outlives it")]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Keeps what keeps the mounts alive, and a worker running.
    Holder {
        /// Holds socket, lock and log.
        #[arg(long)]
        run_dir: PathBuf,
        /// Take over from a dead holder the worker at standard input.
        #[arg(long)]
        adopt: bool,
        /// Take what the daemon at standard input has kept: worker and holder died.
        #[arg(long, conflicts_with = "adopt")]
        restore: bool,
        /// Keep requests in memory that outlives a worker also where the kernel could hand them out again.
        #[arg(long)]
        journal: bool,
    },
    /// Does nothing, to see whether the program runs.
    Probe,
    /// Serves; its holder is at standard input.
    Worker {
        /// Holds socket, lock and log.
        #[arg(long)]
        run_dir: PathBuf,
        /// As the holder's.
        #[arg(long)]
        journal: bool,
    },
}

fn main() -> ExitCode {
    let role = Arguments::parse().role;
    let (Role::Holder { run_dir, .. } | Role::Worker { run_dir, .. }) = &role else {
        return ExitCode::SUCCESS;
    };
    let filter = EnvFilter::try_from_env("SLUICE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false);
    match BoundedLog::of_stderr(run_dir) {
        Ok(stderr) => log.with_writer(move || stderr.clone()).init(),
        Err(_) => log.with_writer(std::io::stderr).init(),
    }
    let ended = match role {
        Role::Probe => Ok(()),
        Role::Holder {
            run_dir,
            adopt,
            restore,
            journal,
        } => {
            let origin = match (adopt, restore) {
                (true, _) => Origin::Worker,
                (_, true) => Origin::Daemon,
                _ => Origin::New,
            };
            holder::run(&run_dir, origin, journal)
        }
        Role::Worker { run_dir, journal } => {
            worker::run(&run_dir, journal).map(|never| match never {})
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "shim ends");
            ExitCode::FAILURE
        }
    }
}
