// SPDX-License-Identifier: Apache-2.0
//! Every message through a real client and a unix socket.

use std::path::PathBuf;
use std::result::Result;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_snapshots::api::snapshots::v1::snapshots_client::SnapshotsClient;
use containerd_snapshots::api::snapshots::v1::{self as api, Kind};
use containerd_snapshots::tonic::transport::{Channel, Endpoint, Uri};
use containerd_snapshots::tonic::{Code, Status};
use sluice_blockindex::digest::{BlobDigest, ChainId, DiffId, IndexDigest};
use tempfile::TempDir;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use super::*;
use crate::snapshots::{
    LABEL_SNAPSHOT_REF, LazyDecision, LazyLayerRecord, LazyLayers, MountError, OverlayOptions,
    PrepareRequest, SnapshotDirectories, SnapshotOptions, SnapshotRecord, Usage,
};
use crate::store::MetadataStore;

/// Everything that asks is lazy.
#[derive(Debug)]
struct AlwaysLazy;

#[async_trait]
impl LazyLayers for AlwaysLazy {
    async fn decide(&self, request: &PrepareRequest) -> LazyDecision {
        LazyDecision::Lazy(LazyLayerRecord {
            chain_id: request.chain_id,
            diff_id: DiffId::of(b""),
            index_digest: IndexDigest::of(b""),
            blob_digest: BlobDigest::of(b""),
            blob_bytes: 0,
            index_source: crate::snapshots::IndexSource::Blob,
            device_bytes: 0,
            sources: Vec::new(),
        })
    }
    fn reused(&self, _: &PrepareRequest, _: &SnapshotRecord) {}
    async fn lowers(
        &self,
        _: &SnapshotRecord,
        chain: &[SnapshotRecord],
    ) -> Result<Vec<PathBuf>, MountError> {
        let chain_id = ChainId::of(chain[0].name.as_bytes());
        Err(MountError::Unusable {
            chain_id,
            reason: "no mounts here".into(),
        })
    }
    fn released(&self, _: &SnapshotRecord) {}
    fn usage(&self, _: &SnapshotRecord) -> Usage {
        Usage {
            inodes: 3,
            size_bytes: 4,
        }
    }
    fn lacks_index(&self, _: &LazyLayerRecord) -> bool {
        false
    }
    async fn cleanup(&self) {}
}

