// SPDX-License-Identifier: Apache-2.0
//! What containerd hears of the disk, against what the disk says.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use containerd_client::services::v1::snapshots as api;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use sluice_snapshotter::resolve::Containerd;

use super::image::{commit_to_containerd, push, tar};
use super::site::start_daemon;
use super::{Client, NS, noise, read, setup, three_layers};

/// Inodes and allocated bytes.
type Held = (i64, i64);

fn add(total: &mut Held, path: &Path) {
    // What is swept meanwhile takes nothing.
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return;
    };
    total.0 += 1;
    total.1 += i64::try_from(metadata.blocks() * 512).unwrap();
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            add(total, &entry.path());
        }
    }
}

/// What devices, indexes and trees take; not the directories that are there for all, nor what opens the store.
fn on_disk(root: &Path) -> Held {
    let mut total = Held::default();
    for name in ["devices", "indexes", "trees"] {
        for entry in std::fs::read_dir(root.join("sluice").join(name)).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if name != "devices" || kind.is_dir() {
                add(&mut total, &entry.path());
            }
        }
    }
    total
}

/// The usages of all committed snapshots, as the daemon tells them.
async fn told(client: &Client) -> (Held, Vec<(String, Held)>) {
    let socket = client.root.join("run/snapshots.sock");
    let daemon = Containerd::new(&socket, Duration::from_secs(20)).channel();
    let mut snapshots = SnapshotsClient::new(daemon);
    let request = api::ListSnapshotsRequest {
        snapshotter: "sluice".into(),
        filters: Vec::new(),
    };
    let mut stream = snapshots.list(request).await.unwrap().into_inner();
    let (mut total, mut each) = (Held::default(), Vec::new());
    while let Some(page) = stream.message().await.unwrap() {
        for info in page.info {
            if info.kind != i32::from(api::Kind::Committed as u8) {
                continue;
            }
            let request = api::UsageRequest {
                snapshotter: "sluice".into(),
                key: info.name.clone(),
            };
            let usage = snapshots.usage(request).await.unwrap().into_inner();
            total.0 += usage.inodes;
            total.1 += usage.size;
            each.push((info.name, (usage.inodes, usage.size)));
        }
    }
    (total, each)
}

/// Waits until both say the same: the file system allocates when it writes back.
async fn assert_same(client: &Client, what: &str) -> Vec<(String, Held)> {
    let begun = std::time::Instant::now();
    loop {
        nix::unistd::sync();
        let (sum, each) = told(client).await;
        let disk = on_disk(&client.root);
        if sum == disk && disk == on_disk(&client.root) {
            println!("{what}: {} inodes, {} bytes", sum.0, sum.1);
            return each;
        }
        // Longer than it is remembered who pays.
        let late = begun.elapsed() > Duration::from_secs(40);
        assert!(!late, "{what}: told {sum:?}, held {disk:?}: {each:#?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_adds_up_to_what_the_disk_holds() {
    let setup = setup().await;
    let (mut tars, large) = three_layers();
    let image = push(setup.port, "team/app", &tars, &[]).await;
    // The same upper layers on another base: two snapshots of each, one device.
    let base = noise(9, 300_000);
    tars[0] = tar(&[("base", Some(&base)), ("gone", Some(b"x"))]);
    let other = push(setup.port, "team/other", &tars, &[]).await;
    let config =
        "[prefetch]\nenabled = false\n\n[boot]\nenabled = false\n\n[prepare]\nbudget = \"30s\"\n";
    let daemon = start_daemon(&setup.root, config).await;
    let client = &setup.client;
    client.ready().await;
    for image in [&image, &other] {
        commit_to_containerd(image, &client.containerd, NS).await;
        assert_eq!(client.unpack(image).await, [] as [usize; 0]);
    }
    let pulled = assert_same(client, "pulled").await;
    assert_eq!(pulled.len(), 6);

    let one = client.container("one", &image.top()).await;
    let two = client.container("two", &other.top()).await;
    assert_eq!(read(&one, "top"), b"top");
    let started = assert_same(client, "started").await;
    assert_eq!(read(&one, "large"), large);
    assert_eq!(read(&two, "base"), base);
    let whole = assert_same(client, "read").await;
    // It is the bytes that were read that came.
    let bytes = |each: &[(String, Held)]| each.iter().map(|it| it.1.1).sum::<i64>();
    let came = bytes(&whole) - bytes(&started);
    let read = i64::try_from(large.len() + base.len()).unwrap();
    assert!((read / 2..read * 2).contains(&came), "{came} of {read}");
    // Of two snapshots with the same device one pays; the other has its merged tree at most.
    let free = whole.iter().filter(|it| it.1.0 <= 1).count();
    assert_eq!(free, 2, "{whole:#?}");

    for key in ["one", "two"] {
        client.end(key).await;
    }
    daemon.stop().await;
}
