// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::digest::{BlobDigest, ConfigDigest, DiffId};
use sluice_blockindex::toc::{ESTARGZ_DIGEST, ZSTD_CHUNKED_CHECKSUM, ZSTD_CHUNKED_POSITION};

use crate::image::document::{OCI_LAYER_GZIP, OCI_LAYER_ZSTD};
use crate::image::memory::MemoryImage;
use crate::pack::{Caps, Input, Packed, pack};
use crate::pool::{ByteBudget, Pool};

fn packed() -> Packed {
    packed_tar(&tar())
}

fn tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for n in 0..40_u32 {
        let content = vec![n.to_le_bytes()[0]; 10_000];
        let mut header = tar::Header::new_gnu();
        header.set_size(10_000);
        header.set_mode(0o640);
        builder
            .append_data(&mut header, format!("d/f{n:02}"), content.as_slice())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

fn packed_tar(tar: &[u8]) -> Packed {
    let (parts, body) = tokio::sync::mpsc::channel(1);
    parts.try_send(Ok(Bytes::copy_from_slice(tar))).unwrap();
    drop(parts);
    let input = Input {
        what: "test".into(),
        blob: BlobDigest::of(tar),
        blob_bytes: tar.len() as u64,
        diff_id: DiffId::of(tar),
        caps: Caps::default(),
        encode: sluice_blockindex::encode::EncodeOptions::default(),
        keep: None,
    };
    let spool = crate::spool::create(&std::env::temp_dir()).unwrap();
    let pool = Pool::new(1).unwrap();
    pack(
        &input,
        body,
        spool,
        &pool,
        &ByteBudget::new(1 << 20),
        &|_| {},
    )
    .unwrap()
}

/// The report of a file that has an index.
fn indexed(file: &File, tree: bool) -> (IndexReport, Option<String>) {
    match inspect_file(file, tree).unwrap() {
        FileReport::Index(report, listing) => (report, listing),
        other => panic!("{other:?}"),
    }
}

fn read_at(file: &File, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn blob_of(packed: &Packed) -> Vec<u8> {
    read_at(&packed.spool, 0, packed.blob_bytes)
}

#[test]
fn a_blob_its_index_and_its_payload_say_the_same() {
    let packed = packed();
    let (report, tree) = indexed(&packed.spool, true);
    assert_eq!((report.files, report.content_bytes), (40, 400_000));
    assert_eq!(report.device_bytes, packed.tar_bytes);
    assert!(
        tree.unwrap().contains("/d/f07 f 0640 0:0"),
        "the listing names files and modes"
    );
    let place = packed.index.as_ref().unwrap();
    let payload = read_at(&packed.spool, place.extent.start(), place.extent.len());
    let (of_payload, _) = indexed(&file_of(&payload), false);
    assert_eq!(of_payload, report);
    let index = decompress_index(&payload, INDEX_FILE_MAX_BYTES).unwrap();
    let (of_index, _) = indexed(&file_of(&index), false);
    assert_eq!(
        of_index,
        IndexReport {
            index_bytes: 0,
            ..report
        }
    );
}

#[test]
fn damage_anywhere_in_a_blob_is_found() {
    let packed = packed();
    let blob = blob_of(&packed);
    let place = packed.index.as_ref().unwrap().extent;
    let end = usize::try_from(place.end()).unwrap();
    // Right before the index and the header of its frame.
    let skeleton = usize::try_from(place.start()).unwrap() - 8 - 20;
    for position in [
        20,
        blob.len() / 3,
        skeleton,
        end - 10,
        end + 12,
        blob.len() - 6,
    ] {
        let mut bad = blob.clone();
        bad[position] ^= 0x40;
        assert!(
            inspect_file(&file_of(&bad), false).is_err(),
            "bit at {position} of {}",
            blob.len()
        );
    }
    for length in [0, 1, 8, blob.len() / 2, blob.len() - 1] {
        assert!(
            inspect_file(&file_of(&blob[..length]), false).is_err(),
            "cut at {length}"
        );
    }
    assert!(inspect_file(&file_of(b"some text that is no blob"), false).is_err());
}

#[test]
fn an_intact_blob_without_an_index_is_no_damage() {
    // A lone block of zeros before more data: malformed, so not lazy.
    let tar = [&[0; 512][..], &tar()].concat();
    let packed = packed_tar(&tar);
    assert!(packed.index.is_err());
    let FileReport::NotLazy(report) = inspect_file(&packed.spool, true).unwrap() else {
        panic!("an index")
    };
    assert_eq!(report.diff_id, DiffId::of(&tar).to_string());
    assert_eq!(report.device_bytes, tar.len() as u64);
    assert!(report.frames > 1 && report.frames_bytes < packed.blob_bytes);
    let blob = blob_of(&packed);
    for position in [3, blob.len() - 12] {
        let mut bad = blob.clone();
        bad[position] ^= 0x40;
        assert!(inspect_file(&file_of(&bad), false).is_err(), "{position}");
    }
    // Without its magic an index is damage, not a choice.
    let packed = packed_tar(&self::tar());
    let mut bad = blob_of(&packed);
    let header = packed.index.as_ref().unwrap().extent.start() - 8;
    bad[usize::try_from(header).unwrap()] ^= 1;
    assert!(inspect_file(&file_of(&bad), false).is_err());
}

#[tokio::test]
async fn layers_of_images_are_lazy_or_say_why_not() {
    let packed = packed();
    let store = MemoryImage::new("store");
    let blob = blob_of(&packed);
    let digest = store.insert_blob(blob.clone());
    let mut layer = Descriptor::new(OCI_LAYER_ZSTD, digest, blob.len() as u64);
    let (of_blob, _) = indexed(&packed.spool, false);
    let diff_id: DiffId = of_blob.diff_id.parse().unwrap();
    let annotations = packed.annotations(diff_id, ConfigDigest::of(b"c")).unwrap();
    layer.annotations = annotations.to_map();
    let report = inspect_layer(&store, &layer, false).await;
    assert_eq!(
        (report.index, report.reason, report.broken),
        (Some(of_blob), None, false)
    );

    let plain = Descriptor::new(OCI_LAYER_GZIP, digest, 1);
    let report = inspect_layer(&store, &plain, false).await;
    assert_eq!(
        (report.reason.as_deref(), report.broken),
        (Some("not converted"), false)
    );

    let digest_text = digest.to_string();
    for (annotations, words, broken) in [
        (
            vec![(ESTARGZ_DIGEST, digest_text.as_str())],
            "contents (eStargz)",
            false,
        ),
        (
            vec![
                (ZSTD_CHUNKED_CHECKSUM, digest_text.as_str()),
                (ZSTD_CHUNKED_POSITION, "100:20:30:1"),
            ],
            "contents (zstd:chunked)",
            false,
        ),
        (
            vec![(ZSTD_CHUNKED_CHECKSUM, digest_text.as_str())],
            ZSTD_CHUNKED_POSITION,
            true,
        ),
    ] {
        let mut listed = plain.clone();
        let owned = annotations
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        listed.annotations = owned.collect();
        let report = inspect_layer(&store, &listed, false).await;
        let reason = report.reason.unwrap();
        assert!(
            reason.contains(words) && report.broken == broken,
            "{reason}"
        );
    }

    let mut bad = blob;
    bad[usize::try_from(annotations.index_extent.start()).unwrap() + 9] ^= 1;
    store.corrupt_blob(digest, bad);
    let report = inspect_layer(&store, &layer, false).await;
    assert!(report.broken && report.reason.unwrap().contains("annotated is sha256:"));
    let store: Arc<dyn ImageReader> = Arc::new(MemoryImage::new("empty"));
    let report = inspect_layer(&*store, &layer, false).await;
    assert!(report.unread && !report.broken, "absent is not damaged");
    assert!(report.reason.unwrap().contains("not found"));
}
