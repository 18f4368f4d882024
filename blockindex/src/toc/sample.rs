// SPDX-License-Identifier: Apache-2.0
//! Writes eStargz and zstd:chunked layers as their tools do, for tests.

use std::io::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use super::footer::estargz_footer;
use super::{TocFormat, TocPin};
use crate::digest::BlobDigest;

/// A file of the layer.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) path: String,
    /// As a TOC names it.
    pub(crate) kind: &'static str,
    pub(crate) mode: u32,
    pub(crate) mtime: u64,
    pub(crate) link: String,
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

impl Spec {
    pub(crate) fn new(path: &str, kind: &'static str) -> Self {
        Self {
            path: path.to_owned(),
            kind,
            mode: 0o755,
            mtime: 1_600_000_000,
            link: String::new(),
            content: Vec::new(),
            xattrs: Vec::new(),
        }
    }

    pub(crate) fn file(path: &str, content: &[u8]) -> Self {
        Self {
            mode: 0o640,
            content: content.to_vec(),
            ..Self::new(path, "reg")
        }
    }

    pub(crate) fn link(path: &str, kind: &'static str, target: &str) -> Self {
        Self {
            link: target.to_owned(),
            ..Self::new(path, kind)
        }
    }
}

/// How the blob is cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    /// Contents are cut into chunks of this size.
    pub(crate) chunk: usize,
    /// A stream gets at least so many bytes of the tar before another one begins.
    pub(crate) stream: usize,
}

/// A layer as it was written.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) tar: Vec<u8>,
    pub(crate) blob: Vec<u8>,
    pub(crate) pin: TocPin,
    pub(crate) toc: Value,
    pub(crate) toc_start: u64,
}

struct Part {
    start: usize,
    entry: usize,
}

/// Writes the tar: the bytes, and where the contents stand in it.
fn tar_of(specs: &[Spec]) -> (Vec<u8>, Vec<usize>) {
    let mut builder = tar::Builder::new(Vec::new());
    let mut contents = Vec::new();
    for spec in specs {
        let records: Vec<(String, &[u8])> = spec
            .xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), &value[..]))
            .collect();
        if !records.is_empty() {
            let records = records.iter().map(|(name, value)| (name.as_str(), *value));
            builder.append_pax_extensions(records).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(match spec.kind {
            "reg" => tar::EntryType::Regular,
            "dir" => tar::EntryType::Directory,
            "symlink" => tar::EntryType::Symlink,
            "hardlink" => tar::EntryType::Link,
            "fifo" => tar::EntryType::Fifo,
            _ => tar::EntryType::Char,
        });
        header.set_size(spec.content.len() as u64);
        header.set_mode(spec.mode);
        header.set_mtime(spec.mtime);
        header.set_uid(7);
        header.set_gid(8);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.as_gnu_mut().unwrap().name[..spec.path.len()].copy_from_slice(spec.path.as_bytes());
        header.as_gnu_mut().unwrap().linkname[..spec.link.len()]
            .copy_from_slice(spec.link.as_bytes());
        header.set_cksum();
        builder.append(&header, &spec.content[..]).unwrap();
        let end = builder.get_ref().len();
        contents.push(end - spec.content.len().next_multiple_of(512));
    }
    // The tar's end belongs to what follows.
    (std::mem::take(builder.get_mut()), contents)
}

