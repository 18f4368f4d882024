// SPDX-License-Identifier: Apache-2.0
//! What a conversion, an indexing or a pull says while it works: events, and who shows them.

use std::fmt::Debug;

use serde::Serialize;

/// How a blob came to be where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transfer {
    /// Its bytes were sent.
    Uploaded,
    /// It was there.
    Present,
    /// Taken from another repository of the same registry.
    Mounted,
    /// Not ours to copy.
    Foreign,
}

/// What is done with the bytes of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// They come from the source.
    Read,
    /// What they became goes to the destination.
    Upload,
}

/// One step, as it is done.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A layer is being read.
    LayerStarted {
        /// Blob at the source.
        source: String,
        /// Its size.
        bytes: u64,
    },
    /// More of a layer was read or sent; at most once a second, and only where asked for.
    LayerProgress {
        /// Blob at the source.
        source: String,
        /// What is going on.
        step: Step,
        /// Bytes so far.
        bytes: u64,
        /// Of how many.
        total: u64,
    },
    /// A layer is at the destination.
    LayerDone {
        /// Blob at the source.
        source: String,
        /// Size at the source.
        source_bytes: u64,
        /// Blob at the destination.
        blob: String,
        /// Size at the destination.
        blob_bytes: u64,
        /// Whether it has an index.
        lazy: bool,
        /// Why not.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        /// Whether its compression was changed in this run.
        converted: bool,
        /// Whether another image of this run had it, converted.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        shared: bool,
        /// How the blob got there.
        transfer: Transfer,
    },
    /// An image's manifest is made.
    ManifestDone {
        /// For which platform.
        platform: String,
        /// Digest at the source.
        source: String,
        /// Digest now.
        digest: String,
    },
    /// Layers have other diff IDs than before, and with them the image has another config.
    DiffIdsChanged {
        /// For which platform.
        platform: String,
        /// How many layers.
        layers: u64,
        /// Digest of the config at the source.
        config_before: String,
        /// Digest now.
        config: String,
    },
    /// A manifest was signed, and the signature is of what it was.
    Signed {
        /// The image at the source.
        image: String,
        /// Digest of the manifest or index that was signed.
        manifest: String,
        /// By what tools.
        signers: Vec<&'static str>,
        /// Where the result is.
        destination: String,
        /// What is to be signed now.
        digest: String,
    },
    /// The last event of a conversion.
    Summary(Summary),
    /// A conversion of several failed; the others go on.
    ImageFailed {
        /// The image.
        source: String,
        /// Where it should have gone.
        destination: String,
        /// Why.
        error: String,
    },
    /// The last event of several conversions.
    Total {
        /// Images asked for.
        images: u64,
        /// Of them, those that failed.
        failed: u64,
        /// Wall time.
        seconds: f64,
    },
    /// It is known what an artifact says of a layer.
    LayerIndexed {
        /// The image's blob.
        source: String,
        /// Its size.
        source_bytes: u64,
        /// How it came to be known.
        how: LayerIndexing,
        /// Whether it has an index.
        lazy: bool,
        /// How the blob is compressed.
        #[serde(skip_serializing_if = "Option::is_none")]
        codec: Option<String>,
        /// Into how many chunks it is cut.
        chunks: u64,
        /// Bytes of the compressed index.
        index_bytes: u64,
        /// Bytes of the file of windows.
        windows_bytes: u64,
        /// Why it has no index.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// An image has its artifact, or needs none.
    ArtifactDone {
        /// For which platform the image is.
        platform: String,
        /// Digest of its manifest, which stays.
        manifest: String,
        /// Digest of the artifact; none where every layer has an index in its blob.
        #[serde(skip_serializing_if = "Option::is_none")]
        artifact: Option<String>,
        /// Its generation.
        generation: u32,
        /// Whether it was pushed in this run.
        pushed: bool,
        /// How it is listed, if it was.
        #[serde(skip_serializing_if = "Option::is_none")]
        listed: Option<&'static str>,
    },
    /// The last event of an indexing.
    IndexSummary(IndexSummary),
    /// A layer is in containerd.
    LayerPulled {
        /// Its diff ID.
        diff_id: String,
        /// Its blob.
        blob: String,
        /// What was done for it.
        how: Pulled,
        /// Bytes downloaded by this client; a lazy layer's index is fetched by the daemon.
        bytes: u64,
    },
    /// The last event of a pull.
    PullSummary {
        /// The image's name in containerd.
        image: String,
        /// Digest of what the name stands for.
        digest: String,
        /// Layers in all.
        layers: u64,
        /// Layers whose bytes come when they are read.
        lazy: u64,
        /// Bytes downloaded by this client.
        bytes: u64,
        /// Wall time.
        seconds: f64,
    },
}

