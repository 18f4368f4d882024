// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::io::Write;

use tar::{Builder, EntryType, Header};

/// What one entry of a test's archive is.
struct Entry<'a> {
    kind: EntryType,
    name: &'a str,
    link: &'a str,
    content: &'a [u8],
}

fn file<'a>(name: &'a str, content: &'a [u8]) -> Entry<'a> {
    Entry {
        kind: EntryType::Regular,
        name,
        link: "",
        content,
    }
}

fn link<'a>(kind: EntryType, name: &'a str, link: &'a str) -> Entry<'a> {
    Entry {
        kind,
        name,
        link,
        content: b"",
    }
}

/// Names are written as they are: the library would refuse some.
fn header(entry: &Entry<'_>, bytes: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(entry.kind);
    header.set_size(bytes);
    let block = header.as_mut_bytes();
    block[..entry.name.len()].copy_from_slice(entry.name.as_bytes());
    block[157..157 + entry.link.len()].copy_from_slice(entry.link.as_bytes());
    header.set_cksum();
    header
}

fn bytes_of(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        bytes.extend(header(entry, entry.content.len() as u64).as_bytes());
        bytes.extend(entry.content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.extend([0; 1024]);
    bytes
}

fn open(bytes: &[u8]) -> Result<Archive, ImageError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    Archive::open(file.path())
}

fn content(archive: &Archive, name: &str) -> Option<Vec<u8>> {
    let extent = archive.find(name)?;
    Some(read(archive.file(), extent).unwrap().into())
}

#[test]
fn entries_are_found_whatever_wrote_the_archive() {
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(120));
    let mut builder = Builder::new(Vec::new());
    for (name, content) in [("./a/../b", &b"one"[..]), (&long, &[1; 600]), ("c", b"")] {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        match name.contains("..") {
            // The library does not write such a name itself.
            true => {
                let entry = file(name, content);
                header = super::tests::header(&entry, content.len() as u64);
                builder.append(&header, content).unwrap();
            }
            false => builder.append_data(&mut header, name, content).unwrap(),
        }
    }
    let records = [("path", b"renamed".as_slice()), ("size", b"3"), ("x", b"y")];
    builder.append_pax_extensions(records).unwrap();
    builder
        .append(&header(&file("old", b""), 0), &b""[..])
        .unwrap();
    let mut bytes = builder.into_inner().unwrap();
    bytes.truncate(bytes.len() - 1024);
    bytes.extend(b"pax");
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    for ending in [1024, 512, 0] {
        let archive = open(&[&bytes[..], &vec![0; ending]].concat()).unwrap();
        assert_eq!(content(&archive, "b").unwrap(), b"one");
        assert_eq!(content(&archive, &long).unwrap(), [1; 600]);
        assert_eq!(content(&archive, "c").unwrap(), b"");
        assert_eq!(content(&archive, "renamed").unwrap(), b"pax");
        assert_eq!(archive.entries.len(), 4);
    }
}

#[test]
fn links_lead_to_what_they_name() {
    let archive = open(&bytes_of(&[
        file("aa/layer.tar", b"layer"),
        link(EntryType::Symlink, "bb/layer.tar", "../aa/layer.tar"),
        link(EntryType::Link, "cc/layer.tar", "bb/layer.tar"),
        link(EntryType::Symlink, "lost", "nothing"),
        link(EntryType::Symlink, "round", "about"),
        link(EntryType::Symlink, "about", "round"),
    ]))
    .unwrap();
    for name in ["aa/layer.tar", "bb/layer.tar", "cc/layer.tar"] {
        assert_eq!(content(&archive, name).unwrap(), b"layer", "{name}");
    }
    for name in ["lost", "round", "aa"] {
        assert!(archive.find(name).is_none(), "{name}");
    }
    assert_eq!(archive.first_link(), Some("about"));
}

