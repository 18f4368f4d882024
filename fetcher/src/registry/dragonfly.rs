// SPDX-License-Identifier: Apache-2.0
//! A Dragonfly daemon (dfdaemon) as a place to read parts of blobs from.
//!
//! It is used as a registry mirror of its HTTP proxy, which needs no interception of TLS: the request goes
//! to the daemon in plain HTTP, and `X-Dragonfly-Registry` says whose it is. `X-Dragonfly-Use-P2P` makes it a
//! task of its network of nodes whatever its own rules say; the task is the blob, of which the daemon
//! fetches the pieces that the `Range` touches. All other headers, `Authorization` with them, go on to the
//! registry, whose refusals (401 with its challenge) come back.
//!
//! **Source** dfdaemon 1.5, `dragonfly-client/src/proxy/{mod,header,task}.rs`.

use std::sync::Arc;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use super::RegistryError;
use super::endpoint::Endpoint;
use super::hosts::Capabilities;
use super::options::{DragonflyOptions, RegistryOptions};
use super::transport::{Own, endpoint_of};
use crate::source::SourceKind;

const REGISTRY: HeaderName = HeaderName::from_static("x-dragonfly-registry");
const USE_P2P: HeaderName = HeaderName::from_static("x-dragonfly-use-p2p");
const APPLICATION: HeaderName = HeaderName::from_static("x-dragonfly-application");
const TAG: HeaderName = HeaderName::from_static("x-dragonfly-tag");

/// The daemon, on behalf of the registry `host`.
///
/// **Errors** [`RegistryError::Configuration`] where a value cannot stand in a header.
pub(super) fn endpoint(
    options: &RegistryOptions,
    dragonfly: &DragonflyOptions,
    host: &str,
) -> Result<Endpoint, RegistryError> {
    let origin = Endpoint::origin(options, host)?;
    let value = |text: &str| {
        HeaderValue::from_str(text).map_err(|_| RegistryError::Configuration {
            host: host.to_owned(),
            problem: format!("{text:?} cannot stand in a header"),
        })
    };
    let mut headers = HeaderMap::new();
    headers.insert(REGISTRY, value(&endpoint_of(&origin.base))?);
    headers.insert(USE_P2P, HeaderValue::from_static("true"));
    for (name, text) in [(APPLICATION, &dragonfly.application), (TAG, &dragonfly.tag)] {
        if !text.is_empty() {
            headers.insert(name, value(text)?);
        }
    }
    let mut base = dragonfly.endpoint.clone();
    base.set_path("/v2");
    Ok(Endpoint {
        kind: SourceKind::Dragonfly,
        label: Arc::from(format!("dragonfly at {}", endpoint_of(&base))),
        base,
        namespace: None,
        own: Own {
            client: None,
            headers,
        },
        // The registry's: the daemon asks it on our behalf, with what we show.
        account: origin.account,
        plain: origin.plain,
        patience: dragonfly.patience,
        can: Capabilities {
            pull: true,
            resolve: false,
        },
    })
}
