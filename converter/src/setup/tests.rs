// SPDX-License-Identifier: Apache-2.0
use super::*;

/// `containerd config default` of containerd 1.6.20, shortened to what matters and its neighbours.
const CONTAINERD_1_6: &str = include_str!("testdata/containerd-1.6.toml");

fn wanted(cri: bool) -> Wanted {
    Wanted {
        address: "/run/sluice/snapshots.sock".into(),
        root: "/var/lib/sluice".into(),
        cri,
        containerd_major: None,
    }
}

/// Name and text of each sample.
const SAMPLES: &[(&str, &str)] = &[
    ("empty", ""),
    ("default 1.6", CONTAINERD_1_6),
    ("only version", "version = 2\n"),
    (
        "version 1",
        "# old\n[plugins.cri]\n  [plugins.cri.containerd]\n    snapshotter = \"native\" # mine\n",
    ),
    (
        "docker's package",
        "#   Licensed text\n\ndisabled_plugins = [\"cri\"]\n\n#root = \"/var/lib/containerd\"\n\n#[debug]\n#  level = \"info\"\n",
    ),
    (
        "another proxy plugin",
        "version = 2\n[proxy_plugins.soci]\n  type = \"snapshot\"\n  address = \"/run/soci.sock\"\n\n# tail comment\n",
    ),
    (
        "version 3",
        "version = 3\n\n[plugins]\n  [plugins.'io.containerd.cri.v1.images']\n    snapshotter = 'overlayfs'\n    disable_snapshot_annotations = true\n\n  [plugins.'io.containerd.transfer.v1.local']\n    max_concurrent_downloads = 3\n    unpack_config = []\n\n[proxy_plugins]\n",
    ),
    (
        "version 3 with unpack_config",
        "version = 3\n[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nplatform = \"linux/amd64\"\nsnapshotter = \"overlayfs\"\n",
    ),
    (
        "version 4",
        "version = 4\nroot = '/var/lib/containerd'\n\n[plugins]\n  [plugins.'io.containerd.cri.v1.images']\n    snapshotter = 'overlayfs'\n    disable_snapshot_annotations = true\n\n  [plugins.'io.containerd.transfer.v1.local']\n    max_concurrent_downloads = 3\n    max_concurrent_unpacks = 1\n\n[proxy_plugins]\n",
    ),
    (
        "k3s-like child tables only",
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n",
    ),
];

#[test]
fn apply_is_idempotent_and_undo_restores_every_byte() {
    for (name, text) in SAMPLES {
        for cri in [false, true] {
            let once = apply(text, &wanted(cri)).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_ne!(&once, text, "{name}");
            assert!(is_edited(&once) && !is_edited(text), "{name}");
            let root = exported_root(&once).expect(name);
            assert_eq!(root.as_deref(), Some("/var/lib/sluice"), "{name}");
            let twice = apply(&once, &wanted(cri)).expect(name);
            assert_eq!(once, twice, "{name} cri={cri}");
            let back = undo(&once).expect(name);
            assert_eq!(&back, text, "{name} cri={cri}\n--- applied:\n{once}");
        }
    }
}

#[test]
fn apply_says_what_is_wanted_and_keeps_the_rest() {
    for (name, text) in SAMPLES {
        let after: DocumentMut = apply(text, &wanted(true)).expect(name).parse().expect(name);
        let plugin = &after["proxy_plugins"]["sluice"];
        assert_eq!(plugin["type"].as_str(), Some("snapshot"), "{name}");
        assert_eq!(
            plugin["address"].as_str(),
            Some("/run/sluice/snapshots.sock"),
            "{name}"
        );
        assert_eq!(
            plugin["exports"]["root"].as_str(),
            Some("/var/lib/sluice"),
            "{name}"
        );
        let cri = match config_version(&after).expect(name) {
            1 => &after["plugins"]["cri"]["containerd"],
            2 => &after["plugins"]["io.containerd.grpc.v1.cri"]["containerd"],
            _ => &after["plugins"]["io.containerd.cri.v1.images"],
        };
        assert_eq!(cri["snapshotter"].as_str(), Some("sluice"), "{name}");
        assert_eq!(
            cri["disable_snapshot_annotations"].as_bool(),
            Some(false),
            "{name}"
        );
        for line in text
            .lines()
            .filter(|line| line.trim_start().starts_with('#'))
        {
            assert!(after.to_string().contains(line), "{name}: lost {line}");
        }
    }
}

