// SPDX-License-Identifier: Apache-2.0
//! What is stuck in the daemon and in the shim, as `sluice status` shows it.

use std::io::{self, Write};

use serde_json::{Value, json};
use sluice_proto::control::StuckStep;

use super::show::printable;

/// A line for each; none where nothing is stuck.
pub(super) fn write(out: &mut impl Write, stuck: &[StuckStep]) -> io::Result<()> {
    for it in stuck {
        let line = format!(
            "STUCK: {} for {} s in {} ({}), on behalf of {}: {}",
            it.step, it.seconds, it.process, it.pid, it.whom, it.subject
        );
        writeln!(out, "{}", printable(&line))?;
    }
    Ok(())
}

/// The same for machines.
pub(super) fn to_json(stuck: &[StuckStep]) -> Value {
    let step = |it: &StuckStep| {
        json!({
            "step": it.step,
            "seconds": it.seconds,
            "process": it.process,
            "pid": it.pid,
            "whom": it.whom,
            "subject": it.subject,
        })
    };
    stuck.iter().map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stuck_step_is_one_line_and_one_object() {
        let stuck = [StuckStep {
            step: "registry body".into(),
            whom: "foreground".into(),
            subject: "bytes 1..2\u{1b}[2J".into(),
            seconds: 7,
            process: "sluiced".into(),
            pid: 12,
        }];
        let mut out = Vec::new();
        write(&mut out, &stuck).unwrap();
        let text = String::from_utf8(out).unwrap();
        let expected =
            "STUCK: registry body for 7 s in sluiced (12), on behalf of foreground: bytes 1..2";
        assert!(
            text.starts_with(expected) && !text.contains('\u{1b}'),
            "{text}"
        );
        let json = to_json(&stuck);
        assert_eq!(
            (&json[0]["step"], &json[0]["seconds"]),
            (&json!("registry body"), &json!(7))
        );
        assert_eq!(to_json(&[]), json!([]));
    }
}
