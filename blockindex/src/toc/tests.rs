// SPDX-License-Identifier: Apache-2.0
//! TOCs as tools write them, and as nobody should.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::sample::{Cut, Sample, Spec, with_toc, write};
use super::*;
use crate::chunkmap::{Chunk, Codec, DeviceForm};
use crate::digest::FileDigest;
use crate::erofs::to_tree;
use crate::frames::{decompress_span_into, device_bytes_of, is_kept_well, verify_chunk};
use crate::gzip::restart::RestartAt;
use crate::index::{Index, UncheckedIndex};
use crate::tar::Scanner;
use crate::tree::{InodeKind, Tree};

/// Chunks of a page, each in a stream of its own.
const PAGES: Cut = Cut {
    chunk: 4096,
    stream: 1,
};
const BOTH: [TocFormat; 2] = [TocFormat::Estargz, TocFormat::ZstdChunked];

fn layer(sample: &Sample) -> TocLayer<'static> {
    TocLayer {
        blob: BlobDigest::of(&sample.blob),
        blob_bytes: sample.blob.len() as u64,
        diff_id: DiffId::of(&sample.tar),
        writer: "test",
    }
}

fn slice(bytes: &[u8], extent: Extent<BlobSpace>) -> &[u8] {
    let range = usize::try_from(extent.start()).unwrap()..usize::try_from(extent.end()).unwrap();
    &bytes[range]
}

fn open(sample: &Sample) -> Result<Toc, TocError> {
    let bytes = sample.blob.len() as u64;
    let first = sample.pin.first_read(bytes)?;
    let place = sample.pin.locate(slice(&sample.blob, first), bytes)?;
    Toc::open(&sample.pin, &place, slice(&sample.blob, place.extent))
}

pub(super) fn index(sample: &Sample) -> Result<Index<Vec<u8>>, TocError> {
    let built = open(sample)?.index(&layer(sample))?;
    Ok(UncheckedIndex::parse_contents(built.file)?.validate()?)
}

/// Decodes a chunk from its frame.
fn decode(sample: &Sample, chunk: &Chunk) -> Vec<u8> {
    let at = (chunk.codec == Codec::Deflate).then_some(RestartAt::Member);
    let mut out = Vec::new();
    decompress_span_into(slice(&sample.blob, chunk.blob), chunk, at, &mut out).unwrap();
    let content = out.split_off(usize::try_from(chunk.skip_bytes).unwrap());
    device_bytes_of(content, chunk).unwrap()
}

pub(super) fn device(sample: &Sample, index: &Index<Vec<u8>>) -> Vec<u8> {
    let mut device = Vec::new();
    for chunk in index.chunk_map().chunks() {
        let chunk = chunk.unwrap();
        assert_eq!(
            (chunk.device.start(), chunk.crc32),
            (device.len() as u64, None)
        );
        let bytes = decode(sample, &chunk);
        assert!(verify_chunk(&bytes, &chunk).is_ok() && is_kept_well(&bytes, &chunk));
        device.extend(bytes);
    }
    assert_eq!(device.len() as u64, index.device_bytes());
    device
}

/// All that a tree says, with contents instead of places.
pub(super) fn listing(tree: &Tree, device: &[u8]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut pending = vec![(String::new(), tree.root())];
    while let Some((path, id)) = pending.pop() {
        let inode = tree.inode(id);
        let what = match &inode.kind {
            InodeKind::Regular { size_bytes, extent } => {
                let start = extent.map_or(0, |run| run.start_block * 512);
                let start = usize::try_from(start).unwrap();
                let end = start + usize::try_from(*size_bytes).unwrap();
                format!("file {:?}", BlobDigest::of(&device[start..end]))
            }
            other => format!("{other:?}"),
        };
        lines.push(format!(
            "{path} {what} {:o} {}:{} {:?} {:?} {}",
            inode.permissions, inode.uid, inode.gid, inode.mtime, inode.xattrs, inode.implicit
        ));
        for (name, child) in tree.children(id) {
            pending.push((format!("{path}/{}", String::from_utf8_lossy(name)), *child));
        }
    }
    lines.sort();
    lines
}

