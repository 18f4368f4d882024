// SPDX-License-Identifier: Apache-2.0
//! `sluice setup`: for containerd's configuration, the files around the pure edits of [`crate::setup`].

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};

use super::setup_mirror::{self, Mirror};
use crate::setup::{Wanted, apply, containerd_root, exported_root, is_edited, undo};

/// What can be prepared.
#[derive(Debug, Subcommand)]
pub(super) enum Setup {
    /// Add Sluice to containerd's config.toml, or take it away again.
    Containerd(Containerd),
    /// Send containerd's pulls of some registries to the mirror of this node first (hosts.toml).
    Mirror(Mirror),
}

/// Arguments of `setup containerd`.
#[derive(Debug, Args)]
pub(super) struct Containerd {
    /// containerd's configuration file; made where it is missing.
    #[arg(long, default_value = "/etc/containerd/config.toml")]
    config: PathBuf,
    /// Socket on which sluiced serves containerd.
    #[arg(long, default_value = "/run/sluice/snapshots.sock")]
    address: String,
    /// sluiced's root directory, exported so that disk use is measured in the right place.
    #[arg(long, default_value = "/var/lib/sluice")]
    root: String,
    /// Make Sluice the snapshotter of Kubernetes' CRI plugin as well.
    #[arg(long)]
    cri: bool,
    /// Remove exactly what an earlier run added.
    #[arg(long)]
    undo: bool,
    /// Show what would change and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Do not ask before writing.
    #[arg(long, short)]
    yes: bool,
    /// The containerd program, asked for its version.
    #[arg(long, default_value = "containerd")]
    containerd: PathBuf,
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<()> {
    match setup {
        Setup::Containerd(arguments) => containerd(arguments),
        Setup::Mirror(arguments) => setup_mirror::run(arguments),
    }
}

fn containerd(arguments: &Containerd) -> anyhow::Result<()> {
    let path = &arguments.config;
    let before = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
    };
    let version = containerd_version(&arguments.containerd);
    if version.is_none() && !arguments.undo {
        let program = arguments.containerd.display();
        let _ = writeln!(
            io::stderr(),
            "sluice: {program} does not tell its version (see --containerd): what only 1.6 or only 2 needs may be left out"
        );
    }
    let after = if arguments.undo {
        undo(&before)
    } else {
        apply(
            &before,
            &Wanted {
                address: arguments.address.clone(),
                root: arguments.root.clone(),
                cri: arguments.cri,
                containerd_major: version.map(|(major, _)| major),
            },
        )
    }
    .with_context(|| format!("edit {}", path.display()))?;

    // What an earlier run linked is what it exported, whatever the default is now.
    let root = match arguments.undo {
        true => exported_root(&before)?.unwrap_or_else(|| arguments.root.clone()),
        false => arguments.root.clone(),
    };
    let link = RootLink::new(&before, &root, version)?;
    let link_change = link.change(arguments.undo);
    // Nobody may be reading any more; that is no reason to leave the work undone.
    let mut out = io::stdout().lock();
    if after == before && link_change.is_none() {
        let _ = writeln!(out, "{}: nothing to change", path.display());
        return Ok(());
    }
    let _ = write!(out, "{}", diff(path, &before, &after));
    if let Some(change) = &link_change {
        let _ = writeln!(out, "{change}");
    }
    if arguments.dry_run {
        return Ok(());
    }
    if !arguments.yes && !confirmed(&mut out)? {
        bail!("{} left as it is", path.display());
    }
    if after != before {
        write_config(path, &before, &after).with_context(|| format!("write {}", path.display()))?;
    }
    if link_change.is_some() {
        link.make(arguments.undo)?;
    }
    let _ = writeln!(
        out,
        "{} written; restart containerd to use it",
        path.display()
    );
    Ok(())
}

