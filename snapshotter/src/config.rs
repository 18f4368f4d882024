// SPDX-License-Identifier: Apache-2.0
//! The configuration of `sluiced`, in two stages: as written in the TOML file ([`Written`]), then
//! as meant ([`Config`]), validated. Every key has a default, so the file may be missing or empty;
//! an unknown key is an error. `docs/configuration.md` lists every key.

mod cluster;
mod index;
mod mirror;
mod notifications;
mod registry;
mod units;
mod written;

#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

pub use cluster::{ClusterConfig, ClusterTlsConfig};
pub use index::{IndexPolicy, IndexUse};
pub use mirror::MirrorConfig;
pub use registry::{CredentialProviders, DragonflyConfig, RegistryConfig, RegistryHost};
pub use written::Written;

use crate::boot::BootOptions;
use crate::notifications::NotificationOptions;
use crate::prewarm::PrewarmOptions;

/// Where the configuration is looked for if the command line does not say.
pub const DEFAULT_PATH: &str = "/etc/sluice/config.toml";

/// The longest path that a unix socket's address holds, without the zero at its end: see unix(7).
const SOCKET_PATH_BYTES: usize = 107;
/// Longest name of a socket below `paths.run`.
const LONGEST_SOCKET_NAME: &str = "snapshots.sock";
/// What a Prepare takes beyond its budget, to commit.
const STORE_GRACE_MARGIN: Duration = Duration::from_secs(1);

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read configuration {path:?}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is no TOML, has an unknown key or a value of the wrong type.
    #[error("parse configuration {path:?}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Names the key and the line.
        message: String,
    },
    /// A value makes no sense.
    #[error("configuration {path:?}: {key} = {value:?}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key with its section.
        key: &'static str,
        /// The value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One line of text per event.
    Text,
    /// One JSON object per event.
    Json,
}

/// How merged trees are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountBackend {
    /// The kernel for images that are complete, FUSE for others.
    Auto,
    /// FUSE.
    Fuse,
    /// The kernel for all; it is an error worth a human's look when it cannot be used.
    Erofs,
}

/// The configuration as meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Everything that survives a reboot.
    pub root: PathBuf,
    /// Sockets and locks.
    pub run_dir: PathBuf,
    /// containerd's gRPC socket.
    pub containerd_address: PathBuf,
    /// Answer idmapped mounts for snapshots with mapping labels; `None`: where containerd makes them.
    pub idmapped_mounts: Option<bool>,
    /// Further options of overlay mounts.
    pub overlay_options: Vec<String>,
    /// How long a Prepare may wait for the network.
    pub prepare_budget: Duration,
    /// Blobs up to this size that have no usable index are pulled whole on purpose.
    pub whole_below_bytes: u64,
    /// How long a reader waits for missing data; `None`: for ever.
    pub read_deadline: Option<Duration>,
    /// How long an operation waits for mounts and for containerd.
    pub rpc_deadline: Duration,
    /// Most bytes that the chunk store may hold; `None`: no limit.
    pub store_budget_bytes: Option<u64>,
    /// Bytes of the disk that are kept free of what nobody waits for; 0: none.
    pub store_reserve_bytes: u64,
    /// Make chunks of new images of files that other layers have.
    pub store_reuse: bool,
    /// How long files of layers that no snapshot has any more are kept: longer than a Prepare takes,
    /// whose files no snapshot has yet.
    pub store_grace: Duration,
    /// Complete images in the background.
    pub prefetch: bool,
    /// How long after a container was prepared that begins, or what else holds until then.
    pub prefetch_delay: Duration,
    /// Until then too, where no boot list foresees a start, and while a reader waits nevertheless.
    pub prefetch_beside_readers: bool,
    /// Learning and loading what containers read while they start.
    pub boot: BootOptions,
    /// Bringing images before they are asked for.
    pub prewarm: PrewarmOptions,
    /// Notifications of registries; `None`: they are not taken.
    pub notifications: Option<NotificationOptions>,
    /// Where images are read from.
    pub registry: RegistryConfig,
    /// Patterns of `host/repository` that may be lazy.
    pub trusted_lazy: Vec<String>,
    /// Which indexes of blobs as they are may be used.
    pub index_use: IndexPolicy,
    /// Where metrics and health are served; `None`: nowhere.
    pub telemetry: Option<SocketAddr>,
    /// Form of the log.
    pub log_format: LogFormat,
    /// Level, or directives as of tracing's env filter.
    pub log_level: String,
    /// How merged trees are mounted.
    pub mount_backend: MountBackend,
    /// Keep FUSE requests in memory that outlives a worker also where the kernel could hand them out again.
    pub mount_journal: bool,
    /// How long a mount that nobody uses is kept.
    pub mount_grace: Duration,
    /// The cluster that this node is in; `None`: it is by itself.
    pub cluster: Option<ClusterConfig>,
    /// The mirror for ordinary pulls; `None`: there is none.
    pub mirror: Option<MirrorConfig>,
}

