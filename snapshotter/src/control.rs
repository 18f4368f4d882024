// SPDX-License-Identifier: Apache-2.0
//! The control service: what the command line asks of the daemon, on `control.sock` (mode 0600).
//!
//! Answers come from the metadata store and the chunk store; containerd is asked for image names, with
//! a deadline, and its absence only leaves names out. Nothing here runs inside a snapshots RPC.

mod boot;
mod cache;
mod content;
mod examine;
mod images;
pub mod ingest;
mod nodes;
mod prewarm;
mod status;
mod why;

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use sluice_fetcher::cluster::node::View;
use sluice_fetcher::registry::{RegistryClient, RegistryError};
use sluice_proto::control::control_server::{Control, ControlServer};
use sluice_proto::control::{
    CacheRequest, CacheResponse, CompleteContentProgress, CompleteContentRequest, EvictRequest,
    EvictResponse, ExamineRequest, LearnedBootListsRequest, LearnedBootListsResponse, NodesRequest,
    NodesResponse, PinRequest, PinResponse, PrewarmRequest, StatusRequest, StatusResponse,
    WhyRequest, WhyResponse,
};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

use crate::lazy::{CacheError, Lazy};
use crate::mount::attached::AttachedMount;
use crate::mount::choice::Abilities;
use crate::prewarm::Prewarms;
use crate::resolve::{Containerd, ContentError, ContentReader, ResolveError};
use crate::run::MirrorSide;
use crate::store::StoreError;

