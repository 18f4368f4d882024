// SPDX-License-Identifier: Apache-2.0
use sluice_fetcher::cluster::home::SharedZones;
use sluice_fetcher::cluster::node::{NodeId, Role};
use sluice_fetcher::cluster::seed::Seed;

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
    // Tables of hosts, empty by default, are not in the first example.
    for section in ["registry", "notifications"] {
        let section = defaults[section].as_table_mut().unwrap();
        section.remove("hosts");
    }
    assert_eq!(documented, defaults);
    assert_eq!(parse(example(0)).unwrap(), parse("").unwrap());
    let mut sections: Vec<(String, &toml::Table)> = defaults
        .iter()
        .map(|(section, keys)| (section.clone(), keys.as_table().unwrap()))
        .collect();
    while let Some((section, keys)) = sections.pop() {
        let text = DOCUMENT.split_once(&format!("## `[{section}]`")).unwrap().1;
        let text = text.split("\n## ").next().unwrap();
        for (key, value) in keys {
            match value.as_table() {
                Some(keys) => sections.push((format!("{section}.{key}"), keys)),
                None => assert!(text.contains(&format!("| `{key}` |")), "{section}.{key}"),
            }
        }
    }
}

#[test]
fn the_second_example_has_every_key_of_a_host() {
    let config = parse(example(1)).unwrap();
    assert_eq!(
        config.registry.hosts["registry.example:5000"],
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
         [store]\nbudget = \"2GiB\"\nreserve = \"3GiB\"\n[telemetry]\naddress = \"\"\n[log]\nformat = \"json\"\n\
         level = \"debug,redb=warn\"\n[mount]\nbackend = \"fuse\"\n",
    )
    .unwrap();
    assert_eq!((config.root, config.run_dir), ("/r".into(), "/s".into()));
    assert_eq!(
        (config.read_deadline, config.store_budget_bytes),
        (None, Some(2 << 30))
    );
    assert_eq!(config.store_reserve_bytes, 3 << 30);
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
        ("[prepare]\nwhole_below = \"few\"", &["prepare.whole_below"]),
        (
            "[fetch]\nread_deadline = \"soon\"",
            &["fetch.read_deadline", "soon"],
        ),
        (
            "[fetch]\nrpc_deadline = \"0s\"",
            &["fetch.rpc_deadline", "zero"],
        ),
        ("[store]\nbudget = \"lots\"", &["store.budget", "lots"]),
        ("[store]\nreserve = \"some\"", &["store.reserve", "some"]),
        (
            "[registry]\ndocker_config = \"x\"",
            &["registry.docker_config"],
        ),
        (
            "[registry]\ncredential_files = [\"/a\", \"b\"]",
            &["registry.credential_files", "absolute"],
        ),
        (
            "[registry]\ncredential_provider_config = \"/etc/plugins.yaml\"",
            &["registry.credential_provider_bin_dir", "both"],
        ),
        (
            "[registry]\ncredential_provider_bin_dir = \"/opt/bin\"",
            &["registry.credential_provider_config", "both"],
        ),
        (
            "[registry]\ncredential_provider_config = \"/a\"\ncredential_provider_bin_dir = \"bin\"",
            &["registry.credential_provider_bin_dir", "absolute"],
        ),
        (
            "[registry]\nhosts_dirs = [\"certs.d\"]",
            &["registry.hosts_dirs"],
        ),
        (
            "[registry]\nengine = \"x\"",
            &["registry.engine", "dragonfly"],
        ),
        (
            "[registry.dragonfly]\nendpoint = \"http://d.example:4001\"",
            &["registry.dragonfly.endpoint", "loopback"],
        ),
        (
            "[registry.dragonfly]\nendpoint = \"http://u:p@127.0.0.1\"",
            &["registry.dragonfly.endpoint"],
        ),
        (
            "[registry.dragonfly]\nendpoint = \"http://127.0.0.1/v2\"",
            &["registry.dragonfly.endpoint"],
        ),
        (
            "[registry.dragonfly]\ntag = \"a\\nb\"",
            &["registry.dragonfly.tag"],
        ),
        (
            "[registry.dragonfly]\ntimeout = \"0s\"",
            &["registry.dragonfly.timeout"],
        ),
        ("[registry.hosts.\"a/b\"]", &["registry.hosts", "a/b"]),
        (
            "[registry.hosts.h]\nca_files = [\"x\"]",
            &["ca_files", "absolute"],
        ),
        ("[trust]\nlazy = [\"\"]", &["trust.lazy"]),
        ("[index]\nnode = \"yes\"", &["index.node", "verify"]),
        ("[index]\ntoc = \"verify\"", &["index.toc", "off"]),
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
            &["mount.backend", "nfs", "fuse", "erofs"],
        ),
        (
            "[snapshots]\nmount_options = [\"upperdir=/x\"]",
            &["snapshots.mount_options"],
        ),
        (
            "[snapshots]\nmount_options = [\"a,b\"]",
            &["snapshots.mount_options"],
        ),
        ("[cluster]\nname = \"a b\"", &["cluster.name", "letters"]),
        ("[cluster]\nzone = \"\"", &["cluster.zone", "letters"]),
        ("[cluster]\nrack = \"a/b\"", &["cluster.rack", "a/b"]),
        (
            "[cluster]\nrole = \"boss\"",
            &["cluster.role", "boss", "leech"],
        ),
        ("[cluster]\nlisten = \":9641\"", &["cluster.listen"]),
        ("[cluster]\nlisten = \"0.0.0.0:0\"", &["cluster.listen"]),
        ("[cluster]\nlisten = \"host:1\"", &["cluster.listen"]),
        (
            "[cluster]\nadvertise = \"0.0.0.0:1\"",
            &["cluster.advertise", "reach"],
        ),
        (
            "[cluster]\nadvertise = \"10.0.0.1\"",
            &["cluster.advertise", "port"],
        ),
        (
            "[cluster]\nseeds = [\"a:1\", \"a:b\"]",
            &["cluster.seeds", "a:b", "host:port"],
        ),
        (
            "[cluster]\nseed_file = \"x\"",
            &["cluster.seed_file", "absolute"],
        ),
        (
            "[cluster]\nallow = [\"10.0.0.0/33\"]",
            &["cluster.allow", "10.0.0.0/33"],
        ),
        ("[cluster]\nupload = \"1Gbit\"", &["cluster.upload", "size"]),
        ("[cluster]\ndownload = \"x\"", &["cluster.download"]),
        ("[cluster]\norigin = \"x\"", &["cluster.origin"]),
        ("[cluster]\norigin_requests = -1", &["origin_requests"]),
        (
            "[cluster]\nzone = \"a\"\nshared_zones = [\"b\"]",
            &["cluster.shared_zones", "\"a\""],
        ),
        (
            "[cluster]\nshared_zones = [\"default\", \"*\"]",
            &["cluster.shared_zones", "letters"],
        ),
        (
            "[cluster]\nupload_slots = 0",
            &["cluster.upload_slots", "leech"],
        ),
        ("[cluster]\nupload_slots = 70000", &["upload_slots"]),
        (
            "[cluster.tls]\ncert = \"/c\"\nkey = \"/k\"",
            &["cluster.tls.ca", "all of"],
        ),
        (
            "[cluster.tls]\ncert = \"c\"\nkey = \"/k\"\nca = \"/a\"",
            &["cluster.tls.cert", "absolute"],
        ),
        ("[cluster]\nenable = true", &["enable", "line 2"]),
        ("[mirror]\nlisten = \"5000\"", &["mirror.listen", "5000"]),
        (
            "[mirror]\nlisten = \"127.0.0.1:0\"",
            &["mirror.listen", "port"],
        ),
        (
            "[mirror]\nlisten = \"0.0.0.0:5000\"",
            &["mirror.listen", "loopback", "mirror.open"],
        ),
        ("[mirror]\nupstream = \"a/b\"", &["mirror.upstream", "a/b"]),
        ("[mirror]\nregistries = [\"\"]", &["mirror.registries"]),
        ("[mirror]\nbudget = \"0\"", &["mirror.budget", "zero"]),
        ("[mirror]\nfresh = \"soon\"", &["mirror.fresh", "soon"]),
        ("[mirror]\naccess = \"1\"", &["mirror.access"]),
        ("[mirror]\nstale = \"1d\"", &["mirror.stale"]),
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

