// SPDX-License-Identifier: Apache-2.0
//! A private docker-registry behind a [`Proxy`].

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::process::Process;
use super::proxy::{LOOPBACK, Line, Proxy};
use super::root::Root;

/// The registry and the line to it.
#[derive(Debug)]
pub struct Registry {
    /// The line: clients use its address.
    pub line: Proxy,
    process: Process,
    direct: SocketAddr,
}

impl Registry {
    /// Starts Debian's docker-registry, empty, below `root`.
    pub fn start(root: &Root, line: Line) -> Result<Self> {
        Self::start_at(root, free_address()?, LOOPBACK, line)
    }

    /// The same, which tells `endpoint` of what is pushed, with this token.
    pub fn start_notifying(root: &Root, line: Line, endpoint: &str, token: &str) -> Result<Self> {
        let notifications = format!(
            "notifications:\n  endpoints:\n    - name: sluice\n      url: {endpoint}\n      headers:\n        Authorization: [\"Bearer {token}\"]\n      timeout: 5s\n      threshold: 5\n      backoff: 1s\n"
        );
        Self::start_configured(root, free_address()?, LOOPBACK, line, &notifications)
    }

    /// A pull-through cache of the registry at `upstream` (`host:port`), below a root of its own.
    pub fn start_cache(root: &Root, line: Line, upstream: &str) -> Result<Self> {
        let proxy = format!("proxy:\n  remoteurl: http://{upstream}\n");
        Self::start_configured(root, free_address()?, LOOPBACK, line, &proxy)
    }

    /// One that knows the user `dev` with the password `pa55:word`, and nobody else.
    pub fn start_private(root: &Root, line: Line) -> Result<Self> {
        let users = root.join("htpasswd")?;
        let known = "dev:$2y$05$abcdefghijklmnopqrstuuyJFE65A46/2eXN/SomAkqtHDi1XDOkC\n";
        std::fs::write(&users, known)?;
        let auth = format!(
            "auth:\n  htpasswd:\n    realm: private\n    path: {}\n",
            users.display()
        );
        Self::start_configured(root, free_address()?, LOOPBACK, line, &auth)
    }

    /// Starts it at `direct`, with the line listening at `listen`; both in the network of the calling thread.
    pub fn start_at(
        root: &Root,
        direct: SocketAddr,
        listen: SocketAddr,
        line: Line,
    ) -> Result<Self> {
        Self::start_configured(root, direct, listen, line, "")
    }

    fn start_configured(
        root: &Root,
        direct: SocketAddr,
        listen: SocketAddr,
        line: Line,
        further: &str,
    ) -> Result<Self> {
        let store = root.directory("registry/store")?;
        let config = root.join("registry/config.yml")?;
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: warn\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {direct}\n{further}",
                store.display()
            ),
        )?;
        let mut process = Process::start(
            "docker-registry",
            Command::new("docker-registry")
                .arg("serve")
                .arg(&config)
                .env("OTEL_TRACES_EXPORTER", "none"),
            &root.join("registry.log")?,
        )
        .context("Debian's docker-registry is needed")?;
        process.wait_ready(Duration::from_secs(20), || {
            TcpStream::connect(direct).is_ok()
        })?;
        Ok(Self {
            line: Proxy::listen(listen, direct, line)?,
            process,
            direct,
        })
    }

    /// `host:port` of the line, as it stands in references.
    #[must_use]
    pub fn host(&self) -> String {
        self.line.address().to_string()
    }

    /// `host:port` of the registry itself, past the line: for preparations that are not measured.
    #[must_use]
    pub fn direct(&self) -> String {
        self.direct.to_string()
    }

    /// SIGKILL; the line stays and fails.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Ends the registry; the line stays and fails.
    pub fn stop(&mut self) -> Result<()> {
        self.process.stop()
    }
}

/// A free address of 127.0.0.1.
pub fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
