// SPDX-License-Identifier: Apache-2.0
//! Which progress of a layer is worth a line: none more than once in an interval.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::report::{Event, Step};

/// Long enough for logs, short enough to tell a slow layer from a stuck one.
const INTERVAL: Duration = Duration::from_secs(1);

/// The layers that are on their way.
#[derive(Debug, Default)]
pub(super) struct Pace {
    layers: HashMap<String, Layer>,
}

#[derive(Debug)]
struct Layer {
    read_bytes: u64,
    total_bytes: u64,
    shown: Instant,
}

impl Pace {
    /// Takes note of layers that start and end.
    pub(super) fn event(&mut self, event: &Event, now: Instant) {
        match event {
            Event::LayerStarted { source, bytes } => {
                let layer = Layer {
                    read_bytes: 0,
                    total_bytes: *bytes,
                    shown: now,
                };
                self.layers.insert(source.clone(), layer);
            }
            Event::LayerDone { source: blob, .. }
            | Event::LayerIndexed { source: blob, .. }
            | Event::LayerPulled { blob, .. } => {
                self.layers.remove(blob);
            }
            _ => {}
        }
    }

    /// `bytes` more were read; the event to show, if it is time for one.
    pub(super) fn read(&mut self, source: &str, bytes: u64, now: Instant) -> Option<Event> {
        let layer = self.layers.get_mut(source)?;
        layer.read_bytes += bytes;
        let (bytes, total) = (layer.read_bytes, layer.total_bytes);
        layer.show(source, Step::Read, (bytes, total), now)
    }

    /// `bytes` of `total` were sent so far; the event to show, if it is time for one.
    pub(super) fn sent(
        &mut self,
        source: &str,
        (bytes, total): (u64, u64),
        now: Instant,
    ) -> Option<Event> {
        let layer = self.layers.get_mut(source)?;
        layer.show(source, Step::Upload, (bytes, total), now)
    }
}

impl Layer {
    fn show(
        &mut self,
        source: &str,
        step: Step,
        (bytes, total): (u64, u64),
        now: Instant,
    ) -> Option<Event> {
        if now.saturating_duration_since(self.shown) < INTERVAL {
            return None;
        }
        self.shown = now;
        Some(Event::LayerProgress {
            source: source.to_owned(),
            step,
            bytes,
            total,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_shown_once_an_interval() {
        let mut pace = Pace::default();
        let start = Instant::now();
        let at = |tenths: u64| start + INTERVAL * u32::try_from(tenths).unwrap() / 10;
        let seen = |event: Option<Event>| match event? {
            Event::LayerProgress {
                step, bytes, total, ..
            } => Some((step, bytes, total)),
            other => panic!("{other:?}"),
        };
        assert_eq!(seen(pace.read("a", 1, at(50))), None, "not started");
        let started = Event::LayerStarted {
            source: "a".into(),
            bytes: 100,
        };
        pace.event(&started, at(0));
        for (tenths, expected) in [
            (5, None),
            (11, Some((Step::Read, 20, 100))),
            (12, None),
            (25, Some((Step::Read, 40, 100))),
        ] {
            assert_eq!(seen(pace.read("a", 10, at(tenths))), expected, "{tenths}");
        }
        let sent = pace.sent("a", (7, 60), at(40));
        assert_eq!(seen(sent), Some((Step::Upload, 7, 60)));
        assert_eq!(seen(pace.sent("a", (8, 60), at(41))), None);
    }
}
