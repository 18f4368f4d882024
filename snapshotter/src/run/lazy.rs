// SPDX-License-Identifier: Apache-2.0
//! The lazy side of the daemon, put together: indexes, chunk store, fetcher, shim, mounts, the lazy
//! layers over them, and the control service.
//!
//! Everything starts from files; the shim is attached by a task, so that neither a missing shim nor
//! containerd nor the network holds the start up.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sluice_fetcher::metrics::Metrics;
use sluice_fetcher::registry::{
    CredentialChain, CredentialFiles, CredentialProvider, DockerConfig, DragonflyOptions,
    HostOptions, KubeletPlugins, MirrorOptions, RegistryClient, RegistryOptions,
};
use sluice_fetcher::scheduler::{Fetcher, FetcherOptions};
use sluice_fetcher::store::{Reclaim, Store, StoreOptions};
use tokio::task::JoinHandle;

use super::{Parts, able, bind_private};
use crate::background::{Background, Begin};
use crate::boot::{Boot, BootMetrics, BootOptions};
use crate::config::Config;
use crate::control::{ControlParts, ControlService};
use crate::disk::DiskReserve;
use crate::durable;
use crate::indexes::IndexFiles;
use crate::layers::Layers;
use crate::lazy::{Lazy, LazyMetrics, LazyOptions, LazyParts, Reclaimer};
use crate::mount::attached::AttachedMount;
use crate::mount::choice::MountChoice;
use crate::mount::erofs::KernelMounts;
use crate::mount::over_fuse;
use crate::mount::{Backend, MountMetrics, MountSpec};
use crate::mounts::Mounts;
use crate::node_indexes::{BUDGET_BYTES, NodeIndexes};
use crate::notifications::{NotificationMetrics, Receiver};
use crate::prewarm::Prewarms;
use crate::resolve::{Containerd, ContainerdContent};
use crate::reuse::Reuse;
use crate::shelf::NodeShelf;
use crate::shim::client::ShimOptions;
use crate::shim::client::reserve::Reserve;
use crate::snapshots::LazyLayers;
use crate::sys::fdstore::FdStore;
use crate::trees::TreeFiles;
use crate::trust::Trust;
use crate::zone_indexes::{ZoneIndexMetrics, ZoneIndexes};

/// Name of the shim's program, next to ours.
const SHIM_PROGRAM: &str = "sluice-shim";
/// Overrides where the shim's program is, for tests that run from a build directory.
const SHIM_VARIABLE: &str = "SLUICE_SHIM";
/// The longest that a read of containerd's content may take within a snapshots RPC: its answers come
/// from its own database, so a second means that it is stuck.
const CONTENT_DEADLINE: Duration = Duration::from_secs(2);

/// Pauses between attempts to attach to the shim. An attempt starts a shim and waits for it for seconds;
/// a node where none can be started (no program, no memory) is not to be kept busy with that.
const FIRST_ATTACH_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_ATTACH_PAUSE: Duration = Duration::from_secs(30);

/// How often it is looked whether all that must be watched is. Between two looks only two deaths in
/// the same moment, while this daemon is not there, can leave something unwatched.
const TEND_INTERVAL: Duration = Duration::from_secs(30);

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The lazy side, running.
#[derive(Debug)]
pub(super) struct LazySide {
    lazy: Lazy,
    fetcher: Fetcher,
    store: Arc<Store>,
    shelf: Arc<NodeShelf>,
    prewarms: Prewarms,
    notifications: Option<JoinHandle<()>>,
    plugins: Option<Arc<KubeletPlugins>>,
    control: JoinHandle<()>,
    attach: JoinHandle<()>,
}