#[test]
fn containerd_2_reads_the_snapshotter_of_version_2_where_there_are_no_runtimes() {
    let on_2 = Wanted {
        containerd_major: Some(2),
        ..wanted(true)
    };
    for (name, text) in SAMPLES {
        let after = apply(text, &on_2).expect(name);
        let doc: DocumentMut = after.parse().expect(name);
        if config_version(&doc).expect(name) >= 2 {
            let images = &doc["plugins"]["io.containerd.cri.v1.images"];
            assert_eq!(images["snapshotter"].as_str(), Some("sluice"), "{name}");
            let off = images["disable_snapshot_annotations"].as_bool();
            assert_eq!(off, Some(false), "{name}");
        }
        assert_eq!(apply(&after, &on_2).expect(name), after, "{name}");
        assert_eq!(&undo(&after).expect(name), text, "{name}");
    }
}

#[test]
fn the_transfer_service_of_containerd_2_unpacks_for_both() {
    for (name, text) in SAMPLES
        .iter()
        .filter(|(name, _)| name.starts_with("version 3") || name.starts_with("version 4"))
    {
        let after: DocumentMut = apply(text, &wanted(true)).expect(name).parse().expect(name);
        let list = &after["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"];
        let names: Vec<&str> = match list {
            Item::ArrayOfTables(tables) => tables
                .iter()
                .filter_map(|table| table["snapshotter"].as_str())
                .collect(),
            Item::Value(Value::Array(array)) => array
                .iter()
                .filter_map(|entry| entry.as_inline_table()?.get("snapshotter")?.as_str())
                .collect(),
            _ => Vec::new(),
        };
        assert_eq!(names, ["overlayfs", "sluice"], "{name}");
    }
}

#[test]
fn a_new_address_is_taken_and_undo_still_restores() {
    let first = apply("version = 2\n", &wanted(false)).expect("first");
    let moved = Wanted {
        address: "/run/other.sock".into(),
        ..wanted(false)
    };
    let second = apply(&first, &moved).expect("second");
    assert!(second.contains("/run/other.sock") && !second.contains("snapshots.sock"));
    assert_eq!(undo(&second).expect("undo"), "version = 2\n");
}

#[test]
fn undo_keeps_what_somebody_added_to_our_table() {
    let text = apply("version = 2\n", &wanted(false)).expect("apply");
    let text = text.replace(
        "type = \"snapshot\"",
        "type = \"snapshot\"\nplatform = \"linux/arm64\"",
    );
    let back = undo(&text).expect("undo");
    assert!(back.contains("platform = \"linux/arm64\""), "{back}");
    assert!(!back.contains("snapshots.sock"), "{back}");
}

#[test]
fn a_plugin_written_by_hand_is_updated_and_comes_back() {
    let text = "[proxy_plugins.sluice]\ntype = \"snapshot\"\naddress = \"/tmp/mine.sock\" # mine\n";
    let after = apply(text, &wanted(false)).expect("apply");
    assert!(
        after.contains("address = \"/run/sluice/snapshots.sock\""),
        "{after}"
    );
    assert_eq!(undo(&after).expect("undo"), text);
    assert_eq!(undo(text).expect("undo"), text);
}

#[test]
fn what_cannot_be_edited_is_refused_by_name() {
    let cases = [
        (
            "version = 9\n",
            "config version 9 is unknown (1 to 4 are known)",
        ),
        (
            "proxy_plugins = 3\n",
            "config key proxy_plugins is not a table: write it as [proxy_plugins]",
        ),
    ];
    for (text, message) in cases {
        let error = apply(text, &wanted(false)).expect_err(text);
        assert_eq!(error.to_string(), message);
    }
    assert!(matches!(
        apply("a = [", &wanted(false)),
        Err(SetupError::Parse(_))
    ));
}
