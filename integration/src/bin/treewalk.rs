// SPDX-License-Identifier: Apache-2.0
//! `treewalk [--no-content] [--directory-times] DIR`: prints [`sluice_integration::tree::list`].

use std::io::{BufWriter, Write};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let root = args
        .iter()
        .find(|a| !a.starts_with("--"))
        .map(String::as_str)
        .unwrap_or(".");
    let options = sluice_integration::tree::Options {
        content: !args.iter().any(|a| a == "--no-content"),
        directory_times: args.iter().any(|a| a == "--directory-times"),
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    sluice_integration::tree::list(root.as_ref(), options, &mut out)?;
    out.flush()?;
    Ok(())
}
