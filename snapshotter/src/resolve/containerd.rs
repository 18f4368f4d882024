// SPDX-License-Identifier: Apache-2.0
//! containerd's gRPC API as the daemon reads it: contents and images.
//!
//! One channel for all calls; it connects when first used and connects again by itself, so the
//! daemon starts without containerd. Each call carries the namespace and has `rpc_deadline`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use containerd_client::services::v1 as api;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use hyper_util::rt::TokioIo;
use sluice_fetcher::steps::{StepKind, Steps};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

use super::{ContentError, ContentInfo, ContentQuery, ContentReader};

/// The metadata key by which containerd's API tells namespaces apart.
const NAMESPACE_HEADER: &str = "containerd-namespace";
/// Lists of contents may be long: containerd sends them in pages of 100 below this size.
const MESSAGE_CAP_BYTES: usize = 16 << 20;

/// containerd answers from its own database and disk.
const CALL_STEP: StepKind = StepKind::new("containerd call", Duration::from_secs(10));

/// A connection to containerd.
#[derive(Clone, Debug)]
pub struct Containerd {
    channel: Channel,
    address: PathBuf,
    rpc_deadline: Duration,
    steps: Steps,
}

impl Containerd {
    /// Prepares a connection to the socket; nothing is sent yet.
    #[must_use]
    pub fn new(address: &Path, rpc_deadline: Duration) -> Self {
        let path = address.to_owned();
        // The address is only a name: the connector below opens the unix socket.
        let channel = Endpoint::from_static("http://containerd.invalid")
            .connect_timeout(rpc_deadline)
            .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move {
                    Ok::<_, std::io::Error>(TokioIo::new(
                        tokio::net::UnixStream::connect(path).await?,
                    ))
                }
            }));
        Self {
            channel,
            address: address.to_owned(),
            rpc_deadline,
            steps: Steps::new(),
        }
    }

    /// Has calls entered into these steps, which somebody watches.
    #[must_use]
    pub fn watched_by(self, steps: Steps) -> Self {
        Self { steps, ..self }
    }

    /// Where containerd listens.
    #[must_use]
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// The channel, for services that this type does not wrap.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The bound on one call.
    #[must_use]
    pub fn rpc_deadline(&self) -> Duration {
        self.rpc_deadline
    }

    /// A request in a namespace with the deadline set.
    ///
    /// **Errors** a namespace that cannot stand in a header.
    pub fn request<T>(&self, namespace: &str, message: T) -> Result<Request<T>, Status> {
        let mut request = Request::new(message);
        let value = namespace
            .parse()
            .map_err(|_| Status::invalid_argument(format!("namespace {namespace:?}")))?;
        request.metadata_mut().insert(NAMESPACE_HEADER, value);
        request.set_timeout(self.rpc_deadline);
        Ok(request)
    }

    /// The images of a namespace whose names or targets fit containerd's filters.
    ///
    /// **Shape** (name, target digest, target media type).
    pub async fn images(
        &self,
        namespace: &str,
        filters: Vec<String>,
    ) -> Result<Vec<(String, String, String)>, ContentError> {
        let call = async {
            let request = self.request(namespace, api::ListImagesRequest { filters })?;
            let mut client = ImagesClient::new(self.channel());
            Ok(client.list(request).await?.into_inner().images)
        };
        let images = self.bounded("list images", call).await?;
        Ok(images
            .into_iter()
            .filter_map(|image| {
                let target = image.target?;
                Some((image.name, target.digest, target.media_type))
            })
            .collect())
    }

    /// All namespaces.
    pub async fn namespaces(&self) -> Result<Vec<String>, ContentError> {
        let call = async {
            let request = Request::new(api::ListNamespacesRequest {
                filter: String::new(),
            });
            let mut client = api::namespaces_client::NamespacesClient::new(self.channel());
            Ok(client.list(request).await?.into_inner().namespaces)
        };
        let namespaces = self.bounded("list namespaces", call).await?;
        Ok(namespaces
            .into_iter()
            .map(|namespace| namespace.name)
            .collect())
    }

    /// Runs a call within the deadline: tonic's own time-out does not cover a body that stalls.
    pub async fn bounded<T>(
        &self,
        what: &'static str,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, ContentError> {
        self.bounded_by(self.rpc_deadline, what, call).await
    }

    /// As [`Containerd::bounded`], with a deadline of its own.
    pub async fn bounded_by<T>(
        &self,
        deadline: Duration,
        what: &'static str,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, ContentError> {
        let _step = self.steps.enter(CALL_STEP, "sluiced", what);
        match tokio::time::timeout(deadline, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(status)) => {
                let message = format!("{:?}: {}", status.code(), status.message());
                Err(ContentError::Unavailable { what, message })
            }
            Err(_) => {
                let message = format!("no answer within {deadline:?}");
                Err(ContentError::Unavailable { what, message })
            }
        }
    }
}