/// What the command line sets over the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--root`.
    pub root: Option<PathBuf>,
    /// `--run-dir`.
    pub run_dir: Option<PathBuf>,
}

impl Config {
    /// Reads a file. `None`: [`DEFAULT_PATH`], which may be missing.
    pub fn load(path: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        let default = Path::new(DEFAULT_PATH);
        let file = path.unwrap_or(default);
        let text = match std::fs::read_to_string(file) {
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => {
                String::new()
            }
            text => text.map_err(|source| ConfigError::Read {
                path: file.into(),
                source,
            })?,
        };
        Self::parse(&text, file, overrides)
    }

    /// Reads the text of a file; the path is for errors only.
    pub fn parse(text: &str, path: &Path, overrides: Overrides) -> Result<Self, ConfigError> {
        let mut written: Written = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.into(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        if let Some(root) = overrides.root {
            written.paths.root = root;
        }
        if let Some(run_dir) = overrides.run_dir {
            written.paths.run = run_dir;
        }
        written.validate(path)
    }

    /// Socket on which containerd reaches the snapshots service.
    pub fn snapshots_socket(&self) -> PathBuf {
        self.run_dir.join("snapshots.sock")
    }

    /// Socket of the control API.
    pub fn control_socket(&self) -> PathBuf {
        self.run_dir.join("control.sock")
    }
}

impl Written {
    /// Turns what is written into what is meant.
    ///
    /// **Errors**: [`ConfigError::Invalid`] names the first key whose value makes no sense.
    pub fn validate(self, path: &Path) -> Result<Config, ConfigError> {
        let Written {
            paths,
            containerd,
            snapshots,
            prepare,
            fetch,
            store,
            prefetch,
            boot,
            prewarm,
            notifications,
            registry,
            trust,
            index,
            telemetry,
            log,
            mount,
            cluster,
            mirror,
        } = self;
        let check = Check { path };
        let read_deadline = check.duration("fetch.read_deadline", &fetch.read_deadline)?;
        let store_budget = check.value("store.budget", &store.budget, units::parse_bytes)?;
        for pattern in &trust.lazy {
            check.value("trust.lazy", pattern, is_pattern)?;
        }
        for option in &snapshots.mount_options {
            check.value("snapshots.mount_options", option, is_mount_option)?;
        }
        let prepare_budget = check.nonzero("prepare.budget", &prepare.budget)?;
        let store_grace = check.duration("store.grace", &store.grace)?;
        let run_dir = check.mountable("paths.run", paths.run)?;
        check.holds_sockets("paths.run", &run_dir)?;
        Ok(Config {
            root: check.mountable("paths.root", paths.root)?,
            run_dir,
            containerd_address: check.absolute("containerd.address", &containerd.address)?,
            idmapped_mounts: snapshots.idmapped_mounts.fixed(),
            overlay_options: snapshots.mount_options,
            prepare_budget,
            whole_below_bytes: check.value(
                "prepare.whole_below",
                &prepare.whole_below,
                units::parse_bytes,
            )?,
            read_deadline: (!read_deadline.is_zero()).then_some(read_deadline),
            rpc_deadline: check.nonzero("fetch.rpc_deadline", &fetch.rpc_deadline)?,
            store_budget_bytes: (store_budget != 0).then_some(store_budget),
            store_reserve_bytes: check.value(
                "store.reserve",
                &store.reserve,
                units::parse_bytes,
            )?,
            store_reuse: store.reuse,
            store_grace: store_grace.max(prepare_budget + STORE_GRACE_MARGIN),
            prefetch: prefetch.enabled,
            prefetch_delay: check.duration("prefetch.delay", &prefetch.delay)?,
            prefetch_beside_readers: prefetch.beside_readers,
            boot: BootOptions {
                enabled: boot.enabled,
                window: check.nonzero("boot.window", &boot.window)?,
                // Known once the kernel was tried.
                whole_pages: false,
            },
            prewarm: PrewarmOptions {
                grace: check.nonzero("prewarm.grace", &prewarm.grace)?,
                deadline: check.nonzero("prewarm.deadline", &prewarm.deadline)?,
            },
            notifications: notifications.validate(&check)?,
            mount_journal: mount.journal,
            mount_grace: check.duration("mount.grace", &mount.grace)?,
            registry: registry.validate(&check)?,
            trusted_lazy: trust.lazy,
            index_use: index.validate(&check)?,
            telemetry: check.value("telemetry.address", &telemetry.address, loopback)?,
            log_format: check.value("log.format", &log.format, |format| match format {
                "text" => Ok(LogFormat::Text),
                "json" => Ok(LogFormat::Json),
                _ => Err("want \"text\" or \"json\"".to_owned()),
            })?,
            log_level: check.value("log.level", &log.level, |level| {
                let filter = tracing_subscriber::EnvFilter::try_new(level);
                filter
                    .map(|_| level.to_owned())
                    .map_err(|error| error.to_string())
            })?,
            mount_backend: check.value("mount.backend", &mount.backend, |name| match name {
                "auto" => Ok(MountBackend::Auto),
                "fuse" => Ok(MountBackend::Fuse),
                "erofs" => Ok(MountBackend::Erofs),
                _ => Err("want \"auto\", \"fuse\" or \"erofs\"".to_owned()),
            })?,
            cluster: cluster.validate(&check)?,
            mirror: mirror.validate(&check)?,
        })
    }
}

/// Makes errors that name the file and the key.
struct Check<'a> {
    path: &'a Path,
}

