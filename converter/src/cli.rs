// SPDX-License-Identifier: Apache-2.0
//! The command line: arguments as written, and the one place where errors become text and exit codes.
//!
//! Results go to standard output, everything else to standard error. Exit code 0 means that all was
//! done, 1 that something failed (the message names it), 2 that the arguments make no sense.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod setup;

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
    /// Prepare other software for Sluice.
    #[command(subcommand)]
    Setup(setup::Setup),
}

/// Runs the command and turns its outcome into an exit code.
pub fn run(arguments: Arguments) -> ExitCode {
    match dispatch(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output went away (`sluice … | head`): nothing is wrong.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "sluice: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::Setup(setup) => setup::run(&setup),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>();
        io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