/// What is ordinarily unpacked from the blob, and what its index says.
fn both_ways(sample: &Sample, format: TocFormat) -> (Vec<String>, Vec<String>) {
    let mut scanner = Scanner::new();
    let mut whole = sample.tar.clone();
    if format == TocFormat::Estargz {
        let (start, end) = (sample.toc_start, sample.blob.len() as u64 - 51);
        let member = slice(&sample.blob, Extent::new(start, end).unwrap());
        let mut tail = flate2::read::GzDecoder::new(member);
        std::io::Read::read_to_end(&mut tail, &mut whole).unwrap();
    }
    scanner.push(&whole, &mut ()).unwrap();
    let index = index(sample).unwrap();
    let tree = to_tree(index.tree().unwrap()).unwrap();
    (
        listing(&scanner.finish().unwrap(), &whole),
        listing(&tree, &device(sample, &index)),
    )
}

fn odd() -> Vec<Spec> {
    let noise: Vec<u8> = (0..9000u32)
        .map(|at| ((at * at) >> 7).to_le_bytes()[0])
        .collect();
    vec![
        Spec::new("usr/", "dir"),
        Spec::file("usr/big", &noise),
        Spec {
            xattrs: vec![
                ("user.a".into(), b"\0\xff".to_vec()),
                ("trusted.overlay.opaque".into(), b"y".to_vec()),
            ],
            ..Spec::file("usr/small", b"small")
        },
        Spec::file("usr/empty", b""),
        Spec::link("usr/hard", "hardlink", "usr/big"),
        Spec::link("bin", "symlink", "usr/bin"),
        Spec::file("bin/tool", b"goes through the link"),
        Spec::new("dev/null", "char"),
        Spec::new("pipe", "fifo"),
        Spec::file("gone/.wh.file", b""),
        Spec::file("gone/.wh..wh..opq", b""),
        Spec::file("gone/.wh.odd", b"a whiteout with a content"),
        Spec::file("usr/small", b"the later one wins"),
        Spec::file("exact", &noise[..1024]),
        Spec::file(".no.prefetch.landmark", b"\xf0"),
        Spec {
            mtime: 0,
            ..Spec::file("../../old", b"escapes")
        },
    ]
}

#[test]
fn a_layer_is_what_an_ordinary_unpacking_makes_of_it() {
    for format in BOTH {
        for cut in [
            PAGES,
            Cut {
                chunk: 1000,
                stream: 1,
            },
            Cut {
                chunk: 4096,
                stream: 5000,
            },
            Cut {
                chunk: 1 << 20,
                stream: 1 << 20,
            },
        ] {
            let sample = write(&odd(), format, cut);
            let (unpacked, lazy) = both_ways(&sample, format);
            assert_eq!(unpacked, lazy, "{format:?} {cut:?}");
            let of_toc = lazy
                .iter()
                .any(|it| it.starts_with("/stargz.index.json file"));
            assert_eq!(of_toc, format == TocFormat::Estargz);
        }
    }
}

#[test]
fn the_index_says_what_it_is_and_is_the_same_again() {
    for format in BOTH {
        let sample = write(&odd(), format, PAGES);
        let built = open(&sample).unwrap().index(&layer(&sample)).unwrap();
        let again = open(&sample).unwrap().index(&layer(&sample)).unwrap();
        assert_eq!(built, again);
        assert!(built.windows.is_empty());
        let index = UncheckedIndex::parse_either(built.file.clone()).unwrap();
        let index = index.validate().unwrap();
        assert_eq!(index.form(), DeviceForm::Contents);
        index
            .check_blob(BlobDigest::of(&sample.blob), sample.blob.len() as u64)
            .unwrap();
        // Neither who wants an index of Sluice's own blobs nor who wants one of a tar gets it.
        for refused in [
            UncheckedIndex::parse(built.file.clone()).err(),
            UncheckedIndex::parse_unmodified(built.file.clone()).err(),
        ] {
            assert!(matches!(
                refused,
                Some(crate::index::IndexError::Kind { .. })
            ));
        }
        // Each content has its digest in the file table.
        let files = index.files().unwrap();
        let digest = FileDigest(*BlobDigest::of(b"the later one wins").as_bytes());
        assert!(files.contents().any(|it| it.digest == digest));
    }
}

