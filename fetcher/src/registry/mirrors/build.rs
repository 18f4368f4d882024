// SPDX-License-Identifier: Apache-2.0
//! Endpoints as a `hosts.toml` describes them. Reads certificates, so it blocks.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use url::Url;

use super::super::RegistryError;
use super::super::endpoint::Endpoint;
use super::super::hosts::{Access, Found, Host, Hosts};
use super::super::reference::{api_host, is_plain_http_default};
use super::super::transport::{Own, base, describe, host_of};
use super::{Endpoints, Mirrors};
use crate::source::SourceKind;

impl Mirrors {
    /// The endpoints of `host`; what is wrong with its file is said in the log, and nothing of the file counts
    /// then. **Blocks.**
    ///
    /// **Errors** where `host` makes no URL.
    pub(super) fn endpoints(&self, host: &str, found: &Found) -> Result<Endpoints, RegistryError> {
        let told = |error: &dyn std::fmt::Display| {
            tracing::warn!(
                file = %found.path.display(), registry = host,
                "use no mirrors, their file is wrong: {error}"
            );
        };
        let built = match &found.hosts {
            Ok(hosts) => self.build(host, hosts).map_err(|error| told(&error)),
            Err(error) => {
                told(error);
                Err(())
            }
        };
        match built {
            Ok(endpoints) => Ok(endpoints),
            Err(()) => self.build(host, &Hosts::default()).map_err(|problem| {
                RegistryError::Configuration {
                    host: host.to_owned(),
                    problem,
                }
            }),
        }
    }

    fn build(&self, host: &str, hosts: &Hosts) -> Result<Endpoints, String> {
        let text = |error: RegistryError| error.to_string();
        let mut mirrors: Vec<_> = self.dragonfly(host).map_err(text)?.into_iter().collect();
        let mut origin = Endpoint::origin(&self.options, host).map_err(text)?;
        for described in &hosts.mirrors {
            if self.is_own(&described.base) || is_same(&described.base, host, &origin.base) {
                continue;
            }
            let mirror = self.host(host, described, SourceKind::Mirror)?;
            mirrors.push(Arc::new(mirror));
        }
        match &hosts.server {
            Some(server) if self.is_own(&server.base) => {}
            // It stands for the registry, which is not asked itself then.
            Some(server) if !is_same(&server.base, host, &origin.base) => {
                origin = self.host(host, server, SourceKind::Origin)?;
            }
            _ => {
                let mut access = hosts.access.clone();
                if let Some((_, configured)) = self.options.host(host) {
                    access.ca.extend(configured.ca_files.iter().cloned());
                    access.skip_verify |= configured.insecure_skip_verify;
                }
                if hosts.access != Access::default() {
                    origin.own = self.own(&origin.base, &access)?;
                }
            }
        }
        Ok(Endpoints {
            mirrors,
            origin: Arc::new(origin),
        })
    }

    fn host(&self, registry: &str, host: &Host, kind: SourceKind) -> Result<Endpoint, String> {
        let of_host = |problem: String| format!("{}: {problem}", host.base);
        Ok(Endpoint {
            kind,
            base: host.base.clone(),
            namespace: Some(registry.to_owned()),
            own: self.own(&host.base, &host.access).map_err(of_host)?,
            account: host_of(&host.base),
            plain: host.base.scheme() == "http",
            patience: self.options.mirrors.patience,
            can: host.can,
            label: host.base.as_str().into(),
        })
    }

    /// How a host is reached.
    fn own(&self, url: &Url, access: &Access) -> Result<Own, String> {
        let headers = access.headers.clone();
        let plain = Access {
            headers: headers.clone(),
            ..Access::default()
        };
        if *access == plain {
            return Ok(Own {
                client: None,
                headers,
            });
        }
        let mut builder = base(&self.options).danger_accept_invalid_certs(access.skip_verify);
        if let Some(timeout) = access.dial_timeout.filter(|it| !it.is_zero()) {
            builder = builder.connect_timeout(timeout.min(self.options.connect_timeout));
        }
        if let Some(proxy) = &access.proxy {
            let proxy = reqwest::Proxy::all(proxy.clone())
                .map_err(|error| format!("proxy: {}", describe(&error)))?;
            // It is for this host whatever the environment says.
            builder = builder.no_proxy().proxy(proxy);
        } else if is_plain_http_default(&host_of(url)) {
            builder = builder.no_proxy();
        }
        for path in &access.ca {
            let refuse = |problem: &str| format!("ca: {}: {problem}", path.display());
            let certificates = reqwest::Certificate::from_pem_bundle(&read("ca", path)?)
                .map_err(|error| refuse(&describe(&error)))?;
            if certificates.is_empty() {
                return Err(refuse("holds no certificate"));
            }
            for certificate in certificates {
                builder = builder.add_root_certificate(certificate);
            }
        }
        // The HTTP library shows one certificate; which of several a host wants is not known beforehand.
        if let Some((certificate, key)) = access.client.first() {
            let mut pem = read("client", certificate)?;
            if let Some(key) = key {
                pem.push(b'\n');
                pem.extend(read("client", key)?);
            }
            let identity = reqwest::Identity::from_pem(&pem).map_err(|_| {
                let path = certificate.display();
                format!("client: {path}: no certificate with its private key")
            })?;
            builder = builder.identity(identity);
        }
        let client = builder.build().map_err(|error| describe(&error))?;
        Ok(Own {
            client: Some(client),
            headers,
        })
    }
}

fn read(key: &str, path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{key}: {}: {error}", path.display()))
}

/// Whether a URL is that of the registry itself: what it is called, or where its API is.
fn is_same(base: &Url, host: &str, origin: &Url) -> bool {
    let own = if base.scheme() == "http" {
        ":80"
    } else {
        ":443"
    };
    let named = host_of(base);
    let is = |text: &str| named == text.strip_suffix(own).unwrap_or(text);
    // `https://docker.io` stands in containerd's examples.
    base.path() == "/v2" && base.scheme() == origin.scheme() && (is(host) || is(api_host(host)))
}
