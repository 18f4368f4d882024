// SPDX-License-Identifier: Apache-2.0
//! The images that tests run, made once and kept below `target/images`.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::command;
use super::tools;

/// The OCI layout of the Python image (over 150 MB, five layers), made when missing.
pub fn python_layout() -> Result<PathBuf> {
    let layout = tools::target().join("images/python");
    if !layout.join(".complete").exists() {
        let script = tools::workspace().join("integration/scripts/image.sh");
        command::run_ok(Command::new(script).arg(&layout), Duration::from_secs(1800))?;
    }
    Ok(layout)
}

/// Pushes `layout:latest` to `reference` (`host:port/name:tag`) with skopeo, byte by byte as it is.
pub fn push_layout(layout: &std::path::Path, reference: &str) -> Result<()> {
    push_with(layout, reference, &[])
}

/// The same to a registry that wants to know who pushes.
pub fn push_layout_as(
    layout: &std::path::Path,
    reference: &str,
    user: &str,
    password: &str,
) -> Result<()> {
    push_with(
        layout,
        reference,
        &[&format!("--dest-creds={user}:{password}")],
    )
}

fn push_with(layout: &std::path::Path, reference: &str, options: &[&str]) -> Result<()> {
    command::run_ok(
        Command::new(tools::on_path("skopeo")?)
            .args([
                "--insecure-policy",
                "copy",
                "--preserve-digests",
                "--dest-tls-verify=false",
            ])
            .args(options)
            .arg(format!("oci:{}:latest", layout.display()))
            .arg(format!("docker://{reference}")),
        Duration::from_secs(600),
    )?;
    Ok(())
}
