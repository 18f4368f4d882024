// SPDX-License-Identifier: Apache-2.0
//! Points at which a test lets the disk below a running daemon fail, or the daemon die.
//!
//! They exist in builds with `test-support` only; elsewhere passing one is nothing. `$SLUICE_FAILPOINTS` names
//! a file of rules, a JSON list such as `[{"point": "sync", "pass": 2, "strikes": 1, "then": "die"}]`. It is
//! read at each point, so that a test changes it under the daemon; counting begins anew when it changes.

use std::io;

/// What the store is about to do with a device's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "test-support", derive(serde::Deserialize))]
#[cfg_attr(feature = "test-support", serde(rename_all = "lowercase"))]
pub(super) enum Point {
    /// Write a chunk.
    Write,
    /// Read a chunk.
    Read,
    /// Make chunks and bitmap durable.
    Sync,
    /// Replace the record of what is durable.
    Record,
}

#[cfg(not(feature = "test-support"))]
#[expect(clippy::unnecessary_wraps, reason = "it fails where points exist")]
pub(super) const fn pass(_: Point) -> io::Result<()> {
    Ok(())
}

#[cfg(feature = "test-support")]
pub(super) use rules::pass;

#[cfg(feature = "test-support")]
mod rules {
    use std::path::PathBuf;
    use std::sync::{Mutex, OnceLock};

    use serde::Deserialize;

    use super::super::lock;
    use super::{Point, io};

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Then {
        /// The system's error of this number.
        Error(i32),
        /// SIGKILL.
        Die,
    }

    #[derive(Clone, Copy, Debug, Deserialize)]
    struct Rule {
        point: Point,
        /// How many times the point is passed before.
        pass: u64,
        strikes: u64,
        then: Then,
    }

    #[derive(Debug, Default)]
    struct Rules {
        text: Vec<u8>,
        /// Each with how often its point was reached.
        rules: Vec<(Rule, u64)>,
    }

    impl Rules {
        fn read(&mut self, text: Vec<u8>) {
            if self.text == text {
                return;
            }
            let rules: Vec<Rule> = serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::error!("failpoints cannot be read: {error}");
                Vec::new()
            });
            self.rules = rules.into_iter().map(|rule| (rule, 0)).collect();
            self.text = text;
        }

        fn strike(&mut self, point: Point) -> Option<Then> {
            let mut strikes = None;
            for (rule, reached) in &mut self.rules {
                if rule.point == point {
                    let due = *reached >= rule.pass && *reached - rule.pass < rule.strikes;
                    *reached += 1;
                    if due {
                        strikes = strikes.or(Some(rule.then));
                    }
                }
            }
            strikes
        }
    }

    /// Goes past a point, unless a rule strikes. **Blocks**.
    pub(in super::super) fn pass(point: Point) -> io::Result<()> {
        static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
        static RULES: Mutex<Rules> = Mutex::new(Rules {
            text: Vec::new(),
            rules: Vec::new(),
        });
        let file = FILE.get_or_init(|| std::env::var_os("SLUICE_FAILPOINTS").map(PathBuf::from));
        let Some(file) = file else { return Ok(()) };
        let text = std::fs::read(file).unwrap_or_else(|_| b"[]".to_vec());
        let strike = {
            let mut rules = lock(&RULES);
            rules.read(text);
            rules.strike(point)
        };
        match strike {
            None => Ok(()),
            Some(Then::Error(number)) => Err(io::Error::from_raw_os_error(number)),
            Some(Then::Die) => {
                tracing::warn!(?point, "a failpoint ends this process");
                nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL)?;
                Ok(())
            }
        }
    }

    #[test]
    fn a_rule_strikes_when_it_should() {
        let mut rules = Rules::default();
        let text = r#"[{"point":"sync","pass":1,"strikes":2,"then":{"error":5}},
            {"point":"write","pass":0,"strikes":1,"then":"die"}]"#;
        rules.read(text.into());
        let five = Some(Then::Error(5));
        let syncs = std::array::from_fn(|_| rules.strike(Point::Sync));
        assert_eq!(syncs, [None, five, five, None]);
        assert_eq!(rules.strike(Point::Write), Some(Then::Die));
        assert_eq!(rules.strike(Point::Write), None);
        rules.read(text.into());
        assert_eq!(rules.strike(Point::Write), None);
        rules.read(format!("{text} ").into());
        assert_eq!(rules.strike(Point::Write), Some(Then::Die));
        assert_eq!(rules.strike(Point::Read), None);
    }
}
