// SPDX-License-Identifier: Apache-2.0
//! Layers made by GNU tar, fetched from memory, unpacked and compared. Runs as root, because owners
//! and devices are part of a layer.

use super::*;
use crate::below::{Lower, open_directory};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::process::Command;

use sluice_fetcher::source::Priority;
use sluice_fetcher::source::memory::MemorySource;

struct Layer {
    blob: Vec<u8>,
    description: LayerBlob,
}

fn layer(tar: &[u8], blob: Vec<u8>) -> Layer {
    let description = LayerBlob {
        blob: BlobDigest::of(&blob),
        blob_bytes: blob.len() as u64,
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd".into(),
        diff_id: DiffId::of(tar),
    };
    Layer { blob, description }
}

fn zstd_layer(tar: &[u8]) -> Layer {
    layer(tar, zstd::encode_all(tar, 1).unwrap())
}

async fn fetch(layer: &Layer, scratch: &Path) -> Result<ScannedTar, LayerUnpackError> {
    let source = Arc::new(MemorySource::new(layer.blob.clone()));
    let context = ReadContext::new(Priority::Foreground);
    layer.description.fetch(source, context, scratch).await
}

fn gnu_tar(directory: &Path, options: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(["--numeric-owner", "-C"])
        .arg(directory)
        .args(options)
        .args(["-cf", "-", "."])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn unpack(tar: &ScannedTar, lowers: Vec<Lower<'_>>) -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    let cancel = CancellationToken::new();
    tar.materialise(target.path(), &Below::new(lowers), &cancel)
        .unwrap();
    target
}

fn sample() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(at("a/b")).unwrap();
    std::fs::write(at("a/file"), b"content").unwrap();
    std::fs::hard_link(at("a/file"), at("a/b/link")).unwrap();
    symlink("/etc/../x", at("a/symlink")).unwrap();
    std::fs::write(at("setuid"), b"#!").unwrap();
    std::os::unix::fs::chown(at("setuid"), Some(1234), Some(99)).unwrap();
    std::fs::set_permissions(at("setuid"), std::fs::Permissions::from_mode(0o4711)).unwrap();
    xattr::set(at("a/file"), "user.sluice", b"value").unwrap();
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o640)).unwrap();
    std::fs::write(at("large"), vec![7; 3 << 20]).unwrap();
    dir
}

