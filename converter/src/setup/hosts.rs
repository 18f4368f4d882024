// SPDX-License-Identifier: Apache-2.0
//! containerd's `hosts.toml`, by which pulls of a registry go to the mirror first. Pure.
//!
//! A file of ours begins with [`MARK`]; one that does not is somebody else's.

use std::fmt::Write as _;

use sluice_fetcher::registry::{api_host, is_plain_http_default};
use toml_edit::{DocumentMut, Item};

/// The first line of files that we wrote.
pub const MARK: &str =
    "# written by `sluice setup mirror`; `sluice setup mirror --remove` removes it";
/// The directory whose file counts for registries without one of their own.
pub const ALL: &str = "_default";

/// The text for `registry`, whose pulls go to `mirror` (`address:port`) first and to the registry itself
/// when the mirror does not answer.
#[must_use]
pub fn text(registry: &str, mirror: &str, plain_http: bool) -> String {
    let mut text = format!("{MARK}\n");
    // For all registries containerd fills in the server by itself.
    if registry != ALL {
        let plain = plain_http || is_plain_http_default(registry);
        let scheme = if plain { "http" } else { "https" };
        let _ = writeln!(text, "server = \"{scheme}://{}\"", api_host(registry));
    }
    let _ = write!(
        text,
        "\n[host.\"http://{mirror}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
    );
    text
}

/// Whether a file is ours.
#[must_use]
pub fn is_ours(text: &str) -> bool {
    text.starts_with(MARK)
}

/// Whether this can be the name of a registry, and of its directory.
#[must_use]
pub fn is_registry(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
    name == ALL || (!name.is_empty() && !name.starts_with('.') && name.chars().all(plain))
}

/// What containerd's configuration lacks to look into `directory`; `None` if it looks there.
///
/// Only the CRI plugin (Kubernetes) and containerd 2's transfer service need it: nerdctl looks into
/// `/etc/containerd/certs.d` by itself, `ctr` with `--hosts-dir`.
#[must_use]
pub fn lacking(config: &str, directory: &str) -> Option<String> {
    let doc: DocumentMut = config.parse().unwrap_or_default();
    let version = doc.get("version").and_then(Item::as_integer).unwrap_or(1);
    let paths: &[&[&str]] = match version {
        1 => &[&["plugins", "cri", "registry"]],
        2 => &[&["plugins", "io.containerd.grpc.v1.cri", "registry"]],
        _ => &[
            &["plugins", "io.containerd.cri.v1.images", "registry"],
            &["plugins", "io.containerd.transfer.v1.local"],
        ],
    };
    let mut text = String::new();
    for path in paths {
        let table = path
            .iter()
            .try_fold(doc.as_item(), |item, name| item.get(name));
        let known = table
            .and_then(|table| table.get("config_path"))
            .and_then(Item::as_str)
            .is_some_and(|value| value.split(':').any(|it| it == directory));
        if !known {
            let quoted = |name: &&str| match name.contains('.') {
                true => format!("\"{name}\""),
                false => (*name).to_owned(),
            };
            let header: Vec<String> = path.iter().map(quoted).collect();
            let header = header.join(".");
            let _ = write!(text, "[{header}]\n  config_path = \"{directory}\"\n");
        }
    }
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_name_the_mirror_and_the_registry() {
        let hub = text("docker.io", "127.0.0.1:9642", false);
        assert!(is_ours(&hub));
        let doc: DocumentMut = hub.parse().unwrap();
        assert_eq!(doc["server"].as_str(), Some("https://registry-1.docker.io"));
        let host = &doc["host"]["http://127.0.0.1:9642"];
        let capabilities = host["capabilities"].as_array().unwrap();
        let words: Vec<_> = capabilities.iter().filter_map(|it| it.as_str()).collect();
        assert_eq!(words, ["pull", "resolve"]);
        for (registry, plain, server) in [
            ("r.example:5000", false, Some("https://r.example:5000")),
            ("r.example:5000", true, Some("http://r.example:5000")),
            ("127.0.0.1:5000", false, Some("http://127.0.0.1:5000")),
            (ALL, false, None),
        ] {
            let doc: DocumentMut = text(registry, "m:1", plain).parse().unwrap();
            assert_eq!(
                doc.get("server").and_then(Item::as_str),
                server,
                "{registry}"
            );
        }
    }

    #[test]
    fn registries_are_names_of_directories() {
        for (name, good) in [
            ("docker.io", true),
            ("localhost:5000", true),
            ("[::1]:5000", true),
            (ALL, true),
            ("", false),
            ("..", false),
            ("a/b", false),
            ("a b", false),
        ] {
            assert_eq!(is_registry(name), good, "{name}");
        }
    }

    #[test]
    fn what_a_configuration_lacks() {
        let directory = "/etc/containerd/certs.d";
        let lacks = |config: &str| lacking(config, directory);
        assert!(lacks("").unwrap().contains("[plugins.cri.registry]"));
        let two = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = ";
        assert_eq!(lacks(&format!("{two}\"{directory}\"\n")), None);
        assert_eq!(lacks(&format!("{two}\"/x:{directory}\"\n")), None);
        let missing = lacks(&format!("{two}\"/x\"\n")).unwrap();
        assert!(missing.starts_with("[plugins.\"io.containerd.grpc.v1.cri\".registry]\n"));
        let three = lacks("version = 3\n").unwrap();
        assert!(three.contains("io.containerd.transfer.v1.local"), "{three}");
        // What it lacks is what it needs.
        assert_eq!(lacks(&format!("version = 3\n{three}")), None);
    }
}
