// SPDX-License-Identifier: Apache-2.0
//! Lazy layers on a real containerd and a real registry: an unpacker's calls, mounts, reads, restarts,
//! removal. Needs root, containerd 1.6 or later and docker-registry.

#![allow(clippy::unwrap_used, reason = "a test, in functions of its own")]

#[path = "lazy/forge.rs"]
mod forge;
#[path = "lazy/image.rs"]
mod image;
#[path = "lazy/site.rs"]
mod site;
#[path = "lazy/usage.rs"]
mod usage;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::snapshots as api;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::{
    CreateRequest as CreateLeaseRequest, DeleteRequest as DeleteLeaseRequest,
};
use containerd_client::types::Mount;
use image::{Image, commit_to_containerd, push, push_claiming, tar};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::Signal;
use site::{
    Process, Root, free_port, mounts_below, start_containerd, start_daemon, start_registry, until,
};
use sluice_blockindex::digest::DiffId;
use sluice_proto::control::control_client::ControlClient;
use sluice_proto::control::examine_event::Event;
use sluice_proto::control::{
    CompleteContentRequest, ExamineRequest, Finding, Severity, StatusRequest, StatusResponse,
    WhyRequest,
};
use sluice_snapshotter::control::ingest::Lease;
use sluice_snapshotter::resolve::{Containerd, ContainerdContent, ContentReader as _};
use tonic::Code;
use tonic::transport::Channel;

const NS: &str = "default";

/// What an unpacker and a runtime do.
struct Client {
    containerd: Containerd,
    /// Keeps what is prepared from containerd's GC, as clients do.
    lease: Lease,
    root: PathBuf,
}

