// SPDX-License-Identifier: Apache-2.0
//! The registry behind its line, with every contender's form of every image in it.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::super::NAMESPACE;
use super::cold;
use super::contender::{Contender, Service};
use super::images::Image;
use crate::harness::containerd::{Containerd, Release};
use crate::harness::nerdctl::Nerdctl;
use crate::harness::proxy::Line;
use crate::harness::registry::Registry;
use crate::harness::root::Root;
use crate::harness::{command, http, images, tools};

/// The longest that a conversion may take.
const CONVERTS: Duration = Duration::from_secs(1800);
/// What a program reads after its probe has answered still belongs to its start.
const SETTLES: Duration = Duration::from_secs(2);

/// How long the line must be quiet before what others fetch in the background is over: SOCI's fetcher begins 30 s after
/// the last layer was mounted.
const QUIET: Duration = Duration::from_secs(40);
/// What a quiet line may carry: answers to questions whether the registry is there.
const QUIET_BYTES: u64 = 100_000;
/// The longest that this may take.
const COMES: Duration = Duration::from_secs(900);

/// The registry, and where everything lives.
#[derive(Debug)]
pub struct Lab {
    /// The registry and its line, which is open while images are made.
    pub registry: Registry,
    /// Where everything lives.
    pub root: Root,
}

impl Lab {
    /// With an empty registry, below a new root named after `name`.
    pub fn open(name: &str) -> Result<Self> {
        let root = Root::new(name)?;
        let registry = Registry::start(&root, Line::OPEN)?;
        Ok(Self { registry, root })
    }

    /// What the contender pulls of the image `name`.
    #[must_use]
    pub fn reference(&self, contender: Contender, name: &str) -> String {
        let [form, tag] = contender.place();
        format!("{}/{name}/{form}:{tag}", self.registry.host())
    }

    /// Pushes the image of a layout as it is. Gives its layers and their bytes in the registry.
    pub fn push(&self, name: &str, layout: &Path) -> Result<(usize, u64)> {
        let direct = self.registry.direct();
        images::push_layout(layout, &format!("{direct}/{name}/original:latest"))?;
        let manifest = http::manifest(&direct, &format!("{name}/original"), "latest")?;
        let layers = manifest["layers"].as_array().context("layers")?;
        let sizes = layers.iter().filter_map(|layer| layer["size"].as_u64());
        Ok((layers.len(), sizes.sum()))
    }

    /// Makes the contender's form of an image that was pushed; what takes long is kept for the next call.
    pub fn prepare(&self, contender: Contender, image: Image) -> Result<()> {
        let name = image.name();
        match contender {
            Contender::SluiceBoot => self.attach_boot_list(image),
            // They pull the same.
            Contender::SluiceErofs | Contender::SluiceFuse => Ok(()),
            Contender::Stargz => {
                self.kept(contender, image, |it| it.convert(contender, name, CONVERTS))
            }
            Contender::StargzOptimized => self.kept(contender, image, |it| {
                let record = it.record(image)?;
                it.to_estargz(contender, name, Some(&record), CONVERTS)
            }),
            _ => self.convert(contender, name, CONVERTS),
        }
        .with_context(|| format!("make {name} for {}", contender.name()))
    }

    /// Makes the contender's form of an image that was pushed, of nothing but the image.
    ///
    /// **Errors**: also when one step takes longer than `deadline`; it is ended then.
    pub fn convert(&self, contender: Contender, name: &str, deadline: Duration) -> Result<()> {
        let original = self.reference(Contender::Overlayfs, name);
        let wanted = self.reference(contender, name);
        match contender {
            Contender::Overlayfs | Contender::Nydus => Ok(()),
            Contender::Sluice => {
                let [from, to] = [&original, &wanted].map(|it| format!("docker://{it}"));
                self.sluice(&["convert", "--quiet", &from, &to], deadline)
            }
            Contender::SluiceIndex => self.sluice(&["index", "--quiet", &original], deadline),
            Contender::Stargz => self.to_estargz(contender, name, None, deadline),
            Contender::Soci => self.within_containerd(&original, |containerd, root| {
                let mut convert = converter("soci-peer", root)?;
                convert
                    .arg(root.directory("soci")?)
                    .arg(containerd.socket());
                convert.args([NAMESPACE, &original, &wanted]);
                command::run_ok(&mut convert, deadline)?;
                Ok(())
            }),
            Contender::SluiceBoot
            | Contender::SluiceErofs
            | Contender::SluiceFuse
            | Contender::StargzOptimized => {
                bail!("{} needs a start of the image", contender.name())
            }
        }
    }

