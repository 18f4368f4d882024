// SPDX-License-Identifier: Apache-2.0
//! Tar entries written byte by byte: libraries refuse to write what tests need to read.

const BLOCK: usize = 512;

/// How long names and numbers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// POSIX ustar; what does not fit stands in PAX records.
    Posix,
    /// GNU: records `L` and `K`, numbers in base 256.
    Gnu,
    /// Before 1988: no magic, no records, no names of owners.
    V7,
}

/// One entry in the making.
#[derive(Debug, Clone)]
pub struct Entry {
    style: Style,
    kind: u8,
    name: Vec<u8>,
    link: Vec<u8>,
    content: Vec<u8>,
    size: Option<u64>,
    mode: u32,
    owner: (u64, u64),
    mtime: i64,
    device: (u32, u32),
    records: Vec<(Vec<u8>, Vec<u8>)>,
    twist: Option<fn(&mut [u8; BLOCK])>,
    spoil: Option<fn(&mut [u8; BLOCK])>,
}

impl Entry {
    /// An entry of the type `kind`, owned by root, 0644.
    #[must_use]
    pub fn new(kind: u8, name: impl AsRef<[u8]>) -> Self {
        Self {
            style: Style::Posix,
            kind,
            name: name.as_ref().to_owned(),
            link: Vec::new(),
            content: Vec::new(),
            size: None,
            mode: 0o644,
            owner: (0, 0),
            mtime: 1_700_000_000,
            device: (0, 0),
            records: Vec::new(),
            twist: None,
            spoil: None,
        }
    }

    /// A regular file.
    #[must_use]
    pub fn file(name: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        Self {
            content: content.as_ref().to_owned(),
            ..Self::new(b'0', name)
        }
    }

    /// A directory, 0755.
    #[must_use]
    pub fn directory(name: impl AsRef<[u8]>) -> Self {
        Self::new(b'5', name).mode(0o755)
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(b'2', name).link(target)
    }

    /// A hard link.
    #[must_use]
    pub fn hard_link(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(b'1', name).link(target)
    }

    /// Written in another style.
    #[must_use]
    pub fn style(self, style: Style) -> Self {
        Self { style, ..self }
    }

    /// What a link leads to.
    #[must_use]
    pub fn link(self, target: impl AsRef<[u8]>) -> Self {
        let link = target.as_ref().to_owned();
        Self { link, ..self }
    }

    /// The mode field, all of it.
    #[must_use]
    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// User and group.
    #[must_use]
    pub fn owner(self, uid: u64, gid: u64) -> Self {
        Self {
            owner: (uid, gid),
            ..self
        }
    }

    /// Seconds since 1970.
    #[must_use]
    pub fn mtime(self, mtime: i64) -> Self {
        Self { mtime, ..self }
    }

    /// Major and minor number.
    #[must_use]
    pub fn device(self, major: u32, minor: u32) -> Self {
        Self {
            device: (major, minor),
            ..self
        }
    }

    /// The size that the header claims, whatever the content.
    #[must_use]
    pub fn claims(self, size: u64) -> Self {
        Self {
            size: Some(size),
            ..self
        }
    }

    /// A PAX record before it.
    #[must_use]
    pub fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        let record = (key.as_ref().to_owned(), value.as_ref().to_owned());
        self.records.push(record);
        self
    }

    /// Changes the header before its checksum is computed.
    #[must_use]
    pub fn twist(self, twist: fn(&mut [u8; BLOCK])) -> Self {
        Self {
            twist: Some(twist),
            ..self
        }
    }

    /// Changes the header after its checksum was computed.
    #[must_use]
    pub fn spoil(self, spoil: fn(&mut [u8; BLOCK])) -> Self {
        Self {
            spoil: Some(spoil),
            ..self
        }
    }

    /// The entry's blocks, those of its records before it.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut records: Vec<u8> = Vec::new();
        for (key, value) in &self.records {
            records.extend(pax_record(key, value));
        }
        let mut header = [0; BLOCK];
        for (value, long, key, at) in [
            (&self.name, b'L', "path", 0),
            (&self.link, b'K', "linkpath", 157),
        ] {
            match value.len() {
                0..=100 => header[at..at + value.len()].copy_from_slice(value),
                _ if self.style == Style::Gnu => {
                    let text = [value.as_slice(), b"\0"].concat();
                    out.extend(Self::file("././@LongLink", text).kind(long).bytes());
                }
                _ => match split(value).filter(|_| at == 0) {
                    Some((prefix, name)) => {
                        header[345..345 + prefix.len()].copy_from_slice(prefix);
                        header[..name.len()].copy_from_slice(name);
                    }
                    None => records.extend(pax_record(key.as_bytes(), value)),
                },
            }
        }
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let size = self.size.unwrap_or(self.content.len() as u64);
        for (value, key, at, width) in [
            (i64::from(self.mode), "mode", 100, 8),
            (signed(self.owner.0), "uid", 108, 8),
            (signed(self.owner.1), "gid", 116, 8),
            (signed(size), "size", 124, 12),
            (self.mtime, "mtime", 136, 12),
            (i64::from(self.device.0), "major", 329, 8),
            (i64::from(self.device.1), "minor", 337, 8),
        ] {
            let field = &mut header[at..at + width];
            if (0..1_i64 << (3 * (width - 1))).contains(&value) {
                let text = format!("{value:0width$o}\0", width = width - 1);
                field.copy_from_slice(text.as_bytes());
            } else if self.style == Style::Gnu {
                base_256(field, value);
            } else {
                records.extend(pax_record(key.as_bytes(), value.to_string().as_bytes()));
            }
        }
        header[156] = self.kind;
        match self.style {
            Style::Posix => header[257..265].copy_from_slice(b"ustar\x0000"),
            Style::Gnu => header[257..265].copy_from_slice(b"ustar  \0"),
            Style::V7 => {}
        }
        if !records.is_empty() {
            out.extend(Self::file("PaxHeaders/x", records).kind(b'x').bytes());
        }
        if let Some(twist) = self.twist {
            twist(&mut header);
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        if let Some(spoil) = self.spoil {
            spoil(&mut header);
        }
        out.extend(header);
        out.extend(&self.content);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        out
    }

    fn kind(self, kind: u8) -> Self {
        Self { kind, ..self }
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// A long name as ustar's prefix and name, where a slash allows it.
fn split(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = (0..name.len().min(156))
        .rev()
        .find(|at| name[*at] == b'/')?;
    let (prefix, rest) = (&name[..at], &name[at + 1..]);
    (!rest.is_empty() && rest.len() <= 100).then_some((prefix, rest))
}

fn base_256(field: &mut [u8], value: i64) {
    let fill = if value < 0 { 0xff } else { 0 };
    field.fill(fill);
    let bytes = value.to_be_bytes();
    let width = field.len().min(bytes.len());
    let at = field.len() - width;
    field[at..].copy_from_slice(&bytes[bytes.len() - width..]);
    field[0] = if value < 0 { 0xff } else { field[0] | 0x80 };
}
