// SPDX-License-Identifier: Apache-2.0
//! A raw tar writer that can spell the same entry in all the ways that tars do.

/// How a header and its long or odd values are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// Everything in PAX records.
    Pax,
    /// GNU long names and base-256 numbers.
    Gnu,
    /// Whatever fits the ustar header there, the rest in PAX records.
    Ustar,
}

/// An entry to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spec {
    pub style: Style,
    pub kind: u8,
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub content: Vec<u8>,
    pub mode: u16,
    pub uid: i64,
    pub gid: i64,
    pub seconds: i64,
    pub nanoseconds: u32,
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Spec {
    pub(crate) fn new(kind: u8, name: &str) -> Self {
        Self {
            style: Style::Ustar,
            kind,
            name: name.into(),
            link: vec![],
            content: vec![],
            mode: 0o644,
            uid: 0,
            gid: 0,
            seconds: 1_700_000_000,
            nanoseconds: 0,
            device: (0, 0),
            xattrs: vec![],
        }
    }

    pub(crate) fn file(name: &str, content: &str) -> Self {
        Self {
            content: content.into(),
            ..Self::new(b'0', name)
        }
    }

    pub(crate) fn link(kind: u8, name: &str, target: &str) -> Self {
        Self {
            link: target.into(),
            ..Self::new(kind, name)
        }
    }
}

/// A whole tar with two end blocks.
pub(crate) fn tar(specs: &[Spec]) -> Vec<u8> {
    let mut out: Vec<u8> = specs.iter().flat_map(entry).collect();
    out.extend([0; 1024]);
    out
}

/// One entry with its records, content and padding.
pub(crate) fn entry(spec: &Spec) -> Vec<u8> {
    let mut out = Vec::new();
    let mut records = Vec::new();
    let mut header = [0u8; 512];
    header[156] = spec.kind;
    let gnu = spec.style == Style::Gnu;
    header[257..265].copy_from_slice(if gnu { b"ustar  \0" } else { b"ustar\x0000" });
    for (value, long, keyword, at) in [
        (&spec.name, b'L', "path", 0),
        (&spec.link, b'K', "linkpath", 157),
    ] {
        if value.len() <= 100 && spec.style != Style::Pax {
            header[at..at + value.len()].copy_from_slice(value);
        } else if gnu {
            out.extend(special(long, &[value, &b"\0"[..]].concat()));
        } else if let Some((prefix, name)) = split_prefix(value).filter(|_| at == 0) {
            header[345..345 + prefix.len()].copy_from_slice(prefix);
            header[..name.len()].copy_from_slice(name);
        } else if !value.is_empty() {
            records.push((keyword.to_owned().into_bytes(), value.clone()));
        }
    }
    let size = i64::try_from(spec.content.len()).unwrap();
    for (value, keyword, at, width) in [
        (i64::from(spec.mode), None, 100, 8),
        (spec.uid, Some("uid"), 108, 8),
        (spec.gid, Some("gid"), 116, 8),
        (size, Some("size"), 124, 12),
        (spec.seconds, None, 136, 12),
        (spec.device.0.into(), None, 329, 8),
        (spec.device.1.into(), None, 337, 8),
    ] {
        let field = &mut header[at..at + width];
        let fits = value >= 0 && value < 1 << (3 * (width - 1));
        match keyword {
            Some(keyword) if spec.style == Style::Pax || (!fits && !gnu) => {
                records.push((keyword.into(), value.to_string().into_bytes()));
            }
            _ if fits => {
                let text = format!("{value:0width$o}\0", width = width - 1);
                field.copy_from_slice(text.as_bytes());
            }
            _ => base256(field, value),
        }
    }
    if spec.nanoseconds != 0 || (spec.style == Style::Pax && spec.seconds < 0) {
        let nanoseconds = i128::from(spec.seconds) * 1_000_000_000 + i128::from(spec.nanoseconds);
        let sign = if nanoseconds < 0 { "-" } else { "" };
        let (whole, rest) = (
            nanoseconds.unsigned_abs() / 1_000_000_000,
            nanoseconds.unsigned_abs() % 1_000_000_000,
        );
        records.push((
            b"mtime".to_vec(),
            format!("{sign}{whole}.{rest:09}").into_bytes(),
        ));
    }
    for (name, value) in &spec.xattrs {
        records.push(([b"SCHILY.xattr.", &name[..]].concat(), value.clone()));
    }
    if !records.is_empty() {
        let payload: Vec<u8> = records.iter().flat_map(|(k, v)| record(k, v)).collect();
        out.extend(special(b'x', &payload));
    }
    seal(&mut header);
    out.extend(header);
    out.extend(&spec.content);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn split_prefix(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let slash = path.iter().rposition(|byte| *byte == b'/')?;
    let (prefix, name) = (&path[..slash], &path[slash + 1..]);
    let fits = (1..=155).contains(&prefix.len()) && (1..=100).contains(&name.len());
    fits.then_some((prefix, name))
}

fn base256(field: &mut [u8], value: i64) {
    let sign = if value < 0 { 0xff } else { 0 };
    for (at, byte) in field.iter_mut().rev().enumerate() {
        *byte = value
            .to_be_bytes()
            .iter()
            .rev()
            .nth(at)
            .copied()
            .unwrap_or(sign);
    }
    field[0] |= 0x80;
}

/// One PAX record, its length included.
pub(crate) fn record(keyword: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = keyword.len() + value.len() + 3;
    let mut length = rest;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    [
        length.to_string().as_bytes(),
        b" ",
        keyword,
        b"=",
        value,
        b"\n",
    ]
    .concat()
}

/// A record entry of type `kind`.
pub(crate) fn special(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..14].copy_from_slice(b"././@LongThing");
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[124..136].copy_from_slice(format!("{:011o}\0", payload.len()).as_bytes());
    seal(&mut header);
    let mut out = header.to_vec();
    out.extend(payload);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

/// Sets the checksum of a header.
pub(crate) fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