/// Why a request of the command line fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// No image fits.
    #[error("no image {0:?} in containerd")]
    NoImage(String),
    /// containerd could not be asked.
    #[error(transparent)]
    Containerd(#[from] ContentError),
    /// The image cannot be resolved.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The metadata store failed.
    #[error("read metadata: {0}")]
    Metadata(#[from] StoreError),
    /// A blob could not be put into containerd's content store.
    #[error(transparent)]
    Ingest(#[from] ingest::IngestError),
    /// The chunk store could not be looked at.
    #[error("look at the store: {0}")]
    Cache(#[from] CacheError),
    /// The image has no lazy layers.
    #[error("nothing of {0:?} is lazy here: `sluice why` says why not")]
    NotLazy(String),
    /// The image has no pin.
    #[error("{0:?} is not pinned")]
    NotPinned(String),
    /// Nobody is known who has the blob.
    #[error("no registry is known that has blob {0}")]
    NoSource(String),
    /// A digest in a request is malformed.
    #[error("{0:?} is no sha256 digest")]
    Request(String),
    /// A digest in a manifest is malformed.
    #[error("manifest names a layer {0:?}, which is no sha256 digest")]
    Digest(String),
    /// An image to prewarm is no reference.
    #[error("{image:?} is no image reference: {problem}")]
    Reference {
        /// As it came.
        image: String,
        /// What is wrong.
        problem: String,
    },
    /// What to prewarm of an image is not known.
    #[error("scope {0:?}: want \"full\" or \"boot\"")]
    Scope(String),
    /// Nodes are meant that are not there.
    #[error(transparent)]
    Nodes(crate::prewarm::others::SelectionError),
    /// The registry does not say what an image is.
    #[error(transparent)]
    Registry(Box<RegistryError>),
    /// Too much is under way.
    #[error("{0}")]
    Busy(String),
    /// The daemon stops.
    #[error("the daemon stops")]
    Stopping,
}

/// One place where our failures become gRPC's.
fn status_of(error: &ControlError) -> Status {
    let message = error.to_string();
    match error {
        ControlError::NoImage(_) | ControlError::NotPinned(_) => Status::not_found(message),
        ControlError::Containerd(ContentError::Unavailable { .. })
        | ControlError::Resolve(ResolveError::Content(ContentError::Unavailable { .. }))
        | ControlError::Ingest(ingest::IngestError::Containerd(_))
        | ControlError::Stopping => Status::unavailable(message),
        ControlError::Ingest(ingest::IngestError::Source { .. }) => Status::unavailable(message),
        ControlError::Ingest(ingest::IngestError::Digest { .. }) => Status::data_loss(message),
        ControlError::Containerd(_) | ControlError::Resolve(ResolveError::Content(_)) => {
            Status::data_loss(message)
        }
        ControlError::Request(_) | ControlError::Reference { .. } | ControlError::Scope(_) => {
            Status::invalid_argument(message)
        }
        ControlError::Nodes(_) | ControlError::NotLazy(_) => Status::failed_precondition(message),
        ControlError::Registry(error) if prewarm::is_unknown(error) => Status::not_found(message),
        ControlError::Registry(_) => Status::unavailable(message),
        ControlError::Busy(_) => Status::resource_exhausted(message),
        ControlError::Resolve(_) | ControlError::NoSource(_) | ControlError::Digest(_) => {
            Status::failed_precondition(message)
        }
        ControlError::Ingest(_) | ControlError::Metadata(_) | ControlError::Cache(_) => {
            Status::internal(message)
        }
    }
}

/// What the control service answers for.
#[derive(Debug)]
pub struct ControlParts {
    /// The lazy layers.
    pub lazy: Lazy,
    /// The shim.
    pub shim: Arc<AttachedMount>,
    /// What the kernel serves.
    pub abilities: Abilities,
    /// containerd, for names of images.
    pub containerd: Containerd,
    /// Who is in the cluster; `None`: the node is in none.
    pub cluster: Option<watch::Receiver<Arc<View>>>,
    /// The mirror; `None`: none is configured.
    pub mirror: Option<MirrorSide>,
    /// Images that are being brought.
    pub prewarms: Prewarms,
    /// The registries.
    pub client: RegistryClient,
    /// The directory of sockets.
    pub run_dir: PathBuf,
}

/// The control service.
#[derive(Clone, Debug)]
pub struct ControlService {
    lazy: Lazy,
    shim: Arc<AttachedMount>,
    /// What the kernel serves.
    abilities: Abilities,
    containerd: Containerd,
    content: Arc<dyn ContentReader>,
    cluster: Option<watch::Receiver<Arc<View>>>,
    mirror: Option<MirrorSide>,
    prewarms: Prewarms,
    client: RegistryClient,
    run_dir: PathBuf,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl ControlService {
    /// Answers for these lazy layers, for the cluster that the node is in, and for its mirror.
    #[must_use]
    pub fn new(parts: ControlParts, stop: CancellationToken) -> Self {
        let ControlParts {
            lazy,
            shim,
            abilities,
            containerd,
            cluster,
            mirror,
            prewarms,
            client,
            run_dir,
        } = parts;
        let content = Arc::clone(&lazy.parts().content);
        Self {
            lazy,
            shim,
            abilities,
            containerd,
            content,
            cluster,
            mirror,
            prewarms,
            client,
            run_dir,
            tasks: TaskTracker::new(),
            stop,
        }
    }

    /// Serves until the daemon stops, and ends what runs then.
    pub async fn serve(self, listener: UnixListener) -> Result<(), tonic::transport::Error> {
        let (stop, tasks) = (self.stop.clone(), self.tasks.clone());
        let served = tonic::transport::Server::builder()
            .add_service(ControlServer::new(self))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
                stop.cancelled().await;
            })
            .await;
        tasks.close();
        tasks.wait().await;
        served
    }

    /// Runs a metadata transaction on a blocking thread.
    async fn metadata<T: Send + 'static>(
        &self,
        work: impl FnOnce(&crate::store::MetadataStore) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, ControlError> {
        let metadata = Arc::clone(&self.lazy.parts().metadata);
        let done = tokio::task::spawn_blocking(move || work(&metadata)).await;
        Ok(done.map_err(|_| ControlError::Stopping)??)
    }
}

type ProgressStream =
    Pin<Box<dyn Stream<Item = Result<CompleteContentProgress, Status>> + Send + 'static>>;

#[tonic::async_trait]
impl Control for ControlService {
    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        let answer = self.status(&request.into_inner().r#match).await;
        answer.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn why(&self, request: Request<WhyRequest>) -> Result<Response<WhyResponse>, Status> {
        let WhyRequest { image, namespace } = request.into_inner();
        let answer = self.why(&image, &namespace).await;
        answer.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn nodes(&self, _: Request<NodesRequest>) -> Result<Response<NodesResponse>, Status> {
        let view = self.cluster.as_ref().map(|view| Arc::clone(&view.borrow()));
        Ok(Response::new(nodes::nodes_of(view.as_deref())))
    }

    async fn learned_boot_lists(
        &self,
        request: Request<LearnedBootListsRequest>,
    ) -> Result<Response<LearnedBootListsResponse>, Status> {
        let answer = self.learned_boot_lists(&request.into_inner()).await;
        answer.map(Response::new).map_err(|error| status_of(&error))
    }

    type PrewarmStream = prewarm::PrewarmStream;

    async fn prewarm(
        &self,
        request: Request<PrewarmRequest>,
    ) -> Result<Response<prewarm::PrewarmStream>, Status> {
        let begun = self.prewarm(request.into_inner()).await;
        begun.map(Response::new).map_err(|error| status_of(&error))
    }

    type ExamineStream = examine::ExamineStream;

    async fn examine(
        &self,
        request: Request<ExamineRequest>,
    ) -> Result<Response<examine::ExamineStream>, Status> {
        Ok(Response::new(self.examine(request.into_inner())))
    }

    async fn cache(&self, _: Request<CacheRequest>) -> Result<Response<CacheResponse>, Status> {
        let answer = self.cache().await;
        answer.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn evict(
        &self,
        request: Request<EvictRequest>,
    ) -> Result<Response<EvictResponse>, Status> {
        let answer = self.evict(request.into_inner()).await;
        answer.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn pin(&self, request: Request<PinRequest>) -> Result<Response<PinResponse>, Status> {
        let answer = self.pin(request.into_inner()).await;
        answer.map(Response::new).map_err(|error| status_of(&error))
    }

    type CompleteContentStream = ProgressStream;

    async fn complete_content(
        &self,
        request: Request<CompleteContentRequest>,
    ) -> Result<Response<ProgressStream>, Status> {
        let CompleteContentRequest { image, namespace } = request.into_inner();
        Ok(Response::new(
            self.clone().complete_content(image, namespace),
        ))
    }
}
