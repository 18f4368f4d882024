// SPDX-License-Identifier: Apache-2.0
//! What is written is read back as the tree that the tar unpacks to, and the tar comes back too.

use std::io::Read as _;

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::digest::BlobDigest;
use crate::erofs::to_tree;
use crate::tar::tests::write::{Spec, Style, record, special, tar};
use crate::toc::sample::Sample;
use crate::toc::tests::{device, index, listing};
use crate::toc::{TocPin, ZSTD_CHUNKED_HEADERS};

const BOTH: [TocFormat; 2] = [TocFormat::Estargz, TocFormat::ZstdChunked];

fn options(format: TocFormat) -> TocOptions {
    TocOptions {
        format,
        level: 3,
        chunk_bytes: TARGET_MIN_BYTES,
    }
}

/// Encodes the tar, which arrives in parts of this size.
fn encode(tar: &[u8], options: TocOptions, part: usize) -> (Vec<u8>, TocTrailer) {
    let mut encoder = TocEncoder::new(options).unwrap();
    let mut jobs = Vec::new();
    for part in tar.chunks(part) {
        encoder.push(part, &mut jobs).unwrap();
    }
    let plan = encoder.finish(&mut jobs).unwrap();
    assert_eq!(plan.diff_id(), DiffId::of(tar));
    assert_eq!(
        jobs.iter().map(TocJob::tar_bytes).sum::<u64>(),
        plan.tar_bytes
    );
    let (mut blob, mut records) = (Vec::new(), TocRecords::default());
    for job in jobs {
        let frames = job.run().unwrap();
        records.add(&frames);
        blob.extend(frames.bytes);
    }
    let trailer = plan.assemble(&records).unwrap();
    blob.extend_from_slice(&trailer.bytes);
    assert_eq!(blob.len() as u64, trailer.blob_bytes);
    (blob, trailer)
}

/// What any gzip or zstd makes of the blob.
fn unpack(blob: &[u8], format: TocFormat) -> Vec<u8> {
    let mut tar = Vec::new();
    match format {
        TocFormat::Estargz => {
            let mut decoder = flate2::read::MultiGzDecoder::new(blob);
            decoder.read_to_end(&mut tar).unwrap();
        }
        TocFormat::ZstdChunked => tar = zstd::decode_all(blob).unwrap(),
    }
    tar
}

fn sample(blob: &[u8], tar: &[u8], trailer: &TocTrailer) -> Sample {
    let pins = trailer.toc.as_ref().unwrap();
    let pin = TocPin::of_annotations(|name| pins.get(name).map(String::as_str));
    Sample {
        tar: tar.to_vec(),
        blob: blob.to_vec(),
        pin: pin.unwrap().unwrap(),
        toc: Value::Null,
        toc_start: 0,
    }
}

/// Encodes, and compares the tree of the TOC with that of the tar that comes out of the blob.
fn comes_back(tar: &[u8], options: TocOptions) -> Vec<String> {
    let format = options.format;
    let (blob, trailer) = encode(tar, options, 70_000);
    let out = unpack(&blob, format);
    assert_eq!(DiffId::of(&out), trailer.diff_id, "{format:?}");
    assert_eq!(out.len() as u64, trailer.tar_bytes, "{format:?}");
    if format == TocFormat::ZstdChunked {
        assert!(out == tar, "the tar is the same");
    }
    let sample = sample(&blob, &out, &trailer);
    let index = index(&sample).unwrap();
    let mut scanner = Scanner::new();
    scanner.push(&out, &mut ()).unwrap();
    let unpacked = listing(&scanner.finish().unwrap(), &out);
    let tree = to_tree(index.tree().unwrap()).unwrap();
    let lazy = listing(&tree, &device(&sample, &index));
    assert_eq!(unpacked, lazy, "{format:?}");
    lazy
}

fn noise(bytes: u32) -> Vec<u8> {
    let mut state = 1_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..bytes).map(next).collect()
}

