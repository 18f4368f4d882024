// SPDX-License-Identifier: Apache-2.0
//! What is odd and has files all the same.

use super::entry::{Entry, Style};
use super::{Case, Outcome, ended};

/// Values for `security.capability`: `cap_net_bind_service` permitted and effective.
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = names();
    cases.extend(numbers());
    cases.extend(links());
    cases.extend(over_each_other());
    cases.extend(hidden());
    cases.extend(attributes());
    cases.extend(ends());
    cases.push(bomb());
    cases.extend(ordinary());
    cases
}

fn lazy(name: &'static str, layers: &[&[Entry]]) -> Case {
    Case::of(name, Outcome::Lazy, layers)
}

fn names() -> Vec<Case> {
    let file = |name: &str| Entry::file(format!("odd/names/{name}"), name);
    let deep = format!("odd/prefix/{}/{}", "p".repeat(120), "n".repeat(90));
    let long = format!("odd/long/{}", vec!["d".repeat(200); 15].join("/"));
    let gnu = format!("odd/gnu/{}/{}", "g".repeat(200), "h".repeat(255));
    vec![
        lazy("prefix", &[&[Entry::file(&deep, "in the prefix field")]]),
        lazy(
            "long",
            &[&[
                Entry::file(&long, "3,000 bytes of path"),
                Entry::symlink("odd/long/link", "t/".repeat(2000)),
            ]],
        ),
        lazy(
            "gnu",
            &[&[
                Entry::file(&gnu, "by GNU's records").style(Style::Gnu),
                Entry::symlink("odd/gnu/link", "u/".repeat(300)).style(Style::Gnu),
                Entry::hard_link("odd/gnu/again", &gnu).style(Style::Gnu),
            ]],
        ),
        lazy(
            "names",
            &[&[
                file("./dotted"),
                file("a//b"),
                file("c/./d"),
                file("e/../f"),
                file("with space"),
                file("with\nnewline"),
                file("back\\slash"),
                file("-rf"),
                file("\u{e9}\u{1f980}"),
                Entry::file("/odd/names/absolute", "absolute"),
                Entry::file("./odd/names/from-here", "from here"),
                Entry::file("../../odd/names/from-above", "from above the root"),
                Entry::directory("odd/names/directory///"),
            ]],
        ),
        // By itself: tables of contents are JSON, and have no such names.
        Case::whole(
            "no-text",
            Outcome::Lazy,
            ended(&Entry::file(b"odd/no-text/\xff\xfe", "no text").bytes()),
        ),
        lazy("root", &[&[Entry::directory("./").mode(0o700).owner(7, 7)]]),
        lazy(
            "implied",
            &[&[Entry::file("odd/implied/a/b/c", "no parents")]],
        ),
        lazy(
            "records",
            &[&[Entry::file("odd/records/wrong", "by its record")
                .pax("path", "odd/records/right")
                .pax("comment", "of nobody's interest")
                .pax("SCHILY.fflags", "nodump")]],
        ),
        // By itself: writers of other formats do not take it.
        Case::whole(
            "global",
            Outcome::Lazy,
            [
                Entry::new(b'g', "pax_global_header")
                    .pax("comment", "of a commit")
                    .bytes(),
                ended(&Entry::file("odd/global/file", "after a global record").bytes()),
            ]
            .concat(),
        ),
        lazy(
            "v7",
            &[&[
                Entry::directory("odd/v7/").style(Style::V7),
                Entry::new(0, "odd/v7/file")
                    .style(Style::V7)
                    .twist(|header| header[124..136].copy_from_slice(b"00000000000\0")),
                Entry::new(0, "odd/v7/directory/").style(Style::V7),
            ]],
        ),
    ]
}

