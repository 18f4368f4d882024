// SPDX-License-Identifier: Apache-2.0
//! What the pages for users tell them to type does what they say: each block is run as it stands, on a new machine.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::root::Root;
use sluice_integration::harness::tools;
use sluice_integration::harness::world::{self, Site, Step};
use sluice_integration::pages::{self, Block, Kind};

/// All steps of one machine.
const DEADLINE: Duration = Duration::from_secs(180);
/// Machines: each waits for its disk and its processes more than it computes.
const AT_ONCE: usize = 2;

/// What is typed otherwise than it stands in a page: the text, what is typed, and why.
const SUBSTITUTIONS: &[(&str, &str, &str)] = &[
    (
        "make install",
        "make --silent --directory @CHECKOUT@ place BUILT=@BUILT@",
        "what was built for tests is installed; an optimized build takes minutes",
    ),
    (
        "sluice setup containerd",
        "sluice setup containerd --yes",
        "nobody sits at a terminal to answer",
    ),
];

/// A page, and which of its sections are somebody's to follow; `None`: all.
const PAGES: &[(&str, Option<&[&str]>)] = &[
    (
        README,
        Some(&[
            "Quick start: nerdctl",
            "Quick start: Kubernetes",
            "Quick start: a cluster",
            "Quick start: a mirror for ordinary pulls",
        ]),
    ),
    (NERDCTL, None),
    (CTR, None),
    (KUBERNETES, None),
    (DOCKER, None),
    (REGISTRIES, None),
    (MIRROR, None),
    (IMAGES, None),
];

const README: &str = "README.md";
const NERDCTL: &str = "docs/clients/nerdctl.md";
const CTR: &str = "docs/clients/ctr.md";
const KUBERNETES: &str = "docs/clients/kubernetes.md";
const DOCKER: &str = "docs/clients/docker.md";
const REGISTRIES: &str = "docs/registries.md";
const MIRROR: &str = "docs/mirror.md";
const IMAGES: &str = "docs/images.md";

/// A reader who follows some sections, one after the other, on a machine of his own.
struct Reader {
    release: Release,
    site: Site,
    /// What the pages say that he has: typed after the first section.
    has: &'static str,
    /// Page and section.
    sections: &'static [(&'static str, &'static str)],
    /// What must hold at the end.
    then: &'static str,
}

const SET_UP: (&str, &str) = (NERDCTL, "Set up a host");

impl Reader {
    const fn new(
        release: Release,
        site: Site,
        sections: &'static [(&'static str, &'static str)],
    ) -> Self {
        Self {
            release,
            site,
            has: "",
            sections,
            then: "",
        }
    }

    const fn who_has(self, has: &'static str) -> Self {
        Self { has, ..self }
    }

    const fn then(self, then: &'static str) -> Self {
        Self { then, ..self }
    }
}

/// In a registry: the image, converted.
const CONVERTED: &str =
    "sluice convert registry.example/team/app:v1 registry.example/team/app:v1-sluice";
/// The same where the registry wants to know who asks, by somebody else; and the password.
const CONVERTED_PRIVATELY: &str = r#"
PASSWORD=pa55:word
echo '{"auths":{"registry.example":{"username":"dev","password":"pa55:word"}}}' >/machine/auth.json
sluice convert --auth-file /machine/auth.json registry.example/team/app:v1 registry.example/team/app:v1-sluice
printf 'runtime-endpoint: unix:///run/containerd/containerd.sock\n' >/etc/crictl.yaml
"#;
/// A plugin of kubelet.
const PLUGIN: &str = r#"
plugins=/usr/libexec/kubernetes/kubelet-plugins/credential-provider/exec
mkdir -p $plugins /etc/kubernetes
cat >$plugins/site-provider <<'PROVIDER'
#!/bin/sh
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","cacheDuration":"1h","auth":{"registry.example":{"username":"dev","password":"pa55:word"}}}'
PROVIDER
chmod 755 $plugins/site-provider
PASSWORD=pa55:word
echo '{"auths":{"registry.example":{"username":"dev","password":"pa55:word"}}}' >/machine/auth.json
sluice convert --auth-file /machine/auth.json registry.example/team/app:v1 registry.example/team/app:v1-sluice
printf 'runtime-endpoint: unix:///run/containerd/containerd.sock\n' >/etc/crictl.yaml
"#;
/// The registry with a certificate of an authority of its own.
const AUTHORITY: &str = "sluice convert --ca-file registry.example:5000=ca.pem \
  registry.example:5000/team/app:v1 registry.example:5000/team/app:v1-sluice";

use Release::{V1, V2};

const ALL_OF_NERDCTL: &[(&str, &str)] = &[
    SET_UP,
    (NERDCTL, "Run an image lazily"),
    (NERDCTL, "For good"),
    (NERDCTL, "Commit, push, save"),
    (NERDCTL, "Converting in place"),
    (NERDCTL, "Back to before"),
];