impl LazySide {
    /// Starts it. Waits for neither the network nor containerd.
    pub(super) async fn start(parts: Parts<'_>) -> Result<Self, Failure> {
        let Parts {
            config,
            store: metadata,
            registry,
            cluster,
            peers,
            mirror,
            steps,
            stop,
            ..
        } = parts;
        let listener = bind_private(&config.control_socket())?;
        let root = config.root.clone();
        let reclaimer = Reclaimer::default();
        let reclaim = reclaimer.hook();
        let run_dir = config.run_dir.clone();
        let open = move || open_files(root, run_dir, reclaim);
        let files = tokio::task::spawn_blocking(open).await??;
        let Files {
            indexes,
            node_indexes,
            trees,
            chunks,
            kernel,
        } = files;
        let (store, stored) = FdStore::take();
        let abilities = able::find_out(config, store).await;

        let registry = registry.sub_registry_with_prefix("sluice");
        let metrics = Metrics::watched(steps.clone());
        metrics.register(registry);
        let lazy_metrics = LazyMetrics::default();
        lazy_metrics.register(registry);
        let fetcher = Fetcher::new(
            FetcherOptions::default(),
            Arc::clone(&chunks),
            metrics.clone(),
        );
        let mut options = registry_options(config);
        options.mirrors = mirror_options(config);
        let retry = options.retry.clone();
        let plugins = plugins(config);
        let client = RegistryClient::counted(options, credentials(config, &plugins), metrics)?;
        let layers = Arc::new(Layers::new(
            fetcher.clone(),
            client.clone(),
            retry,
            Arc::clone(&indexes),
            Arc::clone(&metadata),
        ));

        let trust = Trust::new(config.trusted_lazy.clone());
        let shelf = Arc::new(NodeShelf::new(Arc::clone(&layers), trust.clone()));
        let zone = peers.clone();
        let reserve = DiskReserve::new(&config.root, config.store_reserve_bytes);
        let zone_metrics = ZoneIndexMetrics::default();
        zone_metrics.register(registry);
        let zone_indexes = Arc::new(ZoneIndexes::new(
            Arc::clone(&node_indexes),
            peers.clone(),
            config.index_use.node,
            reserve.clone(),
            zone_metrics,
        ));
        layers.attach_indexes(Arc::clone(&zone_indexes));
        shelf.attach_indexes(Arc::clone(&zone_indexes));
        if let Some(peers) = peers {
            // Before anything is fetched: the first reads go to the zone, too.
            fetcher.attach_peers(Arc::clone(&peers));
            shelf.attach(peers);
        }

        let kept = Arc::new(Reserve::restored(store, stored));
        kept.register(registry);
        let shim = ShimOptions {
            reserve: kept,
            journal: config.mount_journal,
            steps: steps.clone(),
            ..ShimOptions::new(config.run_dir.clone(), shim_program()?)
        };
        let attached = Arc::new(AttachedMount::new(shim, layers.clone()));
        let mount_metrics = MountMetrics::watched(steps.clone());
        mount_metrics.register(registry);
        let backend = Arc::new(MountChoice::new(
            attached.clone(),
            attached.clone(),
            Arc::clone(&kernel),
            abilities.clone(),
            mount_metrics,
        ));
        let mounts = Arc::new(Mounts::new(backend.clone(), &config.root.join("mnt")));
        let boot_metrics = BootMetrics::default();
        boot_metrics.register(registry);
        let boot_options = BootOptions {
            whole_pages: abilities.lazy.is_ok(),
            ..config.boot
        };
        let boot = Boot::new(
            boot_options,
            Arc::clone(&layers),
            Arc::clone(&metadata),
            backend.clone(),
            boot_metrics,
        );
        shelf.attach_boot(Arc::clone(&boot));
        if let Some(zone) = zone {
            boot.set_peers(zone);
        }
        let examined = Arc::clone(&attached);
        let (choice, adopted) = (backend, Arc::clone(&mounts));
        let attach = tokio::spawn(async move {
            adopt(Arc::clone(&attached), kernel, adopted).await;
            tokio::join!(tend(&choice), watch_shim(&attached));
        });

        let containerd = |deadline| {
            Containerd::new(&config.containerd_address, deadline).watched_by(steps.clone())
        };
        let reader = containerd(CONTENT_DEADLINE);
        let containerd = containerd(config.rpc_deadline);
        let begin = config.prefetch.then_some(Begin {
            delay: config.prefetch_delay,
            beside_readers: config.prefetch_beside_readers,
        });
        let reuse = Reuse::new(
            config.store_reuse,
            Arc::clone(&layers),
            Arc::clone(&metadata),
        );
        let lazy = Lazy::start(
            LazyParts {
                content: Arc::new(ContainerdContent::new(reader)),
                metadata,
                trees,
                background: Background::new(Arc::clone(&layers), begin, reserve.clone()),
                boot,
                reuse,
                layers,
                shelf: Arc::clone(&shelf),
                mounts,
                node_indexes,
                zone_indexes,
                metrics: lazy_metrics,
            },
            LazyOptions {
                root: config.root.clone(),
                trust: trust.clone(),
                index_use: config.index_use,
                whole_below_bytes: config.whole_below_bytes,
                read_deadline: config.read_deadline,
                mount_grace: config.mount_grace,
                file_grace: config.store_grace,
                store_budget_bytes: config.store_budget_bytes,
                reserve,
            },
        );
        reclaimer.attach(&lazy);

        let prewarms = Prewarms::new(lazy.clone(), client.clone(), config.prewarm);
        shelf.attach_prewarms(prewarms.downgrade());
        let running = prewarms.clone();
        let notifications = match &config.notifications {
            None => None,
            Some(options) => {
                let counted = NotificationMetrics::default();
                counted.register(registry);
                let (options, running) = (options.clone(), prewarms.clone());
                let (trust, view) = (trust, cluster.clone());
                let receiver = move || Receiver::new(options, running, trust, view, counted);
                let receiver = tokio::task::spawn_blocking(receiver).await??;
                Some(tokio::spawn(receiver.serve(stop.clone())))
            }
        };
        let control = ControlParts {
            lazy: lazy.clone(),
            shim: examined,
            abilities,
            containerd,
            cluster,
            mirror,
            prewarms: running,
            client,
            run_dir: config.run_dir.clone(),
        };
        let service = ControlService::new(control, stop);
        let control = tokio::spawn(async move {
            if let Err(error) = service.serve(listener).await {
                tracing::error!("control service ended: {error}");
            }
        });
        Ok(Self {
            lazy,
            fetcher,
            store: chunks,
            shelf,
            prewarms,
            notifications,
            plugins,
            control,
            attach,
        })
    }