#[test]
fn a_cluster_means_what_it_says() {
    assert_eq!(parse("").unwrap().cluster, None);
    let without = "[cluster]\nname = \"a\"\nseeds = [\"b\"]\n";
    assert_eq!(parse(without).unwrap().cluster, None);

    let least = parse("[cluster]\nenabled = true\nname = \"a\"").unwrap();
    let least = least.cluster.unwrap();
    assert_eq!(
        least,
        ClusterConfig {
            name: NodeId::parse("a").unwrap(),
            zone: "default".into(),
            rack: String::new(),
            role: Role::Node,
            listen: "0.0.0.0:9641".parse().unwrap(),
            advertise: None,
            seeds: vec![],
            seed_file: None,
            gossip: true,
            allow: vec![],
            upload_bytes_per_second: None,
            download_bytes_per_second: None,
            origin_bytes_per_second: None,
            origin_requests: None,
            shared_zones: SharedZones::None,
            upload_slots: 16,
            tls: None,
        }
    );

    let full = parse(
        "[cluster]\nenabled = true\nname = \"n.1\"\nzone = \"eu-1\"\nrack = \"r7\"\n\
         role = \"supernode\"\nlisten = \"[::]:99\"\nadvertise = \"10.1.2.3:98\"\n\
         seeds = [\"peers.example:1\", \"10.0.0.1\"]\nseed_file = \"/etc/seeds\"\n\
         gossip = false\nallow = [\"10.0.0.0/8\", \"fd00::1\"]\nupload = \"100MB\"\n\
         download = \"1GiB\"\norigin = \"5MB\"\norigin_requests = 8\nshared_zones = [\"b\", \"eu-1\"]\nupload_slots = 3\n\
         [cluster.tls]\ncert = \"/c\"\nkey = \"/k\"\nca = \"/a\"\n",
    )
    .unwrap();
    let seeds = ["peers.example:1", "10.0.0.1:9641"];
    assert_eq!(
        full.cluster.unwrap(),
        ClusterConfig {
            name: NodeId::parse("n.1").unwrap(),
            zone: "eu-1".into(),
            rack: "r7".into(),
            role: Role::Supernode,
            listen: "[::]:99".parse().unwrap(),
            advertise: Some("10.1.2.3:98".parse().unwrap()),
            seeds: seeds.map(|seed| Seed::parse(seed).unwrap()).into(),
            seed_file: Some("/etc/seeds".into()),
            gossip: false,
            allow: vec![
                "10.0.0.0/8".parse().unwrap(),
                "fd00::1/128".parse().unwrap()
            ],
            upload_bytes_per_second: Some(100_000_000),
            download_bytes_per_second: Some(1 << 30),
            origin_bytes_per_second: Some(5_000_000),
            origin_requests: Some(8),
            shared_zones: SharedZones::Named(["b", "eu-1"].map(str::to_owned).into()),
            upload_slots: 3,
            tls: Some(ClusterTlsConfig {
                cert: "/c".into(),
                key: "/k".into(),
                ca: "/a".into()
            }),
        }
    );
}