fn confirmed(out: &mut impl Write) -> anyhow::Result<bool> {
    if !io::stdin().is_terminal() {
        bail!("standard input is no terminal: add --yes to write, or --dry-run to look");
    }
    write!(out, "Write this? [y/N] ")?;
    out.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn diff(path: &Path, before: &str, after: &str) -> String {
    let name = path.display().to_string();
    similar::TextDiff::from_lines(before, after)
        .unified_diff()
        .header(&name, &name)
        .to_string()
}

/// Replaces the file whole, with its mode and owner, and keeps beside it the text that it had before
/// the first of our edits.
///
/// A symbolic link is followed: the file that it names is replaced, the link stays.
fn write_config(path: &Path, before: &str, after: &str) -> io::Result<()> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let metadata = fs::metadata(&path).ok();
    if !before.is_empty() && !is_edited(before) {
        replace(
            &with_suffix(&path, ".before-sluice"),
            before,
            metadata.as_ref(),
        )?;
    }
    replace(&path, after, metadata.as_ref())?;
    File::open(directory)?.sync_all()
}

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

pub(super) fn replace(path: &Path, text: &str, like: Option<&fs::Metadata>) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(text.as_bytes())?;
    let mode = like.map_or(0o644, |metadata| metadata.permissions().mode() & 0o7777);
    if let Some(metadata) = like {
        std::os::unix::fs::fchown(file.as_file(), Some(metadata.uid()), Some(metadata.gid()))?;
    }
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// Major version of containerd, if the program can be run. **Blocks** for as long as it runs.
pub(super) fn containerd_major(program: &Path) -> Option<u32> {
    containerd_version(program).map(|(major, _)| major)
}