    /// What the life cycle of snapshots asks.
    pub(super) fn layers(&self) -> Arc<dyn LazyLayers> {
        Arc::new(self.lazy.clone())
    }

    /// The scheduler.
    pub(super) fn fetcher(&self) -> Fetcher {
        self.fetcher.clone()
    }

    /// What this node has for others.
    pub(super) fn shelf(&self) -> Arc<NodeShelf> {
        Arc::clone(&self.shelf)
    }

    /// Stops what runs, at most until the deadline. Mounts stay.
    pub(super) async fn stop(self, deadline: Duration) {
        let Self {
            lazy,
            fetcher,
            store,
            shelf: _,
            prewarms,
            notifications,
            plugins,
            control,
            attach,
        } = self;
        attach.abort();
        // Before anything that a fill needs ends: a reader that waits is to wait on, not to fail.
        lazy.parts().layers.leave_fills();
        let ended = tokio::time::timeout(deadline, async {
            // Both end by the daemon's own token; their results were logged.
            let _ = control.await;
            if let Some(notifications) = notifications {
                let _ = notifications.await;
            }
            prewarms.stop().await;
            lazy.stop().await;
            fetcher.shutdown().await;
            if let Some(plugins) = plugins {
                plugins.stop().await;
            }
            tokio::task::spawn_blocking(move || store.stop()).await
        })
        .await;
        match ended {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!("failed to mark the store clean: {error}"),
            Ok(Err(error)) => tracing::warn!("failed to mark the store clean: {error}"),
            Err(_) => tracing::warn!("the lazy side is still busy at the deadline"),
        }
    }
}