fn numbers() -> Vec<Case> {
    let file = |name: &str| Entry::file(format!("odd/numbers/{name}"), name);
    vec![lazy(
        "numbers",
        &[&[
            file("owner-by-record").owner(4_000_000_000, 3_000_000),
            file("owner-in-base-256")
                .style(Style::Gnu)
                .owner(4_000_000_000, 3_000_000),
            file("before-1970").pax("mtime", "-5.25"),
            file("before-1970-in-base-256")
                .style(Style::Gnu)
                .mtime(-1_000_000),
            file("in-parts").pax("mtime", "1700000000.123456789"),
            file("in-more-parts").pax("mtime", "1700000000.12345678999"),
            file("in-2242").mtime(8_589_934_593).style(Style::Gnu),
            file("in-2500").pax("mtime", "16725225600"),
            file("at-no-time").mtime(0),
            file("mode-with-type").mode(0o100_755),
            file("mode-of-nothing").mode(0),
            file("all-bits").mode(0o7777),
            file("spaces-for-zeros").twist(|header| header[100..108].copy_from_slice(b"   644 \0")),
            file("size-by-record").pax("size", "14"),
            Entry::directory("odd/numbers/sticky").mode(0o1777),
        ]],
    )]
}

fn links() -> Vec<Case> {
    vec![
        lazy(
            "hard-links",
            &[&[
                Entry::file("odd/hard-links/one", "x".repeat(70_000)),
                Entry::hard_link("odd/hard-links/two", "odd/hard-links/one"),
                Entry::hard_link("odd/hard-links/sub/three", "./odd/hard-links/two"),
                Entry::hard_link("odd/hard-links/four", "/odd/hard-links/one").mode(0o600),
                Entry::symlink("odd/hard-links/symlink", "one"),
                Entry::hard_link("odd/hard-links/of-symlink", "odd/hard-links/symlink"),
                Entry::new(b'6', "odd/hard-links/fifo"),
                Entry::hard_link("odd/hard-links/of-fifo", "odd/hard-links/fifo"),
            ]],
        ),
        // By itself: writers of other formats lose the first of two entries of one name, and break the link.
        Case::whole(
            "outlived",
            Outcome::Lazy,
            ended(
                &[
                    Entry::file("odd/outlived/first", "its first name goes"),
                    Entry::hard_link("odd/outlived/survivor", "odd/outlived/first"),
                    Entry::file("odd/outlived/first", "another file"),
                ]
                .iter()
                .flat_map(Entry::bytes)
                .collect::<Vec<u8>>(),
            ),
        ),
        lazy(
            "symlinks",
            &[&[
                Entry::symlink("odd/symlinks/absolute", "/odd/symlinks/real"),
                Entry::symlink("odd/symlinks/dangling", "nothing/here"),
                Entry::symlink("odd/symlinks/loop", "loop"),
                Entry::symlink("odd/symlinks/up", "../../../../../../etc"),
                Entry::directory("odd/symlinks/real"),
                Entry::symlink("odd/symlinks/to-real", "real"),
                Entry::file("odd/symlinks/to-real/through", "through a link"),
                Entry::symlink("odd/symlinks/to-root", "/"),
                Entry::file("odd/symlinks/to-root/odd/symlinks/by-root", "by the root"),
                Entry::symlink("odd/symlinks/later", "made-later"),
                Entry::file("odd/symlinks/later/file", "through a dangling link"),
            ]],
        ),
        // A layer is unpacked by itself: the link of the one below does not lead its entries.
        lazy(
            "link-below",
            &[
                &[
                    Entry::file("odd/link-below/usr/lib/a", "a"),
                    Entry::symlink("odd/link-below/lib", "usr/lib"),
                ],
                &[Entry::file("odd/link-below/lib/b", "b")],
            ],
        ),
    ]
}