#[test]
fn a_damaged_or_padded_chunk_is_refused() {
    let sample = write(&odd(), TocFormat::Estargz, PAGES);
    let index = index(&sample).unwrap();
    let chunk = index
        .chunk_map()
        .chunks()
        .flatten()
        .find(|it| it.padding_bytes > 0)
        .unwrap();
    let good = decode(&sample, &chunk);
    for at in [0, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert!(verify_chunk(&bad, &chunk).is_err(), "{at}");
        assert!(!is_kept_well(&bad, &chunk), "{at}");
    }
    let content = usize::try_from(chunk.content_bytes()).unwrap();
    assert!(device_bytes_of(good[..content].to_vec(), &chunk).is_ok());
    assert!(device_bytes_of(good.clone(), &chunk).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_files_come_back(
        sizes in prop::collection::vec(0usize..6000, 0..12),
        chunk in 1usize..5000, stream in 1usize..9000, gzip: bool,
    ) {
        let chunk = chunk.max(40);
        let specs: Vec<Spec> = sizes.iter().enumerate().map(|(number, size)| {
            let content: Vec<u8> = (0..*size).map(|at| (((at * (number + 3)) >> 3) as u64).to_le_bytes()[0]).collect();
            Spec::file(&format!("d{}/f{number}", number % 3), &content)
        }).collect();
        let format = if gzip { TocFormat::Estargz } else { TocFormat::ZstdChunked };
        let sample = write(&specs, format, Cut { chunk, stream });
        let (unpacked, lazy) = both_ways(&sample, format);
        prop_assert_eq!(unpacked, lazy);
    }
}

/// A TOC of files as they should be, changed.
fn changed(change: impl FnOnce(&mut Vec<Value>)) -> Result<Index<Vec<u8>>, TocError> {
    let specs = [
        Spec::file("a", &[1; 3000]),
        Spec::file("b", &[2; 3000]),
        Spec::link("c", "hardlink", "a"),
    ];
    let sample = write(
        &specs,
        TocFormat::Estargz,
        Cut {
            chunk: 2000,
            stream: 1,
        },
    );
    let mut toc = sample.toc.clone();
    change(toc["entries"].as_array_mut().unwrap());
    index(&with_toc(sample, TocFormat::Estargz, toc))
}

#[test]
fn hostile_tocs_are_refused_with_a_reason() {
    assert!(changed(|_| {}).is_ok());
    type Change = fn(&mut Vec<Value>);
    let cases: [(&str, Change); 26] = [
        ("chunks overlap", |it| {
            it[1]["offset"] = it[0]["offset"].clone()
        }),
        ("chunks go back", |it| {
            let first = it[0]["offset"].clone();
            it[0]["offset"] = it[2]["offset"].clone();
            it[2]["offset"] = first;
        }),
        ("outside of the blob", |it| {
            it[3]["offset"] = json!(1u64 << 40)
        }),
        ("inside the table itself", |it| {
            it[3]["offset"] = json!(100_000)
        }),
        ("negative offset", |it| it[0]["offset"] = json!(-1)),
        ("negative size", |it| it[0]["size"] = json!(-3000)),
        ("huge size", |it| it[0]["size"] = json!(i64::MAX)),
        ("size beyond its chunks", |it| {
            it[0]["size"] = json!(4001);
            it[1]["chunkSize"] = json!(1000);
        }),
        ("size below its chunks", |it| it[0]["size"] = json!(1500)),
        ("number too large", |it| it[0]["size"] = json!(u64::MAX)),
        ("a fraction", |it| it[0]["size"] = json!(0.5)),
        ("chunk above the cap", |it| {
            it[0]["size"] = json!((4 << 20) + 1);
            it[0]["chunkSize"] = json!(0);
            it.remove(1);
        }),
        ("gap in a file", |it| it[1]["chunkOffset"] = json!(2500)),
        ("negative chunk", |it| it[0]["chunkSize"] = json!(-1)),
        ("inner offset too large", |it| {
            it[0]["innerOffset"] = json!(1 << 30)
        }),
        ("inner offset at a stream's first", |it| {
            it[0]["innerOffset"] = json!(512)
        }),
        ("chunk of another file", |it| it[1]["name"] = json!("b")),
        ("chunk of no file", |it| {
            it.remove(0);
        }),
        ("no digest", |it| {
            it[1].as_object_mut().unwrap().remove("chunkDigest");
        }),
        ("digest of no known kind", |it| {
            it[1]["chunkDigest"] = json!("md5:00")
        }),
        ("unknown type", |it| it[0]["type"] = json!("socket")),
        ("hard link to itself", |it| it[4]["linkName"] = json!("c")),
        ("hard link to nothing", |it| {
            it[4]["linkName"] = json!("../a/b")
        }),
        ("name of no UTF-8", |it| it[0]["name"] = json!("a\u{fffd}")),
        ("name with a NUL", |it| it[4]["name"] = json!("a\0")),
        ("bad time", |it| it[0]["modtime"] = json!("yesterday")),
    ];
    for (what, change) in cases {
        let error = changed(change).err();
        let error = error.unwrap_or_else(|| panic!("{what} was taken"));
        assert!(
            !error.is_of_bytes() && !error.to_string().is_empty(),
            "{what}: {error:?}"
        );
    }
    // Links in a circle, of which no name ever is a file.
    let circle = changed(|it| {
        it.push(json!({"name": "x", "type": "hardlink", "linkName": "y"}));
        it.push(json!({"name": "y", "type": "hardlink", "linkName": "x"}));
    });
    assert!(matches!(circle, Err(TocError::NotLazy(_))), "{circle:?}");
    // Paths that escape stay inside, as they do when they are unpacked.
    let inside = changed(|it| it[0]["name"] = json!("../../../etc/../a"));
    assert!(
        inside.is_err(),
        "its chunk still has the old name: {inside:?}"
    );
}

#[test]
fn a_document_of_another_shape_is_refused() {
    let specs = [Spec::file("a", b"content")];
    for format in BOTH {
        for (what, toc) in [
            ("another version", json!({"version": 2, "entries": []})),
            ("no version", json!({"entries": []})),
            ("no entries", json!({"version": 1})),
            ("a list", json!([1, 2])),
            (
                "entries of another kind",
                json!({"version": 1, "entries": {}}),
            ),
        ] {
            let sample = write(&specs, format, PAGES);
            let error = index(&with_toc(sample, format, toc)).err();
            assert!(
                matches!(
                    error,
                    Some(TocError::Json { .. } | TocError::Version { .. })
                ),
                "{what}: {error:?}"
            );
        }
        let sample = write(&specs, format, PAGES);
        let toc = json!({"version": 1, "entries": []});
        assert!(
            index(&with_toc(sample, format, toc)).is_ok(),
            "empty layers exist"
        );
    }
}

#[test]
fn only_the_pinned_bytes_are_a_toc() {
    for format in BOTH {
        let sample = write(&odd(), format, PAGES);
        let bytes = sample.blob.len() as u64;
        let first = sample.pin.first_read(bytes).unwrap();
        let place = sample
            .pin
            .locate(slice(&sample.blob, first), bytes)
            .unwrap();
        let extent = place.extent;
        for at in [0, 30, extent.len() / 2, extent.len() - 20] {
            let mut bad = slice(&sample.blob, extent).to_vec();
            bad[usize::try_from(at).unwrap()] ^= 0x10;
            let error = Toc::open(&sample.pin, &place, &bad).err();
            // Bits of a gzip header or trailer that mean nothing here may change; what is pinned may not.
            if let Some(error) = error {
                assert!(error.is_of_bytes(), "{at}: {error:?}");
            } else {
                let toc = Toc::open(&sample.pin, &place, &bad).unwrap();
                assert_eq!(toc.json_bytes(), open(&sample).unwrap().json_bytes());
            }
        }
        let cut = &slice(&sample.blob, extent)[..100];
        assert!(
            Toc::open(&sample.pin, &place, cut)
                .unwrap_err()
                .is_of_bytes()
        );
    }
}

#[test]
fn footers_of_both_kinds_are_read() {
    let pin = TocPin::Footer {
        json_digest: [0; 32],
    };
    let newer = super::footer::estargz_footer(0x1234);
    let mut legacy = newer.clone();
    legacy.splice(10..16, [22, 0]);
    for (footer, bytes) in [(&newer, 51), (&legacy, 47)] {
        assert_eq!(footer.len(), bytes);
        let tail = [&[7; 100][..], footer].concat();
        let place = pin.locate(&tail, 0x10_0000).unwrap();
        assert_eq!(place.format, TocFormat::Estargz);
        let extent = place.extent;
        assert_eq!(
            (extent.start(), extent.end()),
            (0x1234, 0x10_0000 - bytes as u64)
        );
        // Behind the footer, after the blob's end, or too large.
        for blob_bytes in [0x1234, 0x1234 + bytes as u64, 0x1_0000_0000] {
            let error = pin.locate(&tail, blob_bytes);
            assert!(matches!(error, Err(TocError::Place { .. })), "{error:?}");
        }
        for at in [0, 3, 10, 20, 30] {
            let mut bad = tail.clone();
            bad[100 + at] = b'z';
            assert_eq!(pin.locate(&bad, 0x10_0000), Err(TocError::Footer), "{at}");
        }
    }
    let external = [&[0; 60][..], b"STARGZEXTERNALTOC", &[0; 13]].concat();
    assert_eq!(pin.locate(&external, 90), Err(TocError::External));
    for bytes in [&b""[..], b"short"] {
        assert_eq!(pin.locate(bytes, 5), Err(TocError::Footer));
    }
    assert_eq!(pin.first_read(0), Err(TocError::Footer));
    assert_eq!(pin.first_read(1000).unwrap().len(), 1000);
}

#[test]
fn a_zstd_chunked_blob_may_say_itself_where_its_toc_is() {
    let cut = PAGES;
    let mut sample = write(&odd(), TocFormat::ZstdChunked, cut);
    let by_position = index(&sample).unwrap();
    let json = serde_json::to_vec_pretty(&sample.toc).unwrap();
    let json_digest = *BlobDigest::of(&json).as_bytes();
    sample.pin = TocPin::Footer { json_digest };
    let by_footer = index(&sample).unwrap();
    assert_eq!(by_footer.source(), by_position.source());
    // Newer writers add three numbers for the headers of the tar.
    let end = sample.blob.len() - 8;
    let mut longer = sample.blob[..end].to_vec();
    longer.extend([0; 24]);
    longer.extend(b"GNUlInUx");
    let at = longer.len() - 64 - 4;
    longer[at] = 64;
    let tail = &longer[longer.len() - 72..];
    let place = sample.pin.locate(tail, longer.len() as u64).unwrap();
    assert_eq!(
        (place.format, place.extent.start()),
        (TocFormat::ZstdChunked, sample.toc_start + 8)
    );
    // Another type, another length, another end, beyond the blob.
    for (at, byte) in [(8 + 24, 2), (4, 63), (71, b'X')] {
        let mut bad = tail.to_vec();
        bad[at] = byte;
        let found = sample.pin.locate(&bad, longer.len() as u64);
        assert_eq!(found, Err(TocError::Footer), "{at}");
    }
    let found = sample.pin.locate(tail, 100);
    assert!(matches!(found, Err(TocError::Place { .. })), "{found:?}");
    sample.pin = TocPin::Footer {
        json_digest: [1; 32],
    };
    assert_eq!(open(&sample).unwrap_err(), TocError::Digest);
}

#[test]
fn annotations_pin_a_toc_or_say_what_is_wrong() {
    let digest = BlobDigest::of(b"toc").to_string();
    let read = |pairs: &[(&str, &str)]| {
        TocPin::of_annotations(|name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| *value)
        })
    };
    let has_place =
        |pairs: &[(&str, &str)]| Ok(read(pairs)?.map(|pin| matches!(pin, TocPin::Position { .. })));
    let (checksum, position) = (ZSTD_CHUNKED_CHECKSUM, ZSTD_CHUNKED_POSITION);
    let estargz = (ESTARGZ_DIGEST, digest.as_str());
    let good = [
        (checksum, digest.as_str()),
        (position, "100:50:400:1"),
        estargz,
    ];
    assert_eq!(has_place(&[]), Ok::<_, TocError>(None));
    assert_eq!(has_place(&[estargz]), Ok(Some(false)));
    assert_eq!(has_place(&good), Ok(Some(true)));
    assert_eq!(has_place(&good[..2]), Ok(Some(true)));
    let others = [
        ("io.containers.zstd-chunked.manifest-checksum", good[0].1),
        ("io.containers.zstd-chunked.manifest-position", good[1].1),
    ];
    assert_eq!(read(&others), read(&good[..2]));
    for lacks in [checksum, position] {
        let rest: Vec<_> = good.into_iter().filter(|it| it.0 != lacks).collect();
        assert_eq!(read(&rest), Err(TocError::Missing { name: lacks }));
    }
    for bad in [
        "",
        "1:2:3",
        "100:50:400:2",
        "100:50:400:1:1",
        "-1:50:400:1",
        "7:50:400:1",
        "100:0:400:1",
        "18446744073709551615:50:400:1",
        "x",
    ] {
        let error = read(&[(checksum, &digest), (position, bad)]);
        assert!(
            matches!(error, Err(TocError::Annotation { .. })),
            "{bad}: {error:?}"
        );
    }
    for bad in ["100:99999999999:400:1", "100:50:99999999999:1"] {
        let error = read(&[(checksum, &digest), (position, bad)]);
        assert!(
            matches!(error, Err(TocError::TooLarge { .. })),
            "{bad}: {error:?}"
        );
    }
    let error = read(&[(ESTARGZ_DIGEST, "sha512:00")]);
    assert!(
        matches!(error, Err(TocError::Annotation { .. })),
        "{error:?}"
    );
}