fn odd() -> Vec<Spec> {
    let long = format!("usr/{}", "long/".repeat(60));
    let with = |change: &dyn Fn(&mut Spec), mut spec: Spec| {
        change(&mut spec);
        spec
    };
    vec![
        Spec::new(b'5', "usr/"),
        with(&|it| it.content = noise(200_000), Spec::file("usr/big", "")),
        with(
            &|it| it.content = noise(16_384),
            Spec::file("usr/chunk", ""),
        ),
        with(&|it| it.content = noise(512), Spec::file("usr/block", "")),
        Spec::file("usr/empty", ""),
        with(
            &|it| {
                it.style = Style::Pax;
                it.seconds = 1_700_000_001;
                it.nanoseconds = 123_456_789;
                it.xattrs = vec![
                    (
                        b"security.capability".to_vec(),
                        b"\x01\0\0\x02\xff".to_vec(),
                    ),
                    (b"user.a".to_vec(), Vec::new()),
                ];
            },
            Spec::file("usr/fine", "nanoseconds"),
        ),
        with(
            &|it| it.style = Style::Gnu,
            Spec::file(&format!("{long}gnu"), "g"),
        ),
        with(
            &|it| it.style = Style::Pax,
            Spec::file(&format!("{long}pax"), "p"),
        ),
        with(
            &|it| it.uid = 3_000_000_000,
            Spec::file("owner", "of 32 bits"),
        ),
        with(&|it| it.seconds = -5, Spec::file("before", "1970")),
        with(&|it| it.seconds = 0, Spec::file("epoch", "1970")),
        with(&|it| it.mode = 0o4755, Spec::file("suid", "s")),
        Spec::link(b'1', "usr/hard", "usr/big"),
        Spec::link(b'2', "bin", "usr/bin"),
        Spec::file("bin/tool", "goes through the link"),
        with(&|it| it.device = (1, 3), Spec::new(b'3', "dev/null")),
        with(&|it| it.device = (7, 0), Spec::new(b'4', "dev/loop0")),
        Spec::new(b'6', "pipe"),
        Spec::file("gone/.wh.file", ""),
        Spec::file("gone/.wh..wh..opq", ""),
        Spec::file("\u{e4}\"\\\n\u{1f980}", "a name to be escaped"),
    ]
}

#[test]
fn a_layer_comes_back_whatever_is_in_it() {
    for format in BOTH {
        let lines = comes_back(&tar(&odd()), options(format));
        assert!(lines.iter().any(|line| line.contains("123456789")));
        let toc = lines.iter().any(|line| line.starts_with("/stargz.index"));
        assert_eq!(toc, format == TocFormat::Estargz);
        for tar in [
            tar(&[]),
            Vec::new(),
            vec![0; 10_240],
            // No end, and an end with something behind it.
            crate::tar::tests::write::entry(&Spec::file("a", "b")),
            [tar(&odd()[..3]), b"trailing garbage".repeat(100)].concat(),
        ] {
            comes_back(&tar, options(format));
        }
    }
}

#[test]
fn chunks_are_as_long_as_chosen_and_each_has_a_frame() {
    for (format, chunk_bytes, expected) in [
        (TocFormat::Estargz, 16_384, 10),
        (TocFormat::ZstdChunked, 16_384, 10),
        (TocFormat::ZstdChunked, 131_072, 2),
        (TocFormat::Estargz, 524_288, 1),
        // Out of range: the nearest.
        (TocFormat::Estargz, 1, 10),
    ] {
        let mut file = Spec::file("f", "");
        file.content = noise(200_000);
        let tar = tar(&[file]);
        let options = TocOptions {
            chunk_bytes,
            ..options(format)
        };
        let (blob, trailer) = encode(&tar, options, 1000);
        let index = index(&sample(&blob, &tar, &trailer)).unwrap();
        let chunks: Vec<_> = index.chunk_map().chunks().flatten().collect();
        let of_file = chunks.iter().filter(|it| it.device.start() < 200_000);
        assert_eq!(of_file.count(), expected, "{format:?} {chunk_bytes}");
        for chunk in &chunks[..expected] {
            assert_eq!(chunk.skip_bytes, 0);
        }
    }
}

#[test]
fn the_blob_does_not_depend_on_how_the_tar_arrives() {
    let tar = tar(&odd());
    for format in BOTH {
        let whole = encode(&tar, options(format), usize::MAX);
        for part in [7, 512, 4096, 65_537] {
            assert!(encode(&tar, options(format), part) == whole, "{part}");
        }
    }
}