/// Attaches to the shim and takes over its mounts, as often as it takes: a mount that is not known can
/// neither be shared nor taken away, and nothing is swept before.
async fn adopt(backend: Arc<AttachedMount>, kernel: Arc<KernelMounts>, mounts: Arc<Mounts>) {
    let mut pause = FIRST_ATTACH_PAUSE;
    loop {
        let served = async {
            let client = backend.attach().await.map_err(|error| error.to_string())?;
            client.mounts().await.map_err(|error| error.to_string())
        };
        match served.await {
            Ok(served) => {
                let kernels = kernel.all().into_iter();
                let kernels = kernels.map(|mount| (mount.spec.clone(), mount.backend()));
                let shims = served.into_iter().map(|it| of_shim(it.spec));
                mounts.adopt(&kernels.chain(shims).collect::<Vec<_>>());
                return;
            }
            Err(error) => tracing::error!("failed to attach to the shim, will try again: {error}"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_ATTACH_PAUSE);
    }
}

/// A mount of the shim under the key of its run. The lower one of a kernel's mount stands for its devices: those are in
/// use for as long as it is there.
fn of_shim(spec: MountSpec) -> (MountSpec, Backend) {
    match over_fuse::run_of(&spec.key).map(str::to_owned) {
        Some(key) => (MountSpec { key, ..spec }, Backend::ErofsFuse),
        None => (spec, Backend::Fuse),
    }
}

/// Keeps mounts and their watches in agreement for as long as the daemon lives.
async fn tend(choice: &MountChoice) {
    loop {
        if let Err(error) = choice.tend().await {
            tracing::warn!("failed to look after the watches of mounts: {error}");
        }
        tokio::time::sleep(TEND_INTERVAL).await;
    }
}

/// Shows and counts what is stuck in the shim, for as long as the daemon lives.
async fn watch_shim(attached: &AttachedMount) {
    // It is attached, once and for all: the client looks for a new worker by itself.
    if let Ok(client) = attached.attach().await {
        Arc::clone(client).watch_steps().await;
    }
}

/// kubelet's plugins, if they are used.
fn plugins(config: &Config) -> Option<Arc<KubeletPlugins>> {
    let used = config.registry.credential_providers.as_ref()?;
    let plugins = KubeletPlugins::new(used.config.clone(), used.bin_dir.clone());
    Some(Arc::new(plugins))
}

/// Who knows credentials, whose count first at the beginning.
fn credentials(
    config: &Config,
    plugins: &Option<Arc<KubeletPlugins>>,
) -> Arc<dyn CredentialProvider> {
    let registry = &config.registry;
    let mut all: Vec<Arc<dyn CredentialProvider>> = vec![
        Arc::new(DockerConfig::new(registry.docker_config.clone())),
        Arc::new(CredentialFiles::new(registry.credential_files.clone())),
    ];
    if let Some(plugins) = plugins {
        all.push(Arc::clone(plugins) as Arc<dyn CredentialProvider>);
    }
    Arc::new(CredentialChain::new(all))
}

struct Files {
    indexes: Arc<IndexFiles>,
    node_indexes: Arc<NodeIndexes>,
    trees: Arc<TreeFiles>,
    chunks: Arc<Store>,
    kernel: Arc<KernelMounts>,
}

/// Opens what is on disk. Blocks.
fn open_files(root: PathBuf, run_dir: PathBuf, reclaim: Reclaim) -> Result<Files, Failure> {
    let options = StoreOptions {
        reclaim: Some(reclaim),
        ..StoreOptions::default()
    };
    durable::create_private_directory(&root.join("mnt"))?;
    Ok(Files {
        indexes: Arc::new(IndexFiles::open(&root.join("indexes"))?),
        node_indexes: Arc::new(NodeIndexes::open(&root.join("node-indexes"), BUDGET_BYTES)?),
        trees: Arc::new(TreeFiles::open(&root.join("trees"))?),
        chunks: Arc::new(Store::open(&root.join("devices"), options)?),
        kernel: Arc::new(KernelMounts::open(&run_dir.join("mounts"))?),
    })
}

/// Where else than at registries this daemon reads what it fetches for itself and its zone.
fn mirror_options(config: &Config) -> MirrorOptions {
    let mut options = MirrorOptions::default();
    options.directories.clone_from(&config.registry.hosts_dirs);
    options.own = config.mirror.as_ref().map(|mirror| mirror.listen);
    options.dragonfly = config.registry.dragonfly.as_ref().map(|written| {
        let mut dragonfly = DragonflyOptions::new(written.endpoint.clone());
        dragonfly.application.clone_from(&written.application);
        dragonfly.tag.clone_from(&written.tag);
        dragonfly.patience = written.timeout;
        dragonfly
    });
    options
}

/// How registries are asked, without mirrors: what the node's own mirror asks proves that the registry lets its
/// client in.
pub(super) fn registry_options(config: &Config) -> RegistryOptions {
    let mut options = RegistryOptions::default();
    for (host, written) in &config.registry.hosts {
        let known: &mut HostOptions = options.host_mut(host);
        known.plain_http = written.plain_http;
        known.insecure_skip_verify = written.insecure_skip_verify;
        known.ca_files.clone_from(&written.ca_files);
    }
    options
}

fn shim_program() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os(SHIM_VARIABLE) {
        return Ok(path.into());
    }
    Ok(std::env::current_exe()?.with_file_name(SHIM_PROGRAM))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use async_trait::async_trait;
    use sluice_fetcher::scheduler::Filled;
    use sluice_proto::shim as wire;
    use sluice_proto::shim::envelope::Body;

    use super::*;
    use crate::chain::RunKey;
    use crate::mount::errno::FillErrno;
    use crate::shim::client::{FillRequest, FillService};
    use crate::shim::protocol::{Unframer, frame};
    use crate::shim::{OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, SOCKET_NAME};

    #[derive(Debug)]
    struct NoFills;

    #[async_trait]
    impl FillService for NoFills {
        async fn fill(&self, _: FillRequest) -> Result<Filled, FillErrno> {
            Err(FillErrno::Io)
        }
    }

    /// One connection of a worker that has one mount, which is leaving. Ends with its first answer.
    fn serve(run_dir: &Path, key: RunKey) -> io::Result<()> {
        let mut stream = UnixStream::connect(run_dir.join(SOCKET_NAME))?;
        let hello = wire::Hello {
            version: PROTOCOL_VERSION,
            oldest_version: OLDEST_PROTOCOL_VERSION,
            ..Default::default()
        };
        stream.write_all(&frame(0, Body::Hello(hello)))?;
        let (mut unframer, mut buffer) = (Unframer::default(), [0; 1024]);
        loop {
            let count = stream.read(&mut buffer)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            unframer.push(&buffer[..count]);
            while let Some(envelope) = unframer.take().unwrap() {
                if !matches!(envelope.body, Some(Body::List(_))) {
                    continue;
                }
                let mount = wire::Mount {
                    key: key.to_string(),
                    mountpoint: "/m".into(),
                    tree: "/t".into(),
                    ..Default::default()
                };
                let reply = wire::ListReply {
                    mounts: vec![wire::ListedMount {
                        mount: Some(mount),
                        leaving: true,
                    }],
                    ..Default::default()
                };
                let reply = frame(envelope.id, Body::ListReply(reply));
                return stream.write_all(&reply);
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_shim_that_comes_late_is_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = ShimOptions::new(dir.path().to_owned(), "/no/such/program".into());
        options.start_deadline = Duration::from_millis(300);
        let backend = Arc::new(AttachedMount::new(options, Arc::new(NoFills)));
        let mounts = Arc::new(Mounts::new(backend.clone(), dir.path()));
        let kernel = Arc::new(KernelMounts::open(&dir.path().join("mounts")).unwrap());
        let failed = backend.attach().await.map(drop);
        assert!(failed.is_err());
        let adopting = tokio::spawn(adopt(backend, kernel, Arc::clone(&mounts)));
        // Long enough for the first attempt to have failed.
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert!(!mounts.is_adopted());
        let key = RunKey::from_hex(&"ab".repeat(32)).unwrap();
        let run_dir = dir.path().to_owned();
        let worker = tokio::task::spawn_blocking(move || {
            // An attempt of the daemon may just end when we come.
            while serve(&run_dir, key).is_err() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        tokio::time::timeout(Duration::from_secs(60), adopting)
            .await
            .unwrap()
            .unwrap();
        worker.await.unwrap();
        let adopted: Vec<RunKey> = mounts.mounted().into_iter().map(|run| run.key).collect();
        assert_eq!((mounts.is_adopted(), adopted), (true, vec![key]));
    }
}
