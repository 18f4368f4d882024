// SPDX-License-Identifier: Apache-2.0
//! Runs a program that gives credentials: something goes in, something comes out, within bounds.
//!
//! It has a process group of its own, which is killed when the time is over, when too much comes, or when nobody waits any
//! more: a helper of a helper may hang, too. What it writes to standard error is not read: it may hold secrets.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What a program said.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) status: ExitStatus,
    pub(super) output: Vec<u8>,
}

/// Kills a program and all that it started, when dropped.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended already; then there is nobody to kill.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Gives `input` to the program and reads at most `cap_bytes` of what it says.
///
/// **Errors** what went wrong, without anything that the program said. **Cancel** kills it.
pub(super) async fn run(
    mut command: Command,
    input: &[u8],
    cap_bytes: u64,
    timeout: Duration,
) -> Result<Said, String> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command.process_group(0);
    // Starting a process blocks for a moment, more when this one is large.
    let spawned = tokio::task::spawn_blocking({
        let handle = tokio::runtime::Handle::current();
        move || {
            let _entered = handle.enter();
            tokio::process::Command::from(command)
                .kill_on_drop(true)
                .spawn()
        }
    });
    let talk = async {
        let mut child = match spawned.await {
            Ok(Ok(child)) => child,
            Ok(Err(error)) => return Err(format!("start: {error}")),
            Err(_) => return Err("shutting down".to_owned()),
        };
        let group = Group(
            child
                .id()
                .and_then(|id| i32::try_from(id).ok())
                .map(Pid::from_raw),
        );
        let mut output = Vec::new();
        if let Some(mut stdin) = child.stdin.take() {
            // It may answer without reading; its answer tells.
            let _ = stdin.write_all(input).await;
            let _ = stdin.shutdown().await;
        }
        if let Some(stdout) = child.stdout.take() {
            let mut limited = stdout.take(cap_bytes.saturating_add(1));
            let read = limited.read_to_end(&mut output).await;
            read.map_err(|error| format!("read its answer: {error}"))?;
        }
        if u64::try_from(output.len()).map_or(true, |length| length > cap_bytes) {
            return Err(format!("its answer has more than {cap_bytes} bytes"));
        }
        let status = child
            .wait()
            .await
            .map_err(|error| format!("wait for it: {error}"))?;
        drop(group);
        Ok(Said { status, output })
    };
    tokio::time::timeout(timeout, talk)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {timeout:?}")))
}
