// SPDX-License-Identifier: Apache-2.0
//! Writes the seed corpus of the fuzz targets: `cargo run -p sluice-blockindex --example fuzz_seeds fuzz/corpus`.
//!
//! The files in the tree came from it; run it again when a format changes.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use sluice_blockindex::artifact::{Artifact, ArtifactLayer, IndexBlobs, MANIFEST_TYPE, Subject};
use sluice_blockindex::digest::{BlobDigest, DiffId, IndexDigest, ManifestDigest};
use sluice_blockindex::encode::{EncodeOptions, encode_layer};
use sluice_blockindex::extent::Extent;
use sluice_blockindex::index::{
    INDEX_FILE_MAX_BYTES, UncheckedIndex, WindowsPin, decompress_index,
};
use sluice_blockindex::indexer::{IndexOptions, index_blob};

fn main() {
    let directory = std::env::args_os().nth(1).expect("usage: seeds DIRECTORY");
    let directory = PathBuf::from(directory);
    let tar = tar();
    let options = EncodeOptions {
        writer: "seeds".into(),
        ..EncodeOptions::default()
    };
    let (blob, trailer) = encode_layer(&tar, options).expect("the sample encodes");
    let pin = trailer.index.expect("the sample is lazy");
    let payload = slice(&blob, pin.extent);
    let file = decompress_index(payload, INDEX_FILE_MAX_BYTES).expect("written just now");
    let index = UncheckedIndex::parse(file.clone())
        .expect("sound")
        .validate()
        .expect("valid");
    write(&directory, "index", "file", &file);
    write(&directory, "index", "payload", payload);
    write(&directory, "tree", "image", index.tree_bytes());
    write(&directory, "tar", "sample", &[&[99][..], &tar].concat());
    let chunk = index.chunk_map().chunk(0).expect("one chunk");
    let frame = slice(&blob, chunk.blob);
    let claim = u16::try_from(chunk.device.len())
        .expect("a small chunk")
        .to_le_bytes();
    write(&directory, "frame", "first", &[&claim[..], frame].concat());
    // The chunk map is the second section of the file; its place stands in the section table.
    let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().expect("8 bytes"));
    let section: Extent<()> =
        Extent::from_length(word(64 + 32 + 8), word(64 + 32 + 16)).expect("in the file");
    let map = slice(&file, section);
    write(
        &directory,
        "chunk_map",
        "section",
        &[&[0; 16][..], map].concat(),
    );
    write(&directory, "seek_table", "tail", &blob[blob.len() - 100..]);
    let skeleton = slice(&blob, index.metadata().skeleton.extent);
    let mut plain = u32::try_from(tar.len())
        .expect("a small tar")
        .to_le_bytes()
        .to_vec();
    zstd::Decoder::new(skeleton)
        .expect("zstd")
        .read_to_end(&mut plain)
        .expect("sound");
    write(&directory, "skeleton", "plain", &plain);
    let digest = BlobDigest::of(b"");
    let lazy =
        format!("0=100\n1=50\n2={digest}\n3={digest}\n4=200\n5={digest}\n6={digest}\n7=5000\n");
    write(&directory, "annotations", "lazy", lazy.as_bytes());
    write(
        &directory,
        "annotations",
        "digest",
        digest.to_string().as_bytes(),
    );
    write(&directory, "annotations", "not-lazy", b"8=sparse file\n");
    unmodified(&directory, &tar);
    artifact(&directory);
    toc(&directory);
}

/// The artifact of an image that stands for all: a layer with windows, and one without an index.
fn artifact(directory: &Path) {
    let layer = |name: &str, index| ArtifactLayer {
        blob: BlobDigest::of(name.as_bytes()),
        blob_bytes: 1000,
        diff_id: DiffId::of(name.as_bytes()),
        index,
    };
    let windows = WindowsPin {
        bytes: 50,
        digest: *BlobDigest::of(b"windows").as_bytes(),
    };
    let index = IndexBlobs {
        digest: IndexDigest::of(b"index"),
        bytes: 100,
        windows: Some(windows),
    };
    let sample = Artifact {
        subject: Subject {
            media_type: MANIFEST_TYPE.to_owned(),
            digest: ManifestDigest::of(b"image"),
            bytes: 700,
        },
        generation: 1,
        recipe: "1".to_owned(),
        layers: vec![
            layer("gzip", Ok(index)),
            layer("sparse", Err("sparse file".to_owned())),
        ],
    };
    let bytes = sample.to_json().expect("the sample keeps the rules");
    write(directory, "index_artifact", "sample", &bytes);
}

