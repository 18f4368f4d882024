// SPDX-License-Identifier: Apache-2.0
//! Who was in the cluster, over a restart of the daemon: `cluster/nodes.json` below its root.
//!
//! A hint, never needed: what cannot be read or written costs a line in the log.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sluice_fetcher::cluster::node::{Node, View};
use sluice_fetcher::cluster::remember;
use tokio::sync::watch;

use crate::durable;

const DIRECTORY: &str = "cluster";
const NAME: &str = "nodes.json";
/// What is older is of no use: the nodes have other addresses by then, and each costs a reader a wait.
const AGE_MAX: Duration = Duration::from_secs(3600);
/// How often it is written while nothing changes, so that its age says when this node was here last.
const WRITE_EVERY: Duration = Duration::from_secs(600);
/// Changes of so long are written together.
const SETTLE: Duration = Duration::from_secs(1);

/// The nodes that were there, unless that is long ago. To be called before [`keep`]. **Blocks** for a
/// small file.
pub(super) fn load(root: &Path, free_slots: u16) -> Vec<Node> {
    let directory = root.join(DIRECTORY);
    let path = directory.join(NAME);
    let read = || -> std::io::Result<Vec<Node>> {
        durable::create_private_directory(&directory)?;
        durable::sweep_temporary(&directory)?;
        let written = fs::metadata(&path)?.modified()?;
        // A clock that was set back makes it no older.
        let age = SystemTime::now().duration_since(written);
        if age.is_ok_and(|age| age > AGE_MAX) {
            return Ok(Vec::new());
        }
        Ok(remember::read(&fs::read(&path)?, free_slots)?)
    };
    read().unwrap_or_else(|error| {
        if error.kind() != ErrorKind::NotFound {
            tracing::warn!(path = %path.display(), "nodes that were there are not known: {error}");
        }
        Vec::new()
    })
}

/// Keeps the file until the view ends. **Cancel**: safe; the file is as before or as after.
pub(super) async fn keep(root: &Path, mut view: watch::Receiver<Arc<View>>) {
    let directory = root.join(DIRECTORY);
    loop {
        let now = Arc::clone(&view.borrow_and_update());
        // Who is cut off from all remembers whom it will look for.
        if !now.others.is_empty() {
            let directory = directory.clone();
            let write = move || durable::write(&directory, NAME, &remember::write(&now));
            if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
                tracing::warn!("who is in the cluster cannot be kept: {error}");
            }
        }
        tokio::time::sleep(SETTLE).await;
        let changed = tokio::time::timeout(WRITE_EVERY, view.changed()).await;
        if matches!(changed, Ok(Err(_))) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use sluice_fetcher::cluster::node::{NodeId, Role};

    use super::*;

    fn node(name: &str) -> Node {
        Node {
            id: NodeId::parse(name).unwrap(),
            zone: "z".into(),
            rack: String::new(),
            role: Role::Node,
            address: ([10, 0, 0, 1], 9641).into(),
            version: "0.1.0".into(),
            protocol: 1,
            load: 0,
            free_slots: 16,
        }
    }

    #[tokio::test]
    async fn a_view_outlives_the_daemon_for_an_hour() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(DIRECTORY).join(NAME);
        assert_eq!(load(root.path(), 16), []);
        let mut view = View::alone(node("me"));
        let (sender, seen) = watch::channel(Arc::new(view.clone()));
        let keeper = tokio::spawn({
            let root = root.path().to_owned();
            async move { keep(&root, seen).await }
        });
        view.others = vec![node("a"), node("b")];
        sender.send_replace(Arc::new(view.clone()));
        let until = std::time::Instant::now() + Duration::from_secs(30);
        while load(root.path(), 16) != view.others {
            assert!(std::time::Instant::now() < until, "never written");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Who is alone for a while remembers the others.
        sender.send_replace(Arc::new(View::alone(node("me"))));
        tokio::time::sleep(SETTLE * 2).await;
        assert_eq!(load(root.path(), 16), view.others);
        drop(sender);
        keeper.await.unwrap();

        let file = fs::File::options().write(true).open(&path).unwrap();
        let old = SystemTime::now() - AGE_MAX - Duration::from_secs(1);
        file.set_modified(old).unwrap();
        assert_eq!(load(root.path(), 16), [], "too old");
        fs::write(&path, "{").unwrap();
        assert_eq!(load(root.path(), 16), [], "no JSON");
    }
}
