// SPDX-License-Identifier: Apache-2.0
mod model;
pub(crate) mod write;

use proptest::prelude::*;

use super::*;
use model::{Seen, View, view, view_of_tree};
use write::{Spec, Style, entry, record, seal, special, tar};

fn scan(tar: &[u8]) -> Result<View, ScanError> {
    let mut scanner = Scanner::new();
    scanner.push(tar, &mut ())?;
    scanner.finish().map(|tree| view_of_tree(&tree, tar))
}

fn scan_specs(specs: &[Spec]) -> Result<View, ScanError> {
    scan(&tar(specs))
}

fn seen(view: &View, path: &str) -> Seen {
    view.get(path)
        .unwrap_or_else(|| panic!("no {path} in {:?}", view.keys()))
        .clone()
}

/// Marks a directory as the model would name an implicit one with an opaque mark.
fn kinds(view: &View) -> Vec<(String, String)> {
    let skip_root = view.iter().filter(|(path, _)| !path.is_empty());
    skip_root
        .map(|(path, seen)| (path.clone(), seen.kind.clone()))
        .collect()
}

fn kinds_are(specs: &[Spec], expected: &[(&str, &str)]) {
    let view = scan_specs(specs).unwrap();
    let expected: Vec<_> = expected
        .iter()
        .map(|(p, k)| ((*p).into(), (*k).into()))
        .collect();
    assert_eq!(kinds(&view), expected);
    assert_eq!(Some(view), self::view(specs), "the model sees it otherwise");
}

