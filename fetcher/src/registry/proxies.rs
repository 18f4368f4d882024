// SPDX-License-Identifier: Apache-2.0
//! Which requests go through a proxy, by the environment: `HTTPS_PROXY`, `HTTP_PROXY`, `NO_PROXY`, or the same in lower
//! case, exactly as programs in Go (containerd, nerdctl, kubelet) read them. So what works for a pull works for
//! chunks; the HTTP library's own reading knows no ports in `NO_PROXY`, and `ALL_PROXY` besides. Pure.
//!
//! - The scheme of the request decides which of the first two counts; a value without a scheme is `http://`.
//! - `localhost` and loopback addresses never go through a proxy.
//! - `NO_PROXY` is a list, separated by commas: `*` for all; an IP address or a CIDR; a name, which stands for the
//!   names below it as well; `.name` and `*.name`, for those below it only; each but a CIDR maybe with a port.
//!
//! **Source** Go, package `golang.org/x/net/http/httpproxy`.

use std::net::IpAddr;

use ipnet::IpNet;
use url::{Host, Url};

/// Which requests go through a proxy.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ProxyRules {
    http: Option<Url>,
    https: Option<Url>,
    except: Vec<Except>,
}

/// The proxies' passwords stay out of it.
impl std::fmt::Debug for ProxyRules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |url: &Option<Url>| url.as_ref().map(|url| url.origin().ascii_serialization());
        let ProxyRules {
            http,
            https,
            except,
        } = self;
        f.debug_struct("ProxyRules")
            .field("http", &shown(http))
            .field("https", &shown(https))
            .field("except", except)
            .finish()
    }
}

/// What goes directly.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Except {
    All,
    Network(IpNet),
    Address(IpAddr, Option<u16>),
    Name {
        /// Without the dot before it.
        name: String,
        /// The names below it only.
        below: bool,
        port: Option<u16>,
    },
}

impl ProxyRules {
    /// Of this process's environment. The problem with each variable that cannot be used comes with it, without its
    /// value, in which a password may stand.
    pub fn from_environment() -> (Self, Vec<String>) {
        Self::read(|name| std::env::var(name).ok())
    }

    /// Of these variables.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> (Self, Vec<String>) {
        let either = |upper: &str| {
            let found = [upper.to_owned(), upper.to_ascii_lowercase()];
            let mut found = found.iter().filter_map(|name| variable(name));
            found.find(|value| !value.is_empty()).unwrap_or_default()
        };
        let mut problems = Vec::new();
        let mut proxy = |name: &str| {
            let parsed = parse_proxy(either(name).trim());
            parsed.unwrap_or_else(|problem| {
                problems.push(format!("{name}: {problem}"));
                None
            })
        };
        let rules = ProxyRules {
            http: proxy("HTTP_PROXY"),
            https: proxy("HTTPS_PROXY"),
            except: either("NO_PROXY")
                .split(',')
                .filter_map(parse_except)
                .collect(),
        };
        (rules, problems)
    }

    /// The proxy for a request; `None`: it goes directly.
    pub fn proxy_for(&self, url: &Url) -> Option<&Url> {
        let proxy = match url.scheme() {
            "https" => self.https.as_ref(),
            _ => self.http.as_ref(),
        }?;
        let port = url.port_or_known_default();
        let (name, address) = match url.host()? {
            Host::Ipv4(address) => (String::new(), Some(IpAddr::V4(address))),
            Host::Ipv6(address) => (String::new(), Some(IpAddr::V6(address).to_canonical())),
            Host::Domain(name) => (name.trim_end_matches('.').to_ascii_lowercase(), None),
        };
        let local = name == "localhost" || address.is_some_and(|it| it.is_loopback());
        let same_port = |wanted: &Option<u16>| wanted.is_none_or(|wanted| Some(wanted) == port);
        let excepted = self.except.iter().any(|except| match except {
            Except::All => true,
            Except::Network(network) => address.is_some_and(|it| network.contains(&it)),
            Except::Address(wanted, port) => address == Some(*wanted) && same_port(port),
            Except::Name {
                name: wanted,
                below,
                port,
            } => {
                let rest = name.strip_suffix(wanted.as_str());
                let fits = rest.is_some_and(|rest| match rest.is_empty() {
                    true => !below,
                    false => rest.ends_with('.'),
                });
                fits && same_port(port)
            }
        });
        (!local && !excepted).then_some(proxy)
    }
}

/// **Errors** what is wrong, without the value.
fn parse_proxy(text: &str) -> Result<Option<Url>, &'static str> {
    if text.is_empty() {
        return Ok(None);
    }
    // `host:3128` would parse as a scheme.
    let text = match text.contains("://") {
        true => text.to_owned(),
        false => format!("http://{text}"),
    };
    let url = Url::parse(&text).map_err(|_| "no URL")?;
    match url.scheme() {
        "http" | "https" if url.has_host() => Ok(Some(url)),
        "http" | "https" => Err("no host"),
        _ => Err("only http and https proxies are known"),
    }
}