/// [`ContentReader`] over containerd's content service.
#[derive(Clone, Debug)]
pub struct ContainerdContent {
    containerd: Containerd,
}

impl ContainerdContent {
    /// Reads through this connection.
    #[must_use]
    pub fn new(containerd: Containerd) -> Self {
        Self { containerd }
    }

    fn client(&self) -> ContentClient<Channel> {
        ContentClient::new(self.containerd.channel()).max_decoding_message_size(MESSAGE_CAP_BYTES)
    }
}

/// Quotes a value for containerd's filter syntax.
fn quoted(value: &str) -> String {
    let mut out = String::with_capacity(value.len() + 2);
    out.push('"');
    for c in value.chars() {
        if matches!(c, '"' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
    out
}

fn filter_of(query: ContentQuery<'_>) -> String {
    match query {
        ContentQuery::LabelIs { key, value } => {
            format!("labels.{}=={}", quoted(key), quoted(value))
        }
        ContentQuery::HasLabel(key) => format!("labels.{}", quoted(key)),
    }
}

fn info_of(info: api::Info) -> ContentInfo {
    // Of what was only created some releases say that it was changed in the year 1.
    let times = [info.created_at, info.updated_at].into_iter().flatten();
    let updated = times.filter_map(|at| SystemTime::try_from(at).ok()).max();
    ContentInfo {
        digest: info.digest,
        size_bytes: u64::try_from(info.size).unwrap_or(0),
        labels: info.labels.into_iter().collect(),
        updated,
    }
}

/// `None` for "not found", which is an answer and no failure.
fn found<T>(result: Result<T, Status>) -> Result<Option<T>, Status> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status),
    }
}

#[async_trait]
impl ContentReader for ContainerdContent {
    async fn find(
        &self,
        namespace: &str,
        query: ContentQuery<'_>,
    ) -> Result<Vec<ContentInfo>, ContentError> {
        let call = async {
            let message = api::ListContentRequest {
                filters: vec![filter_of(query)],
            };
            let request = self.containerd.request(namespace, message)?;
            let mut pages = self.client().list(request).await?.into_inner();
            let mut all = Vec::new();
            while let Some(page) = pages.message().await? {
                all.extend(page.info.into_iter().map(info_of));
            }
            Ok(all)
        };
        self.containerd.bounded("list contents", call).await
    }

    async fn info(
        &self,
        namespace: &str,
        digest: &str,
    ) -> Result<Option<ContentInfo>, ContentError> {
        let call = async {
            let message = api::InfoRequest {
                digest: digest.to_owned(),
            };
            let request = self.containerd.request(namespace, message)?;
            found(
                self.client()
                    .info(request)
                    .await
                    .map(|reply| reply.into_inner().info),
            )
        };
        let reply = self.containerd.bounded("stat content", call).await?;
        Ok(reply.flatten().map(info_of))
    }

    async fn read(
        &self,
        namespace: &str,
        digest: &str,
        cap_bytes: usize,
    ) -> Result<Option<Bytes>, ContentError> {
        let range = (0, 0);
        let (bytes, more) = match self.read_range(namespace, digest, range, cap_bytes).await? {
            Some(read) => read,
            None => return Ok(None),
        };
        if more {
            return Err(ContentError::TooLarge {
                digest: digest.to_owned(),
                size_bytes: bytes.len() as u64,
                cap_bytes,
            });
        }
        Ok(Some(bytes))
    }

