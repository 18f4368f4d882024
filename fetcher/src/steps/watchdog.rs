// SPDX-License-Identifier: Apache-2.0
//! The watchdog: looks for stuck steps on a thread of its own, which no task and no system call holds up.

use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Steps, Stuck};

/// How often it looks: limits are seconds.
const INTERVAL: Duration = Duration::from_secs(1);
/// Its stack. It formats lines and recurses nowhere.
const STACK_BYTES: usize = 256 << 10;

/// Looks for as long as it lives.
#[derive(Debug)]
pub struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Starts to watch.
    ///
    /// **Errors** no thread can be started.
    pub fn start(steps: Steps) -> io::Result<Self> {
        let (stop, stopped) = channel::<()>();
        let builder = std::thread::Builder::new()
            .name("watchdog".to_owned())
            .stack_size(STACK_BYTES);
        let thread = builder.spawn(move || {
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                // Counted before it is logged: a log that nobody reads blocks.
                let look = steps.look(Instant::now());
                look.stuck.iter().for_each(tell);
                for step in look.moved {
                    tracing::info!(step, "a step that was stuck goes on");
                }
            }
        })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

/// Names a stuck step in the log.
pub(super) fn tell(stuck: &Stuck) {
    tracing::warn!(
        step = stuck.step,
        subject = stuck.subject,
        whom = stuck.whom,
        pid = stuck.pid,
        seconds = stuck.stands.as_secs(),
        "a step is stuck"
    );
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It panics nowhere; had it done so, there is nobody left to tell.
            let _ = thread.join();
        }
    }
}
