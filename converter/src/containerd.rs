// SPDX-License-Identifier: Apache-2.0
//! containerd's services, seen from one namespace: content, image records, leases.
//!
//! What is written is to be written under a lease ([`Containerd::leased`]), or containerd's garbage
//! collection takes it before something names it. A lease that nobody releases expires within a day.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::{AddResourceRequest, CreateRequest, DeleteRequest, Resource};
use prost_types::Timestamp;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::grpc;
use crate::image::ImageError;

mod content;
mod images;

pub(crate) use content::{SOURCE_LABEL_PREFIX, child_labels, is_label};
pub(crate) use images::to_containerd;

/// How long a call may take that moves no content. Prepare may wait for the snapshotter's network
/// budget and for containerd's lock, which its garbage collection holds for a while.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// After this containerd drops what was left behind by who died.
const LEASE_LIFE: Duration = Duration::from_secs(24 * 3600);

/// Why something was not done.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ContainerdError {
    /// containerd refused, or is not there.
    #[error("{action} {what}: containerd: {reason}")]
    Refused {
        /// What was asked.
        action: &'static str,
        /// Of what.
        what: String,
        /// containerd's words.
        reason: String,
    },
    /// What was to be written could not be read.
    #[error(transparent)]
    Source(#[from] ImageError),
}

/// A connection that speaks for one namespace, under a lease or none.
#[derive(Debug, Clone)]
pub(crate) struct Containerd {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
    lease: Option<(String, MetadataValue<Ascii>)>,
}

/// For `map_err`: what was refused.
pub(crate) fn refused(
    action: &'static str,
    what: impl ToString,
) -> impl FnOnce(Status) -> ContainerdError {
    let what = what.to_string();
    move |status| ContainerdError::Refused {
        action,
        what,
        reason: status.message().to_owned(),
    }
}

fn header(name: &'static str, value: &str) -> Result<MetadataValue<Ascii>, ContainerdError> {
    value.parse().map_err(|_| ContainerdError::Refused {
        action: "use",
        what: format!("{name} {value:?}"),
        reason: "not plain ASCII".to_owned(),
    })
}

impl Containerd {
    /// Connects; asks nothing yet.
    pub(crate) async fn connect(socket: &Path, namespace: &str) -> Result<Self, ContainerdError> {
        let channel = grpc::connect(socket).await;
        let channel = channel.map_err(|e| ContainerdError::Refused {
            action: "connect to",
            what: format!("containerd at {}", socket.display()),
            reason: std::error::Error::source(&e).map_or(e.to_string(), ToString::to_string),
        })?;
        let namespace = header("namespace", namespace)?;
        Ok(Self {
            channel,
            namespace,
            lease: None,
        })
    }

    /// The connection, for a client of one of the services.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A call that takes as long as its bytes do.
    pub(crate) fn unlimited<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request
            .metadata_mut()
            .insert("containerd-namespace", self.namespace.clone());
        if let Some((_, lease)) = &self.lease {
            request
                .metadata_mut()
                .insert("containerd-lease", lease.clone());
        }
        request
    }

    /// A call that moves no content.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = self.unlimited(message);
        request.set_timeout(CALL_TIMEOUT);
        request
    }

    /// The same connection under a new lease: what is made over it is kept from garbage collection until
    /// [`Self::release`]. `purpose` begins the lease's name.
    pub(crate) async fn leased(&self, purpose: &str) -> Result<Self, ContainerdError> {
        let now = SystemTime::now();
        let unique = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = format!("{purpose}-{}-{}", std::process::id(), unique.as_nanos());
        let expire = Timestamp::from(now + LEASE_LIFE).to_string();
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expire)]);
        let lease = header("lease", &id)?;
        let request = self.request(CreateRequest {
            id: id.clone(),
            labels,
        });
        let created = LeasesClient::new(self.channel()).create(request).await;
        created.map_err(refused("create", "lease"))?;
        Ok(Self {
            lease: Some((id, lease)),
            ..self.clone()
        })
    }

    /// Keeps content that is there already, or comes, as long as the lease.
    pub(crate) async fn keep(&self, digest: &str) -> Result<(), ContainerdError> {
        let Some((id, _)) = &self.lease else {
            return Ok(());
        };
        let request = self.request(AddResourceRequest {
            id: id.clone(),
            resource: Some(Resource {
                id: digest.to_owned(),
                r#type: "content".to_owned(),
            }),
        });
        let added = LeasesClient::new(self.channel())
            .add_resource(request)
            .await;
        added.map(|_| ()).map_err(refused("lease", digest))
    }

    /// Ends the lease, if there is one.
    pub(crate) async fn release(&self) -> Result<(), ContainerdError> {
        let Some((id, _)) = &self.lease else {
            return Ok(());
        };
        let request = self.request(DeleteRequest {
            id: id.clone(),
            sync: false,
        });
        let deleted = LeasesClient::new(self.channel()).delete(request).await;
        deleted.map(|_| ()).map_err(refused("delete", "lease"))
    }
}