#[test]
fn with_headers_and_files_the_tar_is_made_again() {
    let tar = tar(&odd());
    let (blob, trailer) = encode(&tar, options(TocFormat::ZstdChunked), 5000);
    let lines = headers(&blob, &trailer).unwrap();
    let contents: Vec<Vec<u8>> = odd().into_iter().map(|spec| spec.content).collect();
    let (mut made, mut contents) = (Vec::new(), contents.into_iter());
    for line in &lines {
        let payload = line["payload"].as_str().map(|text| {
            use base64::Engine as _;
            base64::engine::general_purpose::STANDARD.decode(text)
        });
        let payload = payload.transpose().unwrap();
        if line["type"] == 2 {
            made.extend(payload.unwrap());
            continue;
        }
        let content = contents.next().unwrap();
        assert_eq!(line["size"].as_u64().unwrap_or(0), content.len() as u64);
        let mut sum = headers::Crc64::default();
        sum.update(&content);
        let sum = Some(sum.finish().to_vec()).filter(|_| !content.is_empty());
        assert_eq!(payload, sum);
        made.extend(content);
    }
    assert!(made == tar);
    assert!(contents.next().is_none(), "a line for each entry");
}

/// The lines of tar-split, and that the TOC pins them.
fn headers(blob: &[u8], trailer: &TocTrailer) -> Option<Vec<Value>> {
    let pins = trailer.toc.as_ref().unwrap();
    let numbers = |name: &str| -> Option<Vec<usize>> {
        let numbers = pins.get(name)?.split(':');
        Some(numbers.map(|number| number.parse().unwrap()).collect())
    };
    let toc = numbers(crate::toc::ZSTD_CHUNKED_POSITION).unwrap();
    let toc = zstd::decode_all(&blob[toc[0]..toc[0] + toc[1]]).unwrap();
    let toc: Value = serde_json::from_slice(&toc).unwrap();
    let place = numbers(ZSTD_CHUNKED_HEADERS);
    assert_eq!(place.is_some(), toc.get("tarSplitDigest").is_some());
    let place = place?;
    let payload = &blob[place[0]..place[0] + place[1]];
    assert_eq!(toc["tarSplitDigest"], BlobDigest::of(payload).to_string());
    let text = zstd::decode_all(payload).unwrap();
    assert_eq!(text.len(), place[2]);
    // The footer says the same.
    let footer = &blob[blob.len() - 64..];
    let said = footer.chunks_exact(8).map(|number| {
        let number: [u8; 8] = number.try_into().unwrap();
        usize::try_from(u64::from_le_bytes(number)).ok()
    });
    assert_eq!(said.skip(4).take(3).flatten().collect::<Vec<_>>(), place);
    let text = String::from_utf8(text).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    Some(lines.collect())
}

#[test]
fn headers_are_left_out_where_they_and_the_toc_would_differ() {
    let file = crate::tar::tests::write::entry(&Spec::file("a", "content"));
    let times = special(b'x', &record(b"atime", b"1.5"));
    let global = special(b'g', &record(b"comment", b"x"));
    let mut link = Spec::link(b'1', "b", "a");
    link.content = b"1234567".to_vec();
    // A hard link that says how large it is, as some tars do, without a content.
    let link = crate::tar::tests::write::entry(&link)[..512].to_vec();
    let mut late = Spec::file("late", "x");
    late.style = Style::Gnu;
    late.seconds = 1 << 40;
    let late = crate::tar::tests::write::entry(&late);
    for (what, tar, kept) in [
        ("nothing", file.clone(), true),
        ("time of access", [times, file.clone()].concat(), false),
        ("global record", [global, file.clone()].concat(), false),
        ("size of a link", [file.clone(), link].concat(), false),
        ("year above 9999", late, false),
        ("padding missing", file[..519].to_vec(), false),
    ] {
        let (blob, trailer) = encode(&tar, options(TocFormat::ZstdChunked), 100);
        assert_eq!(headers(&blob, &trailer).is_some(), kept, "{what}");
        comes_back(&tar, options(TocFormat::ZstdChunked));
    }
}