    fn sluice(&self, arguments: &[&str], deadline: Duration) -> Result<()> {
        let mut sluice = Command::new(tools::binary("sluice")?);
        sluice.env("SLUICE_STATE", self.root.directory("converted")?);
        command::run_ok(sluice.args(arguments), deadline)?;
        Ok(())
    }

    /// Starts the converted image once, and attaches what was read.
    fn attach_boot_list(&self, image: Image) -> Result<()> {
        let (_, node) = cold::start(self, Contender::Sluice, image, true)?;
        let Service::Sluice { daemon, .. } = &node.service else {
            bail!("no sluiced");
        };
        let converted = format!(
            "docker://{}",
            self.reference(Contender::Sluice, image.name())
        );
        let [_, tag] = Contender::SluiceBoot.place();
        daemon.sluice_ok(&["optimize", "--wait", "60", "--tag", tag, &converted])?;
        Ok(())
    }

    /// Has a containerd of its own, with the image pulled and not unpacked.
    fn within_containerd(
        &self,
        original: &str,
        work: impl FnOnce(&Containerd, &Root) -> Result<()>,
    ) -> Result<()> {
        let root = self.root.part("p")?;
        let containerd = Containerd::start_with(&root, Release::V2, &[])?;
        let nerdctl = Nerdctl::new(&root, &containerd, NAMESPACE, "overlayfs");
        nerdctl.ok(&["pull", "--quiet", "--unpack=false", original])?;
        work(&containerd, &root)
    }

    fn to_estargz(
        &self,
        contender: Contender,
        name: &str,
        record: Option<&Path>,
        deadline: Duration,
    ) -> Result<()> {
        let original = self.reference(Contender::Overlayfs, name);
        let wanted = self.reference(contender, name);
        self.within_containerd(&original, |containerd, root| {
            let mut convert = converter("stargz-peer", root)?;
            convert.arg(containerd.socket());
            convert.args([NAMESPACE, &original, &wanted]).args(record);
            command::run_ok(&mut convert, deadline)?;
            Nerdctl::new(root, containerd, NAMESPACE, "overlayfs")
                .ok(&["push", "--quiet", &wanted])?;
            Ok(())
        })
    }

    /// Which files of which layer a start reads, in order, as stargz-snapshotter itself sees it: a file of lines
    /// `LAYER PATH`.
    fn record(&self, image: Image) -> Result<PathBuf> {
        let (_, node) = cold::start(self, Contender::Stargz, image, true)?;
        std::thread::sleep(SETTLES);
        let Service::Peer { log, .. } = &node.service else {
            bail!("no stargz-snapshotter");
        };
        let [form, tag] = Contender::Stargz.place();
        let repository = format!("{}/{form}", image.name());
        let manifest = http::manifest(&self.registry.direct(), &repository, tag)?;
        let layers = manifest["layers"].as_array().context("layers")?;
        let digests = layers.iter().map(|layer| layer["digest"].as_str());
        let numbers: BTreeMap<&str, usize> = digests.flatten().zip(0..).collect();
        let accesses = accesses(&std::fs::read_to_string(log)?, &numbers);
        ensure!(!accesses.is_empty(), "no access was recorded");
        let path = self.root.join("record")?;
        let mut file = std::fs::File::create(&path)?;
        for (layer, name) in accesses {
            writeln!(file, "{layer} {name}")?;
        }
        Ok(path)
    }

