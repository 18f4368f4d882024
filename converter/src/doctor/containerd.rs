// SPDX-License-Identifier: Apache-2.0
//! containerd's configuration against what `sluice setup containerd` would write.

use toml_edit::{DocumentMut, Item};

use super::{Finding, Severity};
use crate::setup::{Wanted, apply};

/// Name of the check.
pub const CHECK: &str = "containerd";

const SETUP: &str = "run `sluice setup containerd` and restart containerd";

fn at<'a>(doc: &'a DocumentMut, path: &[&str]) -> Option<&'a Item> {
    path.iter()
        .try_fold(doc.as_item(), |item, name| item.get(name))
}

/// The snapshotter of Kubernetes' CRI plugin, in any version of the configuration.
fn cri_snapshotter(doc: &DocumentMut) -> Option<&str> {
    let places: [&[&str]; 3] = [
        &["plugins", "cri", "containerd", "snapshotter"],
        &[
            "plugins",
            "io.containerd.grpc.v1.cri",
            "containerd",
            "snapshotter",
        ],
        &["plugins", "io.containerd.cri.v1.images", "snapshotter"],
    ];
    places
        .iter()
        .find_map(|path| at(doc, path).and_then(Item::as_str))
}

/// Judges the text of a configuration.
///
/// `cri`: Kubernetes' plugin must use Sluice as well; it is looked at anyway where the text says that it does.
#[must_use]
pub fn judge(subject: &str, text: &str, wanted: &Wanted) -> Vec<Finding> {
    let finding =
        |severity, problem: &str| Finding::new(CHECK, severity, subject, problem).advice(SETUP);
    let doc: DocumentMut = match text.parse() {
        Ok(doc) => doc,
        Err(error) => {
            let problem = format!("is not TOML: {error}");
            let advice = "mend the file; containerd does not start with it";
            return vec![Finding::new(CHECK, Severity::Error, subject, problem).advice(advice)];
        }
    };
    let plugin = |name: &str| {
        let path = ["proxy_plugins", "sluice"];
        let rest = name.split('.');
        let path: Vec<&str> = path.into_iter().chain(rest).collect();
        at(&doc, &path).and_then(Item::as_str).map(str::to_owned)
    };
    if at(&doc, &["proxy_plugins", "sluice"]).is_none() {
        let problem = "has no [proxy_plugins.sluice]: containerd does not know Sluice";
        return vec![finding(Severity::Error, problem)];
    }
    let mut found = Vec::new();
    if plugin("type").as_deref() != Some("snapshot") {
        let problem = "[proxy_plugins.sluice] type is not \"snapshot\"";
        found.push(finding(Severity::Error, problem));
    }
    match plugin("address") {
        Some(address) if address == wanted.address => {}
        address => {
            let address = address.unwrap_or_default();
            let problem = format!(
                "names the socket {address:?}, and sluiced listens on {:?}",
                wanted.address
            );
            found.push(finding(Severity::Error, &problem));
        }
    }
    match plugin("exports.root") {
        Some(root) if root == wanted.root => {}
        None => {
            let problem = "has no exports.root: kubelet measures the wrong disk, and does not evict when Sluice's is full";
            found.push(finding(Severity::Warning, problem));
        }
        Some(root) => {
            let problem = format!(
                "exports the root {root:?}, and sluiced's is {:?}",
                wanted.root
            );
            found.push(finding(Severity::Warning, &problem));
        }
    }
    let modern = wanted.containerd_major.is_none_or(|major| major >= 2);
    if modern && plugin("exports.enable_remote_snapshot_annotations").as_deref() != Some("true") {
        let problem = "has no exports.enable_remote_snapshot_annotations: pulls by containerd 2's transfer service are not lazy";
        found.push(finding(Severity::Warning, problem));
    }
    let mut wanted = wanted.clone();
    wanted.cri |= cri_snapshotter(&doc) == Some("sluice");
    if !found.is_empty() {
        return found;
    }
    // What is left: the CRI plugin, and the transfer service's unpack_config.
    match apply(text, &wanted) {
        Ok(after) if same(&after, &doc) => {}
        Ok(_) => {
            let problem = "lacks what Kubernetes' plugin needs for lazy pulls (snapshotter, annotations or unpack_config)";
            found.push(finding(Severity::Warning, problem));
        }
        Err(error) => {
            let problem = format!("cannot be judged: {error}");
            found.push(finding(Severity::Warning, &problem));
        }
    }
    found
}

/// Whether the text says the same. `apply` writes keys that containerd 1 ignores: they are not missed.
fn same(after: &str, before: &DocumentMut) -> bool {
    let plugins = |text: &str| {
        let table: Option<toml::Table> = text.parse().ok();
        table.map(|mut table| {
            table.remove("proxy_plugins");
            table
        })
    };
    plugins(after) == plugins(&before.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(cri: bool, major: u32) -> Wanted {
        Wanted {
            address: "/run/sluice/snapshots.sock".into(),
            root: "/var/lib/sluice".into(),
            cri,
            containerd_major: Some(major),
        }
    }

    fn worst(text: &str, wanted: &Wanted) -> Option<(Severity, String)> {
        let found = judge("c.toml", text, wanted);
        let worst = found.into_iter().max_by_key(|finding| finding.severity)?;
        Some((worst.severity, worst.problem))
    }

    #[test]
    fn what_setup_writes_is_right() {
        for (text, cri, major) in [
            ("", false, 1),
            ("version = 2\n", true, 1),
            ("version = 3\n", true, 2),
            ("version = 2\n[plugins]\n", true, 2),
        ] {
            let wanted = wanted(cri, major);
            let text = apply(text, &wanted).unwrap();
            assert_eq!(judge("c", &text, &wanted), [], "{text}");
        }
    }

    #[test]
    fn each_key_that_is_missing_or_wrong_is_found() {
        let wanted = wanted(true, 2);
        let good = apply("version = 3\n", &wanted).unwrap();
        for (from, to, severity, words) in [
            (
                "proxy_plugins",
                "proxy_other",
                Severity::Error,
                "does not know Sluice",
            ),
            (
                "type = \"snapshot\"",
                "type = \"content\"",
                Severity::Error,
                "type",
            ),
            (
                "sluice/snapshots.sock",
                "else.sock",
                Severity::Error,
                "else.sock",
            ),
            (
                "root = \"/var/lib/sluice\"",
                "",
                Severity::Warning,
                "exports.root",
            ),
            ("/var/lib/sluice", "/srv", Severity::Warning, "/srv"),
            (
                "enable_remote_snapshot_annotations = \"true\"",
                "",
                Severity::Warning,
                "transfer service",
            ),
            (
                "disable_snapshot_annotations = false",
                "disable_snapshot_annotations = true",
                Severity::Warning,
                "annotations",
            ),
            ("version = 3", "version = ", Severity::Error, "is not TOML"),
        ] {
            let bad = good.replace(from, to);
            assert_ne!(bad, good, "{from}");
            let (found, problem) = worst(&bad, &wanted).unwrap_or_else(|| panic!("{from}"));
            assert_eq!(found, severity, "{from}: {problem}");
            assert!(problem.contains(words), "{from}: {problem}");
        }
    }

    #[test]
    fn containerd_1_needs_no_transfer_service() {
        let text = apply("", &wanted(false, 1)).unwrap();
        let text = text.replace("enable_remote_snapshot_annotations = \"true\"\n", "");
        assert_eq!(worst(&text, &wanted(false, 1)), None);
        assert!(worst(&text, &wanted(false, 2)).is_some());
    }
}