#[tokio::test]
async fn what_gnu_tar_packed_comes_back() {
    let from = sample();
    let tar = gnu_tar(from.path(), &["--format=pax", "--xattrs"]);
    let scratch = tempfile::tempdir().unwrap();
    for layer in [
        zstd_layer(&tar),
        layer(&tar, tar.clone()),
        layer(&tar, gzip(&tar)),
    ] {
        let scanned = fetch(&layer, scratch.path()).await.unwrap();
        assert!(!scanned.has_implicit_directories());
        let target = unpack(&scanned, Vec::new());
        let again = gnu_tar(target.path(), &["--format=pax", "--xattrs", "--sort=name"]);
        let want = gnu_tar(from.path(), &["--format=pax", "--xattrs", "--sort=name"]);
        // The PAX header has access and change times; what counts is compared file by file.
        assert_eq!(again.len(), want.len());
        compare(from.path(), target.path());
        let at = |name: &str| target.path().join(name);
        assert_eq!(
            at("a/file").metadata().unwrap().ino(),
            at("a/b/link").metadata().unwrap().ino()
        );
        assert_eq!(
            xattr::get(at("a/file"), "user.sluice").unwrap().unwrap(),
            b"value"
        );
    }
    assert_eq!(
        std::fs::read_dir(scratch.path()).unwrap().count(),
        0,
        "nothing is left"
    );
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn compare(want: &Path, actual: &Path) {
    let mut names: Vec<_> = std::fs::read_dir(want)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    let mut others: Vec<_> = std::fs::read_dir(actual)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    others.sort();
    assert_eq!(names, others);
    for name in names {
        let (want, actual) = (want.join(&name), actual.join(&name));
        let (w, a) = (
            want.symlink_metadata().unwrap(),
            actual.symlink_metadata().unwrap(),
        );
        let of = |m: &std::fs::Metadata| {
            (
                m.mode(),
                m.uid(),
                m.gid(),
                m.nlink(),
                m.mtime(),
                m.mtime_nsec(),
                m.rdev(),
            )
        };
        assert_eq!(of(&w), of(&a), "{}", want.display());
        if w.is_dir() {
            compare(&want, &actual);
        } else if w.is_symlink() {
            assert_eq!(want.read_link().unwrap(), actual.read_link().unwrap());
        } else if w.is_file() {
            assert!(std::fs::read(&want).unwrap() == std::fs::read(&actual).unwrap());
        }
    }
}

#[tokio::test]
async fn sparse_files_of_all_formats_are_expanded() {
    let from = tempfile::tempdir().unwrap();
    let long = "n".repeat(150);
    for name in ["sparse", &long] {
        use std::os::unix::fs::FileExt as _;
        let file = File::create(from.path().join(name)).unwrap();
        for (offset, text) in [
            (0, b"begin"),
            (70 << 20, b"inner"),
            ((90 << 20) + 3, b"later"),
        ] {
            file.write_all_at(text, offset).unwrap();
        }
        for hole in 1..30 {
            file.write_all_at(b"piece", hole << 20).unwrap();
        }
        file.set_len(100 << 20).unwrap();
    }
    std::fs::write(from.path().join("plain"), b"plain").unwrap();
    // The GNU format has whole seconds only.
    let touched = Command::new("touch")
        .args(["-d", "@1700000000"])
        .args(["plain", "sparse", &long, "."])
        .current_dir(from.path())
        .status()
        .unwrap();
    assert!(touched.success());
    let scratch = tempfile::tempdir().unwrap();
    for options in [
        &["--sparse", "--format=gnu"][..],
        &["--sparse", "--format=pax", "--sparse-version=0.0"],
        &["--sparse", "--format=pax", "--sparse-version=0.1"],
        &["--sparse", "--format=pax", "--sparse-version=1.0"],
    ] {
        let tar = gnu_tar(from.path(), options);
        assert!(tar.len() < 10 << 20, "GNU tar made no sparse entries");
        let scanned = fetch(&zstd_layer(&tar), scratch.path()).await.unwrap();
        let target = unpack(&scanned, Vec::new());
        compare(from.path(), target.path());
        let blocks = target.path().join("sparse").metadata().unwrap().blocks();
        assert!(blocks < 20 << 11, "holes stay holes, {blocks} blocks");
    }
}

fn entry(builder: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, path: &str, data: &[u8]) {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(data.len() as u64);
    builder.append_data(&mut header, path, data).unwrap();
}

#[tokio::test]
async fn whiteouts_and_implied_directories_are_made_for_overlay() {
    let mut builder = tar::Builder::new(Vec::new());
    entry(&mut builder, tar::EntryType::Regular, "etc/.wh.gone", b"");
    entry(
        &mut builder,
        tar::EntryType::Regular,
        "var/opaque/.wh..wh..opq",
        b"",
    );
    entry(
        &mut builder,
        tar::EntryType::Regular,
        "var/opaque/new",
        b"new",
    );
    let tar = builder.into_inner().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let scanned = fetch(&zstd_layer(&tar), scratch.path()).await.unwrap();
    assert!(scanned.has_implicit_directories());
    let lower = tempfile::tempdir().unwrap();
    std::fs::create_dir(lower.path().join("etc")).unwrap();
    std::os::unix::fs::chown(lower.path().join("etc"), Some(7), Some(8)).unwrap();
    let mode = std::fs::Permissions::from_mode(0o1751);
    std::fs::set_permissions(lower.path().join("etc"), mode).unwrap();
    // A link in a lower layer must never be followed, wherever it leads on the host.
    symlink("/var", lower.path().join("var")).unwrap();
    let target = unpack(
        &scanned,
        vec![Lower::Directory(open_directory(lower.path()).unwrap())],
    );
    let at = |name: &str| target.path().join(name);
    let whiteout = at("etc/gone").symlink_metadata().unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    assert_eq!(
        xattr::get(at("var/opaque"), "trusted.overlay.opaque")
            .unwrap()
            .unwrap(),
        b"y"
    );
    assert_eq!(std::fs::read(at("var/opaque/new")).unwrap(), b"new");
    let etc = at("etc").metadata().unwrap();
    assert_eq!((etc.uid(), etc.gid(), etc.mode() & 0o7777), (7, 8, 0o1751));
    assert_eq!(at("var").metadata().unwrap().mode() & 0o7777, 0o755);
    assert_eq!(
        xattr::get(at("etc"), "trusted.sluice.implicit").unwrap(),
        None
    );
}

#[tokio::test]
async fn wrong_bytes_are_refused() {
    let tar = gnu_tar(sample().path(), &[]);
    let scratch = tempfile::tempdir().unwrap();
    let mut other = zstd_layer(&tar);
    other.description.diff_id = DiffId::of(b"other");
    let error = fetch(&other, scratch.path()).await.unwrap_err();
    assert!(matches!(error, LayerUnpackError::Diff { .. }), "{error}");
    let mut other = zstd_layer(&tar);
    other.description.blob = BlobDigest::of(b"other");
    let error = fetch(&other, scratch.path()).await.unwrap_err();
    assert!(matches!(error, LayerUnpackError::Blob { .. }), "{error}");
    let mut trailing = zstd_layer(&tar);
    trailing
        .blob
        .extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
    trailing.description.blob = BlobDigest::of(&trailing.blob);
    trailing.description.blob_bytes = trailing.blob.len() as u64;
    fetch(&trailing, scratch.path()).await.unwrap();
    let garbage = layer(b"x", b"garbage that is no layer".to_vec());
    let error = fetch(&garbage, scratch.path()).await.unwrap_err();
    assert!(matches!(error, LayerUnpackError::Compression(_)), "{error}");
    let cut = zstd_layer(&tar[..tar.len() / 2 + 100]);
    assert!(fetch(&cut, scratch.path()).await.is_err());
}

#[tokio::test]
async fn a_cancelled_unpack_stops() {
    let tar = gnu_tar(sample().path(), &[]);
    let scratch = tempfile::tempdir().unwrap();
    let scanned = fetch(&zstd_layer(&tar), scratch.path()).await.unwrap();
    let target = tempfile::tempdir().unwrap();
    let cancel = CancellationToken::new();
    cancel.cancel();
    let error = scanned
        .materialise(target.path(), &Below::new(Vec::new()), &cancel)
        .unwrap_err();
    assert!(matches!(
        error,
        LayerUnpackError::Materialise(MaterialiseError::Cancelled)
    ));
}

/// A tar of one file, whose directories are implied.
fn tar_of_file(path: &Path) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    builder.append_data(&mut header, path, &b"x"[..]).unwrap();
    builder.into_inner().unwrap()
}

