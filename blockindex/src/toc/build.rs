// SPDX-License-Identifier: Apache-2.0
//! From a TOC to a layer index.

use super::chunks::{Placed, Placement};
use super::entries::{RawEntry, for_each};
use super::open::ESTARGZ_NAME;
use super::{Toc, TocError, TocFormat, TocLayer};
use crate::chunkmap::DeviceForm;
use crate::digest::{FileDigest, Sha256Hasher, StrongAlgorithm};
use crate::erofs::{DeviceSlot, write_tree};
use crate::extent::Extent;
use crate::index::{FileContent, UnmodifiedBlob, UnmodifiedParts, device_tag};
use crate::indexer::BuiltIndex;
use crate::seektable::SKIPPABLE_HEADER_BYTES;
use crate::tar::{Applied, Apply, Entry};
use crate::tree::Timestamp;
use crate::units::{
    BLOCK_BYTES, CHUNK_MAX_BYTES, SPAN_FRAME_MAX_BYTES, SPAN_MAX_BYTES, blocks_for,
};

/// What a TOC has come to.
#[derive(Debug, Default)]
struct Building {
    apply: Apply,
    places: Placement,
}

impl Toc {
    /// Makes the index of the layer: the same for the same TOC, layer and versions of the libraries.
    ///
    /// Memory: the tree, and 80 bytes for each chunk, besides the JSON.
    ///
    /// **Errors**: whatever makes the layer not lazy, with the reason.
    pub fn index(&self, layer: &TocLayer<'_>) -> Result<BuiltIndex, TocError> {
        let mut building = Building::default();
        for_each(&self.json, &mut |entry| building.entry(&entry))?;
        building.places.check_whole()?;
        let frames_end = match self.format {
            TocFormat::Estargz if self.is_in_tree() => {
                self.add_itself(&mut building)?;
                self.extent.end()
            }
            TocFormat::Estargz => self.extent.start(),
            TocFormat::ZstdChunked => self.extent.start().saturating_sub(SKIPPABLE_HEADER_BYTES),
        };
        let tree = building.apply.finish()?;
        let Placed {
            chunks,
            restarts,
            files,
            device_bytes,
        } = building.places.finish(frames_end, self.format)?;
        let device = DeviceSlot {
            tag: *device_tag(layer.diff_id),
            blocks: blocks_for(device_bytes),
        };
        let tree = write_tree(&tree, &[device]).map_err(|error| TocError::Tree {
            reason: error.to_string(),
        })?;
        let parts = UnmodifiedParts {
            form: DeviceForm::Contents,
            tree: &tree,
            chunks: &chunks,
            restarts: &restarts,
            files: &files,
            diff_id: layer.diff_id,
            blob: UnmodifiedBlob {
                digest: layer.blob,
                bytes: layer.blob_bytes,
                windows: None,
            },
            frames_bytes: frames_end,
            algorithm: StrongAlgorithm::Sha256,
            writer: layer.writer,
        };
        Ok(BuiltIndex::of(&parts)?)
    }

    /// Whether the TOC itself, a file of the tar, is a file of the tree. Its frame is one that a reader of one chunk
    /// must take whole; one that is too large for that is left out.
    fn is_in_tree(&self) -> bool {
        let bytes = BLOCK_BYTES + self.json_bytes();
        !self.json.is_empty()
            && bytes <= SPAN_MAX_BYTES
            && self.extent.len() <= SPAN_FRAME_MAX_BYTES
    }

    /// An eStargz tar ends with its TOC, which an ordinary unpacking puts into the root.
    fn add_itself(&self, building: &mut Building) -> Result<(), TocError> {
        let Building { apply, places } = building;
        // The frame begins with the file's header, which takes a block of the device too.
        let start = places.device_bytes().checked_add(BLOCK_BYTES);
        let run = start.and_then(|start| Extent::from_length(start, self.json_bytes()));
        let run = run.ok_or_else(|| TocError::Entry {
            path: ESTARGZ_NAME.to_owned(),
            what: "device too large",
        })?;
        // Attributes as its writers set them: those in the header are not pinned.
        let entry = Entry {
            kind: b'0',
            name: ESTARGZ_NAME.into(),
            link_name: Vec::new(),
            size: 0,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            major: 0,
            minor: 0,
            xattrs: Vec::new(),
            sparse: false,
            other_fields: false,
        };
        apply.entry(&entry, run)?;
        let mut hasher = Sha256Hasher::new();
        hasher.update(&self.json);
        let digest = FileDigest(hasher.finish());
        let whole = [self.header.as_slice(), self.json.as_slice()].concat();
        let most = usize::try_from(CHUNK_MAX_BYTES).unwrap_or(usize::MAX);
        let pieces: Vec<&[u8]> = whole.chunks(most).collect();
        places.add_frame(self.extent, &pieces, FileContent { run, digest })
    }
}

impl Building {
    fn entry(&mut self, entry: &RawEntry) -> Result<(), TocError> {
        if entry.is_chunk() {
            return self.places.chunk(entry);
        }
        self.places.check_whole()?;
        let of_tar = entry.to_tar()?;
        let bytes = match of_tar.kind {
            b'0' => u64::try_from(entry.size).map_err(|_| entry.error("negative size"))?,
            _ => 0,
        };
        let run = self.places.next_run(bytes);
        let run = run.ok_or_else(|| entry.error("impossible size"))?;
        let applied = self.apply.entry(&of_tar, run)?;
        if bytes == 0 {
            return Ok(());
        }
        self.places.begin(entry, run, applied == Applied::File)
    }
}