    async fn read_part(
        &self,
        namespace: &str,
        digest: &str,
        offset: u64,
        bytes: usize,
    ) -> Result<Option<Bytes>, ContentError> {
        let range = (
            i64::try_from(offset).unwrap_or(i64::MAX),
            i64::try_from(bytes).unwrap_or(i64::MAX),
        );
        let read = self.read_range(namespace, digest, range, bytes).await?;
        Ok(read.map(|(bytes, _)| bytes))
    }

    async fn image_names(&self, namespace: &str, host: &str) -> Result<Vec<String>, ContentError> {
        let filters = vec![filter_of_host(host)];
        let images = self.containerd.images(namespace, filters).await?;
        Ok(images.into_iter().map(|(name, ..)| name).collect())
    }
}

/// The images of a host, with a port or without. In a regular expression of containerd's filters.
fn filter_of_host(host: &str) -> String {
    let mut pattern = String::from("^");
    for c in host.chars() {
        if !c.is_ascii_alphanumeric() && c != '-' {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push_str("(:[0-9]+)?/");
    format!("name~={}", quoted(&pattern))
}

impl ContainerdContent {
    /// Reads from the first of `range` on, its second bytes or, for 0, to the end; ends above the cap, and says so.
    async fn read_range(
        &self,
        namespace: &str,
        digest: &str,
        (offset, size): (i64, i64),
        cap_bytes: usize,
    ) -> Result<Option<(Bytes, bool)>, ContentError> {
        let call = async {
            let message = api::ReadContentRequest {
                digest: digest.to_owned(),
                offset,
                size,
            };
            let request = self.containerd.request(namespace, message)?;
            let mut stream = self.client().read(request).await?.into_inner();
            let mut bytes = BytesMut::new();
            while let Some(part) = stream.message().await? {
                bytes.extend_from_slice(&part.data);
                if bytes.len() > cap_bytes {
                    return Ok((bytes.freeze(), true));
                }
            }
            Ok((bytes.freeze(), false))
        };
        // "Not found" comes with the reply or with the first message of the stream.
        let read = async { found(call.await) };
        self.containerd.bounded("read content", read).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_changed_counts_from_its_beginning() {
        let at = |seconds| prost_types::Timestamp { seconds, nanos: 0 };
        let info = |created, updated| api::Info {
            created_at: created,
            updated_at: updated,
            ..api::Info::default()
        };
        let time = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        // The year 1, as Go writes "never".
        let never = Some(at(-62_135_596_800));
        for (created, updated, expected) in [
            (Some(at(7)), never, time(7)),
            (Some(at(7)), Some(at(9)), time(9)),
            (None, Some(at(9)), time(9)),
            (None, None, None),
        ] {
            assert_eq!(info_of(info(created, updated)).updated, expected);
        }
    }

    #[test]
    fn filters_are_quoted_as_containerd_parses_them() {
        let is = ContentQuery::LabelIs {
            key: "a.b/c",
            value: "sha256:00",
        };
        assert_eq!(filter_of(is), r#"labels."a.b/c"=="sha256:00""#);
        assert_eq!(
            filter_of(ContentQuery::HasLabel("x\"y")),
            r#"labels."x\"y""#
        );
    }

    #[test]
    fn a_host_is_no_pattern() {
        assert_eq!(
            filter_of_host("r-1.example"),
            r#"name~="^r-1\\.example(:[0-9]+)?/""#
        );
        assert_eq!(
            filter_of_host("[::1]"),
            r#"name~="^\\[\\:\\:1\\](:[0-9]+)?/""#
        );
    }

    #[tokio::test]
    async fn a_dead_containerd_is_unavailable_within_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let containerd = Containerd::new(&dir.path().join("none.sock"), Duration::from_millis(300));
        let content = ContainerdContent::new(containerd);
        let error = content.info("default", "sha256:00").await.unwrap_err();
        assert!(matches!(
            error,
            ContentError::Unavailable {
                what: "stat content",
                ..
            }
        ));
    }
}
