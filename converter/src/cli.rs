// SPDX-License-Identifier: Apache-2.0
//! The command line: arguments as written, and the one place where errors become text and exit codes.
//!
//! Results go to standard output, everything else to standard error. Exit code 0 means that all was
//! done, 1 that something failed (the message names it), 2 that the arguments make no sense. `doctor` has its
//! own codes: by the worst that it found.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

mod cache;
mod control;
mod convert;
mod doctor;
mod index;
mod inspect;
mod nodes;
mod open;
mod optimize;
mod pace;
mod prewarm;
mod pull;
mod setup;
mod setup_mirror;
mod show;
mod show_index;
mod stuck;

/// Sluice: containers start before their images are here.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, max_term_width = 100)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Convert an image so that it can start before its layers are downloaded.
    Convert(convert::Convert),
    /// Make an image lazy as it is: index its layers and push the indexes beside it.
    Index(index::Index),
    /// Show layers, frames, index and files of an image, a blob or an index, and check them.
    Inspect(inspect::Inspect),
    /// Pull an image into containerd without the bytes of its lazy layers.
    Pull(pull::Pull),
    /// Have the daemon bring an image before anybody asks for it.
    Prewarm(prewarm::Prewarm),
    /// Attach to a converted image what its starts on this node have read first, for starts elsewhere.
    Optimize(optimize::Optimize),
    /// Show what the daemon holds.
    Status(control::Status),
    /// Say whether an image is lazy, and if not, why.
    Why(control::Why),
    /// List the nodes of the cluster, as this one sees them.
    Nodes(nodes::Nodes),
    /// Look for what is wrong on this node, and repair it.
    ///
    /// Exit code: 0 nothing, 1 a warning, 2 an error, 3 nothing could be examined.
    Doctor(doctor::Doctor),
    /// Work on the chunk store.
    #[command(subcommand)]
    Cache(cache::Cache),
    /// Work on containerd's content store.
    #[command(subcommand)]
    Content(control::Content),
    /// Prepare other software for Sluice.
    #[command(subcommand)]
    Setup(setup::Setup),
}

impl Command {
    /// Whether the output is all that there is to it.
    fn only_shows(&self) -> bool {
        matches!(
            self,
            Self::Inspect(_)
                | Self::Status(_)
                | Self::Why(_)
                | Self::Nodes(_)
                | Self::Cache(cache::Cache::Ls(_))
        )
    }
}

/// Runs the command and turns its outcome into an exit code.
pub fn run(arguments: Arguments) -> ExitCode {
    let only_shows = arguments.command.only_shows();
    match dispatch(arguments) {
        Ok(code) => code,
        // The reader of our output went away (`sluice … | head`): nothing is wrong.
        Err(e) if only_shows && is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            let text = format!("{e:#}");
            let lines: Vec<_> = text.lines().map(show::printable).collect();
            let _ = writeln!(std::io::stderr(), "sluice: {}", lines.join("\n"));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: Arguments) -> anyhow::Result<ExitCode> {
    // Warnings of the libraries below; results and progress have their own ways.
    let filter = tracing_subscriber::EnvFilter::try_from_env("SLUICE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init();
    let done = match arguments.command {
        Command::Doctor(doctor) => return Ok(doctor::run(&doctor)),
        Command::Cache(cache) => wait_for(cache::run(cache)),
        Command::Setup(setup) => setup::run(&setup),
        Command::Convert(convert) => wait_for(convert::run(convert)),
        Command::Index(index) => wait_for(index::run(index)),
        Command::Inspect(inspect) => wait_for(inspect::run(inspect)),
        Command::Pull(pull) => wait_for(pull::run(pull)),
        Command::Prewarm(prewarm) => wait_for(prewarm::run(prewarm)),
        Command::Optimize(optimize) => wait_for(optimize::run(optimize)),
        Command::Status(status) => wait_for(control::status(status)),
        Command::Why(why) => wait_for(control::why(why)),
        Command::Nodes(nodes) => wait_for(nodes::run(nodes)),
        Command::Content(content) => wait_for(control::content(content)),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Runs `work` until it ends or the user interrupts, which drops it and so ends all that it started.
fn wait_for(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("start runtime")?;
    runtime.block_on(async {
        tokio::select! {
            result = work => result,
            signal = tokio::signal::ctrl_c() => {
                signal.context("listen for interrupts")?;
                anyhow::bail!("interrupted")
            }
        }
    })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>();
        io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
