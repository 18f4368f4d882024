// SPDX-License-Identifier: Apache-2.0
//! A registry that wants to know who asks: each way of docs/registries.md to tell it makes an image lazy, and without
//! any the image is pulled by whoever is known, and runs.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::registry::Registry;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, images};

const USER: &str = "dev";
const PASSWORD: &str = "pa55:word";
/// `dev:pa55:word` and the password in base64, as headers and files have them.
const ENCODED: [&str; 2] = ["ZGV2OnBhNTU6d29yZA", "cGE1NTp3b3Jk"];

/// An image with one layer that is like no other.
fn push(site: &Site, registry: &Registry, mark: &str) -> Result<String> {
    let root = Attributes::root;
    let mut layer = Layer::new();
    layer
        .directory("bin", root(0o755))?
        .file("bin/busybox", root(0o755), &layout::busybox()?)?
        .symlink("bin/sh", "busybox")?
        .file("mark", root(0o644), mark.as_bytes())?;
    let directory = tempfile::tempdir()?;
    let show = ["/bin/busybox", "cat", "/mark"];
    let layout = layout::write(directory.path(), &mut [layer], &show)?;
    let original = format!("{}/private/{mark}:original", registry.direct());
    images::push_layout_as(&layout, &original, USER, PASSWORD)?;
    let reference = format!("{}/private/{mark}:lazy", registry.host());
    let auth = site.root.join("auth.json")?;
    let host = |host: String| {
        format!("\"{host}\":{{\"username\":\"{USER}\",\"password\":\"{PASSWORD}\"}}")
    };
    let hosts = [host(registry.host()), host(registry.direct())].join(",");
    std::fs::write(&auth, format!("{{\"auths\":{{{hosts}}}}}"))?;
    site.daemon.sluice_ok(&[
        "convert",
        "--auth-file",
        &auth.display().to_string(),
        &format!("docker://{original}"),
        &format!("docker://{reference}"),
    ])?;
    Ok(reference)
}

/// Has the daemon read this section, and look for docker's configuration nowhere but where it says.
fn configure(site: &mut Site, base: &str, registry: &str) -> Result<()> {
    let path = site.root.join("sluice.toml")?;
    std::fs::write(&path, format!("{base}\n[registry]\n{registry}\n"))?;
    site.daemon.stop()?;
    site.daemon_again()
}

/// Pulls it, and says whether it is lazy and why not.
fn pull(site: &Site, namespace: &str, reference: &str) -> Result<(bool, String)> {
    let nerdctl = site.nerdctl(namespace);
    nerdctl.ok(&["pull", "--quiet", reference])?;
    let why = site.why(namespace, reference)?;
    let reason = why.first().context("a layer")?.reason.clone();
    Ok((why.iter().all(|layer| layer.lazy), reason))
}

#[test]
fn every_way_to_be_known_makes_an_image_lazy() -> Result<()> {
    let mut site = Site::start("registries", Release::V1, Line::OPEN, "")?;
    let part = site.root.part("private")?;
    let registry = Registry::start_private(&part, Line::OPEN)?;
    let host = registry.host();
    let nerdctl = site.nerdctl("private");
    let login = ["login", "--username", USER, "--password", PASSWORD, &host];
    nerdctl.ok(&login)?;
    let docker = site.root.directory("docker")?.join("config.json");

    // A Secret as it is mounted, for one part of the registry.
    let secrets = site.root.directory("secrets/team")?;
    let auth = format!(
        "{{\"auths\":{{\"{host}/private\":{{\"auth\":\"{}==\"}}}}}}",
        ENCODED[0]
    );
    std::fs::write(secrets.join(".dockerconfigjson"), auth)?;

    // A plugin as kubelet runs it.
    let plugins = site.root.directory("plugins")?;
    let answer = format!(
        r#"{{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","cacheDuration":"1h","auth":{{"{host}":{{"username":"{USER}","password":"{PASSWORD}"}}}}}}"#
    );
    let plugin = plugins.join("site-provider");
    std::fs::write(&plugin, format!("#!/bin/sh\necho '{answer}'\n"))?;
    std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755))?;
    let hangs = plugins.join("hangs");
    std::fs::write(&hangs, "#!/bin/sh\nsleep 600\n")?;
    std::fs::set_permissions(&hangs, std::fs::Permissions::from_mode(0o755))?;
    let provider = |name: &str| -> Result<String> {
        let file = site.root.join(&format!("{name}.yaml"))?;
        let text = format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n  - name: {name}\n    \
             matchImages:\n      - \"{host}\"\n    defaultCacheDuration: 10m\n    \
             apiVersion: credentialprovider.kubelet.k8s.io/v1\n"
        );
        std::fs::write(&file, text)?;
        Ok(format!(
            "docker_config = \"/nowhere\"\ncredential_provider_config = \"{}\"\n\
             credential_provider_bin_dir = \"{}\"",
            file.display(),
            plugins.display()
        ))
    };
    let ways = [
        (
            "docker",
            format!("docker_config = \"{}\"", docker.display()),
            true,
        ),
        (
            "secret",
            format!(
                "docker_config = \"/nowhere\"\ncredential_files = [\"{}\"]",
                site.root.directory("secrets")?.display()
            ),
            true,
        ),
        ("plugin", provider("site-provider")?, true),
        ("nobody", "docker_config = \"/nowhere\"".to_owned(), false),
        ("hangs", provider("hangs")?, false),
    ];
    let written = std::fs::read_to_string(site.root.join("sluice.toml")?)?;
    let base = written.replace("level = \"info\"", "level = \"trace\"");
    ensure!(base != written, "{written}");
    let mut kept = String::new();
    for (way, section, lazy) in ways {
        let reference = push(&site, &registry, way)?;
        configure(&mut site, &base, &section)?;
        let (is_lazy, reason) = pull(&site, "private", &reference)?;
        println!("{way}: {reason}");
        ensure!(
            is_lazy == lazy,
            "{way}: {reason}\n{}",
            site.daemon.log_tail()
        );
        let run = ["run", "--rm", "--net", "none", &reference];
        let ran = command::run_ok(
            site.nerdctl("private").command()?.args(run),
            Duration::from_secs(60),
        );
        let ran = ran.with_context(|| site.daemon.log_tail())?;
        ensure!(ran.stdout == way, "{way} shows {:?}", ran.stdout);
        kept.push_str(&site.daemon.log());
    }
    // In no line, not even where libraries trace what they send.
    ensure!(kept.contains("TRACE"));
    for secret in [&ENCODED[..], &[PASSWORD]].concat() {
        let mut lines = kept.lines();
        let line = lines.find(|line| line.contains(secret));
        ensure!(line.is_none(), "a secret is logged: {line:?}");
    }
    // What hangs ends with the daemon at the latest.
    site.daemon.stop()?;
    let pattern = hangs.display().to_string();
    let left = Command::new("pgrep").args(["-f", &pattern]).output()?;
    ensure!(left.stdout.is_empty(), "{left:?}");
    Ok(())
}