fn parse_except(text: &str) -> Option<Except> {
    let text = text.trim().to_ascii_lowercase();
    if text.is_empty() {
        return None;
    }
    if text == "*" {
        return Some(Except::All);
    }
    if let Ok(network) = text.parse::<IpNet>() {
        return Some(Except::Network(network));
    }
    let address = |text: &str| text.parse::<IpAddr>().ok().map(|it| it.to_canonical());
    if let Some(address) = address(&text) {
        return Some(Except::Address(address, None));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, Some(port.parse().ok()?)),
        None => (text.as_str(), None),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if let Some(address) = address(host) {
        return Some(Except::Address(address, port));
    }
    let host = host.strip_prefix('*').unwrap_or(host);
    let (name, below) = match host.strip_prefix('.') {
        Some(name) => (name, true),
        None => (host, false),
    };
    (!name.is_empty() && !name.contains('*')).then(|| Except::Name {
        name: name.to_owned(),
        below,
        port,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(variables: &[(&str, &str)]) -> ProxyRules {
        let value = |name: &str| {
            let mut all = variables.iter();
            Some(all.find(|(its, _)| *its == name)?.1.to_owned())
        };
        ProxyRules::read(value).0
    }

    fn goes(rules: &ProxyRules, url: &str) -> Option<String> {
        let proxy = rules.proxy_for(&Url::parse(url).unwrap());
        proxy.map(|proxy| proxy.as_str().to_owned())
    }

    #[test]
    fn the_scheme_decides_and_capitals_come_first() {
        let known = rules(&[
            ("HTTP_PROXY", ""),
            ("http_proxy", "low:1"),
            ("HTTPS_PROXY", "https://u:p@up.example:2"),
            ("https_proxy", "low:3"),
            ("ALL_PROXY", "http://all:4"),
        ]);
        let proxy = |url: &str| goes(&known, url);
        assert_eq!(proxy("http://a.example/").as_deref(), Some("http://low:1/"));
        assert_eq!(
            proxy("https://a.example/").as_deref(),
            Some("https://u:p@up.example:2/")
        );
        assert_eq!(goes(&rules(&[]), "https://a.example/"), None);
        let shown = format!("{known:?}");
        assert!(
            !shown.contains("u:p") && shown.contains("https://up.example:2"),
            "{shown}"
        );
    }

    #[test]
    fn what_is_no_proxy_is_said_without_its_value() {
        let variables = |name: &str| match name {
            "HTTP_PROXY" => Some("socks5://u:hunter2@p.example".to_owned()),
            "HTTPS_PROXY" => Some("http://u:hunter2@/".to_owned()),
            _ => None,
        };
        let (rules, problems) = ProxyRules::read(variables);
        assert_eq!(rules, ProxyRules::default());
        assert_eq!(problems.len(), 2, "{problems:?}");
        let all = problems.join(" ");
        assert!(
            all.contains("HTTP_PROXY: only http") && !all.contains("hunter2"),
            "{all}"
        );
    }

    #[test]
    fn exceptions_are_those_of_go() {
        // What NO_PROXY says, and which requests go directly and which do not.
        let cases: [(&str, &[&str], &[&str]); 11] = [
            (
                "",
                &[
                    "localhost",
                    "127.0.0.1:5000",
                    "127.9.9.9",
                    "[::1]:5000",
                    "localhost.",
                ],
                &["localhost.example", "10.0.0.1", "a.localhost.example"],
            ),
            ("*", &["a.example", "10.0.0.1"], &[]),
            (
                "example.com",
                &[
                    "example.com",
                    "a.example.com",
                    "a.b.example.com:8443",
                    "EXAMPLE.com",
                ],
                &["notexample.com", "example.com.evil", "example.org"],
            ),
            (
                ".example.com",
                &["a.example.com"],
                &["example.com", "aexample.com"],
            ),
            ("*.example.com", &["a.example.com"], &["example.com"]),
            (
                "example.com:5000",
                &["example.com:5000", "a.example.com:5000"],
                &["example.com", "example.com:5001"],
            ),
            ("example.com:443", &["example.com"], &["example.com:80"]),
            (
                "10.0.0.0/8,192.168.1.1, fd00::/8",
                &["10.1.2.3:5000", "192.168.1.1", "[fd00::1]"],
                &["11.0.0.1", "192.168.1.2", "[fe80::1]", "10.example"],
            ),
            (
                "10.0.0.1:5000",
                &["10.0.0.1:5000"],
                &["10.0.0.1", "10.0.0.1:5001"],
            ),
            ("[fd00::1]:5000", &["[fd00::1]:5000"], &["[fd00::1]"]),
            (
                " ,, :80 ,a*b.example, good.example ",
                &["good.example"],
                &["aXb.example", "a.example"],
            ),
        ];
        for (except, directly, through) in cases {
            let known = rules(&[("HTTPS_PROXY", "http://p.example"), ("no_proxy", except)]);
            for host in directly {
                assert_eq!(
                    goes(&known, &format!("https://{host}/v2/")),
                    None,
                    "{except} {host}"
                );
            }
            for host in through {
                let proxy = goes(&known, &format!("https://{host}/v2/"));
                assert!(proxy.is_some(), "{except} {host}");
            }
        }
    }
}
