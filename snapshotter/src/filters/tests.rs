// SPDX-License-Identifier: Apache-2.0
use std::time::SystemTime;

use proptest::prelude::*;

use super::*;
use crate::snapshots::{SnapshotId, SnapshotKind, Usage};

fn record(
    name: &str,
    kind: SnapshotKind,
    parent: Option<&str>,
    labels: &[(&str, &str)],
) -> SnapshotRecord {
    SnapshotRecord {
        id: SnapshotId(1),
        name: name.into(),
        kind,
        parent: parent.map(Into::into),
        labels: labels
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect(),
        created: SystemTime::UNIX_EPOCH,
        updated: SystemTime::UNIX_EPOCH,
        usage: Usage::default(),
        layer: None,
    }
}

/// Snapshots a to h, each with something that a filter can tell.
fn corpus() -> Vec<SnapshotRecord> {
    use SnapshotKind::{Active, Committed, View};
    vec![
        record("a", Committed, None, &[("foo", "true")]),
        record("b", Active, Some("a"), &[]),
        record(
            "c",
            View,
            Some("a"),
            &[("foo", "present"), ("two words", "present")],
        ),
        record("d", Committed, Some("a"), &[("with \\ and \"", "1")]),
        record("e", Committed, Some("d"), &[("with \\ and \".post", "1")]),
        record(
            "f",
            Active,
            Some("ns/1/ä, b"),
            &[("foo", "omg_asdf.asdf-qwer")],
        ),
        record(
            "g",
            Committed,
            None,
            &[("containerd.io/snapshot.ref", "sha256:0011")],
        ),
        record(
            "h/2/x",
            Committed,
            Some("a"),
            &[("containerd.io/snapshot.ref", "sha256:0011")],
        ),
    ]
}

fn select(filters: &[&str]) -> String {
    let filters = Filters::parse(filters).unwrap();
    let names = corpus().into_iter().filter(|record| filters.accept(record));
    names
        .map(|record| record.name.chars().next().unwrap())
        .collect()
}

#[test]
fn selectors_select() {
    for (filter, expected) in [
        // Presence.
        ("", "abcdefgh"),
        ("name", "abcdefgh"),
        ("kind", "abcdefgh"),
        ("parent", "abcdefgh"),
        ("labels", ""),
        ("labels.foo", "acf"),
        ("other", ""),
        ("name.anything", "abcdefgh"),
        // Equality.
        ("kind==committed", "adegh"),
        ("kind==active", "bf"),
        ("kind==view", "c"),
        ("kind==Committed", ""),
        ("name==a", "a"),
        ("name==h/2/x", "h"),
        ("name==\"h/2/x\"", "h"),
        ("parent==\"\"", "ag"),
        ("parent==a", "bcdh"),
        ("labels.foo==true", "a"),
        ("labels.foo==\"\"", ""),
        ("labels.foo==omg_asdf.asdf-qwer", "f"),
        ("other==\"\"", ""),
        // Inequality: a missing field is the empty string.
        ("name!=a", "bcdefgh"),
        ("labels.foo!=true", "bcdefgh"),
        ("labels.foo!=\"\"", "acf"),
        ("other!=x", "abcdefgh"),
        ("other!=\"\"", ""),
        // Regular expressions, unanchored.
        ("name~=[ab]", "ab"),
        ("name~=^h/", "h"),
        ("name~=/h\\/[0-9]/", "h"),
        ("name~=|h/[0-9]{1,2}|", "h"),
        ("name~=\"h/[0-9]{1,2}\"", "h"),
        ("labels.foo~=^$", "bdegh"),
        ("name~=(", ""),
        ("name~=/[ab]{0,1}\"\\//", ""),
        ("labels.foo~=asdf\\.asdf", "f"),
        // Conjunction.
        ("labels.foo,name", "acf"),
        ("name==c,labels.foo==present", "c"),
        ("name==c,labels.foo==wrong", ""),
        ("kind==committed,parent==a,labels.foo", ""),
        // Quoting of fields.
        ("labels.\"two words\"", "c"),
        ("name==c,labels.\"two words\"==present", "c"),
        ("\"labels\".foo==true", "a"),
        ("labels.\"with \\\\ and \\\"\"==1", "d"),
        ("labels.\"with \\\\ and \\\"\".post==1", "e"),
        ("labels.containerd.\"io/snapshot\".ref", "gh"),
        // Quoting of values: escapes of Go strings.
        ("name==\"\\x61\"", "a"),
        ("name==\"\\141\"", "a"),
        ("name==\"\\u0061\"", "a"),
        ("name==\"\\U00000061\"", "a"),
        ("name==\"\\a\\b\\f\\n\\r\\t\\v\"", ""),
        ("name==\"\\xff\"", ""),
        ("name==\"\\ud800\"", ""),
        ("parent==\"ns/1/ä, b\"", "f"),
        ("parent==\"ns/1/\\u00e4, b\"", "f"),
        ("parent==\"ns/1/\\xc3\\xa4, b\"", "f"),
        // Spaces before fields, operators and values.
        (" name==a", "a"),
        ("name ==a", "a"),
        ("name== a", "a"),
        ("name==a, kind==committed", "a"),
        ("labels. foo", "acf"),
        // A value may hold what an operator or a path is made of.
        ("labels.foo==omg=asdf", ""),
        ("labels.foo!=a=b!~\"c", "abcdefgh"),
        // What containerd asks for after AlreadyExists.
        (
            "labels.\"containerd.io/snapshot.ref\"==sha256:0011,parent==\"\"",
            "g",
        ),
        (
            "labels.\"containerd.io/snapshot.ref\"==sha256:0011,parent==\"a\"",
            "h",
        ),
        (
            "labels.\"containerd.io/snapshot.ref\"==sha256:0012,parent==\"a\"",
            "",
        ),
    ] {
        assert_eq!(select(&[filter]), expected, "{filter}");
    }
}