impl Client {
    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.containerd.channel())
    }

    async fn ready(&self) {
        until("containerd serves our snapshotter", async || {
            let request = api::StatSnapshotRequest {
                snapshotter: "sluice".into(),
                key: "none".into(),
            };
            let request = self.containerd.request(NS, request).unwrap();
            let answer = self.snapshots().stat(request).await;
            answer.is_err_and(|status| status.code() == Code::NotFound)
        })
        .await;
    }

    async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, tonic::Status> {
        let request = api::PrepareSnapshotRequest {
            snapshotter: "sluice".into(),
            key: key.into(),
            parent: parent.into(),
            labels,
        };
        let begun = std::time::Instant::now();
        loop {
            let mut request = self.containerd.request(NS, request.clone())?;
            request
                .metadata_mut()
                .insert("containerd-lease", self.lease.id().parse().unwrap());
            match self.snapshots().prepare(request).await {
                // containerd looks for a daemon that was away with growing pauses.
                Err(status)
                    if status.code() == Code::Unavailable
                        && status.message().contains("connection")
                        && begun.elapsed() < Duration::from_secs(60) =>
                {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                answer => return Ok(answer?.into_inner().mounts),
            }
        }
    }

    /// Unpacks as clients do; gives the layers that they would have had to download.
    async fn unpack(&self, image: &Image) -> Vec<usize> {
        let mut parent = String::new();
        let mut downloads = Vec::new();
        for (number, layer) in image.layers.iter().enumerate() {
            let name = layer.chain_id.to_string();
            let mut labels: HashMap<String, String> =
                layer.annotations.clone().into_iter().collect();
            labels.insert("containerd.io/snapshot.ref".into(), name.clone());
            match self
                .prepare(&format!("extract-{number} {name}"), &parent, labels)
                .await
            {
                Err(status) if status.code() == Code::AlreadyExists => {
                    let stat = api::StatSnapshotRequest {
                        snapshotter: "sluice".into(),
                        key: name.clone(),
                    };
                    let stat = self.containerd.request(NS, stat).unwrap();
                    self.snapshots().stat(stat).await.unwrap();
                }
                Ok(_) => {
                    downloads.push(number);
                    return downloads;
                }
                Err(status) => panic!("layer {number}: {status}"),
            }
            parent = name;
        }
        downloads
    }

    /// Prepares a container's snapshot and mounts it.
    async fn container(&self, key: &str, parent: &str) -> PathBuf {
        let mounts = self.prepare(key, parent, HashMap::new()).await.unwrap();
        let [one] = &mounts[..] else {
            panic!("{mounts:?}")
        };
        let target = self.root.join(key);
        std::fs::create_dir_all(&target).unwrap();
        assert_eq!(one.r#type, "overlay", "{one:?}");
        let options = one.options.join(",");
        mount(
            Some("overlay"),
            &target,
            Some("overlay"),
            MsFlags::empty(),
            Some(&*options),
        )
        .unwrap_or_else(|error| panic!("mount {options}: {error}"));
        target
    }

    async fn remove(&self, key: &str) {
        let request = api::RemoveSnapshotRequest {
            snapshotter: "sluice".into(),
            key: key.into(),
        };
        let request = self.containerd.request(NS, request).unwrap();
        self.snapshots().remove(request).await.unwrap();
    }

    /// Has containerd collect garbage now, as `nerdctl rmi` and `ctr images rm --sync` do. Left to
    /// itself it forgets a removal that it was told of while it collected, until the next one.
    async fn collect(&self) {
        let mut leases = LeasesClient::new(self.containerd.channel());
        let id = "collected".to_owned();
        let lease = CreateLeaseRequest {
            id: id.clone(),
            labels: HashMap::new(),
        };
        let request = self.containerd.request(NS, lease).unwrap();
        leases.create(request).await.unwrap();
        let gone = DeleteLeaseRequest { id, sync: true };
        let request = self.containerd.request(NS, gone).unwrap();
        leases.delete(request).await.unwrap();
    }

    /// Asks the daemon itself: older containerds do not pass it on.
    async fn cleanup(&self) {
        let socket = self.root.join("run/snapshots.sock");
        let daemon = Containerd::new(&socket, Duration::from_secs(20)).channel();
        let request = api::CleanupRequest {
            snapshotter: "sluice".into(),
        };
        SnapshotsClient::new(daemon).cleanup(request).await.unwrap();
    }

    async fn end(&self, key: &str) {
        umount(&self.root.join(key)).unwrap();
        self.remove(key).await;
    }

    /// The control API.
    fn control(&self) -> ControlClient<Channel> {
        let socket = self.root.join("run/control.sock");
        ControlClient::new(Containerd::new(&socket, Duration::from_secs(10)).channel())
    }

    /// What the daemon finds wrong with itself.
    async fn examine(&self, fix: bool) -> Vec<Finding> {
        let request = ExamineRequest {
            fix,
            ..ExamineRequest::default()
        };
        let mut events = self.control().examine(request).await.unwrap().into_inner();
        let mut found = Vec::new();
        while let Some(event) = events.message().await.unwrap() {
            if let Some(Event::Finding(finding)) = event.event {
                found.push(finding);
            }
        }
        found
    }

    async fn status(&self) -> StatusResponse {
        let request = StatusRequest {
            r#match: String::new(),
        };
        self.control().status(request).await.unwrap().into_inner()
    }
}

struct Setup {
    client: Client,
    port: u16,
    registry: Option<Process>,
    containerd: Process,
    root: Root,
}

async fn setup() -> Setup {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test mounts, so it needs root"
    );
    let root = Root::new();
    let port = free_port();
    let registry = Some(start_registry(&root, port));
    let containerd = start_containerd(&root);
    let connection = Containerd::new(&root.join("containerd.sock"), Duration::from_secs(20));
    until("the registry listens", async || {
        tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .is_ok()
    })
    .await;
    until("containerd listens", async || {
        connection.namespaces().await.is_ok()
    })
    .await;
    let lease = Lease::take(&connection, NS).await.unwrap();
    let client = Client {
        containerd: connection,
        lease,
        root: root.path.clone(),
    };
    Setup {
        client,
        port,
        registry,
        containerd,
        root,
    }
}