/// How it came to be known what an artifact says of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerIndexing {
    /// Its blob was read.
    Indexed,
    /// An artifact said it already.
    Reused,
    /// It was converted: its index is in its blob, and the artifact says nothing of it.
    Converted,
    /// Its blob is none that could be read, or is known not to be lazy.
    Left,
}

/// What an indexing did, all in all.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct IndexSummary {
    /// The image.
    pub image: String,
    /// Digest of what its name stands for, before and after.
    pub digest: String,
    /// Images (platforms) in it that were looked at.
    pub images: u64,
    /// Layers, each once.
    pub layers: u64,
    /// Layers whose blobs were read in this run.
    pub layers_indexed: u64,
    /// Layers that an artifact had already.
    pub layers_reused: u64,
    /// Layers without an index.
    pub layers_not_lazy: u64,
    /// Bytes of the blobs that have an index beside them.
    pub blob_bytes: u64,
    /// Bytes of these indexes, compressed.
    pub index_bytes: u64,
    /// Bytes of their files of windows.
    pub windows_bytes: u64,
    /// Artifacts pushed in this run.
    pub artifacts_pushed: u64,
    /// Blobs and manifests sent.
    pub uploads: u64,
    /// Bytes sent.
    pub uploaded_bytes: u64,
    /// Wall time.
    pub seconds: f64,
}

impl IndexSummary {
    /// Counts a layer.
    pub(crate) fn add(&mut self, event: &Event) {
        let Event::LayerIndexed {
            source_bytes,
            how,
            lazy,
            index_bytes,
            windows_bytes,
            ..
        } = event
        else {
            return;
        };
        self.layers += 1;
        self.layers_indexed += u64::from(*how == LayerIndexing::Indexed);
        self.layers_reused += u64::from(*how == LayerIndexing::Reused);
        self.layers_not_lazy += u64::from(!lazy);
        if *index_bytes > 0 {
            self.blob_bytes += source_bytes;
            self.index_bytes += index_bytes;
            self.windows_bytes += windows_bytes;
        }
    }
}

/// What was done for a layer of a pulled image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pulled {
    /// The snapshotter had a snapshot of it before.
    Present,
    /// The snapshotter took it without its bytes.
    Lazy,
    /// Downloaded and unpacked.
    Unpacked,
}

/// What a conversion did, all in all.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Where it was read.
    pub source: String,
    /// Where it was written.
    pub destination: String,
    /// Digest of the manifest or index at the destination.
    pub digest: String,
    /// Images (platforms) in it.
    pub images: u64,
    /// Layers, each once.
    pub layers: u64,
    /// Layers whose compression was changed in this run.
    pub layers_converted: u64,
    /// Layers known to be at the destination by their annotations.
    pub layers_reused: u64,
    /// Layers that another image of this run had.
    pub layers_shared: u64,
    /// Layers without an index.
    pub layers_not_lazy: u64,
    /// Bytes of the layers at the source.
    pub source_bytes: u64,
    /// Bytes of the layers at the destination.
    pub blob_bytes: u64,
    /// Blobs and manifests sent.
    pub uploads: u64,
    /// Bytes sent.
    pub uploaded_bytes: u64,
    /// Wall time.
    pub seconds: f64,
}

/// Shows events. Called from several tasks at once; must not block for long.
pub trait Reporter: Send + Sync + Debug {
    /// A step was done.
    fn event(&self, event: &Event);
    /// `bytes` more bytes of the layer with this source blob were read.
    fn progress(&self, source: &str, bytes: u64);
    /// `sent_bytes` of the `total_bytes` that this layer became were sent so far.
    fn uploading(&self, source: &str, sent_bytes: u64, total_bytes: u64);
}

/// Reports on one layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerReporter<'a> {
    reporter: &'a dyn Reporter,
    source: &'a str,
}

impl<'a> LayerReporter<'a> {
    /// For the layer with this source blob.
    pub fn new(reporter: &'a dyn Reporter, source: &'a str) -> Self {
        Self { reporter, source }
    }

    /// For blobs that nobody waits for, such as configs.
    pub fn silent() -> Self {
        Self::new(&Silent, "")
    }

    /// `bytes` more bytes were read.
    pub fn read(&self, bytes: u64) {
        self.reporter.progress(self.source, bytes);
    }

    /// `sent_bytes` of `total_bytes` were sent so far.
    pub fn sent(&self, sent_bytes: u64, total_bytes: u64) {
        self.reporter
            .uploading(self.source, sent_bytes, total_bytes);
    }
}

/// Shows nothing.
#[derive(Debug)]
pub struct Silent;

impl Reporter for Silent {
    fn event(&self, _: &Event) {}
    fn progress(&self, _: &str, _: u64) {}
    fn uploading(&self, _: &str, _: u64, _: u64) {}
}