struct Server {
    root: TempDir,
    client: SnapshotsClient<Channel>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Server {
    async fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = MetadataStore::open(&root.path().join("metadata.redb")).unwrap();
        let snapshots = Snapshots::start(
            Arc::new(store),
            SnapshotDirectories::open(root.path()).unwrap(),
            Arc::new(AlwaysLazy),
            SnapshotOptions {
                prepare_budget: Duration::from_secs(5),
                mount_deadline: Duration::from_secs(5),
                overlay: OverlayOptions::default(),
            },
            SnapshotMetrics::default(),
        )
        .unwrap();
        let socket = root.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let limits = RequestLimits::new(Duration::from_secs(5), Duration::from_secs(30));
            serve(
                snapshots,
                listener,
                SnapshotMetrics::default(),
                limits,
                stopped,
            )
            .await
            .unwrap()
        });
        let connect = tower::service_fn(move |_: Uri| UnixStream::connect(socket.clone()));
        let channel = Endpoint::from_static("http://unix")
            .connect_with_connector(connect)
            .await;
        Server {
            root,
            client: SnapshotsClient::new(channel.unwrap()),
            stop,
            task,
        }
    }

    async fn prepare(&mut self, key: &str, parent: &str) -> Result<Vec<String>, Status> {
        self.prepare_labelled(key, parent, &[]).await
    }

    async fn prepare_labelled(
        &mut self,
        key: &str,
        parent: &str,
        labels: &[(&str, &str)],
    ) -> Result<Vec<String>, Status> {
        let request = api::PrepareSnapshotRequest {
            snapshotter: "sluice".into(),
            key: key.into(),
            parent: parent.into(),
            labels: map(labels),
        };
        let mounts = self.client.prepare(request).await?.into_inner().mounts;
        Ok(mounts
            .into_iter()
            .map(|m| format!("{} {} {:?}", m.r#type, m.source, m.options))
            .collect())
    }

    async fn commit(&mut self, name: &str, key: &str) -> Result<(), Status> {
        let request = api::CommitSnapshotRequest {
            snapshotter: "sluice".into(),
            name: name.into(),
            key: key.into(),
            labels: map(&[("committed", "yes")]),
        };
        self.client.commit(request).await.map(|_| ())
    }

    async fn stat(&mut self, key: &str) -> Result<api::Info, Status> {
        let request = api::StatSnapshotRequest {
            snapshotter: "sluice".into(),
            key: key.into(),
        };
        Ok(self.client.stat(request).await?.into_inner().info.unwrap())
    }

    async fn update(
        &mut self,
        name: &str,
        labels: &[(&str, &str)],
        mask: Option<&[&str]>,
    ) -> Result<api::Info, Status> {
        // Go sends its zero time, in the year 1, where a client sets none.
        let zero_time = SystemTime::UNIX_EPOCH - Duration::from_secs(62_135_596_800);
        let mut request = api::UpdateSnapshotRequest {
            snapshotter: "sluice".into(),
            info: Some(api::Info {
                name: name.into(),
                parent: "ignored".into(),
                kind: Kind::Unknown.into(),
                created_at: Some(zero_time.into()),
                updated_at: None,
                labels: map(labels),
            }),
            update_mask: None,
        };
        if let Some(paths) = mask {
            let mask = request.update_mask.get_or_insert_default();
            mask.paths = paths.iter().map(|path| (*path).to_owned()).collect();
        }
        Ok(self
            .client
            .update(request)
            .await?
            .into_inner()
            .info
            .unwrap())
    }

    /// Names, and in how many messages they came.
    async fn list(&mut self, filters: &[&str]) -> Result<(Vec<String>, usize), Status> {
        let request = api::ListSnapshotsRequest {
            snapshotter: "sluice".into(),
            filters: filters.iter().map(|filter| (*filter).to_owned()).collect(),
        };
        let mut stream = self.client.list(request).await?.into_inner();
        let (mut names, mut messages) = (Vec::new(), 0);
        while let Some(message) = stream.message().await? {
            messages += 1;
            names.extend(message.info.into_iter().map(|info| info.name));
        }
        Ok((names, messages))
    }
}

fn map(labels: &[(&str, &str)]) -> HashMap<String, String> {
    labels
        .iter()
        .map(|(key, value)| ((*key).into(), (*value).into()))
        .collect()
}

#[tokio::test]
async fn the_whole_contract_through_a_client() {
    let mut server = Server::start().await;
    let fs = |id: u32| {
        server
            .root
            .path()
            .join(format!("snapshots/{id}/fs"))
            .display()
            .to_string()
    };
    let (one, two) = (fs(1), fs(2));

    let begun = SystemTime::now();
    assert_eq!(
        server
            .prepare_labelled("k1", "", &[("a", "b")])
            .await
            .unwrap(),
        [format!("bind {one} [\"rw\", \"rbind\"]")]
    );
    let info = server.stat("k1").await.unwrap();
    assert_eq!(
        (info.name.as_str(), info.parent.as_str(), info.kind()),
        ("k1", "", Kind::Active)
    );
    assert_eq!(
        (&info.labels, &info.created_at),
        (&map(&[("a", "b")]), &info.updated_at)
    );
    let created: SystemTime = info.created_at.unwrap().try_into().unwrap();
    assert!((begun..=SystemTime::now()).contains(&created));

    server.commit("c1", "k1").await.unwrap();
    let info = server.stat("c1").await.unwrap();
    assert_eq!(
        (info.kind(), &info.labels),
        (Kind::Committed, &map(&[("committed", "yes")]))
    );
    let view = api::ViewSnapshotRequest {
        snapshotter: "sluice".into(),
        key: "v1".into(),
        parent: "c1".into(),
        labels: map(&[("view", "1")]),
    };
    let mounts = server.client.view(view).await.unwrap().into_inner().mounts;
    assert_eq!(
        (mounts[0].source.as_str(), mounts[0].target.as_str()),
        (one.as_str(), "")
    );
    assert_eq!(mounts[0].options, ["ro", "rbind"]);
    let info = server.stat("v1").await.unwrap();
    assert_eq!((info.kind(), info.parent.as_str()), (Kind::View, "c1"));
    let request = api::MountsRequest {
        snapshotter: "sluice".into(),
        key: "v1".into(),
    };
    assert_eq!(
        server
            .client
            .mounts(request)
            .await
            .unwrap()
            .into_inner()
            .mounts,
        mounts
    );

    let usage = api::UsageRequest {
        snapshotter: "sluice".into(),
        key: "c1".into(),
    };
    let usage = server.client.usage(usage).await.unwrap().into_inner();
    assert_eq!(usage.inodes, 1);
    for (name, code) in [("c1", Code::FailedPrecondition), ("no", Code::NotFound)] {
        let request = api::RemoveSnapshotRequest {
            snapshotter: "s".into(),
            key: name.into(),
        };
        assert_eq!(
            server.client.remove(request).await.unwrap_err().code(),
            code
        );
    }
    let request = api::RemoveSnapshotRequest {
        snapshotter: "s".into(),
        key: "v1".into(),
    };
    server.client.remove(request).await.unwrap();
    assert!(std::path::Path::new(&two).exists());
    server
        .client
        .cleanup(api::CleanupRequest {
            snapshotter: "s".into(),
        })
        .await
        .unwrap();
    assert!(!std::path::Path::new(&two).exists());

    assert_eq!(
        server.prepare("k", "no").await.unwrap_err().code(),
        Code::NotFound
    );
    server.prepare("k", "c1").await.unwrap();
    assert_eq!(
        server.prepare("k", "c1").await.unwrap_err().code(),
        Code::AlreadyExists
    );
    assert_eq!(
        server.prepare("l", "k").await.unwrap_err().code(),
        Code::InvalidArgument
    );
    assert_eq!(
        server.commit("c1", "k").await.unwrap_err().code(),
        Code::AlreadyExists
    );
    assert_eq!(
        server.commit("x", "no").await.unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(
        server.commit("x", "c1").await.unwrap_err().code(),
        Code::FailedPrecondition
    );

    server.stop.cancel();
    server.task.await.unwrap();
}

#[tokio::test]
async fn update_takes_masks() {
    let mut server = Server::start().await;
    server
        .prepare_labelled("k", "", &[("a", "1"), ("b", "2")])
        .await
        .unwrap();
    let before = server.stat("k").await.unwrap();

    let info = server
        .update("k", &[("a", "x"), ("c", "3")], None)
        .await
        .unwrap();
    assert_eq!(info.labels, map(&[("a", "x"), ("c", "3")]));
    assert_eq!(
        (info.kind(), &info.parent, &info.created_at),
        (Kind::Active, &before.parent, &before.created_at)
    );
    assert_ne!(info.updated_at, before.updated_at);
    let info = server.update(
        "k",
        &[("a", "y"), ("d.e/f", "4")],
        Some(&["labels.d.e/f", "labels.c"]),
    );
    assert_eq!(
        info.await.unwrap().labels,
        map(&[("a", "x"), ("d.e/f", "4")])
    );
    let info = server
        .update("k", &[("only", "1")], Some(&["labels"]))
        .await
        .unwrap();
    assert_eq!(info.labels, map(&[("only", "1")]));
    let info = server
        .update("k", &[("all", "1")], Some(&[]))
        .await
        .unwrap();
    assert_eq!(info.labels, map(&[("all", "1")]));
    for field in ["parent", "kind", "name", "created_at"] {
        let status = server
            .update("k", &[], Some(&["labels", field]))
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}");
    }
    assert_eq!(server.stat("k").await.unwrap().labels, map(&[("all", "1")]));
    let status = server.update("no", &[], None).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let nothing = api::UpdateSnapshotRequest::default();
    assert_eq!(
        server.client.update(nothing).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
}

#[tokio::test]
async fn list_streams_and_filters() {
    let mut server = Server::start().await;
    let mut expected = Vec::new();
    for index in 0..230 {
        let key = format!("k{index:03}");
        let parity = if index % 2 == 0 { "even" } else { "odd" };
        server
            .prepare_labelled(&key, "", &[("a.b/parity", parity)])
            .await
            .unwrap();
        expected.push(key);
    }
    assert_eq!(server.list(&[]).await.unwrap(), (expected.clone(), 3));
    let (odd, _) = server.list(&["labels.\"a.b/parity\"==odd"]).await.unwrap();
    assert_eq!((odd.len(), odd[0].as_str()), (115, "k001"));
    let (some, _) = server
        .list(&["name==k001,kind==active", "name~=^k22.$"])
        .await
        .unwrap();
    assert_eq!(some.len(), 11);
    assert_eq!(
        server.list(&["kind==committed"]).await.unwrap(),
        (Vec::new(), 0)
    );
    let error = server.list(&["name="]).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("name="), "{}", error.message());
}

#[tokio::test]
async fn already_exists_answers_a_reference_and_the_snapshot_is_listed() {
    let mut server = Server::start().await;
    let chain_id = ChainId::of(b"1").to_string();
    let labels = [(LABEL_SNAPSHOT_REF, chain_id.as_str())];
    let status = server
        .prepare_labelled("ns/1/k", "", &labels)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    let filter = format!("labels.\"{LABEL_SNAPSHOT_REF}\"=={chain_id},parent==\"\"");
    let (names, _) = server.list(&[&filter]).await.unwrap();
    assert_eq!(names.len(), 1);
    let info = server.stat(&names[0]).await.unwrap();
    assert_eq!(
        (info.kind(), &info.labels),
        (Kind::Committed, &map(&labels))
    );
    let usage = api::UsageRequest {
        snapshotter: "s".into(),
        key: names[0].clone(),
    };
    let usage = server.client.usage(usage).await.unwrap().into_inner();
    assert_eq!((usage.inodes, usage.size), (3, 4));
    let status = server
        .prepare("ns/2/container", &names[0])
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::DataLoss);
    assert!(
        status.message().contains("no mounts here"),
        "{}",
        status.message()
    );
}
