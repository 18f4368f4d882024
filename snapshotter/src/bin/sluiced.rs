// SPDX-License-Identifier: Apache-2.0
//! `sluiced`: the daemon that containerd connects to.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser;
use sluice_snapshotter::config::{Config, Overrides};
use sluice_snapshotter::sys::process;
use sluice_snapshotter::{run, telemetry};

/// Starts containers before their images are downloaded: a snapshotter for containerd.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; the default one may be missing [default: /etc/sluice/config.toml]
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Directory for everything that survives a reboot, instead of paths.root
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory for sockets, instead of paths.run
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Read the configuration, say whether it can be used, and exit
    #[arg(long)]
    check_config: bool,
}

fn main() -> anyhow::Result<()> {
    process::keep_memory_small(process::DAEMON_ALLOCATOR);
    let arguments = Arguments::parse();
    let overrides = Overrides {
        root: arguments.root,
        run_dir: arguments.run_dir,
    };
    let config = Config::load(arguments.config.as_deref(), overrides)?;
    if arguments.check_config {
        println!("configuration is good");
        return Ok(());
    }
    telemetry::start_log(config.log_format, &config.log_level)
        .map_err(|error| anyhow::anyhow!("start the log: {error}"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = runtime.context("start the runtime")?;
    let result = runtime.block_on(run::run(config));
    // A thread that hangs in a system call must not keep the process.
    runtime.shutdown_background();
    result
        .inspect_err(|error| tracing::error!(%error, "sluiced ends"))
        .context("run sluiced")
}
