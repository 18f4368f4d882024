// SPDX-License-Identifier: Apache-2.0
//! `sluice setup mirror`: the files around the texts of [`crate::setup::hosts`].

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;

use super::setup::{replace, with_suffix};
use crate::setup::hosts;

/// Name of the file in a registry's directory.
const HOSTS: &str = "hosts.toml";
/// Where containerd, nerdctl and others look.
const CERTS: &str = "etc/containerd/certs.d";
/// Behind the name of a file that was somebody else's.
const BEFORE: &str = ".before-sluice";

/// Arguments of `setup mirror`.
#[derive(Debug, Args)]
pub(super) struct Mirror {
    /// A registry whose pulls go to the mirror first, as references name it; may be given several times.
    /// `_default`: all that have no hosts.toml of their own.
    #[arg(long = "registry", value_name = "HOST")]
    registries: Vec<String>,
    /// Where the mirror listens: `[mirror] listen` of sluiced.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9642")]
    mirror: std::net::SocketAddr,
    /// The registries speak plain HTTP.
    #[arg(long)]
    plain_http: bool,
    /// Replace a hosts.toml that somebody else wrote; it is kept beside, and comes back with --remove.
    #[arg(long)]
    replace: bool,
    /// Remove what earlier runs wrote, of these registries or of all.
    #[arg(long, conflicts_with = "replace")]
    remove: bool,
    /// The directory that stands for `/`.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

pub(super) fn run(arguments: &Mirror) -> anyhow::Result<()> {
    for registry in &arguments.registries {
        if !hosts::is_registry(registry) {
            bail!("{registry:?} is no registry: name its host as image references do");
        }
    }
    let mut out = io::stdout().lock();
    if arguments.remove {
        return remove(arguments, &mut out);
    }
    if arguments.registries.is_empty() {
        bail!("name at least one --registry ({} for all)", hosts::ALL);
    }
    let paths: Vec<(PathBuf, String)> = arguments
        .registries
        .iter()
        .map(|registry| {
            let mirror = arguments.mirror.to_string();
            let text = hosts::text(registry, &mirror, arguments.plain_http);
            (path(&arguments.root, registry), text)
        })
        .collect();
    // All or none: a refusal must not leave half of it done.
    for (path, _) in &paths {
        if let Some(present) = read(path)?
            && !hosts::is_ours(&present)
            && !arguments.replace
        {
            bail!(
                "{} was not written by sluice and is left as it is; put `[host.\"http://{}\"]` with \
                 `capabilities = [\"pull\", \"resolve\"]` first into it, or use --replace",
                path.display(),
                arguments.mirror
            );
        }
    }
    for (path, text) in &paths {
        write(path, text, &mut out)?;
    }
    tell(arguments, &mut out)
}

fn path(root: &Path, registry: &str) -> PathBuf {
    root.join(CERTS).join(registry).join(HOSTS)
}

fn read(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

fn write(path: &Path, text: &str, out: &mut impl Write) -> anyhow::Result<()> {
    let present = read(path)?;
    if present.as_deref() == Some(text) {
        let _ = writeln!(out, "{}: nothing to change", path.display());
        return Ok(());
    }
    let failed = || format!("write {}", path.display());
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).with_context(failed)?;
    if let Some(present) = present.filter(|it| !hosts::is_ours(it)) {
        replace(&with_suffix(path, BEFORE), &present, None).with_context(failed)?;
    }
    replace(path, text, None).with_context(failed)?;
    let _ = writeln!(out, "{} written", path.display());
    Ok(())
}

fn remove(arguments: &Mirror, out: &mut impl Write) -> anyhow::Result<()> {
    let directory = arguments.root.join(CERTS);
    let mut registries = arguments.registries.clone();
    if registries.is_empty() {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries.collect::<Result<Vec<_>, _>>()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).with_context(|| directory.display().to_string()),
        };
        let names = entries
            .iter()
            .map(|it| it.file_name().to_string_lossy().into_owned());
        registries = names.collect();
        registries.sort();
    }
    let mut removed = 0;
    for registry in registries {
        let path = path(&arguments.root, &registry);
        if !read(&path)?.is_some_and(|text| hosts::is_ours(&text)) {
            continue;
        }
        let before = with_suffix(&path, BEFORE);
        let failed = || format!("remove {}", path.display());
        if before.exists() {
            fs::rename(&before, &path).with_context(failed)?;
            let _ = writeln!(out, "{} is as it was before", path.display());
        } else {
            fs::remove_file(&path).with_context(failed)?;
            // Only if nothing else is in it.
            let _ = path.parent().map(fs::remove_dir);
            let _ = writeln!(out, "{} removed", path.display());
        }
        removed += 1;
    }
    if removed == 0 {
        let _ = writeln!(out, "nothing to remove");
    }
    Ok(())
}

