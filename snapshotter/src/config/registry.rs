// SPDX-License-Identifier: Apache-2.0
//! `[registry]` as meant: credentials, hosts, and where else content may be read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sluice_fetcher::registry::is_plain_http_default;
use url::Url;

use super::written::{Dragonfly, Registry};
use super::{Check, ConfigError, is_host};

/// What is known of one registry host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryHost {
    /// Plain HTTP; `None`: for this machine's own addresses only.
    pub plain_http: Option<bool>,
    /// Accept any certificate.
    pub insecure_skip_verify: bool,
    /// PEM files of further certificate authorities.
    pub ca_files: Vec<PathBuf>,
}

/// A Dragonfly daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DragonflyConfig {
    /// The address of its HTTP proxy.
    pub endpoint: Url,
    /// The application of its tasks; empty: none.
    pub application: String,
    /// The tag of its tasks; empty: none.
    pub tag: String,
    /// Longest wait for the head of an answer.
    pub timeout: Duration,
}

/// kubelet's credential provider plugins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialProviders {
    /// kubelet's `--image-credential-provider-config`.
    pub config: PathBuf,
    /// kubelet's `--image-credential-provider-bin-dir`.
    pub bin_dir: PathBuf,
}

/// Where images are read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryConfig {
    /// Docker's `config.json` with credentials; `None`: where docker itself looks.
    pub docker_config: Option<PathBuf>,
    /// Further files like it, and directories of such.
    pub credential_files: Vec<PathBuf>,
    /// kubelet's plugins, if they are used.
    pub credential_providers: Option<CredentialProviders>,
    /// Directories with a `hosts.toml` for each registry.
    pub hosts_dirs: Vec<PathBuf>,
    /// The Dragonfly daemon, if parts of blobs are read through it.
    pub dragonfly: Option<DragonflyConfig>,
    /// By `host[:port]`.
    pub hosts: BTreeMap<String, RegistryHost>,
}

impl Registry {
    /// Turns what is written into what is meant. The keys of an engine are checked whether it is on or not.
    pub(super) fn validate(self, check: &Check<'_>) -> Result<RegistryConfig, ConfigError> {
        let Registry {
            docker_config,
            credential_files,
            credential_provider_config,
            credential_provider_bin_dir,
            hosts_dirs,
            engine,
            dragonfly,
            hosts,
        } = self;
        let hosts = hosts.into_iter().map(|(host, written)| {
            check.value("registry.hosts", &host, is_host)?;
            for file in &written.ca_files {
                check.absolute("registry.hosts.*.ca_files", file)?;
            }
            let known = RegistryHost {
                plain_http: written.plain_http,
                insecure_skip_verify: written.insecure_skip_verify,
                ca_files: written.ca_files,
            };
            Ok((host, known))
        });
        let hosts = hosts.collect::<Result<_, ConfigError>>()?;
        let docker_config = PathBuf::from(docker_config);
        let docker_config = (!docker_config.as_os_str().is_empty()).then_some(docker_config);
        if let Some(file) = &docker_config {
            check.absolute("registry.docker_config", file)?;
        }
        for file in &credential_files {
            check.absolute("registry.credential_files", file)?;
        }
        let credential_providers = providers(
            check,
            &credential_provider_config,
            &credential_provider_bin_dir,
        )?;
        for directory in &hosts_dirs {
            check.absolute("registry.hosts_dirs", directory)?;
        }
        let dragonfly = dragonfly.validate(check)?;
        let on = check.value("registry.engine", &engine, |engine| match engine {
            "" => Ok(false),
            "dragonfly" => Ok(true),
            _ => Err("want \"dragonfly\", or nothing for none".to_owned()),
        })?;
        Ok(RegistryConfig {
            docker_config,
            credential_files,
            credential_providers,
            hosts_dirs,
            dragonfly: on.then_some(dragonfly),
            hosts,
        })
    }
}

/// Both keys, or neither.
fn providers(
    check: &Check<'_>,
    config: &str,
    bin_dir: &str,
) -> Result<Option<CredentialProviders>, ConfigError> {
    let keys = [
        ("registry.credential_provider_config", config),
        ("registry.credential_provider_bin_dir", bin_dir),
    ];
    if keys.iter().all(|(_, value)| value.is_empty()) {
        return Ok(None);
    }
    for (key, value) in keys {
        check.value(key, value, |value| match value.is_empty() {
            true => Err("want both credential_provider_config and _bin_dir, or neither".to_owned()),
            false => Ok(()),
        })?;
        check.absolute(key, Path::new(value))?;
    }
    Ok(Some(CredentialProviders {
        config: config.into(),
        bin_dir: bin_dir.into(),
    }))
}

impl Dragonfly {
    fn validate(self, check: &Check<'_>) -> Result<DragonflyConfig, ConfigError> {
        let Dragonfly {
            endpoint,
            application,
            tag,
            timeout,
        } = self;
        for (key, text) in [
            ("registry.dragonfly.application", &application),
            ("registry.dragonfly.tag", &tag),
        ] {
            check.value(key, text, |text| {
                match text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
                    true => Ok(()),
                    false => Err("want printable ASCII: it stands in a header".to_owned()),
                }
            })?;
        }
        Ok(DragonflyConfig {
            endpoint: check.value("registry.dragonfly.endpoint", &endpoint, proxy)?,
            application,
            tag,
            timeout: check.nonzero("registry.dragonfly.timeout", &timeout)?,
        })
    }
}

/// The address of a proxy that is shown the registries' credentials: on this machine, or with TLS.
fn proxy(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| error.to_string())?;
    let bare = matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none();
    let host = url.host_str().unwrap_or_default();
    if !matches!(url.scheme(), "http" | "https") || host.is_empty() || !bare {
        Err("want http://<host>:<port>".to_owned())
    } else if !url.username().is_empty() || url.password().is_some() {
        Err("credentials do not belong into a URL".to_owned())
    } else if url.scheme() == "http" && !is_plain_http_default(host) {
        Err("want a loopback address, or https: credentials of registries go there".to_owned())
    } else {
        Ok(url)
    }
}