impl Check<'_> {
    fn value<T>(
        &self,
        key: &'static str,
        value: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        parse(value).map_err(|reason| ConfigError::Invalid {
            path: self.path.into(),
            key,
            value: value.to_owned(),
            reason,
        })
    }

    fn duration(&self, key: &'static str, value: &str) -> Result<Duration, ConfigError> {
        self.value(key, value, units::parse_duration)
    }

    fn nonzero(&self, key: &'static str, value: &str) -> Result<Duration, ConfigError> {
        self.value(key, value, |text| match units::parse_duration(text)? {
            Duration::ZERO => Err("must not be zero".to_owned()),
            duration => Ok(duration),
        })
    }

    fn absolute(&self, key: &'static str, value: &Path) -> Result<PathBuf, ConfigError> {
        self.value(key, &value.to_string_lossy(), |_| {
            let plain = value.is_absolute()
                && value
                    .components()
                    .all(|part| !matches!(part, Component::ParentDir));
            if plain {
                Ok(value.to_owned())
            } else {
                Err("want an absolute path".to_owned())
            }
        })
    }

    fn holds_sockets(&self, key: &'static str, directory: &Path) -> Result<(), ConfigError> {
        let longest = SOCKET_PATH_BYTES - LONGEST_SOCKET_NAME.len() - 1;
        self.value(key, &directory.to_string_lossy(), |_| {
            if directory.as_os_str().len() <= longest {
                Ok(())
            } else {
                Err(format!("want at most {longest} bytes: sockets are in it"))
            }
        })
    }

    /// A path that may stand in the options of an overlay mount and in a unix socket's address.
    fn mountable(&self, key: &'static str, value: PathBuf) -> Result<PathBuf, ConfigError> {
        let value = self.absolute(key, &value)?;
        let text = value.to_string_lossy().into_owned();
        self.value(key, &text, |text| {
            let plain = value.to_str().is_some()
                && !text.contains(|c: char| matches!(c, ':' | ',' | '\\' | '"') || c.is_control());
            if plain {
                Ok(value.clone())
            } else {
                Err(
                    "a path in mount options holds no colon, comma, quote, backslash or control \
                     character, and is UTF-8"
                        .to_owned(),
                )
            }
        })
    }
}

fn loopback(text: &str) -> Result<Option<SocketAddr>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let address: SocketAddr = text
        .parse()
        .map_err(|_| "want <address>:<port>, or nothing to turn it off".to_owned())?;
    if address.ip().is_loopback() {
        Ok(Some(address))
    } else {
        Err("want a loopback address: the endpoint has no authentication".to_owned())
    }
}

fn is_host(text: &str) -> Result<(), String> {
    let plain = !text.is_empty() && !text.contains(|c: char| c == '/' || c.is_whitespace());
    if plain {
        Ok(())
    } else {
        Err("want host or host:port, as in image references".to_owned())
    }
}

fn is_pattern(text: &str) -> Result<(), String> {
    let plain = !text.is_empty() && !text.contains(char::is_whitespace);
    if plain {
        Ok(())
    } else {
        Err("want a pattern such as registry.example/team/*".to_owned())
    }
}

fn is_mount_option(text: &str) -> Result<(), String> {
    let name = text.split('=').next().unwrap_or("");
    if name.is_empty() || text.contains(',') {
        Err("want one mount option".to_owned())
    } else if matches!(
        name,
        "lowerdir" | "upperdir" | "workdir" | "uidmap" | "gidmap"
    ) {
        Err("this option is made by the snapshotter".to_owned())
    } else {
        Ok(())
    }
}