/// What is left to do for a person.
fn tell(arguments: &Mirror, out: &mut impl Write) -> anyhow::Result<()> {
    let config = arguments.root.join("etc/containerd/config.toml");
    let text = read(&config)?.unwrap_or_default();
    if let Some(lacking) = hosts::lacking(&text, &format!("/{CERTS}")) {
        let _ = write!(
            out,
            "for Kubernetes (CRI) and containerd 2's transfer service, {} lacks:\n\n{lacking}\n\
             then restart containerd. nerdctl needs none of it; ctr takes --hosts-dir /{CERTS}\n",
            config.display()
        );
    }
    let _ = writeln!(
        out,
        "sluiced serves it with [mirror] listen = \"{}\"",
        arguments.mirror
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(root: &Path, registries: &[&str]) -> Mirror {
        Mirror {
            registries: registries.iter().map(|it| (*it).to_owned()).collect(),
            mirror: "127.0.0.1:9642".parse().unwrap(),
            plain_http: false,
            replace: false,
            remove: false,
            root: root.to_owned(),
        }
    }

    #[test]
    fn files_are_written_again_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let wanted = arguments(root.path(), &["docker.io", "localhost:5000"]);
        run(&wanted).unwrap();
        let hub = path(root.path(), "docker.io");
        let first = fs::read_to_string(&hub).unwrap();
        let made = fs::metadata(&hub).unwrap().modified().unwrap();
        run(&wanted).unwrap();
        assert_eq!(fs::metadata(&hub).unwrap().modified().unwrap(), made);
        let mut other = arguments(root.path(), &["docker.io"]);
        other.mirror = "127.0.0.1:5000".parse().unwrap();
        run(&other).unwrap();
        assert_ne!(fs::read_to_string(&hub).unwrap(), first);
        let mut gone = arguments(root.path(), &[]);
        gone.remove = true;
        run(&gone).unwrap();
        assert_eq!(fs::read_dir(root.path().join(CERTS)).unwrap().count(), 0);
        run(&gone).unwrap();
    }

    #[test]
    fn what_others_wrote_stays_or_comes_back() {
        let root = tempfile::tempdir().unwrap();
        let theirs = path(root.path(), "r.example");
        fs::create_dir_all(theirs.parent().unwrap()).unwrap();
        fs::write(&theirs, "server = \"https://other\"\n").unwrap();
        let mut wanted = arguments(root.path(), &["docker.io", "r.example"]);
        let error = run(&wanted).unwrap_err().to_string();
        assert!(
            error.contains("r.example") && error.contains("--replace"),
            "{error}"
        );
        assert!(!path(root.path(), "docker.io").exists(), "all or none");
        wanted.replace = true;
        run(&wanted).unwrap();
        assert!(hosts::is_ours(&fs::read_to_string(&theirs).unwrap()));
        // Again: the copy stays what it was.
        wanted.mirror = "127.0.0.1:5000".parse().unwrap();
        run(&wanted).unwrap();
        wanted.replace = false;
        wanted.remove = true;
        run(&wanted).unwrap();
        let text = fs::read_to_string(&theirs).unwrap();
        assert_eq!(text, "server = \"https://other\"\n");
        assert_eq!(fs::read_dir(theirs.parent().unwrap()).unwrap().count(), 1);
        // What others wrote is not removed.
        run(&wanted).unwrap();
        assert!(theirs.exists());
    }

    #[test]
    fn no_registry_leads_out_of_the_directory() {
        let root = tempfile::tempdir().unwrap();
        for registries in [&["../x"][..], &["a/b"], &[""], &[]] {
            assert!(
                run(&arguments(root.path(), registries)).is_err(),
                "{registries:?}"
            );
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