#[test]
fn what_no_toc_can_say_is_compressed_as_it_is_with_a_reason() {
    let mut bytes = Spec::file("x", "content");
    bytes.name = b"\xff\xfe".to_vec();
    let mut replaced = Spec::file("\u{fffd}", "content");
    replaced.style = Style::Pax;
    let mut xattr = Spec::file("x", "");
    xattr.xattrs = vec![(b"user.\xff".to_vec(), Vec::new())];
    let mut whiteout = Spec::file(".wh.x", "");
    whiteout.content = noise(600);
    let file = |name| Spec::file(name, "content");
    let twice = |first: Spec, second: Spec| tar(&[first, file("between"), second]);
    let mut sparse = tar(&[file("s")]);
    sparse[156] = b'S';
    crate::tar::tests::write::seal(&mut sparse[..512]);
    let estargz = TocFormat::Estargz;
    let cases = [
        (tar(&[file("a"), bytes]), "no UTF-8", None),
        (tar(&[replaced]), "no UTF-8", None),
        (tar(&[xattr]), "no UTF-8", None),
        (twice(file("a"), file("./a")), "named twice", None),
        (
            twice(Spec::new(b'5', "d"), Spec::new(b'5', "d/")),
            "named twice",
            None,
        ),
        (
            twice(Spec::file(".wh.a", ""), Spec::file(".wh.a", "")),
            "named twice",
            None,
        ),
        (tar(&[whiteout]), "belongs to no file", None),
        (sparse, "sparse", None),
        (b"no tar at all".repeat(100), "checksum", None),
        (tar(&[file("a")])[..515].to_vec(), "too early", None),
        (
            tar(&[file("a")])[..520].to_vec(),
            "within its last block",
            Some(estargz),
        ),
        (
            [tar(&[file("a")]), vec![1; PENDING_MAX_BYTES]].concat(),
            "after the last",
            None,
        ),
    ];
    for (tar, expected, only) in cases {
        for format in BOTH {
            let (blob, trailer) = encode(&tar, options(format), 1000);
            assert!(
                unpack(&blob, format) == tar || trailer.toc.is_ok(),
                "{expected}"
            );
            if only.is_some_and(|only| only != format) {
                assert!(trailer.toc.is_ok(), "{expected}");
                continue;
            }
            let reason = trailer.toc.unwrap_err();
            assert!(reason.contains(expected), "{format:?} {expected}: {reason}");
            assert_eq!(trailer.diff_id, DiffId::of(&tar));
        }
    }
}

#[test]
fn a_table_of_contents_that_was_there_gives_way() {
    let files = |names: &[&str]| {
        let files = names.iter().map(|name| Spec::file(name, "content"));
        tar(&files.collect::<Vec<_>>())
    };
    let format = TocFormat::Estargz;
    let plain = encode(&files(&["a", "b"]), options(format), 1000);
    for names in [
        &["a", "b", "stargz.index.json"][..],
        &["a", "./stargz.index.json", "b"],
        &["/stargz.index.json", "a", "b"],
    ] {
        comes_back(&files(names), options(format));
        let again = encode(&files(names), options(format), 100);
        assert_eq!(again.1.diff_id, plain.1.diff_id, "{names:?}");
    }
    // What was written is written again, to the byte.
    let out = unpack(&plain.0, format);
    assert!(encode(&out, options(format), 1000) == plain);
    // Without a TOC it is the rest of the tar.
    let (blob, trailer) = encode(&files(&["stargz.index.json", "a", "a"]), options(format), 9);
    assert!(trailer.toc.unwrap_err().contains("named twice"));
    assert!(unpack(&blob, format) == files(&["a", "a"]));
    assert_eq!(trailer.diff_id, DiffId::of(&files(&["a", "a"])));
    // In the other format it is a file as any other.
    comes_back(
        &files(&["a", "stargz.index.json"]),
        options(TocFormat::ZstdChunked),
    );
}

#[test]
fn records_of_another_layer_are_refused() {
    let tar = tar(&[Spec::file("a", "content")]);
    for format in BOTH {
        let mut encoder = TocEncoder::new(options(format)).unwrap();
        let mut jobs = Vec::new();
        encoder.push(&tar, &mut jobs).unwrap();
        let plan = encoder.finish(&mut jobs).unwrap();
        let error = plan.assemble(&TocRecords::default()).unwrap_err();
        assert_eq!(error.to_string(), "0 chunk records, want 1");
    }
    let level = TocOptions {
        level: 10,
        ..options(TocFormat::Estargz)
    };
    let mut encoder = TocEncoder::new(level).unwrap();
    let mut jobs = Vec::new();
    encoder.push(&tar, &mut jobs).unwrap();
    encoder.finish(&mut jobs).unwrap();
    assert!(jobs[0].run().is_err(), "gzip has no level 10");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_files_come_back(
        sizes in prop::collection::vec((0_u32..70_000, 0_u8..3), 0..10), estargz: bool,
    ) {
        let specs: Vec<Spec> = sizes.iter().enumerate().map(|(number, (size, style))| {
            let mut spec = Spec::file(&format!("d{}/f{number}", number % 3), "");
            spec.content = noise(*size);
            spec.style = [Style::Pax, Style::Gnu, Style::Ustar][usize::from(*style)];
            spec
        }).collect();
        let format = if estargz { TocFormat::Estargz } else { TocFormat::ZstdChunked };
        comes_back(&tar(&specs), options(format));
    }
}