#[test]
fn a_bomb_is_not_decompressed() {
    // A zstd TOC that is much more than the manifest says.
    let bomb = zstd::bulk::compress(&vec![b' '; 4 << 20], 3).unwrap();
    let pin = TocPin::Position {
        extent: Extent::from_length(8, bomb.len() as u64).unwrap(),
        json_bytes: 1000,
        digest: *BlobDigest::of(&bomb).as_bytes(),
    };
    let place = pin.locate(&[], 1 << 20).unwrap();
    let error = Toc::open(&pin, &place, &bomb).unwrap_err();
    assert!(matches!(error, TocError::Damaged { .. }), "{error:?}");
    // An eStargz TOC whose header promises more than is accepted.
    let mut header = tar::Header::new_ustar();
    header.set_path("stargz.index.json").unwrap();
    header.set_size(TOC_JSON_MAX_BYTES + 1);
    header.set_cksum();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, header.as_bytes()).unwrap();
    let member = encoder.finish().unwrap();
    let pin = TocPin::Footer {
        json_digest: [0; 32],
    };
    let place = TocPlace {
        extent: Extent::from_length(0, 100).unwrap(),
        format: TocFormat::Estargz,
        json_bytes: 0,
    };
    let error = Toc::open(&pin, &place, &member).unwrap_err();
    assert!(matches!(error, TocError::TooLarge { .. }), "{error:?}");
}
