// SPDX-License-Identifier: Apache-2.0
//! Writes small OCI layouts from tars made in memory.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use flate2::write::GzEncoder;
use flate2::{Compression, GzBuilder};
use tar::{Builder, EntryType, Header};

use blob::{Blob, Hashed};

pub mod blob;

/// A layer's tar in the making.
#[derive(Default)]
pub struct Layer {
    builder: Option<Builder<Vec<u8>>>,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").finish_non_exhaustive()
    }
}

/// What an entry has beside its name; the mtime is always 1700000000.
#[derive(Debug, Clone, Copy)]
pub struct Attributes {
    /// Permission bits, 07777.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
}

impl Attributes {
    /// Owned by root.
    #[must_use]
    pub const fn root(mode: u32) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
        }
    }
}

impl Layer {
    /// An empty layer.
    #[must_use]
    pub fn new() -> Self {
        Self {
            builder: Some(Builder::new(Vec::new())),
        }
    }

    fn builder(&mut self) -> &mut Builder<Vec<u8>> {
        self.builder.get_or_insert_with(|| Builder::new(Vec::new()))
    }

    fn header(kind: EntryType, attributes: Attributes, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(attributes.mode);
        header.set_uid(attributes.uid);
        header.set_gid(attributes.gid);
        header.set_mtime(1_700_000_000);
        header.set_size(size);
        header
    }

    /// PAX records for the next entry, such as xattrs (`SCHILY.xattr.user.x`).
    pub fn pax(&mut self, records: &[(&str, &[u8])]) -> Result<&mut Self> {
        self.builder()
            .append_pax_extensions(records.iter().copied())?;
        Ok(self)
    }

    /// A directory.
    pub fn directory(&mut self, path: &str, attributes: Attributes) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Directory, attributes, 0);
        self.builder()
            .append_data(&mut header, path, std::io::empty())?;
        Ok(self)
    }

    /// A regular file.
    pub fn file(
        &mut self,
        path: &str,
        attributes: Attributes,
        content: &[u8],
    ) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Regular, attributes, content.len() as u64);
        self.builder().append_data(&mut header, path, content)?;
        Ok(self)
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Symlink, Attributes::root(0o777), 0);
        self.builder().append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// A hard link.
    pub fn link(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Link, Attributes::root(0o644), 0);
        self.builder().append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// A FIFO or device.
    pub fn special(
        &mut self,
        path: &str,
        kind: EntryType,
        major: u32,
        minor: u32,
    ) -> Result<&mut Self> {
        let mut header = Self::header(kind, Attributes::root(0o660), 0);
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        self.builder()
            .append_data(&mut header, path, std::io::empty())?;
        Ok(self)
    }

    /// Its tar.
    pub fn finish(&mut self) -> Result<Vec<u8>> {
        Ok(self
            .builder
            .take()
            .unwrap_or_else(|| Builder::new(Vec::new()))
            .into_inner()?)
    }
}

/// How a layer's tar stands in its blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// One gzip member.
    Gzip,
    /// Several members, the first of nothing, with all header fields that gzip knows.
    GzipMembers,
    /// One zstd frame that says how long it is.
    Zstd,
    /// zstd frames of some 64 KiB, with skippable ones between.
    ZstdFrames,
    /// As it is.
    Plain,
}

impl Coding {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Gzip,
        Self::GzipMembers,
        Self::Zstd,
        Self::ZstdFrames,
        Self::Plain,
    ];

    pub(super) fn media_type(self) -> &'static str {
        match self {
            Self::Gzip | Self::GzipMembers => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd | Self::ZstdFrames => "application/vnd.oci.image.layer.v1.tar+zstd",
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
        }
    }

    fn encode(self, tar: &[u8]) -> Result<Vec<u8>> {
        const PART: usize = 64 * 1024;
        let gzip = |builder: GzBuilder, bytes: &[u8]| -> Result<Vec<u8>> {
            let mut gzip = builder.mtime(0).write(Vec::new(), Compression::new(6));
            gzip.write_all(bytes)?;
            Ok(gzip.finish()?)
        };
        Ok(match self {
            Self::Gzip => gzip(GzBuilder::new(), tar)?,
            Self::GzipMembers => {
                let mut out = gzip(GzBuilder::new(), b"")?;
                for part in tar.chunks(PART) {
                    let fields = GzBuilder::new().filename("layer.tar").comment("of a test");
                    out.extend(gzip(fields.extra(b"SL\x02\0xy".to_vec()), part)?);
                }
                out
            }
            Self::Zstd => zstd::bulk::compress(tar, 3)?,
            Self::ZstdFrames => {
                let mut out = Vec::new();
                for part in tar.chunks(PART) {
                    out.extend(zstd::bulk::compress(part, 3)?);
                    out.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, b'a', b'b', b'c']);
                }
                if out.is_empty() {
                    out = zstd::bulk::compress(b"", 3)?;
                }
                out
            }
            Self::Plain => tar.to_owned(),
        })
    }
}

/// Writes `layers` as an image tagged `latest` below `directory`, gzip-compressed, with `command`.
pub fn write(directory: &Path, layers: &mut [Layer], command: &[&str]) -> Result<PathBuf> {
    let tars: Result<Vec<_>> = layers.iter_mut().map(Layer::finish).collect();
    write_tars(directory, &tars?, Coding::Gzip, command)
}

/// Writes an image of these tars, the lowest first, tagged `latest` below `directory`, with `command`.
pub fn write_tars(
    directory: &Path,
    tars: &[Vec<u8>],
    coding: Coding,
    command: &[&str],
) -> Result<PathBuf> {
    let blobs = tars.iter().map(|tar| Blob::write(directory, tar, coding));
    blob::assemble(directory, &blobs.collect::<Result<Vec<_>>>()?, command)
}

/// Writes an image as [`write_tars`] does, of one layer in gzip that memory need not hold: `fill` writes its tar.
pub fn write_large(
    directory: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    command: &[&str],
) -> Result<PathBuf> {
    let layer = Blob::stream(directory, |compressed| {
        let mut tar = Hashed::new(GzEncoder::new(compressed, Compression::fast()));
        fill(&mut tar)?;
        let (gzip, diff_id, _) = tar.finish();
        gzip.finish()?;
        Ok(diff_id)
    })?;
    blob::assemble(directory, &[layer], command)
}

/// Debian's static busybox: the one program that small images need.
pub fn busybox() -> Result<Vec<u8>> {
    for path in ["/usr/bin/busybox", "/bin/busybox"] {
        if let Ok(bytes) = std::fs::read(path) {
            return Ok(bytes);
        }
    }
    anyhow::bail!("busybox-static is not installed: run `make setup`")
}
