// SPDX-License-Identifier: Apache-2.0
//! The command line of Sluice. See `docs/cli.md`.

use clap::Parser;

fn main() -> std::process::ExitCode {
    sluice_converter::cli::run(sluice_converter::cli::Arguments::parse())
}