const READERS: &[Reader] = &[
    Reader::new(V2, Site::Open, ALL_OF_NERDCTL),
    Reader::new(V1, Site::Open, ALL_OF_NERDCTL),
    Reader::new(
        V2,
        Site::Open,
        &[
            SET_UP,
            (CTR, "ctr"),
            (CTR, "containerd 2"),
            (CTR, "Looking into an image"),
            (CTR, "User namespaces"),
        ],
    ),
    Reader::new(
        V1,
        Site::Open,
        &[SET_UP, (CTR, "ctr"), (CTR, "containerd 1")],
    ),
    Reader::new(
        V2,
        Site::Open,
        &[
            (KUBERNETES, "Set up a node"),
            (KUBERNETES, "See that it works"),
        ],
    ),
    Reader::new(
        V1,
        Site::Open,
        &[
            (KUBERNETES, "Set up a node"),
            (KUBERNETES, "See that it works"),
        ],
    ),
    Reader::new(V2, Site::Private, &[SET_UP, (REGISTRIES, "docker login")])
        .who_has(CONVERTED_PRIVATELY),
    Reader::new(
        V2,
        Site::Private,
        &[
            (KUBERNETES, "Set up a node"),
            (REGISTRIES, "A Kubernetes Secret"),
        ],
    )
    .who_has(CONVERTED_PRIVATELY),
    Reader::new(
        V2,
        Site::Private,
        &[
            (KUBERNETES, "Set up a node"),
            (REGISTRIES, "kubelet's credential providers"),
        ],
    )
    .who_has(PLUGIN),
    Reader::new(
        V2,
        Site::Authority,
        &[
            SET_UP,
            (REGISTRIES, "A private certificate authority"),
            (REGISTRIES, "For the daemon alone"),
            (REGISTRIES, "Ports"),
        ],
    )
    .who_has(AUTHORITY),
    Reader::new(V2, Site::Cached, &[SET_UP, (REGISTRIES, "A mirror")]).who_has(CONVERTED),
    Reader::new(V2, Site::Open, &[SET_UP, (REGISTRIES, "A proxy")])
        .who_has(
            "sluice convert registry.example/team/app:v1 registry.example/team/app:v1-sluice
             connect-proxy 127.0.0.1:3128 >/machine/proxy.txt &",
        )
        .then("grep 'connected registry.example:443' /machine/proxy.txt"),
    Reader::new(
        V2,
        Site::Open,
        &[
            (README, "Quick start: nerdctl"),
            (README, "Quick start: a cluster"),
            (README, "Quick start: a mirror for ordinary pulls"),
        ],
    ),
    Reader::new(V1, Site::Open, &[(README, "Quick start: Kubernetes")]).then("sluice doctor --cri"),
    Reader::new(
        V2,
        Site::Open,
        &[
            SET_UP,
            (MIRROR, "The mirror for ordinary pulls"),
            (MIRROR, "containerd, nerdctl, Kubernetes"),
            (MIRROR, "podman and skopeo"),
        ],
    ),
];

/// The blocks of a page that somebody is to follow.
fn read(page: &str) -> Result<Vec<Block>> {
    let (_, sections) = PAGES
        .iter()
        .find(|(name, _)| *name == page)
        .context("a page")?;
    let text = std::fs::read_to_string(tools::workspace().join(page))?;
    let strict = |section: &str| sections.is_none_or(|it| it.contains(&section));
    pages::blocks(&text, strict).with_context(|| page.to_owned())
}