fn compress(format: TocFormat, bytes: &[u8]) -> Vec<u8> {
    match format {
        TocFormat::Estargz => {
            let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        TocFormat::ZstdChunked => zstd::bulk::compress(bytes, 3).unwrap(),
    }
}

fn skippable(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap();
    [&[0x50, 0x2a, 0x4d, 0x18], &length.to_le_bytes()[..], bytes].concat()
}

/// Writes a layer.
pub(crate) fn write(specs: &[Spec], format: TocFormat, cut: Cut) -> Sample {
    let (mut tar, contents) = tar_of(specs);
    let mut entries: Vec<Value> = Vec::new();
    let mut parts: Vec<Part> = Vec::new();
    for (spec, content) in specs.iter().zip(&contents) {
        let xattrs: serde_json::Map<String, Value> = spec
            .xattrs
            .iter()
            .map(|(name, value)| (name.clone(), STANDARD.encode(value).into()))
            .collect();
        let seconds = i64::try_from(spec.mtime).unwrap();
        let time = time::OffsetDateTime::from_unix_timestamp(seconds).unwrap();
        let time = format!(
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
            time.year(),
            u8::from(time.month()),
            time.day(),
            time.hour(),
            time.minute(),
            time.second()
        );
        let mut entry = json!({
            "name": spec.path, "type": spec.kind, "mode": spec.mode, "uid": 7, "gid": 8,
            "modtime": time,
        });
        let fields = entry.as_object_mut().unwrap();
        if !xattrs.is_empty() {
            fields.insert("xattrs".into(), xattrs.into());
        }
        if !spec.link.is_empty() {
            fields.insert("linkName".into(), spec.link.clone().into());
        }
        if spec.kind == "char" {
            fields.insert("devMajor".into(), 1.into());
            fields.insert("devMinor".into(), 3.into());
        }
        if spec.content.is_empty() {
            entries.push(entry);
            continue;
        }
        fields.insert("size".into(), spec.content.len().into());
        fields.insert(
            "digest".into(),
            BlobDigest::of(&spec.content).to_string().into(),
        );
        for (number, chunk) in spec.content.chunks(cut.chunk).enumerate() {
            parts.push(Part {
                start: content + number * cut.chunk,
                entry: entries.len(),
            });
            let mut entry = match number {
                0 => entry.clone(),
                _ => json!({"name": spec.path, "type": "chunk"}),
            };
            let fields = entry.as_object_mut().unwrap();
            if number > 0 {
                fields.insert("chunkOffset".into(), (number * cut.chunk).into());
            }
            // The last chunk of a file has none, as the tools leave it out.
            if chunk.len() == cut.chunk {
                fields.insert("chunkSize".into(), chunk.len().into());
            }
            let digest = BlobDigest::of(chunk).to_string();
            fields.insert("chunkDigest".into(), digest.into());
            entries.push(entry);
        }
    }
    if format == TocFormat::ZstdChunked {
        tar.resize(tar.len() + 1024, 0);
    }
    let mut blob = Vec::new();
    let mut stream_start = 0;
    let mut open: Vec<&Part> = Vec::new();
    let mut close = |from: usize, to: usize, open: &mut Vec<&Part>| {
        for part in open.drain(..) {
            let fields = entries[part.entry].as_object_mut().unwrap();
            fields.insert("offset".into(), blob.len().into());
            if part.start > from {
                fields.insert("innerOffset".into(), (part.start - from).into());
            }
        }
        blob.extend(compress(format, &tar[from..to]));
    };
    for part in &parts {
        if open.is_empty() || part.start - stream_start >= cut.stream {
            close(stream_start, part.start, &mut open);
            stream_start = part.start;
        }
        open.push(part);
    }
    close(stream_start, tar.len(), &mut open);
    let toc = json!({"version": 1, "entries": entries});
    let sample = Sample {
        tar,
        blob,
        pin: TocPin::Footer {
            json_digest: [0; 32],
        },
        toc: Value::Null,
        toc_start: 0,
    };
    with_toc(sample, format, toc)
}

/// The same frames with another TOC.
pub(crate) fn with_toc(mut sample: Sample, format: TocFormat, toc: Value) -> Sample {
    if sample.toc_start > 0 {
        sample
            .blob
            .truncate(usize::try_from(sample.toc_start).unwrap());
    }
    sample.toc_start = sample.blob.len() as u64;
    let json = serde_json::to_vec_pretty(&toc).unwrap();
    let of = |bytes: &[u8]| *BlobDigest::of(bytes).as_bytes();
    match format {
        TocFormat::Estargz => {
            let mut header = tar::Header::new_ustar();
            header.set_path("stargz.index.json").unwrap();
            header.set_size(json.len() as u64);
            header.set_cksum();
            let mut builder = tar::Builder::new(Vec::new());
            builder.append(&header, &json[..]).unwrap();
            let member = compress(format, &builder.into_inner().unwrap());
            sample.blob.extend(member);
            sample.blob.extend(estargz_footer(sample.toc_start));
            sample.pin = TocPin::Footer {
                json_digest: of(&json),
            };
        }
        TocFormat::ZstdChunked => {
            let payload = zstd::bulk::compress(&json, 3).unwrap();
            sample.blob.extend(skippable(&payload));
            let numbers = [
                sample.toc_start + 8,
                payload.len() as u64,
                json.len() as u64,
                1,
            ];
            let mut footer: Vec<u8> = numbers.iter().flat_map(|it| it.to_le_bytes()).collect();
            footer.extend([0x47, 0x6e, 0x55, 0x6c, 0x49, 0x6e, 0x55, 0x78]);
            sample.blob.extend(skippable(&footer));
            let get = |name: &str| match name {
                super::ZSTD_CHUNKED_CHECKSUM => Some(BlobDigest::of(&payload).to_string()),
                super::ZSTD_CHUNKED_POSITION => Some(format!(
                    "{}:{}:{}:1",
                    sample.toc_start + 8,
                    payload.len(),
                    json.len()
                )),
                _ => None,
            };
            let texts: Vec<(&str, String)> =
                [super::ZSTD_CHUNKED_CHECKSUM, super::ZSTD_CHUNKED_POSITION]
                    .into_iter()
                    .map(|name| (name, get(name).unwrap()))
                    .collect();
            let find = |name: &str| {
                let found = texts.iter().find(|(key, _)| *key == name);
                found.map(|(_, text)| text.as_str())
            };
            sample.pin = TocPin::of_annotations(find).unwrap().unwrap();
        }
    }
    sample.toc = toc;
    sample
}
