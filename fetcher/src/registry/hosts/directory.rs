// SPDX-License-Identifier: Apache-2.0
//! Where a registry's `hosts.toml` is, and whether it changed. Blocks.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::super::reference::Repository;
use super::{Access, FILE, Hosts, HostsError, parse};

/// The directory whose file counts for registries without one of their own.
const DEFAULT: &str = "_default";
/// Largest file that is read.
const MOST_BYTES: u64 = 1 << 20;
/// Directories of one root that are looked at for names.
const MOST_DIRECTORIES: usize = 1024;
/// Certificates of one directory that are used.
const MOST_CERTIFICATES: usize = 32;

/// Files as they were when they were read. Others stand for the same when it is equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Stamp(Vec<(PathBuf, Option<(SystemTime, u64)>)>);

impl Stamp {
    fn of(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let look = |path: &Path| {
            let metadata = fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        let stamped = paths.into_iter().map(|path| {
            let present = look(&path);
            (path, present)
        });
        Stamp(stamped.collect())
    }

    /// Whether the files are as they were. **Blocks.**
    pub(in super::super) fn holds(&self) -> bool {
        *self == Self::of(self.0.iter().map(|(path, _)| path.clone()))
    }
}

/// What is known of a registry.
#[derive(Clone, Debug)]
pub(in super::super) struct Found {
    /// All that was looked at.
    pub(in super::super) stamp: Stamp,
    /// The file that counts, or the directory with certificates only; for messages.
    pub(in super::super) path: PathBuf,
    /// What it says; nothing where there is no file.
    pub(in super::super) hosts: Result<Hosts, HostsError>,
}

/// The names of the directory of `host` (`host[:port]`), in the order in which they count.
fn names(host: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((name, port)) = host
        .rsplit_once(':')
        .filter(|(_, port)| !port.contains(']'))
    {
        names.push(format!("{name}_{port}_"));
    }
    names.push(host.to_owned());
    names.push(DEFAULT.to_owned());
    names
}

/// The registries (`host:port`) that directories below these roots are named after. **Blocks.**
pub(in super::super) fn named(roots: &[PathBuf]) -> Vec<String> {
    let entries = roots.iter().filter_map(|root| fs::read_dir(root).ok());
    let names = entries.flat_map(|entries| entries.flatten().take(MOST_DIRECTORIES));
    names
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| host_of(entry.file_name().to_str()?))
        .collect()
}

/// The registry with the port that a directory's name names.
fn host_of(name: &str) -> Option<String> {
    let (host, port) = match name.strip_suffix('_') {
        Some(rest) => rest.rsplit_once('_')?,
        None => name.rsplit_once(':')?,
    };
    let host = format!("{host}:{port}");
    Repository::new(&host, "any").is_ok().then_some(host)
}

/// Looks up `host` in these directories. The first directory of the registry that exists counts.
pub(in super::super) fn find(roots: &[PathBuf], host: &str) -> Found {
    let candidates: Vec<PathBuf> = roots
        .iter()
        .flat_map(|root| names(host).into_iter().map(|name| root.join(name)))
        .collect();
    let directory = candidates.iter().find(|path| path.is_dir());
    let mut looked_at = candidates.clone();
    let Some(directory) = directory else {
        return Found {
            stamp: Stamp::of(looked_at),
            path: PathBuf::new(),
            hosts: Ok(Hosts::default()),
        };
    };
    let path = directory.join(FILE);
    looked_at.push(path.clone());
    // Before it is read: what changes meanwhile is read again.
    let before = Stamp::of(looked_at.clone());
    let hosts = match read(&path) {
        Ok(Some(text)) => parse(&text, directory),
        Ok(None) => certificates(directory),
        Err(error) => Err(HostsError::Read(error.to_string())),
    };
    let mut stamp = before;
    if let Ok(hosts) = &hosts {
        stamp.0.extend(Stamp::of(files_of(hosts)).0);
    }
    Found { stamp, path, hosts }
}

fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MOST_BYTES => {
            Err(io::Error::other(format!("larger than {MOST_BYTES} bytes")))
        }
        Ok(_) => fs::read_to_string(path).map(|text| (!text.trim().is_empty()).then_some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Docker's files: `*.crt` are authorities, `*.cert` and `*.key` client certificates.
fn certificates(directory: &Path) -> Result<Hosts, HostsError> {
    let failed = |error: io::Error| HostsError::Read(error.to_string());
    let mut access = Access::default();
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    for path in paths.into_iter().take(MOST_CERTIFICATES) {
        match path.extension().and_then(|it| it.to_str()) {
            Some("crt") => access.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                access.client.push((path, Some(key)));
            }
            _ => {}
        }
    }
    Ok(Hosts {
        access,
        ..Hosts::default()
    })
}

