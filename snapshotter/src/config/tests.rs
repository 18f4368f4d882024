// SPDX-License-Identifier: Apache-2.0
use super::*;

const DOCUMENT: &str = include_str!("../../../docs/configuration.md");

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(
        text,
        Path::new("/etc/sluice/config.toml"),
        Overrides::default(),
    )
}

fn example(index: usize) -> &'static str {
    let block = DOCUMENT.split("```toml\n").nth(index + 1).unwrap();
    block.split("```").next().unwrap()
}

#[test]
fn the_documented_defaults_are_the_defaults_of_every_key() {
    let documented: toml::Table = example(0).parse().unwrap();
    let mut defaults = toml::Table::try_from(Written::default()).unwrap();
    // A table of hosts, empty by default, is shown in the second example.
    defaults["registry"].as_table_mut().unwrap().remove("hosts");
    assert_eq!(documented, defaults);
    assert_eq!(parse(example(0)).unwrap(), parse("").unwrap());
    for (section, keys) in &defaults {
        assert!(DOCUMENT.contains(&format!("## `[{section}]`")), "{section}");
        for key in keys.as_table().unwrap().keys() {
            assert!(
                DOCUMENT.contains(&format!("| `{key}` |")),
                "{section}.{key}"
            );
        }
    }
}

#[test]
fn the_second_example_has_every_key_of_a_host() {
    let config = parse(example(1)).unwrap();
    assert_eq!(
        config.registry_hosts["registry.example:5000"],
        RegistryHost {
            plain_http: Some(false),
            insecure_skip_verify: false,
            ca_files: vec!["/etc/sluice/registry-ca.pem".into()],
        }
    );
}

#[test]
fn values_mean_what_they_say() {
    let config = parse(
        "[paths]\nroot = \"/r\"\nrun = \"/s\"\n[fetch]\nread_deadline = \"0\"\n\
         [store]\nbudget = \"2GiB\"\n[telemetry]\naddress = \"\"\n[log]\nformat = \"json\"\n\
         level = \"debug,redb=warn\"\n[mount]\nbackend = \"fuse\"\n",
    )
    .unwrap();
    assert_eq!((config.root, config.run_dir), ("/r".into(), "/s".into()));
    assert_eq!(
        (config.read_deadline, config.store_budget_bytes),
        (None, Some(2 << 30))
    );
    assert_eq!(
        (config.telemetry, config.log_format),
        (None, LogFormat::Json)
    );
    assert_eq!(config.mount_backend, MountBackend::Fuse);
    let defaults = parse("").unwrap();
    assert_eq!(defaults.read_deadline, Some(Duration::from_secs(300)));
    assert_eq!(defaults.prepare_budget, Duration::from_secs(5));
    assert_eq!(
        defaults.snapshots_socket(),
        Path::new("/run/sluice/snapshots.sock")
    );
}

#[test]
fn the_command_line_wins() {
    let overrides = Overrides {
        root: Some("/a".into()),
        run_dir: Some("/b".into()),
    };
    let config = Config::parse("[paths]\nroot = \"/c\"", Path::new("f"), overrides).unwrap();
    assert_eq!((config.root, config.run_dir), ("/a".into(), "/b".into()));
}

#[test]
fn errors_name_the_file_and_the_key() {
    for (text, parts) in [
        ("[paths]\nrot = \"/r\"", &["rot", "line 2", "root"][..]),
        ("[path]\n", &["path", "line 1"]),
        ("root = \"/r\"", &["root"]),
        ("[paths\n", &["line 1"]),
        ("[paths]\nroot = 1", &["root", "string"]),
        ("[registry.hosts.\"h\"]\nplain = true", &["plain"]),
        (
            "[paths]\nroot = \"relative\"",
            &["paths.root", "relative", "absolute"],
        ),
        ("[paths]\nroot = \"/a/../b\"", &["paths.root", "absolute"]),
        ("[paths]\nroot = \"/a:b\"", &["paths.root", "/a:b", "colon"]),
        ("[paths]\nrun = \"/a,b\"", &["paths.run", "comma"]),
        ("[containerd]\naddress = \"x\"", &["containerd.address"]),
        ("[prepare]\nbudget = \"5\"", &["prepare.budget", "duration"]),
        ("[prepare]\nbudget = \"0\"", &["prepare.budget", "zero"]),
        (
            "[fetch]\nread_deadline = \"soon\"",
            &["fetch.read_deadline", "soon"],
        ),
        (
            "[fetch]\nrpc_deadline = \"0s\"",
            &["fetch.rpc_deadline", "zero"],
        ),
        ("[store]\nbudget = \"lots\"", &["store.budget", "lots"]),
        (
            "[registry]\ndocker_config = \"x\"",
            &["registry.docker_config"],
        ),
        ("[registry.hosts.\"a/b\"]", &["registry.hosts", "a/b"]),
        (
            "[registry.hosts.h]\nca_files = [\"x\"]",
            &["ca_files", "absolute"],
        ),
        ("[trust]\nlazy = [\"\"]", &["trust.lazy"]),
        (
            "[telemetry]\naddress = \"0.0.0.0:1\"",
            &["telemetry.address", "loopback"],
        ),
        (
            "[telemetry]\naddress = \"localhost:1\"",
            &["telemetry.address"],
        ),
        ("[log]\nformat = \"xml\"", &["log.format", "json"]),
        ("[log]\nlevel = \"a=b=c\"", &["log.level"]),
        (
            "[mount]\nbackend = \"nfs\"",
            &["mount.backend", "nfs", "fuse"],
        ),
        (
            "[snapshots]\nmount_options = [\"upperdir=/x\"]",
            &["snapshots.mount_options"],
        ),
        (
            "[snapshots]\nmount_options = [\"a,b\"]",
            &["snapshots.mount_options"],
        ),
    ] {
        let error = parse(text).unwrap_err().to_string();
        for part in parts.iter().chain(&["/etc/sluice/config.toml"]) {
            assert!(
                error.contains(part),
                "{text:?} gives {error:?}, want {part:?}"
            );
        }
    }
}

#[test]
fn a_named_file_must_exist() {
    let missing = Path::new("/nonexistent/sluice.toml");
    let error = Config::load(Some(missing), Overrides::default()).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }));
    assert!(error.to_string().contains("/nonexistent/sluice.toml"));
}

#[test]
fn sockets_fit_into_the_run_directory() {
    let parse_run = |bytes: usize| {
        let run = format!("/{}", "r".repeat(bytes - 1));
        parse(&format!("[paths]\nrun = \"{run}\"\n"))
    };
    let config = parse_run(92).unwrap();
    assert_eq!(config.snapshots_socket().as_os_str().len(), 107);
    let error = parse_run(93).unwrap_err().to_string();
    assert!(
        error.contains("paths.run") && error.contains("92 bytes"),
        "{error}"
    );
}

#[test]
fn files_are_kept_longer_than_a_prepare_takes() {
    for (budget, grace, seconds) in [("5s", "20s", 20), ("5s", "1s", 6), ("60s", "20s", 61)] {
        let text = format!("[prepare]\nbudget = \"{budget}\"\n[store]\ngrace = \"{grace}\"\n");
        let config = parse(&text).unwrap();
        assert_eq!(config.store_grace, Duration::from_secs(seconds), "{text}");
    }
}