/// The image that pages call `registry.example/team/app:v1`.
fn image(directory: &Path) -> Result<()> {
    let root = Attributes::root;
    let mut programs = Layer::new();
    programs
        .directory("bin", root(0o755))?
        .file("bin/busybox", root(0o755), &layout::busybox()?)?
        .symlink("bin/sh", "busybox")?
        .symlink("bin/touch", "busybox")?;
    let mut data = Layer::new();
    let model: Vec<u8> = (0..400_000_u32)
        .flat_map(|it| it.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    data.directory("srv", root(0o755))?
        .file("srv/hello", root(0o644), b"hello from app\n")?
        .file("srv/model", root(0o644), &model)?;
    let command = ["/bin/busybox", "cat", "/srv/hello"];
    layout::write(directory, &mut [programs, data], &command)?;
    Ok(())
}

/// What is typed for this text, and which substitutions were made.
fn typed(text: &str, used: &mut BTreeSet<&'static str>) -> Result<String> {
    let program = tools::binary("sluiced")?;
    let built = program.parent().context("program has a directory")?;
    let mut text = text.to_owned();
    for (written, instead, _) in SUBSTITUTIONS {
        if text.contains(written) {
            used.insert(written);
            let instead = instead
                .replace("@CHECKOUT@", &tools::workspace().display().to_string())
                .replace("@BUILT@", &built.display().to_string());
            text = text.replace(written, &instead);
        }
    }
    Ok(text)
}

/// Follows the sections; says what was done, and what of it was not as the pages say.
fn follow(reader: &Reader, root: &Root, used: &mut BTreeSet<&'static str>) -> Result<()> {
    let mut steps = Vec::new();
    // Of each step its place in a page, and what it is to print.
    let mut done: Vec<(String, Option<String>)> = Vec::new();
    let also = |place: &str, typed: &str, steps: &mut Vec<Step>, done: &mut Vec<_>| {
        if !typed.is_empty() {
            println!("{place}, typed: {typed}");
            steps.push(Step::Type(format!("{typed}\n")));
            done.push((place.to_owned(), None));
        }
    };
    for (at, (page, section)) in reader.sections.iter().enumerate() {
        if at == 1 {
            also("what the reader has", reader.has, &mut steps, &mut done);
        }
        let blocks = read(page)?;
        ensure!(
            blocks.iter().any(|it| it.section == *section),
            "{page} has nothing to do in a section {section:?}"
        );
        for block in blocks.into_iter().filter(|it| it.section == *section) {
            let place = format!("{page}:{}", block.line);
            if block.not_run.is_some() {
                continue;
            }
            match block.kind {
                Kind::Run => steps.push(Step::Type(typed(&block.text, used)?)),
                Kind::File(path) => steps.push(Step::Write {
                    path,
                    text: block.text,
                }),
                Kind::Printed => {
                    let (_, shown) = done.last_mut().context("something was run")?;
                    *shown = Some(block.text);
                    continue;
                }
            }
            done.push((place, None));
        }
    }
    also("what must hold", reader.then, &mut steps, &mut done);
    let start = Instant::now();
    let outcome = world::run(root, reader.release, reader.site, image, &steps, DEADLINE)?;
    let release = reader.release.name();
    println!(
        "{release}, registry {}: {} of {} blocks in {:.1} s",
        reader.site.name(),
        outcome.printed.len(),
        steps.len(),
        start.elapsed().as_secs_f64()
    );
    let mut wrong = Vec::new();
    for (at, ((place, shown), printed)) in done.iter().zip(&outcome.printed).enumerate() {
        let last = at + 1 == outcome.printed.len();
        if last && outcome.failed {
            let what = &steps[at];
            wrong.push(format!(
                "{place} failed on {release}: {what:?}\n{printed}\n{}",
                outcome.logs
            ));
        } else if let Some(shown) = shown
            && !pages::is_as_shown(shown, printed)
        {
            wrong.push(format!(
                "{place} on {release} does not print what the page shows, but:\n{printed}"
            ));
        }
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n\n"));
    }
    ensure!(outcome.printed.len() == steps.len(), "not all was done");
    Ok(())
}

#[test]
fn what_pages_tell_to_type_does_what_they_say() -> Result<()> {
    let only = std::env::var("SLUICE_DOCS_SECTION").ok();
    let wanted = |reader: &&Reader| {
        let mut sections = reader.sections.iter();
        only.as_ref()
            .is_none_or(|only| sections.any(|(_, section)| section == only))
    };
    let readers: Vec<&Reader> = READERS.iter().filter(wanted).collect();
    ensure!(!readers.is_empty(), "nobody follows {only:?}");
    let root = Root::new("docs")?;
    let next = AtomicUsize::new(0);
    let results = std::thread::scope(|scope| {
        let work = || {
            let mut done = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(reader) = readers.get(at) else {
                    break done;
                };
                let mut used = BTreeSet::new();
                let part = root.part(&format!("{at}"));
                let followed = part.and_then(|part| follow(reader, &part, &mut used));
                done.push((used, followed));
            }
        };
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended.collect::<Vec<_>>()
    });
    let mut used = BTreeSet::new();
    let mut wrong = Vec::new();
    for done in results {
        for (substitutions, followed) in done.unwrap_or_else(|e| std::panic::resume_unwind(e)) {
            used.extend(substitutions);
            wrong.extend(followed.err().map(|e| format!("{e:#}")));
        }
    }
    for (written, instead, why) in SUBSTITUTIONS {
        println!("typed otherwise: `{written}` as `{instead}`: {why}");
        if only.is_none() && wrong.is_empty() && !used.contains(written) {
            wrong.push(format!("nothing says `{written}` any more"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    Ok(())
}

#[test]
fn every_block_is_somebodys_to_follow_or_says_why_not() -> Result<()> {
    let mut left = Vec::new();
    for (page, _) in PAGES {
        let (mut run, mut written, mut shown) = (0, 0, 0);
        for block in read(page)? {
            let place = format!("{page}:{}", block.line);
            if let Some(reason) = &block.not_run {
                println!("{place}: not run: {reason}");
                continue;
            }
            let here = (*page, block.section.as_str());
            if !READERS.iter().any(|reader| reader.sections.contains(&here)) {
                left.push(format!("{place}: in {:?}", block.section));
            }
            match block.kind {
                Kind::Run => run += 1,
                Kind::File(_) => written += 1,
                Kind::Printed => shown += 1,
            }
        }
        println!("{page}: {run} blocks run, {written} files written, {shown} outputs compared");
    }
    ensure!(left.is_empty(), "nobody follows {left:#?}");
    Ok(())
}