fn read(root: &Path, name: &str) -> Vec<u8> {
    std::fs::read(root.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Bytes that do not compress, different for each seed.
fn noise(seed: u8, bytes: usize) -> Vec<u8> {
    let mut state = u64::from(seed) + 1;
    (0..bytes)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state.to_le_bytes()[7]
        })
        .collect()
}

fn three_layers() -> (Vec<Vec<u8>>, Vec<u8>) {
    let large = noise(1, 6 << 20);
    let tars = vec![
        tar(&[
            ("etc", None),
            ("etc/one", Some(b"one")),
            ("large", Some(&large)),
            ("gone", Some(b"x")),
        ]),
        tar(&[("etc/two", Some(b"two")), (".wh.gone", Some(b""))]),
        tar(&[("top", Some(b"top")), ("etc/one", Some(b"changed"))]),
    ];
    (tars, large)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_runs_before_its_bytes_are_here() {
    let mut setup = setup().await;
    let (tars, large) = three_layers();
    let image = push(setup.port, "team/app", &tars, &[]).await;
    let daemon = start_daemon(&setup.root, "[prefetch]\ndelay = \"2s\"\n").await;
    let client = &setup.client;
    client.ready().await;
    commit_to_containerd(&image, &client.containerd, NS).await;

    assert_eq!(
        client.unpack(&image).await,
        [] as [usize; 0],
        "nothing is downloaded"
    );
    let one = client.container("one", &image.top()).await;
    assert_eq!(read(&one, "etc/one"), b"changed");
    assert_eq!(read(&one, "etc/two"), b"two");
    assert!(!one.join("gone").exists());
    let status = client.status().await;
    let [seen] = &status.images[..] else {
        panic!("{status:?}")
    };
    assert!(
        !seen.sealed && seen.present_bytes < seen.total_bytes / 2,
        "{seen:?}"
    );
    assert_eq!(read(&one, "large"), large);
    std::fs::write(one.join("etc/two"), b"written").unwrap();

    let two = client.container("two", &image.top()).await;
    assert_eq!(read(&two, "etc/two"), b"two");
    let status = client.status().await;
    let [mounted] = &status.mounts[..] else {
        panic!("one mount for both: {status:?}")
    };
    assert_eq!((mounted.layers, mounted.users), (3, 2));

    until("the image is sealed", async || {
        client.status().await.images[0].sealed
    })
    .await;
    setup.registry = None;
    let three = client.container("three", &image.top()).await;
    assert_eq!(read(&three, "large"), large);

    // The daemon dies and comes back: mounts were never gone, and new containers start without a
    // registry.
    daemon.kill();
    assert_eq!(read(&three, "etc/one"), b"changed");
    let daemon = start_daemon(&setup.root, "").await;
    client.ready().await;
    let four = client.container("four", &image.top()).await;
    assert_eq!(read(&four, "top"), b"top");

    for key in ["one", "two", "three", "four"] {
        client.end(key).await;
    }
    for layer in image.layers.iter().rev() {
        client.remove(&layer.chain_id.to_string()).await;
    }
    client.collect().await;
    let state = setup.root.join("sluice");
    until("mounts and files are gone", async || {
        let left = |name: &str| {
            let entries = std::fs::read_dir(state.join(name)).unwrap().flatten();
            entries
                .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
                .count()
        };
        mounts_below(&state).is_empty()
            && left("mnt") + left("trees") + left("indexes") + left("devices") == 0
    })
    .await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_keeps_its_budget_and_what_went_is_fetched_anew() {
    let setup = setup().await;
    let (tars, large) = three_layers();
    let image = push(setup.port, "team/budget", &tars, &[]).await;
    let extra = "budget = \"1MB\"\n[prefetch]\nenabled = false\n";
    let daemon = start_daemon(&setup.root, extra).await;
    let client = &setup.client;
    client.ready().await;
    commit_to_containerd(&image, &client.containerd, NS).await;
    client.unpack(&image).await;
    let devices = setup.root.join("sluice/devices");
    let held = || {
        use std::os::unix::fs::MetadataExt as _;
        let below = |path: &Path| {
            let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let layers = below(&devices);
        let files = layers
            .iter()
            .flat_map(|it| below(it))
            .flat_map(|it| below(&it));
        files
            .filter_map(|it| Some(it.metadata().ok()?.blocks() * 512))
            .sum::<u64>()
    };
    for round in 0..2 {
        let one = client.container("one", &image.top()).await;
        assert_eq!(read(&one, "large"), large, "{round}");
        // In use it stays, whatever the budget says.
        client.cleanup().await;
        assert!(held() > 4 << 20, "{round}: {}", held());
        assert_eq!(read(&one, "top"), b"top", "{round}");
        client.end("one").await;
        until("the store is within its budget", async || {
            client.cleanup().await;
            held() <= 1_000_000
        })
        .await;
    }
    let log = std::fs::read_to_string(setup.root.join("sluiced.log")).unwrap();
    let warnings = log.matches("take more than [store] budget").count();
    assert_eq!(warnings, 2, "once each time: {log}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_cannot_be_lazy_is_unpacked_below_lazy_ones() {
    let setup = setup().await;
    let (tars, large) = three_layers();
    let image = push(setup.port, "team/mixed", &tars, &[1]).await;
    let daemon = start_daemon(&setup.root, "[prefetch]\nenabled = false\n").await;
    let client = &setup.client;
    client.ready().await;
    commit_to_containerd(&image, &client.containerd, NS).await;
    assert_eq!(
        client.unpack(&image).await,
        [] as [usize; 0],
        "nothing is downloaded"
    );
    let one = client.container("one", &image.top()).await;
    for (name, content) in [
        ("etc/one", &b"changed"[..]),
        ("etc/two", b"two"),
        ("large", &large),
    ] {
        assert!(read(&one, name) == content, "{name}");
    }
    assert!(
        !one.join("gone").exists(),
        "the whiteout of the unpacked layer"
    );
    assert_eq!(
        client.status().await.mounts.len(),
        2,
        "one run below, one above"
    );

    let request = WhyRequest {
        image: image.manifest.clone(),
        namespace: NS.into(),
    };
    let why = client.control().why(request).await.unwrap().into_inner();
    let lazy: Vec<bool> = why.layers.iter().map(|layer| layer.lazy).collect();
    assert_eq!((lazy, why.lazy), (vec![true, false, true], false));
    assert!(
        why.layers[1].reason.contains("unpacked here"),
        "{}",
        why.layers[1].reason
    );
    client.end("one").await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn content_is_completed_for_tools_that_need_it() {
    let setup = setup().await;
    let (tars, _) = three_layers();
    let image = push(setup.port, "team/content", &tars, &[]).await;
    let daemon = start_daemon(&setup.root, "[prefetch]\nenabled = false\n").await;
    let client = &setup.client;
    client.ready().await;
    commit_to_containerd(&image, &client.containerd, NS).await;
    client.unpack(&image).await;
    let content = ContainerdContent::new(client.containerd.clone());
    for layer in &image.layers {
        assert!(
            content
                .info(NS, &layer.blob.to_string())
                .await
                .unwrap()
                .is_none()
        );
    }
    for round in 0..2 {
        let request = CompleteContentRequest {
            image: image.manifest.clone(),
            namespace: NS.into(),
        };
        let mut reports = client
            .control()
            .complete_content(request)
            .await
            .unwrap()
            .into_inner();
        let mut done = 0;
        while let Some(report) = reports.message().await.unwrap() {
            done += usize::from(report.done);
        }
        assert_eq!(done, image.layers.len(), "round {round}");
    }
    let manifest = content.info(NS, &image.manifest).await.unwrap().unwrap();
    for layer in &image.layers {
        let blob = layer.blob.to_string();
        let info = content.info(NS, &blob).await.unwrap().unwrap();
        assert!(
            info.labels
                .keys()
                .any(|key| key.contains("distribution.source")),
            "{info:?}"
        );
        assert!(
            manifest.labels.values().any(|value| *value == blob),
            "kept by the manifest"
        );
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_registry_costs_an_image_one_budget() {
    let mut setup = setup().await;
    let (tars, _) = three_layers();
    let image = push(setup.port, "team/dead", &tars, &[]).await;
    let extra = "[prepare]\nbudget = \"2s\"\n[prefetch]\nenabled = false\n";
    let daemon = start_daemon(&setup.root, extra).await;
    let client = &setup.client;
    client.ready().await;
    commit_to_containerd(&image, &client.containerd, NS).await;
    // A listener that never answers: connections are taken by the kernel and nothing comes.
    setup.registry = None;
    let silent = loop {
        match std::net::TcpListener::bind(("127.0.0.1", setup.port)) {
            Ok(listener) => break listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let begun = std::time::Instant::now();
    assert_eq!(client.unpack(&image).await, [0], "ordinary");
    assert!(
        begun.elapsed() < Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
    let begun = std::time::Instant::now();
    let first = &image.layers[0];
    client
        .remove(&format!("extract-0 {}", first.chain_id))
        .await;
    assert_eq!(client.unpack(&image).await, [0], "still ordinary");
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "remembered: {:?}",
        begun.elapsed()
    );
    let request = WhyRequest {
        image: image.config.to_string(),
        namespace: String::new(),
    };
    let why = client.control().why(request).await.unwrap().into_inner();
    assert!(
        !why.lazy && why.layers[0].reason.contains("budget"),
        "{why:?}"
    );
    drop(silent);
    daemon.stop().await;
    drop(setup.containerd);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_waits_through_a_stop_of_the_daemon() {
    let setup = setup().await;
    let (tars, large) = three_layers();
    let image = push(setup.port, "team/stop", &tars, &[]).await;
    let extra = "[prefetch]\nenabled = false\n";
    let daemon = start_daemon(&setup.root, extra).await;
    let client = &setup.client;
    client.ready().await;
    commit_to_containerd(&image, &client.containerd, NS).await;
    assert_eq!(client.unpack(&image).await, [] as [usize; 0]);
    let one = client.container("one", &image.top()).await;

    // The registry stands still, so the reader waits for as long as the test wants.
    let registry = setup.registry.as_ref().unwrap();
    registry.signal(Signal::SIGSTOP);
    let path = one.join("large");
    let reader = tokio::task::spawn_blocking(move || std::fs::read(path));
    tokio::time::sleep(Duration::from_secs(1)).await;
    daemon.stop().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!reader.is_finished(), "{:?}", reader.await);
    let daemon = start_daemon(&setup.root, extra).await;
    registry.signal(Signal::SIGCONT);
    assert!(reader.await.unwrap().unwrap() == large);
    client.end("one").await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_was_removed_is_pulled_again() {
    let setup = setup().await;
    let (tars, large) = three_layers();
    let image = push(setup.port, "team/again", &tars, &[]).await;
    let extra = "[prefetch]\nenabled = false\n";
    let daemon = start_daemon(&setup.root, extra).await;
    let client = &setup.client;
    client.ready().await;
    commit_to_containerd(&image, &client.containerd, NS).await;
    let indexes = setup.root.join("sluice/indexes");
    let count = || std::fs::read_dir(&indexes).unwrap().count();
    for round in 0..2 {
        assert_eq!(client.unpack(&image).await, [] as [usize; 0], "{round}");
        assert_eq!(count(), image.layers.len(), "{round}");
        if round == 0 {
            for layer in image.layers.iter().rev() {
                client.remove(&layer.chain_id.to_string()).await;
            }
            client.collect().await;
            until("the indexes are swept", async || count() == 0).await;
        }
    }
    // Nothing but what is on disk counts from here on.
    daemon.stop().await;
    let daemon = start_daemon(&setup.root, extra).await;
    client.ready().await;
    let one = client.container("one", &image.top()).await;
    assert!(read(&one, "large") == large);
    client.end("one").await;
    daemon.stop().await;
}

/// An image that claims another's layer with its own bytes is found out by its seal, loudly; what is left of
/// it is dropped when nobody stands on it, and the honest image is pulled from nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_forged_layer_fails_its_seal_and_is_dropped() {
    let setup = setup().await;
    let (large, evil) = (noise(1, 1 << 20), noise(2, 1 << 20));
    let honest = vec![tar(&[("large", Some(&large))])];
    let forged = vec![tar(&[("large", Some(&evil))])];
    let claims = [(0, DiffId::of(&honest[0]))];
    let forged = push_claiming(setup.port, "evil/app", &forged, &[], &claims).await;
    let honest = push(setup.port, "team/app", &honest, &[]).await;
    assert_eq!(forged.top(), honest.top());
    let daemon = start_daemon(&setup.root, "[prefetch]\ndelay = \"0s\"\n").await;
    let client = &setup.client;
    client.ready().await;
    commit_to_containerd(&forged, &client.containerd, NS).await;
    assert_eq!(client.unpack(&forged).await, [] as [usize; 0]);
    let one = client.container("one", &forged.top()).await;
    until("the seal fails", async || {
        let status = client.status().await;
        status.layers.iter().any(|layer| !layer.failure.is_empty())
    })
    .await;
    assert!(std::fs::read(one.join("large")).is_err());
    let log = std::fs::read_to_string(setup.root.join("sluiced.log")).unwrap();
    assert!(log.contains("ERROR") && log.contains("does not have its diff ID"));

    let failed = |findings: Vec<Finding>| {
        let found = findings.into_iter().find(|it| it.check == "layers");
        found.map(|it| (it.severity(), it.problem.contains("forged"), it.repaired))
    };
    let told = Some((Severity::Error, true, false));
    assert_eq!(failed(client.examine(false).await), told);
    assert_eq!(
        failed(client.examine(true).await),
        told,
        "a container is on it"
    );
    client.end("one").await;
    until("it is dropped", async || {
        failed(client.examine(true).await) == Some((Severity::Error, true, true))
    })
    .await;
    let devices = std::fs::read_dir(setup.root.join("sluice/devices")).unwrap();
    let devices = devices.filter(|it| it.as_ref().unwrap().path().is_dir());
    assert_eq!(devices.count(), 0);
    // What is left is containerd's to remove.
    assert_eq!(
        failed(client.examine(true).await),
        Some((Severity::Error, false, false))
    );
    client.remove(&forged.top()).await;
    client.collect().await;
    until("nothing is wrong", async || {
        client.examine(false).await.is_empty()
    })
    .await;

    commit_to_containerd(&honest, &client.containerd, NS).await;
    assert_eq!(client.unpack(&honest).await, [] as [usize; 0]);
    let one = client.container("one", &honest.top()).await;
    assert!(read(&one, "large") == large);
    client.end("one").await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_below_its_reserve_serves_readers_and_completes_nothing() {
    let setup = setup().await;
    let (tars, large) = three_layers();
    let image = push(setup.port, "team/reserve", &tars, &[]).await;
    // No disk has that much. `[store]` is the last table that the set-up writes.
    let extra = "reserve = \"1000000000GiB\"\n[prefetch]\ndelay = \"0s\"\n";
    let daemon = start_daemon(&setup.root, extra).await;
    let client = &setup.client;
    client.ready().await;
    commit_to_containerd(&image, &client.containerd, NS).await;
    client.unpack(&image).await;
    let one = client.container("one", &image.top()).await;
    assert_eq!(read(&one, "top"), b"top");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let status = client.status().await;
    let sealed = status.layers.iter().filter(|layer| layer.sealed).count();
    let present: u64 = status.layers.iter().map(|layer| layer.present_bytes).sum();
    assert!(sealed == 0 && present < 1 << 20, "{status:?}");
    let found = client.examine(false).await;
    let reserve = |it: &Finding| it.check == "budget" && it.problem.contains("reserve");
    assert!(found.iter().any(reserve), "{found:?}");
    assert!(read(&one, "large") == large);
    client.end("one").await;
    daemon.stop().await;
}
