// SPDX-License-Identifier: Apache-2.0
//! Where a registry's content is asked for: the registry's own endpoint, a mirror, a Dragonfly daemon.

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use url::Url;

use super::hosts::Capabilities;
use super::options::RegistryOptions;
use super::reference::api_host;
use super::transport::{Call, Own};
use super::{RegistryError, Repository};
use crate::source::SourceKind;

/// One place that speaks the distribution API on behalf of a registry.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    pub(super) kind: SourceKind,
    /// The root of its API, without a slash at the end.
    pub(super) base: Url,
    /// The registry's name, which mirrors are told.
    pub(super) namespace: Option<String>,
    /// How it is reached, where that is not as every host is.
    pub(super) own: Own,
    /// Whose credentials it is shown: those of this host, and no others.
    pub(super) account: String,
    /// Whether that host speaks plain HTTP by the administrator's word.
    pub(super) plain: bool,
    /// Longest wait for the head of an answer while others may be asked.
    pub(super) patience: Duration,
    /// What it may be asked for.
    pub(super) can: Capabilities,
    /// Its name in logs and in what is remembered.
    pub(super) label: Arc<str>,
}

impl Endpoint {
    /// The registry's own endpoint.
    ///
    /// **Errors** [`RegistryError::Configuration`] where `host` makes no URL.
    pub(super) fn origin(options: &RegistryOptions, host: &str) -> Result<Self, RegistryError> {
        let plain = options.is_plain(host);
        let scheme = if plain { "http" } else { "https" };
        let text = format!("{scheme}://{}/v2", api_host(host));
        let base = Url::parse(&text).map_err(|error| RegistryError::Configuration {
            host: host.to_owned(),
            problem: format!("no URL: {error}"),
        })?;
        Ok(Endpoint {
            kind: SourceKind::Origin,
            label: base.as_str().into(),
            base,
            namespace: None,
            own: Own::default(),
            account: host.to_owned(),
            plain,
            patience: options.header_timeout,
            can: Capabilities::ALL,
        })
    }

    /// The URL of `rest` (`blobs/…`, `manifests/…`) of the repository.
    ///
    /// **Errors** [`RegistryError::Configuration`].
    pub(super) fn url(&self, place: &Repository, rest: &str) -> Result<Url, RegistryError> {
        let base = self.base.as_str().trim_end_matches('/');
        let text = format!("{base}/{}/{rest}", place.name());
        let mut url = Url::parse(&text).map_err(|error| RegistryError::Configuration {
            host: place.host().to_owned(),
            problem: format!("no URL: {error}"),
        })?;
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    /// A request for `rest` of the repository.
    ///
    /// **Errors** [`RegistryError::Configuration`].
    pub(super) fn call(
        &self,
        method: Method,
        place: &Repository,
        rest: &str,
        what: String,
    ) -> Result<Call, RegistryError> {
        let mut call = Call::new(method, self.url(place, rest)?, what);
        call.own = self.own.clone();
        Ok(call)
    }
}