fn over_each_other() -> Vec<Case> {
    let at = |name: &str| format!("odd/twice/{name}");
    vec![
        lazy(
            "twice",
            &[&[
                Entry::file(at("file"), "first"),
                Entry::file(at("file"), "second, longer").mode(0o600),
                Entry::file(at("file-to-link"), "f"),
                Entry::symlink(at("file-to-link"), "file"),
                Entry::symlink(at("link-to-file"), "file"),
                Entry::file(at("link-to-file"), "f"),
                Entry::file(at("file-to-directory"), "f"),
                Entry::directory(at("file-to-directory")).mode(0o711),
                Entry::file(at("file-to-directory/in"), "in"),
                Entry::directory(at("directory")).mode(0o700),
                Entry::file(at("directory/stays"), "stays"),
                Entry::directory(at("directory")).mode(0o755).owner(3, 4),
                Entry::symlink(at("link-to-directory"), "directory"),
                Entry::directory(at("link-to-directory")),
                Entry::file(at("./dotted"), "1"),
                Entry::file(at("dotted"), "22"),
            ]],
        ),
        lazy(
            "layers",
            &[
                &[
                    Entry::directory("odd/layers/becomes-file"),
                    Entry::file("odd/layers/becomes-file/x", "x"),
                    Entry::file("odd/layers/becomes-directory", "f"),
                    Entry::symlink("odd/layers/becomes-other-link", "a"),
                    Entry::directory("odd/layers/attributes").mode(0o700),
                    Entry::file("odd/layers/attributes/kept", "kept"),
                    Entry::file("odd/layers/attributes/changed", "old"),
                ],
                &[
                    Entry::file("odd/layers/becomes-file", "now a file"),
                    Entry::directory("odd/layers/becomes-directory").mode(0o750),
                    Entry::file("odd/layers/becomes-directory/y", "y"),
                    Entry::symlink("odd/layers/becomes-other-link", "b"),
                    Entry::directory("odd/layers/attributes")
                        .mode(0o711)
                        .owner(5, 6),
                    Entry::file("odd/layers/attributes/changed", "new"),
                ],
                &[Entry::file("odd/layers/attributes/third", "3")],
            ],
        ),
    ]
}

fn hidden() -> Vec<Case> {
    let at = |name: &str| format!("odd/hidden/{name}");
    let below: Vec<Entry> = [
        "file",
        "tree/a",
        "tree/b/c",
        "opaque/old",
        "opaque/sub/old",
        "again/old",
        "name/x",
        "deep/1/2/3",
    ]
    .iter()
    .map(|name| Entry::file(at(name), *name))
    .collect();
    vec![
        lazy(
            "hidden",
            &[
                &below,
                &[
                    Entry::file(at(".wh.file"), ""),
                    Entry::file(at(".wh.tree"), ""),
                    Entry::file(at(".wh.never-there"), ""),
                    Entry::directory(at("opaque")).mode(0o750),
                    Entry::file(at("opaque/before-the-mark"), "b"),
                    Entry::file(at("opaque/.wh..wh..opq"), ""),
                    Entry::file(at("opaque/after-the-mark"), "a"),
                    Entry::file(at("implied/.wh..wh..opq"), ""),
                    Entry::file(at(".wh.again"), ""),
                    Entry::file(at("deep/1/.wh.2"), ""),
                    Entry::file(at(".wh..wh.plnk"), "of aufs"),
                    Entry::file(at("wh.no-mark"), "no mark"),
                    Entry::file(at(".whiteout"), "no mark"),
                ],
                &[
                    Entry::file(at("again/new"), "new"),
                    Entry::file(at("name/.wh.x"), "content of a mark"),
                    Entry::file(at("opaque/sub/new"), "new"),
                ],
            ],
        ),
        lazy(
            "opaque-root",
            &[
                &[Entry::file("odd/opaque-root/d/old", "old")],
                &[
                    Entry::file("odd/opaque-root/d/.wh..wh..opq", ""),
                    Entry::file("odd/opaque-root/d/new", "new"),
                ],
                &[
                    Entry::file("odd/opaque-root/d/.wh..wh..opq", ""),
                    Entry::file("odd/opaque-root/d/newer", "newer"),
                ],
            ],
        ),
    ]
}