/// Major and minor version of containerd, if the program can be run.
fn containerd_version(program: &Path) -> Option<(u32, u32)> {
    let output = std::process::Command::new(program)
        .arg("--version")
        .output()
        .ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

/// `containerd github.com/containerd/containerd v1.7.24 88bf19b…`
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let version = text.split_whitespace().nth(2)?;
    let mut parts = version.trim_start_matches('v').split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The link by which containerd 1.6, which knows no exports, finds a snapshotter's files.
#[derive(Debug)]
struct RootLink {
    path: PathBuf,
    target: PathBuf,
    needed: bool,
}

impl RootLink {
    fn new(config: &str, root: &str, version: Option<(u32, u32)>) -> anyhow::Result<Self> {
        let containerd_root = containerd_root(config)?;
        Ok(Self {
            path: Path::new(&containerd_root).join("io.containerd.snapshotter.v1.sluice"),
            target: root.into(),
            needed: version.is_some_and(|version| version < (1, 7)),
        })
    }

    fn is_ours(&self) -> bool {
        fs::read_link(&self.path).is_ok_and(|target| target == self.target)
    }

    /// What would be done, in words; nothing if it is done already.
    fn change(&self, undo: bool) -> Option<String> {
        let path = self.path.display();
        match (undo, self.is_ours()) {
            (true, true) => Some(format!("remove link {path}")),
            (false, false) if self.needed && self.path != self.target => {
                Some(format!("link {path} -> {}", self.target.display()))
            }
            _ => None,
        }
    }

    fn make(&self, undo: bool) -> anyhow::Result<()> {
        let path = &self.path;
        if undo {
            return fs::remove_file(path).with_context(|| format!("remove {}", path.display()));
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        }
        // An older link of ours may point elsewhere; anything else is not ours to replace.
        if fs::read_link(path).is_ok() {
            fs::remove_file(path).with_context(|| format!("replace {}", path.display()))?;
        }
        std::os::unix::fs::symlink(&self.target, path)
            .with_context(|| format!("link {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(directory: &Path) -> Containerd {
        Containerd {
            config: directory.join("config.toml"),
            address: "/run/sluice/snapshots.sock".into(),
            root: "/var/lib/sluice".into(),
            cri: true,
            undo: false,
            dry_run: false,
            yes: true,
            containerd: "/nonexistent/containerd".into(),
        }
    }

    #[test]
    fn writing_keeps_mode_and_backup_and_undo_restores() {
        let directory = tempfile::tempdir().unwrap();
        let mut arguments = arguments(directory.path());
        let text = "version = 2 # mine\n";
        fs::write(&arguments.config, text).unwrap();
        fs::set_permissions(&arguments.config, fs::Permissions::from_mode(0o640)).unwrap();

        arguments.dry_run = true;
        containerd(&arguments).unwrap();
        assert_eq!(fs::read_to_string(&arguments.config).unwrap(), text);
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            1,
            "a dry run writes nothing"
        );

        arguments.dry_run = false;
        containerd(&arguments).unwrap();
        let written = fs::read_to_string(&arguments.config).unwrap();
        assert!(written.starts_with(text) && written.contains("[proxy_plugins.sluice]"));
        assert_eq!(
            fs::metadata(&arguments.config).unwrap().mode() & 0o7777,
            0o640
        );
        let backup = with_suffix(&arguments.config, ".before-sluice");
        assert_eq!(fs::read_to_string(&backup).unwrap(), text);

        arguments.address = "/run/other.sock".into();
        containerd(&arguments).unwrap();
        arguments.undo = true;
        containerd(&arguments).unwrap();
        assert_eq!(fs::read_to_string(&arguments.config).unwrap(), text);
        assert_eq!(
            fs::read_to_string(&backup).unwrap(),
            text,
            "the backup is what was there before the first run"
        );
    }

    #[test]
    fn undo_takes_away_the_link_of_the_root_that_was_exported() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("containerd");
        fs::write(
            &program,
            "#!/bin/sh\necho containerd c/containerd 1.6.20 x\n",
        )
        .unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut arguments = arguments(directory.path());
        arguments.containerd = program;
        let text = format!("root = \"{}\"\n", directory.path().display());
        fs::write(&arguments.config, text).unwrap();
        arguments.root = "/srv/sluice".into();
        containerd(&arguments).unwrap();
        let link = directory.path().join("io.containerd.snapshotter.v1.sluice");
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("/srv/sluice"));
        arguments.root = "/var/lib/sluice".into();
        arguments.undo = true;
        containerd(&arguments).unwrap();
        assert!(fs::symlink_metadata(&link).is_err());
    }

    #[test]
    fn a_link_of_the_config_stays_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let arguments = arguments(directory.path());
        let real = directory.path().join("real.toml");
        fs::write(&real, "version = 2\n").unwrap();
        std::os::unix::fs::symlink(&real, &arguments.config).unwrap();
        containerd(&arguments).unwrap();
        assert!(
            fs::symlink_metadata(&arguments.config)
                .unwrap()
                .is_symlink()
        );
        assert!(fs::read_to_string(&real).unwrap().contains("sluice"));
    }

    #[test]
    fn the_root_is_linked_for_containerd_1_6_only() {
        let directory = tempfile::tempdir().unwrap();
        let config = format!("root = \"{}\"\n", directory.path().display());
        for (version, needed) in [
            (None, false),
            (Some((1, 6)), true),
            (Some((1, 7)), false),
            (Some((2, 1)), false),
        ] {
            let link = RootLink::new(&config, "/var/lib/sluice", version).unwrap();
            assert_eq!(link.change(false).is_some(), needed, "{version:?}");
        }
        let link = RootLink::new(&config, "/var/lib/sluice", Some((1, 6))).unwrap();
        link.make(false).unwrap();
        assert_eq!(link.change(false), None);
        assert!(link.change(true).is_some());
        link.make(true).unwrap();
        assert_eq!(link.change(true), None);
    }

    #[test]
    fn versions_parse_as_packages_print_them() {
        let cases = [
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+b1",
                Some((1, 6)),
            ),
            (
                "containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b71",
                Some((2, 1)),
            ),
            ("containerd containerd.io 1.7.28 b98a3aace", Some((1, 7))),
            ("", None),
            ("containerd x y", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_version(text), expected, "{text}");
        }
    }
}
