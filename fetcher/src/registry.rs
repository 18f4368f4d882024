// SPDX-License-Identifier: Apache-2.0
//! The registry client: OCI distribution specification 1.1, the client's half.
//!
//! Thin by intent (see docs/decisions/002-registry-client.md): one request at a time is built, sent
//! and judged here, so that the rules that keep a node alive can be kept exactly.
//!
//! - **Credentials** are sent only to the host they belong to, and to the token service that this
//!   host names, never along a redirect to another host.
//! - **Redirects** are followed by hand, at most [`MAX_REDIRECTS`] times, never from https to plain
//!   http unless that host is configured as plain.
//! - **401, 403 and an expired redirect** all mean "refresh once".
//! - **Ranges** are single; an answer of 200 is the whole blob, handed on as such and remembered.
//! - **Every wait is bounded**: connect, head of the answer, stalls in the body, the caller's
//!   deadline. 429 and 5xx are retried with growing pauses, `Retry-After` honoured.
//! - **In flight** per host are at most so many requests, of which some are kept for readers.
//!
//! Nothing here is written to disk; a crash leaves at most an unfinished upload at the registry.

use std::fmt;
use std::sync::Arc;

mod blobs;
mod credentials;
mod error;
mod manifests;
mod media;
mod options;
mod reference;
mod upload;

pub use credentials::{Credential, CredentialProvider, DockerConfig, NoCredentials, Secret};
pub use error::RegistryError;
pub use manifests::{FetchedManifest, ManifestBody, Resolved};
pub use media::{MANIFEST_TYPES, is_image_index, is_image_manifest};
pub use options::{HostOptions, RegistryOptions};
pub use reference::{
    DOCKER_HUB, ImageReference, ReferenceError, Repository, api_host, is_plain_http_default,
};
pub use upload::{MountOutcome, Upload};

/// Most redirects followed for one request: registries use one, a proxy in front one more; ten is
/// what browsers and curl users are used to.
pub const MAX_REDIRECTS: usize = 10;

/// A client for any number of registries. Cheap to clone; clones share connections, tokens and limits.
#[derive(Clone)]
pub struct RegistryClient {
    inner: Arc<Inner>,
}

struct Inner {
    options: RegistryOptions,
    credentials: Arc<dyn CredentialProvider>,
}

impl fmt::Debug for RegistryClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryClient").finish_non_exhaustive()
    }
}

impl RegistryClient {
    /// A client with these options, asking `credentials` for what each host needs.
    ///
    /// **Errors** [`RegistryError::Configuration`] when a CA file cannot be read or an option makes no sense.
    pub fn new(
        options: RegistryOptions,
        credentials: Arc<dyn CredentialProvider>,
    ) -> Result<Self, RegistryError> {
        Ok(RegistryClient {
            inner: Arc::new(Inner {
                options,
                credentials,
            }),
        })
    }
}

impl Inner {
    fn unfinished(&self, host: &str) -> RegistryError {
        let _ = (&self.options, &self.credentials);
        RegistryError::Configuration {
            host: host.to_owned(),
            problem: "not supported yet".into(),
        }
    }
}
