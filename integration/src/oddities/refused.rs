// SPDX-License-Identifier: Apache-2.0
//! What nobody unpacks: containerd says no, and so must whoever is lazy.

use super::entry::{Entry, Style};
use super::{Case, Outcome, ended};

pub(super) fn cases() -> Vec<Case> {
    let refused = |name, entries: &[Entry]| Case::of(name, Outcome::Refused, &[entries]);
    let file = Entry::file("odd/file", "content");
    let cut = |tar: Vec<u8>, bytes: usize| tar[..bytes].to_vec();
    vec![
        refused(
            "link-to-nothing",
            &[Entry::hard_link("odd/link", "odd/nothing")],
        ),
        refused(
            "cycle-of-hard-links",
            &[
                Entry::hard_link("odd/a", "odd/b"),
                Entry::hard_link("odd/b", "odd/a"),
            ],
        ),
        refused(
            "link-before-its-target",
            &[Entry::hard_link("odd/link", "odd/file"), file.clone()],
        ),
        refused(
            "link-to-a-directory",
            &[
                Entry::directory("odd/d"),
                Entry::hard_link("odd/link", "odd/d"),
            ],
        ),
        refused(
            "link-out",
            &[Entry::hard_link("odd/link", "../../../../etc/passwd")],
        ),
        refused(
            "link-to-itself",
            &[Entry::hard_link("odd/link", "odd/link")],
        ),
        refused("symlink-to-nowhere", &[Entry::symlink("odd/link", "")]),
        refused("contiguous", &[Entry::new(b'7', "odd/contiguous")]),
        refused("unknown-type", &[Entry::new(b'Z', "odd/unknown")]),
        refused("volume-header", &[Entry::new(b'V', "odd/volume")]),
        refused("mark-of-nothing", &[Entry::file("odd/.wh.", "")]),
        refused(
            "below-a-file",
            &[file.clone(), Entry::file("odd/file/below", "b")],
        ),
        refused(
            "name-of-256",
            &[Entry::file(format!("odd/{}", "n".repeat(256)), "n")],
        ),
        refused(
            "path-of-5000",
            &[Entry::file(
                format!("odd/{}", vec!["d".repeat(200); 25].join("/")),
                "d",
            )],
        ),
        refused(
            "negative-size",
            &[file
                .clone()
                .style(Style::Gnu)
                .twist(|header| header[124..136].fill(0xff))],
        ),
        refused("negative-size-by-record", &[file.clone().pax("size", "-7")]),
        refused(
            "no-number",
            &[file
                .clone()
                .twist(|header| header[100..108].copy_from_slice(b"0o64x4 \0"))],
        ),
        refused(
            "wrong-checksum",
            &[file.clone().spoil(|header| header[0] ^= 1)],
        ),
        refused("bad-record", &[file.clone().pax("mtime", "yesterday")]),
        refused(
            "nul-in-a-record",
            &[file.clone().pax("path", b"odd/\0file")],
        ),
        // Nothing of an entry but its content may be long: all else is held in memory.
        refused(
            "record-of-2-mib",
            &[file.clone().pax("comment", vec![b'c'; 2 << 20])],
        ),
        refused(
            "name-of-2-mib",
            &[Entry::file(vec![b'n'; 2 << 20], "n").style(Style::Gnu)],
        ),
        refused(
            "links-in-circles",
            &[
                Entry::symlink("odd/x", "y"),
                Entry::symlink("odd/y", "x"),
                Entry::file("odd/x/file", "never"),
            ],
        ),
        Case::whole(
            "cut-in-content",
            Outcome::Refused,
            cut(ended(&file.bytes()), 515),
        ),
        Case::whole(
            "cut-in-a-header",
            Outcome::Refused,
            cut(ended(&file.bytes()), 300),
        ),
        Case::whole(
            "more-than-there-is",
            Outcome::Refused,
            ended(&file.clone().claims(1 << 40).bytes()),
        ),
        Case::whole("no-tar", Outcome::Refused, b"#!/bin/sh\n".repeat(200)),
    ]
}