#[test]
fn what_could_mean_two_things_is_refused() {
    let huge = header(&file("x", b""), u64::MAX - 100).as_bytes().to_vec();
    let long = Entry {
        kind: EntryType::GNULongName,
        name: "././@LongLink",
        link: "",
        content: &[b'n'; 100_000],
    };
    let mut sum = bytes_of(&[file("x", b"")]);
    sum[0] = b'y';
    let mut cut = bytes_of(&[file("x", &[1; 2000])]);
    cut.truncate(1800);
    let pax = |records: &[(&str, &[u8])]| {
        let mut builder = Builder::new(Vec::new());
        let records = records.iter().copied();
        builder.append_pax_extensions(records).unwrap();
        builder
            .append(&header(&file("x", b""), 0), &b""[..])
            .unwrap();
        builder.into_inner().unwrap()
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("twice", bytes_of(&[file("a", b"1"), file("./a", b"2")])),
        ("leads out", bytes_of(&[file("../a", b"1")])),
        ("leads out", bytes_of(&[file("a/../../b", b"1")])),
        ("begins at the root", bytes_of(&[file("/a", b"1")])),
        (
            "leads out",
            bytes_of(&[link(EntryType::Symlink, "a/b", "../../c")]),
        ),
        (
            "begins at the root",
            bytes_of(&[link(EntryType::Link, "a", "/etc/passwd")]),
        ),
        (
            "neither file, directory nor link",
            bytes_of(&[link(EntryType::Fifo, "a", "")]),
        ),
        (
            "neither file, directory nor link",
            bytes_of(&[link(EntryType::GNUSparse, "a", "")]),
        ),
        ("ends beyond the archive", huge),
        ("ends beyond the archive", cut),
        ("take 100000 bytes", bytes_of(&[long, file("a", b"")])),
        ("checksum", sum),
        ("size is no number", pax(&[("size", b"-1")])),
        (
            "ends beyond the archive",
            pax(&[("size", b"18446744073709551615")]),
        ),
        ("sparse", pax(&[("GNU.sparse.major", b"1")])),
        ("not a tar", Vec::new()),
        ("not a tar", b"short".to_vec()),
        ("not a tar", vec![b'x'; 4096]),
        ("gzip", b"\x1f\x8b\x08\x00rest".to_vec()),
        ("zstd", b"\x28\xb5\x2f\xfdrest".to_vec()),
    ];
    for (message, bytes) in cases {
        let error = open(&bytes).expect_err(message).to_string();
        assert!(error.contains(message), "{message}: {error}");
        assert!(error.contains("archive /"), "names the file: {error}");
    }
    let directory = tempfile::tempdir().unwrap();
    let error = Archive::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}

#[test]
fn too_many_entries_are_refused() {
    let names: Vec<String> = (0..=ENTRIES_MAX).map(|n| n.to_string()).collect();
    let entries: Vec<_> = names.iter().map(|name| file(name, b"")).collect();
    let most = bytes_of(&entries[..ENTRIES_MAX]);
    assert_eq!(open(&most).unwrap().entries.len(), ENTRIES_MAX);
    let error = open(&bytes_of(&entries)).unwrap_err().to_string();
    assert!(error.contains("more than 65536 entries"), "{error}");
}

#[test]
fn an_archive_that_is_replaced_is_read_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.tar");
    std::fs::write(&path, bytes_of(&[file("a", b"old")])).unwrap();
    let archive = Archive::open(&path).unwrap();
    let other = directory.path().join("y.tar");
    std::fs::write(&other, bytes_of(&[file("a", b"new")])).unwrap();
    std::fs::rename(&other, &path).unwrap();
    assert_eq!(content(&archive, "a").unwrap(), b"old");
}

proptest::proptest! {
    /// Any bytes open or are refused, in memory that the input bounds.
    #[test]
    fn damaged_archives_do_not_panic(at in 0_usize..4096, value: u8, length in 0_usize..4096) {
        let mut bytes = bytes_of(&[
            file("a", &[1; 700]),
            link(EntryType::Symlink, "b", "a"),
            file("c", b"x"),
        ]);
        bytes.truncate(length.max(1));
        let at = at % bytes.len();
        bytes[at] = value;
        if let Ok(archive) = open(&bytes) {
            for name in ["a", "b", "c"] {
                let _ = content(&archive, name);
            }
        }
    }
}