    /// Pushes what an earlier call made of the image for this version of the contender, or makes and keeps it.
    fn kept(
        &self,
        contender: Contender,
        image: Image,
        make: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<()> {
        let index = std::fs::read(image.layout()?.join("index.json"))?;
        let source = hex::encode(&Sha256::digest(index)[..6]);
        let name = format!("{}.{}-{source}", contender.name(), contender.version()?);
        let layout = image.layout()?.with_extension(name);
        let [form, tag] = contender.place();
        let direct = format!("{}/{}/{form}:{tag}", self.registry.direct(), image.name());
        let done = layout.join(".complete");
        if done.exists() {
            return images::push_layout(&layout, &direct);
        }
        make(self)?;
        // Also what was made of an older image, or by an older version.
        let prefix = format!("{}.{}.", image.name(), contender.name());
        for entry in std::fs::read_dir(layout.parent().context("a directory")?)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        let mut copy = Command::new(tools::on_path("skopeo")?);
        copy.args(["--insecure-policy", "copy", "--preserve-digests"]);
        copy.arg("--src-tls-verify=false")
            .arg(format!("docker://{direct}"));
        copy.arg(format!("oci:{}:latest", layout.display()));
        command::run_ok(&mut copy, CONVERTS)?;
        std::fs::write(done, "")?;
        Ok(())
    }

    /// Waits until the line has been quiet for a while: what snapshotters that do not say so fetch in the background is here.
    pub fn wait_quiet(&self) -> Result<()> {
        let carried = || self.registry.line.bytes();
        let begun = Instant::now();
        let (mut mark, mut since) = (carried(), Instant::now());
        while since.elapsed() < QUIET {
            ensure!(
                begun.elapsed() < COMES,
                "the line is not quiet after {COMES:?}"
            );
            std::thread::sleep(Duration::from_secs(1));
            let now = carried();
            if now > mark + QUIET_BYTES {
                (mark, since) = (now, Instant::now());
            }
        }
        Ok(())
    }

    /// Reads what the contender may ask for, so that the registry has it in memory.
    pub fn warm(&self, contender: Contender, name: &str) -> Result<()> {
        let [form, _] = contender.place();
        let store = self.root.path().join("registry/store/docker/registry/v2");
        let layers = store
            .join("repositories")
            .join(name)
            .join(form)
            .join("_layers/sha256");
        let entries =
            std::fs::read_dir(&layers).with_context(|| format!("list {}", layers.display()))?;
        for entry in entries {
            let digest = entry?.file_name().into_string().ok().context("a digest")?;
            let prefix = digest.get(..2).context("a digest")?;
            let blob = store
                .join("blobs/sha256")
                .join(prefix)
                .join(&digest)
                .join("data");
            let mut file = std::fs::File::open(blob)?;
            std::io::copy(&mut file, &mut std::io::sink())?;
        }
        Ok(())
    }
}

/// The conversion of one of `integration/peers`, whose temporary files go with `root`: one that is killed leaves them.
fn converter(peer: &str, root: &Root) -> Result<Command> {
    let mut convert = Command::new(tools::go_tool(peer)?);
    convert.arg("convert").env("TMPDIR", root.directory("tmp")?);
    Ok(convert)
}

/// First accesses to files of these layers in a log of JSON lines.
fn accesses(log: &str, layers: &BTreeMap<&str, usize>) -> Vec<(usize, String)> {
    let access = |line: &str| {
        let entry: Value = serde_json::from_str(line).ok()?;
        let path = entry["msg"].as_str()?.strip_prefix("file accessed: /")?;
        let layer = layers.get(entry["layer"].as_str()?)?;
        Some((*layer, path.to_owned()))
    };
    log.lines().filter_map(access).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_read_from_the_log_in_order() {
        let log = concat!(
            "not JSON\n",
            r#"{"layer":"sha256:b","level":"debug","msg":"file accessed: /usr/bin/x"}"#,
            "\n",
            r#"{"layer":"sha256:other","level":"debug","msg":"file accessed: /etc/y"}"#,
            "\n",
            r#"{"level":"info","msg":"resolved"}"#,
            "\n",
            r#"{"layer":"sha256:a","level":"debug","msg":"file accessed: /etc/y"}"#,
            "\n",
        );
        let layers = BTreeMap::from([("sha256:a", 0), ("sha256:b", 1)]);
        let found = accesses(log, &layers);
        assert_eq!(
            found,
            [(1, "usr/bin/x".to_owned()), (0, "etc/y".to_owned())]
        );
    }
}
