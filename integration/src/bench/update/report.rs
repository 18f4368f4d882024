// SPDX-License-Identifier: Apache-2.0
//! What of a next version was fetched, in words.

use std::fmt::Write as _;

use super::{Figures, Scene, Update};
use crate::bench::report::{Entry, Times};
use crate::bench::start::images::Image;

const HEAD: &str = "# The next version of an image, side by side

<!-- Written by `make bench BENCH=update`: do not edit. -->

The node has the version before, started and complete. Of the next one everything was installed anew, as a build without a
cache does: each modification time is a day later, those that compiled Python keeps of its sources too; the files of one package are
others. So no layer is what it was, and sharing layers, which each contender does, saves nothing. Over a line of 100 Mbit/s and 20 ms;
medians of rounds in which contenders take turns. Bytes are all that the line carried: until the container was ready, and until nothing
more came in the background.
";

/// The figures of one image.
pub fn table(image: Image, scene: &Scene) -> String {
    let mut text = String::new();
    let changes = &scene.changes;
    let _ = writeln!(
        text,
        "\n### {}, {} upgraded: {:.0} MB in gzip; {:.1} % of all bytes of files changed\n",
        image.name(),
        scene.package,
        scene.bytes as f64 / 1e6,
        changes.percent()
    );
    text += "| contender | version | runs | ready s | MB at ready | MB in all | of the image |\n";
    text += "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n";
    for (contender, (version, updates)) in &scene.updates {
        let middle = |of: &dyn Fn(&Update) -> f64| {
            let times = Times::of(updates.iter().map(of).collect());
            times.map_or(0.0, |times| times.median_s)
        };
        let all = middle(&|it| it.all_bytes as f64);
        let _ = writeln!(
            text,
            "| {} | {version} | {} | {:.2} | {:.1} | {:.1} | {:.0} % |",
            contender.title(),
            updates.len(),
            middle(&|it| it.start.ready_s),
            middle(&|it| it.start.bytes as f64) / 1e6,
            all / 1e6,
            all * 100.0 / scene.bytes as f64
        );
    }
    for (contender, why) in &scene.absent {
        let _ = writeln!(text, "\n{} was not measured: {why}", contender.title());
    }
    text
}

/// The whole report.
pub fn markdown(entry: &Entry<Figures>) -> String {
    let mut text = HEAD.to_owned();
    let _ = writeln!(
        text,
        "\nLinux {}, {} cores. All samples are in [update.json](update.json).",
        entry.kernel, entry.cores
    );
    for (image, scene) in &entry.figures {
        text += &table(*image, scene);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::start::contender::Contender;
    use crate::harness::rebuilt::Changes;
    use std::collections::BTreeMap;

    #[test]
    fn a_table_has_medians_and_shares() {
        let update = |all_bytes| Update {
            start: Default::default(),
            all_bytes,
        };
        let updates = [30_000_000, 10_000_000, 20_000_000].map(update).to_vec();
        let scene = Scene {
            package: "flask".to_owned(),
            bytes: 100_000_000,
            changes: Changes {
                files: 1,
                bytes: 5,
                all_bytes: 50,
            },
            updates: BTreeMap::from([(Contender::Sluice, ("1".to_owned(), updates))]),
            absent: BTreeMap::from([(Contender::Soci, "no program".to_owned())]),
            load: 0.0,
        };
        let text = table(Image::Python, &scene);
        assert!(text.contains("10.0 % of all bytes"), "{text}");
        assert!(
            text.contains("| 1 | 3 | 0.00 | 0.0 | 20.0 | 20 % |"),
            "{text}"
        );
        assert!(text.contains("no program"), "{text}");
    }
}