/// Tables of contents: a few entries, the end of a blob, and annotations. No blob is written: the target takes any.
fn toc(directory: &Path) {
    let digest = BlobDigest::of(b"content");
    let json = format!(
        r#"{{"version":1,"entries":[
{{"name":"d/","type":"dir","modtime":"2021-01-02T03:04:05Z","mode":493,"xattrs":{{"user.a":"AP8="}}}},
{{"name":"d/big","type":"reg","size":9000,"digest":"{digest}","offset":100,"chunkSize":4096,"chunkDigest":"{digest}"}},
{{"name":"d/big","type":"chunk","offset":3000,"chunkOffset":4096,"chunkDigest":"{digest}"}},
{{"name":"small","type":"reg","size":5,"digest":"{digest}","offset":6000,"endOffset":6020}},
{{"name":"beside","type":"reg","size":5,"digest":"{digest}","offset":6000,"innerOffset":1024}},
{{"name":"hard","type":"hardlink","linkName":"small"}},
{{"name":"soft","type":"symlink","linkName":"d"}},
{{"name":"soft/.wh.gone","type":"reg"}},
{{"name":"null","type":"char","devMajor":1,"devMinor":3}},
{{"name":"pipe","type":"fifo"}}]}}"#
    );
    for (kind, name) in [(0, "zstd-chunked"), (1, "estargz")] {
        write(
            directory,
            "toc",
            name,
            &[&[kind][..], json.as_bytes()].concat(),
        );
    }
    let footer = [
        &[
            0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0,
        ][..],
        format!("{:016x}STARGZ", 20).as_bytes(),
        &[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let mut header = tar::Header::new_ustar();
    header.set_path("stargz.index.json").expect("a short path");
    header.set_size(2);
    header.set_cksum();
    encoder.write_all(header.as_bytes()).expect("in memory");
    encoder.write_all(b"{}").expect("in memory");
    let member = encoder.finish().expect("in memory");
    let end = [&[2][..], &[0; 20], &member, &footer].concat();
    write(directory, "toc", "footer", &end);
    let lines = format!("{digest}\n100:50:400:1\n{digest}\n");
    write(
        directory,
        "toc",
        "annotations",
        &[&[3][..], lines.as_bytes()].concat(),
    );
}

/// Blobs of others, and the index of one of them.
fn unmodified(directory: &Path, tar: &[u8]) {
    // Long enough for several blocks and restart points, small enough for a corpus.
    let content: Vec<u8> = (0u32..40_000)
        .map(|at| (at.wrapping_mul(at) >> 9).to_le_bytes()[0] & 0x0f)
        .collect();
    let gzip = |bytes: &[u8], level| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
        encoder.write_all(bytes).expect("in memory");
        encoder.flush().expect("in memory");
        encoder.write_all(bytes).expect("in memory");
        encoder.finish().expect("in memory")
    };
    let (small, large) = (gzip(tar, 9), gzip(&content, 6));
    let zstd = zstd::encode_all(tar, 3).expect("in memory");
    let members = [gzip(tar, 1), gzip(tar, 6), vec![0; 10]].concat();
    // Mode, chunks of at most 512 bytes times that, pieces.
    let with = |mode: u8, bytes: &[u8]| [&[mode, 7, 3], bytes].concat();
    write(directory, "gzip", "small", &with(0, &small));
    write(directory, "gzip", "members", &with(0, &members));
    write(directory, "gzip", "zstd", &with(0, &zstd));
    write(directory, "gzip", "stream", &with(1, &large[10..]));
    write(
        directory,
        "gzip",
        "stored",
        &with(1, &gzip(&content[..2000], 0)[10..]),
    );
    write(directory, "gzip", "frame", &with(2, &large[10..]));
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    builder
        .append_data(&mut header, "file", content.as_slice())
        .expect("in memory");
    let layer = builder.into_inner().expect("in memory");
    let options = IndexOptions {
        chunk_max_bytes: 30_000,
        writer: "seeds".into(),
        ..IndexOptions::default()
    };
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
    for part in layer.chunks(10_000) {
        encoder.write_all(part).expect("in memory");
        encoder.flush().expect("in memory");
    }
    let blob = encoder.finish().expect("in memory");
    let index = index_blob(&blob, options)
        .expect("sound")
        .index
        .expect("lazy");
    write(directory, "index", "unmodified", &index.file);
    let word = |at: usize| u64::from_le_bytes(index.file[at..at + 8].try_into().expect("8 bytes"));
    let section = |at: usize| -> Extent<()> {
        Extent::from_length(word(64 + 32 * at + 8), word(64 + 32 * at + 16)).expect("in the file")
    };
    let (map, restarts) = (
        slice(&index.file, section(1)),
        slice(&index.file, section(4)),
    );
    write(
        directory,
        "chunk_map",
        "unmodified",
        &[&[0; 16], map, restarts].concat(),
    );
}

fn slice<S>(bytes: &[u8], extent: Extent<S>) -> &[u8] {
    let at = |offset| usize::try_from(offset).expect("in memory");
    &bytes[at(extent.start())..at(extent.end())]
}

fn write(directory: &Path, target: &str, name: &str, bytes: &[u8]) {
    let directory = directory.join(target);
    fs::create_dir_all(&directory).expect("corpus directory");
    fs::write(directory.join(name), bytes).expect("corpus file");
}

/// A small tar with one of everything, written by hand so that it never changes.
fn tar() -> Vec<u8> {
    let xattr = b"31 SCHILY.xattr.user.key=value\n";
    let entries: [(&str, u8, &str, &[u8]); 12] = [
        ("etc/", b'5', "", b""),
        ("etc/file", b'0', "", b"content"),
        ("etc/hard", b'1', "etc/file", b""),
        ("etc/soft", b'2', "../etc", b""),
        ("dev/null", b'3', "", b""),
        ("pipe", b'6', "", b""),
        ("etc/.wh.gone", b'0', "", b""),
        ("opaque/.wh..wh..opq", b'0', "", b""),
        ("pax", b'x', "", xattr),
        ("etc/soft/through", b'0', "", b"more content"),
        ("long", b'L', "", b"etc/a-long-name\0"),
        ("short", b'0', "", b"x"),
    ];
    let mut tar = Vec::new();
    for (name, kind, link, content) in entries {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[100..108].copy_from_slice(b"0000755\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        header[136..148].copy_from_slice(b"14524770400\0");
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar\x0000");
        if kind == b'3' {
            header[329..337].copy_from_slice(b"0000001\0");
            header[337..345].copy_from_slice(b"0000003\0");
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.extend(header);
        tar.extend(content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.extend([0; 1024]);
    tar
}