#[tokio::test]
async fn the_deepest_layer_needs_little_stack_and_few_descriptors() {
    let scratch = tempfile::tempdir().unwrap();
    let mut path = std::path::PathBuf::from("d/".repeat(2000));
    path.push("file");
    let layer = zstd_layer(&tar_of_file(&path));
    let scanned = fetch(&layer, scratch.path()).await.unwrap();
    let small = std::thread::Builder::new().stack_size(192 << 10);
    let target = small.spawn(move || unpack(&scanned, Vec::new()));
    let target = target.unwrap().join().unwrap();
    let mut find = Command::new("find");
    let found = find.arg(target.path()).args(["-name", "file"]).output();
    let found = found.unwrap().stdout;
    let levels = found
        .split(|byte| *byte == b'/')
        .filter(|name| name == b"d");
    assert_eq!(levels.count(), 2000);
    // A standard library may delete it by recursion; this does not.
    let removed = Command::new("rm")
        .arg("-r")
        .arg(target.path().join("d"))
        .status();
    assert!(removed.unwrap().success());
}

#[tokio::test]
async fn the_root_takes_the_attributes_of_the_one_below() {
    let scratch = tempfile::tempdir().unwrap();
    let lower = tempfile::tempdir().unwrap();
    let mode = std::fs::Permissions::from_mode(0o2771);
    std::os::unix::fs::chown(lower.path(), Some(12), Some(34)).unwrap();
    std::fs::set_permissions(lower.path(), mode).unwrap();
    let layer = zstd_layer(&tar_of_file(Path::new("file")));
    let scanned = fetch(&layer, scratch.path()).await.unwrap();
    let below = || Lower::Directory(open_directory(lower.path()).unwrap());
    for (lowers, expected) in [(vec![], (0, 0, 0o755)), (vec![below()], (12, 34, 0o2771))] {
        let target = unpack(&scanned, lowers);
        let root = target.path().metadata().unwrap();
        assert_eq!((root.uid(), root.gid(), root.mode() & 0o7777), expected);
    }
}

#[tokio::test]
async fn a_bomb_ends_with_the_deadline() {
    let scratch = tempfile::tempdir().unwrap();
    let zeros = std::io::Read::take(std::io::repeat(0), 1 << 30);
    let blob = zstd::encode_all(zeros, 1).unwrap();
    let layer = layer(b"not what it is", blob);
    let until = Until {
        deadline: Some(Instant::now()),
        ..Until::default()
    };
    let (sender, receiver) = mpsc::channel(QUEUE_PIECES);
    let (blob, description) = (layer.blob.clone(), layer.description.clone());
    let scratch_path = scratch.path().to_owned();
    let work = tokio::task::spawn_blocking(move || {
        description.decompress_and_scan(PieceReader::new(receiver), &scratch_path, &until)
    });
    sender.send(Ok(blob.into())).await.unwrap();
    drop(sender);
    let ended = work.await.unwrap();
    assert!(
        matches!(ended, Err(LayerUnpackError::Cancelled)),
        "{ended:?}"
    );
}
