// SPDX-License-Identifier: Apache-2.0
//! `systemctl` of machines that tests make: see [`sluice_integration::harness::units`].

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match sluice_integration::harness::units::run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}
