// SPDX-License-Identifier: Apache-2.0
//! The events of `sluice index` in words.

use super::show::{bytes, short};
use crate::report::{Event, IndexSummary, LayerIndexing};

/// A line for an event of an indexing.
pub(super) fn describe(event: &Event) -> Option<String> {
    match event {
        Event::LayerIndexed {
            source,
            source_bytes,
            how,
            lazy,
            codec,
            chunks,
            index_bytes,
            windows_bytes,
            reason,
        } => {
            let blob = format!("layer {}: {}", short(source), bytes(*source_bytes));
            let already = match how {
                LayerIndexing::Reused => ", already there",
                LayerIndexing::Indexed | LayerIndexing::Converted | LayerIndexing::Left => "",
            };
            if *how == LayerIndexing::Converted {
                return Some(format!("{blob}, converted: lazy by itself"));
            }
            if !lazy {
                let reason = reason.as_deref().unwrap_or_default();
                return Some(format!("{blob}{already}, not lazy: {reason}"));
            }
            let codec = codec.as_deref().unwrap_or_default();
            let index = share(*index_bytes, *source_bytes);
            let windows = match windows_bytes {
                0 => String::new(),
                count => format!(", windows {}", share(*count, *source_bytes)),
            };
            let plural = if *chunks == 1 { "" } else { "s" };
            Some(format!(
                "{blob} {codec}, {chunks} chunk{plural}, index {index}{windows}{already}"
            ))
        }
        Event::ArtifactDone {
            platform,
            manifest,
            artifact,
            generation,
            listed,
            ..
        } => {
            let image = format!("image {platform} {}", short(manifest));
            let Some(artifact) = artifact else {
                return Some(format!("{image}: lazy by itself, no artifact needed"));
            };
            let artifact = format!("artifact {artifact}, generation {generation}");
            Some(match listed {
                Some(listed) => format!("{image}: {artifact}, listed {listed}"),
                None => format!("{image}: {artifact}, as it was"),
            })
        }
        Event::IndexSummary(summary) => Some(summarise(summary)),
        _ => None,
    }
}

/// Bytes in percent of a blob.
fn share(part: u64, whole: u64) -> String {
    // For people: 52 bits are plenty.
    #[allow(clippy::cast_precision_loss, reason = "shown with two decimals")]
    let percent = part as f64 * 100.0 / whole.max(1) as f64;
    format!("{percent:.2} %")
}

fn summarise(summary: &IndexSummary) -> String {
    let sent = match summary.uploads {
        0 => "nothing to upload".to_owned(),
        uploads => format!("{uploads} uploads, {}", bytes(summary.uploaded_bytes)),
    };
    let beside = summary.index_bytes + summary.windows_bytes;
    format!(
        "{} = {}, not a byte of it changed: {sent}; {} layers ({} indexed, {} reused, {} not lazy), index and windows {} of {} in {:.1} s",
        summary.image,
        summary.digest,
        summary.layers,
        summary.layers_indexed,
        summary.layers_reused,
        summary.layers_not_lazy,
        share(beside, summary.blob_bytes),
        bytes(summary.blob_bytes),
        summary.seconds,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(how: LayerIndexing, lazy: bool) -> Event {
        Event::LayerIndexed {
            source: format!("sha256:{}", "ab".repeat(32)),
            source_bytes: 10_000,
            how,
            lazy,
            codec: lazy.then(|| "gzip".to_owned()),
            chunks: 7,
            index_bytes: if lazy { 50 } else { 0 },
            windows_bytes: if lazy { 130 } else { 0 },
            reason: (!lazy).then(|| "sparse file".to_owned()),
        }
    }

    #[test]
    fn layers_say_what_they_cost_or_why_they_are_not_lazy() {
        let head = "layer abababababab: 9.77 KiB";
        for (how, lazy, expected) in [
            (
                LayerIndexing::Indexed,
                true,
                " gzip, 7 chunks, index 0.50 %, windows 1.30 %",
            ),
            (
                LayerIndexing::Reused,
                true,
                " gzip, 7 chunks, index 0.50 %, windows 1.30 %, already there",
            ),
            (LayerIndexing::Indexed, false, ", not lazy: sparse file"),
            (
                LayerIndexing::Converted,
                true,
                ", converted: lazy by itself",
            ),
        ] {
            let line = describe(&layer(how, lazy)).unwrap();
            assert_eq!(line, format!("{head}{expected}"));
        }
    }

    #[test]
    fn the_summary_says_that_nothing_changed() {
        let summary = IndexSummary {
            image: "docker://x".into(),
            digest: "d".into(),
            ..IndexSummary::default()
        };
        let line = describe(&Event::IndexSummary(summary)).unwrap();
        let expected = "docker://x = d, not a byte of it changed: nothing to upload; 0 layers";
        assert!(line.starts_with(expected), "{line}");
    }
}