fn attributes() -> Vec<Case> {
    let file = |name: &str| Entry::file(format!("odd/attributes/{name}"), name);
    vec![lazy(
        "attributes",
        &[&[
            file("user")
                .pax("SCHILY.xattr.user.comment", b"with \0 byte")
                .pax("SCHILY.xattr.user.empty", ""),
            file("capable")
                .mode(0o755)
                .pax("SCHILY.xattr.security.capability", CAPABILITY),
            file("large").pax("SCHILY.xattr.user.large", "v".repeat(2000)),
            file("trusted").pax("SCHILY.xattr.trusted.overlay.opaque", "y"),
            file("foreign").pax("LIBARCHIVE.xattr.user.x", "eA=="),
            Entry::directory("odd/attributes/directory").pax("SCHILY.xattr.user.d", "d"),
            Entry::new(b'3', "odd/attributes/null")
                .device(1, 3)
                .mode(0o666),
            Entry::new(b'4', "odd/attributes/disk")
                .device(259, 300_000)
                .mode(0o660),
            Entry::new(b'6', "odd/attributes/fifo").mode(0o600),
            Entry::file("odd/attributes/sized-directory", "").claims(0),
            Entry::file("odd/attributes/empty", ""),
            Entry::file("odd/attributes/block", "b".repeat(512)),
            Entry::file("odd/attributes/block-and-one", "b".repeat(513)),
        ]],
    )]
}

/// What stands, or does not stand, behind the last entry.
fn ends() -> Vec<Case> {
    let one = |name: &str| Entry::file(format!("odd/{name}/file"), name).bytes();
    vec![
        Case::whole("nothing", Outcome::Lazy, Vec::new()),
        Case::whole("zeros-only", Outcome::Lazy, ended(&[])),
        Case::whole("no-end", Outcome::Lazy, one("no-end")),
        Case::whole(
            "half-an-end",
            Outcome::Lazy,
            [one("half-an-end"), vec![0; 512]].concat(),
        ),
        Case::whole(
            "padded",
            Outcome::Lazy,
            [one("padded"), vec![0; 20_480]].concat(),
        ),
        Case::whole(
            "more-behind",
            Outcome::Lazy,
            [
                ended(&one("more-behind")),
                one("unseen"),
                b"rubbish".to_vec(),
            ]
            .concat(),
        ),
    ]
}

/// A thousand times its blob. By itself: nobody wants to write it for each client.
fn bomb() -> Case {
    let zeros = Entry::file("odd/bomb/zeros", vec![0; 128 << 20]);
    Case::whole("bomb", Outcome::Lazy, ended(&zeros.bytes()))
}

/// Shown by containerd, but no run of a tar holds it, or no layer alone says what it is.
fn ordinary() -> Vec<Case> {
    vec![
        Case::of(
            "link-to-below",
            Outcome::Refused,
            &[
                &[Entry::file("odd/link-to-below/file", "below")],
                &[Entry::hard_link(
                    "odd/link-to-below/link",
                    "odd/link-to-below/file",
                )],
            ],
        ),
        Case::of(
            "mark-of-own",
            Outcome::Ordinary,
            &[&[
                Entry::file("odd/mark-of-own/file", "hidden by its own layer"),
                Entry::file("odd/mark-of-own/.wh.file", ""),
            ]],
        ),
        Case::of(
            "sparse",
            Outcome::Ordinary,
            &[&[Entry::file(
                "odd/sparse/wrong",
                "1\n4096\n4\n".to_owned() + &"\0".repeat(503) + "data",
            )
            .pax("GNU.sparse.major", "1")
            .pax("GNU.sparse.minor", "0")
            .pax("GNU.sparse.name", "odd/sparse/file")
            .pax("GNU.sparse.realsize", "8192")]],
        ),
        Case::of(
            "acl",
            Outcome::Ordinary,
            &[&[Entry::file("odd/acl/file", "acl").pax(
                "SCHILY.xattr.system.posix_acl_access",
                [
                    2, 0, 0, 0, 1, 0, 6, 0, 0xff, 0xff, 0xff, 0xff, 2, 0, 4, 0, 1, 0, 0, 0, 4, 0,
                    4, 0, 0xff, 0xff, 0xff, 0xff, 16, 0, 4, 0, 0xff, 0xff, 0xff, 0xff, 32, 0, 4, 0,
                    0xff, 0xff, 0xff, 0xff,
                ],
            )]],
        ),
    ]
}