#[test]
fn a_mirror_means_what_it_says() {
    assert_eq!(parse("").unwrap().mirror, None);
    let least = parse("[mirror]\nlisten = \"127.0.0.1:9642\"").unwrap();
    assert_eq!(
        least.mirror.unwrap(),
        MirrorConfig {
            listen: "127.0.0.1:9642".parse().unwrap(),
            upstream: None,
            registries: vec!["*".into()],
            budget_bytes: 10 << 30,
            fresh: Duration::from_secs(30),
            access: Duration::from_secs(300),
            stale: Duration::from_secs(86_400),
        }
    );
    let full = parse(
        "[mirror]\nlisten = \"10.0.0.1:5000\"\nopen = true\nupstream = \"docker.io\"\n\
         registries = [\"docker.io\", \"a.example/team/*\"]\nbudget = \"1MB\"\n\
         fresh = \"0s\"\naccess = \"1m\"\nstale = \"2h\"\n",
    );
    assert_eq!(
        full.unwrap().mirror.unwrap(),
        MirrorConfig {
            listen: "10.0.0.1:5000".parse().unwrap(),
            upstream: Some("docker.io".into()),
            registries: vec!["docker.io".into(), "a.example/team/*".into()],
            budget_bytes: 1_000_000,
            fresh: Duration::ZERO,
            access: Duration::from_secs(60),
            stale: Duration::from_secs(7_200),
        }
    );
}