#[test]
fn filters_are_alternatives() {
    assert_eq!(select(&[]), "abcdefgh");
    assert_eq!(select(&["name==a", "kind==view"]), "ac");
    assert_eq!(select(&["name==a,kind==view", "name==b"]), "b");
    assert_eq!(select(&["name==z", ""]), "abcdefgh");
}

#[test]
fn errors_name_the_place() {
    for (filter, offset) in [
        (",", 0),
        (" ", 1),
        ("name==a,", 8),
        ("name==a,,name", 8),
        ("labels.", 7),
        ("labels..a", 7),
        ("labels.|foo|==a", 7),
        ("labels.?\"a\"==b", 7),
        ("labels.ns/key==value", 9),
        ("name=a", 5),
        ("name=", 5),
        ("name===a", 7),
        ("name=!a", 6),
        ("name==", 6),
        ("name==,kind", 6),
        ("image~=,id", 7),
        ("name==/value", 6),
        ("name==|a|", 6),
        ("name==.a", 6),
        ("name==~a", 7),
        ("name~=/value", 12),
        ("name==\"a", 8),
        ("name==\"a\nb\"", 9),
        ("name==\"a\"b", 9),
        ("name==a b", 7),
        ("name==a ,kind", 7),
        ("name==\"\\q\"", 9),
        ("name==\"\\x6\"", 11),
        ("name==\"\\400\"", 11),
        ("name==\"\\18\"", 10),
        ("name==\"\\U00110000\"", 17),
        ("name==\"\\/\"", 9),
        ("name==\u{1}", 6),
        ("näme==a", 1),
    ] {
        let error = Filters::parse(&["name", filter]).unwrap_err();
        assert_eq!(
            (error.filter.as_str(), error.offset),
            (filter, offset),
            "{error}"
        );
    }
}

proptest! {
    #[test]
    fn no_input_panics(text in ".*") {
        let _ = Filters::parse(&[text]);
    }

    #[test]
    fn a_quoted_value_is_found(name in ".*") {
        let wanted = record(&name, SnapshotKind::Active, None, &[]);
        let other = record(&format!("{name}x"), SnapshotKind::Active, None, &[]);
        // Rust's escapes for a string, but for \u{…} and \', are Go's.
        let quoted: String = name.chars().map(|c| match c {
            '"' | '\\' => format!("\\{c}"),
            c if u32::from(c) < 32 => format!("\\x{:02x}", u32::from(c)),
            c => c.to_string(),
        }).collect();
        let filters = Filters::parse(&[format!("name==\"{quoted}\"")]).unwrap();
        prop_assert!(filters.accept(&wanted));
        prop_assert!(!filters.accept(&other));
    }
}
