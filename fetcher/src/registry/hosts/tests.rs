// SPDX-License-Identifier: Apache-2.0

use super::*;

fn read(text: &str) -> Result<Hosts, HostsError> {
    parse(text, Path::new("/certs.d/r.example"))
}

fn bases(hosts: &Hosts) -> Vec<&str> {
    hosts
        .mirrors
        .iter()
        .map(|host| host.base.as_str())
        .collect()
}

#[test]
fn hosts_come_in_the_order_of_the_file() {
    let text = r#"
        server = "https://r.example"
        [host."https://z.example"]
        [host."http://127.0.0.1:30020"]
          capabilities = ["pull", "Resolve"]
        [host."https://a.example:8443/proxy/"]
          capabilities = ["pull"]
        [host."m.example/path/v2"]
          capabilities = ["push"]
        [host."https://bare.example/root"]
          override_path = true
        [host."https://root.example"]
          override_path = true
    "#;
    let hosts = read(text).unwrap();
    assert_eq!(
        bases(&hosts),
        [
            "https://z.example/v2",
            "http://127.0.0.1:30020/v2",
            "https://a.example:8443/proxy/v2",
            "https://m.example/path/v2",
            "https://bare.example/root",
            "https://root.example/",
        ]
    );
    let can: Vec<_> = hosts
        .mirrors
        .iter()
        .map(|host| (host.can.pull, host.can.resolve))
        .collect();
    let all = (true, true);
    assert_eq!(can, [all, all, (true, false), (false, false), all, all]);
    assert_eq!(hosts.server.unwrap().base.as_str(), "https://r.example/v2");
    assert_eq!(read("").unwrap(), Hosts::default());
    // Keys of later versions, and of other tools.
    assert_eq!(
        read("novel = 1\n[other]\nx = 2\n").unwrap(),
        Hosts::default()
    );
}

#[test]
fn how_a_host_is_reached() {
    let text = r#"
        ca = "own.pem"
        [host."https://m.example"]
          ca = ["a.pem", "/etc/b.pem"]
          client = [["c.pem", "c.key"], ["/d.pem", ""], "e.pem"]
          skip_verify = true
          dial_timeout = "1.5s"
          proxy = "http://proxy.example:3128"
          [host."https://m.example".header]
            x-one = "first"
            X-Two = ["second", "third"]
    "#;
    let hosts = read(text).unwrap();
    let base = Path::new("/certs.d/r.example");
    assert_eq!(hosts.access.ca, [base.join("own.pem")]);
    assert_eq!(hosts.server, None);
    let access = &hosts.mirrors[0].access;
    assert_eq!(access.ca, [base.join("a.pem"), "/etc/b.pem".into()]);
    assert_eq!(
        access.client,
        [
            (base.join("c.pem"), Some(base.join("c.key"))),
            ("/d.pem".into(), None),
            (base.join("e.pem"), None),
        ]
    );
    assert!(access.skip_verify);
    assert_eq!(access.dial_timeout, Some(Duration::from_millis(1500)));
    assert_eq!(
        access.proxy.as_ref().unwrap().as_str(),
        "http://proxy.example:3128/"
    );
    assert_eq!(access.headers.get("x-one").unwrap(), "first");
    let two: Vec<_> = access.headers.get_all("x-two").iter().collect();
    assert_eq!(two, ["second", "third"]);
    let shown = format!("{access:?}");
    assert!(
        !shown.contains("first") && !shown.contains("third"),
        "{shown}"
    );
    let one = read("[host.\"https://m.example\"]\nca = \"a.pem\"\nclient = \"c.pem\"\n").unwrap();
    let access = &one.mirrors[0].access;
    assert_eq!(access.ca, [base.join("a.pem")]);
    assert_eq!(access.client, [(base.join("c.pem"), None)]);
}

#[test]
fn errors_name_the_key() {
    let host = "[host.\"https://m.example\"]\n";
    let cases = [
        ("server = 1", "server"),
        ("server = \"ftp://r.example\"", "server"),
        ("server = \"https://u:secret@r.example\"", "server"),
        ("server = \"https://r.example?x=1\"", "server"),
        ("host = 1", "host"),
        (
            "[host]\n\"https://m.example\" = 1",
            "host.\"https://m.example\"",
        ),
        ("[host.\"file:///m\"]", "host.\"file:///m\""),
        ("capabilities = [\"fly\"]", "capabilities"),
        ("capabilities = \"pul\"", "capabilities"),
        ("capabilities = [1]", "capabilities"),
        ("ca = 1", "ca"),
        ("client = [[\"a\"]]", "client"),
        ("client = [[\"a\", \"b\", \"c\"]]", "client"),
        ("client = [[\"a\", 1]]", "client"),
        ("client = true", "client"),
        ("skip_verify = \"true\"", "skip_verify"),
        ("override_path = 1", "override_path"),
        ("dial_timeout = \"soon\"", "dial_timeout"),
        ("dial_timeout = 5", "dial_timeout"),
        ("proxy = \"socks5://p.example\"", "proxy"),
        ("header = 1", "header"),
        ("[header]\n\"a b\" = \"x\"", "header.a b"),
        ("[header]\na = 1", "header.a"),
        ("[header]\na = \"x\\ny\"", "header.a"),
    ];
    for (text, expected) in cases {
        match read(text) {
            Err(HostsError::Key { key, problem }) => {
                assert_eq!(key, expected, "{text}");
                assert!(!problem.contains("secret"), "{problem}");
            }
            other => panic!("{text}: {other:?}"),
        }
        let known = ["server", "host", "header"]
            .iter()
            .any(|it| text.contains(it));
        if known || expected == "override_path" {
            continue;
        }
        match read(&format!("{host}{text}")) {
            Err(HostsError::Key { key, .. }) => {
                assert_eq!(key, format!("host.\"https://m.example\".{expected}"));
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    assert!(matches!(read("server = "), Err(HostsError::Syntax(_))));
    let many: String = (0..=MOST_HOSTS)
        .map(|number| format!("[host.\"https://m{number}.example\"]\n"))
        .collect();
    assert!(matches!(read(&many), Err(HostsError::Key { .. })));
}

#[test]
fn durations_are_those_of_go() {
    let cases = [
        ("1s", Some(1000)),
        ("500ms", Some(500)),
        ("1m30s", Some(90_000)),
        ("1.5h", Some(5_400_000)),
        ("2000us", Some(2)),
        ("0", Some(0)),
        ("1", None),
        ("", None),
        ("s", None),
        ("-1s", None),
        ("9000h", None),
        ("1d", None),
        ("1..5s", None),
    ];
    for (text, millis) in cases {
        assert_eq!(
            go_duration(text),
            millis.map(Duration::from_millis),
            "{text}"
        );
    }
}