fn refused(specs: &[Spec]) -> NotLazy {
    assert_eq!(view(specs), None, "the model accepts it");
    match scan_specs(specs) {
        Err(ScanError::NotLazy(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

fn dir(name: &str) -> Spec {
    Spec {
        mode: 0o755,
        ..Spec::new(b'5', name)
    }
}

#[test]
fn names_are_cleaned_and_parents_implied() {
    kinds_are(
        &[
            Spec::file("./a/b/../c", ""),
            Spec::file("/d//e", "x"),
            Spec::file("../../f", ""),
        ],
        &[
            ("a", "dir implicit"),
            ("a/c", "file"),
            ("d", "dir implicit"),
            ("d/e", "file"),
            ("f", "file"),
        ],
    );
    // The root itself is ignored, as containerd does.
    kinds_are(
        &[dir("./"), dir("/"), dir("a/.."), Spec::file(".", "content")],
        &[],
    );
    assert_eq!(scan_specs(&[dir("./")]).unwrap()[""].kind, "dir implicit");
}

#[test]
fn later_entries_win() {
    kinds_are(
        &[Spec::file("a", "1"), Spec::file("a", "22")],
        &[("a", "file")],
    );
    kinds_are(
        &[dir("a"), Spec::file("a/b", ""), Spec::file("a", "")],
        &[("a", "file")],
    );
    kinds_are(
        &[Spec::file("a", ""), dir("a"), Spec::file("a/b", "")],
        &[("a", "dir"), ("a/b", "file")],
    );
    let mut again = dir("a");
    again.mode = 0o1700;
    again.xattrs = vec![(b"user.two".to_vec(), b"2".to_vec())];
    let mut first = dir("a");
    first.xattrs = vec![(b"user.one".to_vec(), b"1".to_vec())];
    let view = scan_specs(&[first, Spec::file("a/b", ""), again]).unwrap();
    assert_eq!(seen(&view, "a").mode, 0o1700);
    assert_eq!(seen(&view, "a").xattrs.len(), 2);
    assert!(view.contains_key("a/b"));
}

#[test]
fn hard_links_join_inodes() {
    let mut last = Spec::link(b'1', "x/c", "/b");
    last.mode = 0o4711;
    let specs = [
        Spec::file("a", "content"),
        Spec::link(b'1', "b", "./a"),
        Spec::link(b'2', "d", "x"),
        dir("x"),
        last,
        Spec::link(b'1', "e", "d/c"),
        Spec::link(b'1', "soft", "d"),
    ];
    let view = scan_specs(&specs).unwrap();
    for path in ["a", "b", "x/c", "e"] {
        let seen = seen(&view, path);
        assert_eq!(
            (seen.first_name.as_str(), &seen.bytes[..]),
            ("a", &b"content"[..])
        );
        // The last link's header decides over the attributes of all.
        assert_eq!(seen.mode, 0o644);
    }
    assert_eq!(seen(&view, "soft").kind, "link");
    assert_eq!(Some(view), self::view(&specs));
}

#[test]
fn a_replaced_link_target_lives_on_under_its_other_name() {
    let specs = [
        Spec::file("a", "old"),
        Spec::link(b'1', "b", "a"),
        Spec::file("a", "new"),
    ];
    let view = scan_specs(&specs).unwrap();
    assert_eq!(seen(&view, "b").bytes, b"old");
    assert_eq!(seen(&view, "a").bytes, b"new");
}

#[test]
fn hard_links_that_lead_nowhere_are_not_lazy() {
    for specs in [
        vec![Spec::link(b'1', "a", "missing")],
        vec![Spec::file("a", ""), Spec::link(b'1', "a", "a")],
        vec![dir("a"), Spec::link(b'1', "b", "a")],
        vec![dir("a"), Spec::link(b'1', "b", "a/")],
        vec![dir("a"), Spec::link(b'1', "b", "a/..")],
        vec![Spec::file(".wh.a", ""), Spec::link(b'1', "b", "a")],
        vec![Spec::link(b'1', "b", "")],
    ] {
        assert!(matches!(refused(&specs), NotLazy::HardLinkTarget { .. }));
    }
}

#[test]
fn parents_go_through_symlinks_inside_the_root() {
    kinds_are(
        &[
            Spec::link(b'2', "lib", "usr/lib"),
            Spec::file("lib/x", ""),
            Spec::link(b'2', "out", "../../../etc"),
            Spec::file("out/passwd", ""),
            Spec::link(b'2', "abs", "/usr"),
            Spec::file("abs/lib/y", ""),
        ],
        &[
            ("abs", "link"),
            ("etc", "dir implicit"),
            ("etc/passwd", "file"),
            ("lib", "link"),
            ("out", "link"),
            ("usr", "dir implicit"),
            ("usr/lib", "dir implicit"),
            ("usr/lib/x", "file"),
            ("usr/lib/y", "file"),
        ],
    );
    // A directory entry replaces a symlink, it is not written through it.
    kinds_are(&[Spec::link(b'2', "a", "b"), dir("a")], &[("a", "dir")]);
    let looped = [Spec::link(b'2', "a", "a"), Spec::file("a/b", "")];
    assert!(matches!(refused(&looped), NotLazy::TooManyLinks { .. }));
    let through = [Spec::file("a", ""), Spec::file("a/b", "")];
    assert!(matches!(
        refused(&through),
        NotLazy::ParentNotDirectory { .. }
    ));
}

#[test]
fn whiteouts_and_opaque_marks() {
    kinds_are(
        &[
            Spec::file("d/.wh..wh..opq", "ignored content"),
            Spec::file(".wh.gone", ""),
            Spec::file(".wh.gone", ""),
            Spec::file(".wh.back", ""),
            Spec::file("back", ""),
            Spec::link(b'1', ".wh..wh.plnk", "nowhere"),
            Spec::file("d/new", ""),
        ],
        &[
            ("back", "file"),
            ("d", "dir implicit opaque"),
            ("d/new", "file"),
            ("gone", "char"),
        ],
    );
    for (specs, own) in [
        (vec![Spec::file("a", ""), Spec::file(".wh.a", "")], true),
        (vec![Spec::file(".wh.", "")], false),
        (vec![Spec::file(".wh..", "")], false),
        (vec![Spec::file(".wh...", "")], false),
    ] {
        let reason = refused(&specs);
        assert_eq!(
            matches!(reason, NotLazy::WhiteoutOfOwn { .. }),
            own,
            "{reason}"
        );
    }
}

#[test]
fn an_opaque_mark_goes_with_its_directory() {
    kinds_are(
        &[
            Spec::file("d/.wh..wh..opq", ""),
            Spec::file("d", ""),
            dir("d"),
        ],
        &[("d", "dir")],
    );
    kinds_are(
        &[dir("d"), Spec::file("d/.wh..wh..opq", ""), dir("d")],
        &[("d", "dir opaque")],
    );
    let root = scan_specs(&[Spec::file(".wh..wh..opq", "")]).unwrap();
    assert_eq!(root[""].kind, "dir implicit opaque");
}

#[test]
fn devices_and_modes() {
    let mut null = Spec::new(b'3', "null");
    null.device = (1, 3);
    let mut disk = Spec::new(b'4', "disk");
    disk.device = (4095, 1_048_575);
    let mut set = Spec::file("su", "");
    set.mode = 0o7755;
    let view = scan_specs(&[null, disk, set, Spec::new(b'6', "pipe")]).unwrap();
    assert_eq!(
        (
            seen(&view, "null").kind.as_str(),
            seen(&view, "null").device
        ),
        ("char", (1, 3))
    );
    assert_eq!(seen(&view, "disk").device, (4095, 1_048_575));
    assert_eq!(seen(&view, "su").mode, 0o7755);
    assert_eq!(seen(&view, "pipe").kind, "fifo");
    let mut bad = Spec::new(b'3', "bad");
    bad.device = (4096, 0);
    assert!(matches!(
        scan_specs(&[bad]),
        Err(ScanError::NotLazy(NotLazy::DeviceNumber { .. }))
    ));
}

#[test]
fn xattrs_that_pass_and_that_do_not() {
    let with = |kind, name: &str| {
        let mut spec = Spec::new(kind, "a");
        spec.link = b"target".to_vec();
        spec.xattrs = vec![(name.into(), b"\0value\n".to_vec())];
        scan_specs(&[spec]).map(|view| seen(&view, "a").xattrs.len())
    };
    assert_eq!(with(b'0', "security.capability"), Ok(1));
    assert_eq!(with(b'0', "user.x"), Ok(1));
    assert_eq!(with(b'2', "user.x"), Ok(0));
    assert_eq!(with(b'2', "security.selinux"), Ok(1));
    assert_eq!(with(b'5', "trusted.overlay.opaque"), Ok(0));
    assert_eq!(with(b'5', "trusted.sluice.implicit"), Ok(0));
    for name in ["system.posix_acl_access", "user.", "odd", ""] {
        let result = with(b'0', name);
        assert!(
            matches!(result, Err(ScanError::NotLazy(NotLazy::Xattr { .. }))),
            "{name}"
        );
    }
    // containerd does not read libarchive's spelling.
    let records = record(b"LIBARCHIVE.xattr.user.x", b"dg==");
    let tar = [special(b'x', &records), entry(&Spec::file("a", ""))].concat();
    assert_eq!(seen(&scan(&tar).unwrap(), "a").xattrs.len(), 0);
}

#[test]
fn times_are_bounded_as_containerd_does() {
    for (seconds, nanoseconds, expected) in [
        (1_700_000_000, 123_456_789, (1_700_000_000, 123_456_789)),
        (-1, 500_000_000, (0, 0)),
        (-5_000_000_000, 0, (0, 0)),
        (9_223_372_036, 854_775_807, (9_223_372_036, 854_775_807)),
        (9_223_372_037, 0, (0, 0)),
        (0, 1, (0, 1)),
    ] {
        for style in [Style::Pax, Style::Gnu, Style::Ustar] {
            let spec = Spec {
                style,
                seconds,
                nanoseconds,
                ..Spec::file("a", "")
            };
            assert_eq!(seen(&scan_specs(&[spec]).unwrap(), "a").mtime, expected);
        }
    }
}

#[test]
fn a_replaced_directory_leaves_its_time() {
    let mut first = dir("a");
    first.seconds = 77;
    let specs = [first, Spec::file("a", "")];
    let view = scan_specs(&specs).unwrap();
    assert_eq!(seen(&view, "a").mtime, (77, 0));
    assert_eq!(Some(view), self::view(&specs));
    let gone = [dir("a/b"), Spec::link(b'2', "a", "nowhere")];
    assert!(matches!(refused(&gone), NotLazy::DirectoryGone { .. }));
}

#[test]
fn owners_are_32_bits() {
    for style in [Style::Pax, Style::Gnu, Style::Ustar] {
        let owned = |uid| Spec {
            style,
            uid,
            gid: 4_000_000_000,
            ..Spec::file("a", "")
        };
        let view = scan_specs(&[owned(3_000_000_000)]).unwrap();
        assert_eq!(seen(&view, "a").owner, (3_000_000_000, 4_000_000_000));
        for uid in [-1, 4_294_967_295, 1 << 40] {
            assert!(matches!(refused(&[owned(uid)]), NotLazy::Owner { .. }));
        }
    }
}

#[test]
fn sparse_files_and_unknown_types_are_not_lazy() {
    let sparse = Spec::new(b'S', "s");
    assert!(matches!(
        scan_specs(&[sparse]),
        Err(ScanError::NotLazy(NotLazy::Sparse { .. }))
    ));
    let records = record(b"GNU.sparse.major", b"1");
    let tar = [special(b'x', &records), entry(&Spec::file("s", "abc"))].concat();
    assert!(matches!(
        scan(&tar),
        Err(ScanError::NotLazy(NotLazy::Sparse { .. }))
    ));
    for kind in [b'7', b'V', b'M', 255] {
        let result = scan_specs(&[Spec::new(kind, "v")]);
        assert!(matches!(
            result,
            Err(ScanError::NotLazy(NotLazy::EntryType { .. }))
        ));
    }
}

#[test]
fn global_records_are_ignored_and_forget_what_was_pending() {
    let tar = [
        special(b'x', &record(b"path", b"lost")),
        special(b'g', &record(b"path", b"global")),
        entry(&Spec::file("a", "")),
    ]
    .concat();
    assert_eq!(
        kinds(&scan(&tar).unwrap()),
        [("a".to_owned(), "file".to_owned())]
    );
}

#[test]
fn old_regular_files_with_a_slash_are_directories() {
    let specs = [Spec::new(0, "d/"), Spec::new(0, "f"), Spec::new(b'0', "g/")];
    let view = scan_specs(&specs).unwrap();
    assert_eq!(
        ["d", "f", "g"].map(|path| seen(&view, path).kind),
        ["dir", "file", "file"].map(str::to_owned)
    );
}

#[test]
fn names_need_not_be_text() {
    let mut spec = Spec::new(b'0', "");
    spec.name = b"\xff\xfe/\x01\n".to_vec();
    for style in [Style::Pax, Style::Gnu, Style::Ustar] {
        spec.style = style;
        let mut scanner = Scanner::new();
        scanner
            .push(&tar(std::slice::from_ref(&spec)), &mut ())
            .unwrap();
        let tree = scanner.finish().unwrap();
        assert!(tree.lookup([&b"\xff\xfe"[..], b"\x01\n"]).is_some());
    }
}

#[test]
fn long_names_are_refused_where_linux_refuses_them() {
    let long = "x".repeat(256);
    assert!(matches!(
        scan_specs(&[Spec::file(&long, "")]),
        Err(ScanError::NotLazy(NotLazy::Name { .. }))
    ));
    assert!(scan_specs(&[Spec::file(&long[1..], "")]).is_ok());
    let deep = "d/".repeat(2100);
    assert!(matches!(
        scan_specs(&[Spec::file(&deep, "")]),
        Err(ScanError::NotLazy(NotLazy::PathTooLong { .. }))
    ));
    for target in ["", &"t".repeat(4096)] {
        assert!(matches!(
            scan_specs(&[Spec::link(b'2', "l", target)]),
            Err(ScanError::NotLazy(NotLazy::SymlinkTarget { .. }))
        ));
    }
}

#[test]
fn ends_of_tars() {
    let file = entry(&Spec::file("a", "content"));
    let whole = |tail: &[u8]| scan(&[&file[..], tail].concat()).map(|view| view.len());
    assert_eq!(whole(&[]), Ok(2));
    assert_eq!(whole(&[0; 512]), Ok(2));
    assert_eq!(whole(&[0; 10_240]), Ok(2));
    assert_eq!(whole(&[&[0; 1024][..], b"rubbish"].concat()), Ok(2));
    assert_eq!(scan(&[]).map(|view| view.len()), Ok(1));
    assert_eq!(scan(&[0; 1024]).map(|view| view.len()), Ok(1));
    assert_eq!(
        whole(&[0; 100]),
        Err(ScanError::Truncated {
            offset: 1124,
            missing: 412
        })
    );
    assert_eq!(
        whole(&[&[0; 512][..], &file].concat()),
        Err(ScanError::AfterZeroBlock { offset: 1536 })
    );
    // The padding of the last entry may lack, its content may not.
    assert_eq!(scan(&file[..519]).map(|view| view.len()), Ok(2));
    assert_eq!(
        scan(&file[..518]),
        Err(ScanError::Truncated {
            offset: 518,
            missing: 1
        })
    );
    assert_eq!(
        scan(&file[..500]),
        Err(ScanError::Truncated {
            offset: 500,
            missing: 12
        })
    );
}

#[test]
fn malformed_headers_are_typed_errors() {
    let mut tar = entry(&Spec::file("a", "content"));
    tar[0] ^= 1;
    assert_eq!(scan(&tar), Err(ScanError::Checksum { offset: 0 }));
    for (at, bytes, field) in [
        (100, &b"9"[..], "mode"),
        (124, b"x", "size"),
        (124, &[0xff; 12], "size"),
        (136, b"-1", "mtime"),
        (329, b"z", "devmajor"),
    ] {
        let mut tar = entry(&Spec::file("a", "content"));
        tar[at..at + bytes.len()].copy_from_slice(bytes);
        seal(&mut tar[..512]);
        assert_eq!(scan(&tar), Err(ScanError::Number { offset: 0, field }));
    }
    let large = special(b'L', &vec![b'a'; 1024 * 1024 + 1]);
    assert!(matches!(
        scan(&large),
        Err(ScanError::RecordTooLarge { offset: 0, .. })
    ));
    let tar = [special(b'x', b"nonsense"), entry(&Spec::file("a", ""))].concat();
    assert_eq!(scan(&tar), Err(ScanError::PaxRecord { offset: 0 }));
    for keyword in ["size", "uid", "mtime", "atime"] {
        let records = record(keyword.as_bytes(), b"x1");
        let tar = [special(b'x', &records), entry(&Spec::file("a", ""))].concat();
        assert!(
            matches!(scan(&tar), Err(ScanError::Number { offset: 1024, .. })),
            "{keyword}"
        );
    }
}

#[test]
fn after_an_error_nothing_is_taken() {
    let mut scanner = Scanner::new();
    assert!(scanner.push(&[1; 512], &mut ()).is_err());
    assert_eq!(scanner.push(&[0; 512], &mut ()), Err(ScanError::Stopped));
    assert!(matches!(scanner.finish(), Err(ScanError::Stopped)));
}

/// Paths that collide, nest, and go through one another.
fn path() -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec!["a", "b", "c", "d", "..", ".", "lib", ".wh.a", ".wh.b"]);
    let opaque = prop::sample::select(vec!["", "", "", "", "", "", "", "/.wh..wh..opq", "/"]);
    let long = prop::sample::select(vec![0, 0, 0, 0, 90, 130]);
    (
        prop::collection::vec(part, 1..4),
        opaque,
        long,
        any::<bool>(),
    )
        .prop_map(|(parts, suffix, long, rooted)| {
            let long = if long > 0 {
                format!("/{}", "n".repeat(long))
            } else {
                String::new()
            };
            let root = if rooted { "/" } else { "" };
            format!("{root}{}{long}{suffix}", parts.join("/"))
        })
}

fn spec() -> impl Strategy<Value = Spec> {
    let style = prop::sample::select(vec![Style::Pax, Style::Gnu, Style::Ustar]);
    let kind = prop::sample::select(b"00000555511223346".to_vec());
    let content = prop::collection::vec(any::<u8>(), 0..1200);
    let id = prop::sample::select(vec![0, 1000, 2_097_152, 4_294_967_294, 4_294_967_295, -3]);
    let seconds = prop::sample::select(vec![0, 1_700_000_000, -1, 8_589_934_592, -9_000_000_000]);
    let nanoseconds = prop::sample::select(vec![0, 0, 1, 999_999_999]);
    let xattr_name = prop::sample::select(vec![
        "user.a",
        "user.b",
        "security.capability",
        "trusted.overlay.opaque",
    ]);
    let xattrs = prop::collection::btree_map(
        xattr_name.prop_map(|name| name.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..40),
        0..3,
    );
    (
        (style, kind, path(), path(), content),
        (
            0u16..0o10_000,
            prop::bool::weighted(0.02),
            id,
            seconds,
            nanoseconds,
            xattrs,
        ),
    )
        .prop_map(|((style, kind, name, link, content), attributes)| {
            let (mode, odd_owner, id, seconds, nanoseconds, xattrs) = attributes;
            Spec {
                style,
                kind,
                name: name.into_bytes(),
                link: if matches!(kind, b'1' | b'2') {
                    link.into_bytes()
                } else {
                    vec![]
                },
                content: if kind == b'0' { content } else { vec![] },
                mode,
                uid: if odd_owner {
                    id
                } else {
                    id.clamp(0, 2_097_152)
                },
                gid: 7,
                seconds,
                nanoseconds,
                device: if matches!(kind, b'3' | b'4') {
                    (1, 5)
                } else {
                    (0, 0)
                },
                xattrs: xattrs.into_iter().collect(),
            }
        })
}

#[test]
fn what_takes_too_much_is_not_lazy() {
    use super::budget::Allowance;
    let mut attributes = Spec::file("a", "");
    attributes.xattrs = vec![(b"user.k".to_vec(), vec![b'v'; 50])];
    let loose = Spec {
        content: vec![1; 600],
        ..Spec::new(b'0', ".wh.a")
    };
    let after = |bytes: &[u8]| [&tar(&[])[..], bytes].concat();
    let (entries, tree_bytes) = ("entries", "tree bytes");
    // What may be had of each, and what is then exceeded.
    let cases = [
        (
            tar(&[Spec::file("a", ""), Spec::file("a", "")]),
            [2, 2, 0],
            None,
        ),
        (
            tar(&[Spec::file("a", ""), Spec::file("a", "")]),
            [1, 2, 0],
            Some(entries),
        ),
        (tar(&[Spec::file("a/b/c", "")]), [3, 3, 0], None),
        (tar(&[Spec::file("a/b/c", "")]), [2, 3, 0], Some(entries)),
        (tar(&[dir("abc")]), [1, 6, 0], None),
        (tar(&[dir("abc")]), [1, 5, 0], Some(tree_bytes)),
        (tar(&[Spec::link(b'2', "a", "bcde")]), [1, 5, 0], None),
        (
            tar(&[Spec::link(b'2', "a", "bcde")]),
            [1, 4, 0],
            Some(tree_bytes),
        ),
        (tar(&[attributes.clone()]), [1, 57, 0], None),
        (tar(&[attributes]), [1, 56, 0], Some(tree_bytes)),
        (tar(std::slice::from_ref(&loose)), [1, 1, 600], None),
        (
            tar(&[loose]),
            [1, 1, 599],
            Some("bytes that belong to no file"),
        ),
        (after(&[7; 5000]), [0, 0, 5000], None),
        (
            after(&[7; 5000]),
            [0, 0, 4999],
            Some("bytes that belong to no file"),
        ),
        (after(&[0; 5000]), [0, 0, 0], None),
    ];
    for (at, (tar, [entries_max, bytes_max, loose_max], exceeded)) in cases.iter().enumerate() {
        for piece in [1, 511, 100_000] {
            let mut scanner = Scanner::new();
            scanner.apply.budget.entries = Allowance::new(entries, *entries_max);
            scanner.apply.budget.tree_bytes = Allowance::new(tree_bytes, *bytes_max);
            scanner.apply.budget.loose_bytes =
                Allowance::new("bytes that belong to no file", *loose_max);
            let pushed = tar
                .chunks(piece)
                .try_for_each(|bytes| scanner.push(bytes, &mut ()));
            let what = match pushed.and_then(|()| scanner.finish()) {
                Ok(_) => None,
                Err(ScanError::NotLazy(NotLazy::Limit { what, .. })) => Some(what),
                Err(other) => panic!("case {at}: {other}"),
            };
            assert_eq!(what, *exceeded, "case {at} in pieces of {piece}");
        }
    }
}

#[test]
fn the_work_for_symlinks_is_bounded_over_the_whole_tar() {
    // Each path below `s` visits some thousand components, as one path may.
    let mut specs = vec![
        Spec::link(b'2', "s", &"t/".repeat(200)),
        Spec::link(b'2', "t", "."),
    ];
    specs.extend((0..3).map(|at| Spec::file(&format!("s/f{at}"), "")));
    let tar = tar(&specs);
    for (steps, refused) in [(1 << 20, false), (100, true)] {
        let mut scanner = Scanner::new();
        scanner.apply.budget.steps = steps;
        let pushed = scanner.push(&tar, &mut ());
        let links = matches!(
            pushed,
            Err(ScanError::NotLazy(NotLazy::TooManyLinks { .. }))
        );
        assert_eq!(links, refused, "{steps} steps: {pushed:?}");
    }
}

/// Gathers what the sink sees, to compare it with the bytes pushed.
#[derive(Default)]
struct Recorder {
    bytes: Vec<u8>,
    contents: Vec<Vec<u8>>,
}

impl TarSink for Recorder {
    fn structure(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }
    fn content_start(&mut self, run: Extent<DeviceSpace>) {
        assert_eq!(run.start(), self.bytes.len() as u64);
        assert!(!run.is_empty() && run.start().is_multiple_of(512));
        self.contents.push(vec![]);
    }
    fn content(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.contents.last_mut().unwrap().extend(bytes);
    }
    fn content_end(&mut self) {}
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    /// Model: a flat map built from the entries themselves.
    #[test]
    fn scan_equals_the_naive_model(specs in prop::collection::vec(spec(), 0..12)) {
        let tar = tar(&specs);
        match (scan(&tar), view(&specs)) {
            (Ok(scanned), Some(expected)) => prop_assert_eq!(scanned, expected),
            (Err(ScanError::NotLazy(_)), None) => {}
            (scanned, expected) => prop_assert!(false, "scan: {:?}\nmodel: {:?}", scanned, expected),
        }
    }

    /// However the tar is cut, the outcome and what the sink sees are the same.
    #[test]
    fn pieces_do_not_matter(
        specs in prop::collection::vec(spec(), 0..6),
        pieces in prop::collection::vec(1usize..2000, 1..8),
    ) {
        let tar = tar(&specs);
        let mut scanner = Scanner::new();
        let mut recorder = Recorder::default();
        let mut rest = &tar[..];
        let mut result = Ok(());
        for piece in pieces.iter().cycle() {
            let (now, later) = rest.split_at((*piece).min(rest.len()));
            result = scanner.push(now, &mut recorder);
            rest = later;
            if result.is_err() || rest.is_empty() {
                break;
            }
        }
        let scanned = result.and_then(|()| scanner.finish());
        let expected: Vec<&Vec<u8>> = specs.iter().map(|spec| &spec.content).collect();
        prop_assert!(recorder.contents.iter().all(|content| expected.contains(&content) || scanned.is_err()));
        prop_assert!(tar.starts_with(&recorder.bytes));
        if scanned.is_ok() {
            prop_assert_eq!(recorder.bytes.len(), tar.len());
        }
        prop_assert_eq!(scanned.map(|tree| view_of_tree(&tree, &tar)), scan(&tar));
    }
}