fn files_of(hosts: &Hosts) -> Vec<PathBuf> {
    let of_mirrors = hosts.mirrors.iter().map(|host| &host.access);
    let all = of_mirrors.chain([&hosts.access]);
    let files = all.flat_map(|access| {
        let pairs = access.client.iter();
        let pairs = pairs.flat_map(|(certificate, key)| [Some(certificate), key.as_ref()]);
        access.ca.iter().chain(pairs.flatten())
    });
    files.cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_found_under_each_spelling() {
        let root = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let roots = [root.path().to_owned(), other.path().to_owned()];
        let put = |root: &Path, name: &str, mirror: &str| {
            let directory = root.join(name);
            fs::create_dir_all(&directory).unwrap();
            let text = format!("[host.\"https://{mirror}\"]\n");
            fs::write(directory.join(FILE), text).unwrap();
        };
        let mirror = |host: &str| {
            let found = find(&roots, host).hosts.unwrap().mirrors;
            found
                .first()
                .map(|host| host.base.host_str().unwrap().to_owned())
        };
        assert_eq!(mirror("r.example:5000"), None);
        // Each is before those that were there before.
        for (root, name, host) in [
            (other.path(), "_default", "any.example"),
            (root.path(), "_default", "default.example"),
            (root.path(), "r.example:5000", "colon.example"),
            (root.path(), "r.example_5000_", "underscore.example"),
        ] {
            put(root, name, host);
            assert_eq!(mirror("r.example:5000").as_deref(), Some(host), "{name}");
        }
        assert_eq!(mirror("docker.io").as_deref(), Some("default.example"));
        put(root.path(), "docker.io", "hub.example");
        assert_eq!(mirror("docker.io").as_deref(), Some("hub.example"));
        assert_eq!(
            names("[::1]:5000"),
            ["[::1]_5000_", "[::1]:5000", "_default"]
        );
        assert_eq!(names("[::1]"), ["[::1]", "_default"]);
    }

    #[test]
    fn directories_name_ports() {
        let root = tempfile::tempdir().unwrap();
        let roots = [root.path().join("none"), root.path().to_owned()];
        let directories = ["a.example:5000", "b.example_80_", "[::1]_7_", "c.example"];
        let others = ["_default", "d.example:x", "e_example", "f:1_", "__", "_1_"];
        for name in directories.iter().chain(&others) {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        fs::write(root.path().join("file:1"), "").unwrap();
        let mut named = named(&roots);
        named.sort();
        assert_eq!(named, ["[::1]:7", "a.example:5000", "b.example:80"]);
    }

    #[test]
    fn a_change_of_any_file_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let roots = [root.path().to_owned()];
        let nothing = find(&roots, "r.example").stamp;
        assert!(nothing.holds());
        let directory = root.path().join("r.example");
        fs::create_dir(&directory).unwrap();
        assert!(!nothing.holds());
        let empty = find(&roots, "r.example").stamp;
        let text = "[host.\"https://m.example\"]\nca = \"ca.pem\"\n";
        fs::write(directory.join(FILE), text).unwrap();
        assert!(!empty.holds());
        let no_ca = find(&roots, "r.example").stamp;
        assert!(no_ca.holds());
        fs::write(directory.join("ca.pem"), "x").unwrap();
        assert!(!no_ca.holds());
        let whole = find(&roots, "r.example").stamp;
        fs::write(directory.join("ca.pem"), "xy").unwrap();
        assert!(!whole.holds());
    }

    #[test]
    fn without_a_file_dockers_certificates_count() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("r.example");
        fs::create_dir(&directory).unwrap();
        for name in ["b.crt", "a.crt", "c.cert", "c.key", "readme"] {
            fs::write(directory.join(name), "x").unwrap();
        }
        let hosts = find(&[root.path().to_owned()], "r.example").hosts.unwrap();
        assert_eq!(hosts.mirrors, []);
        assert_eq!(
            hosts.access.ca,
            [directory.join("a.crt"), directory.join("b.crt")]
        );
        let pair = (directory.join("c.cert"), Some(directory.join("c.key")));
        assert_eq!(hosts.access.client, [pair]);
    }
}
