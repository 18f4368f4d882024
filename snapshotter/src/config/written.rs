// SPDX-License-Identifier: Apache-2.0
//! The configuration as written. Names are the keys of the file, defaults are those documented.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The whole file.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "docs/configuration.md documents each key")]
pub struct Written {
    pub paths: Paths,
    pub containerd: Containerd,
    pub snapshots: Snapshots,
    pub prepare: Prepare,
    pub fetch: Fetch,
    pub store: Store,
    pub prefetch: Prefetch,
    pub boot: Boot,
    pub prewarm: Prewarm,
    pub notifications: Notifications,
    pub registry: Registry,
    pub trust: Trust,
    pub index: Index,
    pub telemetry: Telemetry,
    pub log: Log,
    pub mount: Mount,
    pub cluster: Cluster,
    pub mirror: Mirror,
}

/// Declares a section: its keys, their types and their defaults in one place.
macro_rules! section {
    ($(#[$doc:meta])* $name:ident { $($key:ident: $type:ty = $default:expr),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        #[allow(missing_docs, reason = "docs/configuration.md documents each key")]
        pub struct $name {
            $(pub $key: $type),*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($key: $default),* }
            }
        }
    };
}

/// A switch that may be left to the daemon: `true`, `false` or `"auto"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or \"auto\"")]
pub enum Choice {
    /// As it says.
    Fixed(bool),
    /// `"auto"`.
    Word(AutoWord),
}

/// The one word of [`Choice`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AutoWord {
    /// As it turns out.
    Auto,
}

impl Choice {
    const AUTO: Self = Self::Word(AutoWord::Auto);

    /// What is fixed, if anything is.
    pub fn fixed(self) -> Option<bool> {
        match self {
            Self::Fixed(fixed) => Some(fixed),
            Self::Word(AutoWord::Auto) => None,
        }
    }
}

section! {
    /// `[paths]`
    Paths {
        root: PathBuf = "/var/lib/sluice".into(),
        run: PathBuf = "/run/sluice".into(),
    }
}
section! {
    /// `[containerd]`
    Containerd { address: PathBuf = "/run/containerd/containerd.sock".into() }
}
section! {
    /// `[snapshots]`
    Snapshots {
        idmapped_mounts: Choice = Choice::AUTO,
        mount_options: Vec<String> = Vec::new(),
    }
}
section! {
    /// `[prepare]`
    Prepare {
        budget: String = "5s".into(),
        whole_below: String = "256KiB".into(),
    }
}
section! {
    /// `[fetch]`
    Fetch {
        read_deadline: String = "300s".into(),
        rpc_deadline: String = "30s".into(),
    }
}
section! {
    /// `[store]`
    Store {
        budget: String = "0".into(),
        reserve: String = "0".into(),
        reuse: bool = true,
        grace: String = "20s".into(),
    }
}
section! {
    /// `[prefetch]`
    Prefetch {
        enabled: bool = true,
        delay: String = "5s".into(),
        beside_readers: bool = true,
    }
}
section! {
    /// `[boot]`
    Boot {
        enabled: bool = true,
        window: String = "10s".into(),
    }
}
section! {
    /// `[prewarm]`
    Prewarm {
        grace: String = "1h".into(),
        deadline: String = "1h".into(),
    }
}
section! {
    /// `[notifications]`
    Notifications {
        listen: String = String::new(),
        token: String = String::new(),
        prewarm: bool = false,
        hosts: BTreeMap<String, String> = BTreeMap::new(),
    }
}
section! {
    /// `[registry]`
    Registry {
        docker_config: String = String::new(),
        credential_files: Vec<PathBuf> = Vec::new(),
        credential_provider_config: String = String::new(),
        credential_provider_bin_dir: String = String::new(),
        hosts_dirs: Vec<PathBuf> = vec!["/etc/containerd/certs.d".into()],
        engine: String = String::new(),
        dragonfly: Dragonfly = Dragonfly::default(),
        hosts: BTreeMap<String, Host> = BTreeMap::new(),
    }
}
section! {
    /// `[registry.dragonfly]`
    Dragonfly {
        endpoint: String = "http://127.0.0.1:4001".into(),
        application: String = String::new(),
        tag: String = String::new(),
        timeout: String = "5s".into(),
    }
}
section! {
    /// `[trust]`
    Trust { lazy: Vec<String> = vec!["*".into()] }
}
section! {
    /// `[index]`
    Index {
        referrer: String = "on".into(),
        node: String = "on".into(),
        toc: String = "on".into(),
    }
}
section! {
    /// `[telemetry]`
    Telemetry { address: String = "127.0.0.1:9640".into() }
}
section! {
    /// `[log]`
    Log {
        format: String = "text".into(),
        level: String = "info".into(),
    }
}
section! {
    /// `[mount]`
    Mount {
        backend: String = "auto".into(),
        journal: bool = false,
        grace: String = "30s".into(),
    }
}

section! {
    /// `[cluster]`
    Cluster {
        enabled: bool = false,
        name: String = String::new(),
        zone: String = "default".into(),
        rack: String = String::new(),
        role: String = "node".into(),
        listen: String = "0.0.0.0:9641".into(),
        advertise: String = String::new(),
        seeds: Vec<String> = Vec::new(),
        seed_file: String = String::new(),
        gossip: bool = true,
        allow: Vec<String> = Vec::new(),
        upload: String = "0".into(),
        download: String = "0".into(),
        origin: String = "0".into(),
        origin_requests: u32 = 0,
        shared_zones: Vec<String> = Vec::new(),
        upload_slots: u16 = 16,
        tls: ClusterTls = ClusterTls::default(),
    }
}
section! {
    /// `[mirror]`
    Mirror {
        listen: String = String::new(),
        open: bool = false,
        upstream: String = String::new(),
        registries: Vec<String> = vec!["*".into()],
        budget: String = "10GiB".into(),
        fresh: String = "30s".into(),
        access: String = "5m".into(),
        stale: String = "24h".into(),
    }
}

section! {
    /// `[cluster.tls]`
    ClusterTls {
        cert: String = String::new(),
        key: String = String::new(),
        ca: String = String::new(),
    }
}

/// `[registry.hosts."host:port"]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "docs/configuration.md documents each key")]
pub struct Host {
    pub plain_http: Option<bool>,
    pub insecure_skip_verify: bool,
    pub ca_files: Vec<PathBuf>,
}
