// SPDX-License-Identifier: Apache-2.0
//! How far a prewarm is: pure.

use sluice_blockindex::digest::ManifestDigest;

use crate::plan::{LayoutLayer, Refusal, RefusalKind};

/// What is brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// Whole layers.
    Full,
    /// The chunks of the boot list.
    Boot,
}

impl Scope {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Boot => "boot",
        }
    }

    /// By its word; an empty one means everything.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "full" => Some(Self::Full),
            "boot" => Some(Self::Boot),
            _ => None,
        }
    }
}

/// Where a prewarm is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Others run before it.
    #[default]
    Queued,
    /// The registry is asked what the reference stands for.
    Resolving,
    /// The indexes are fetched.
    Indexing,
    /// The chunks are.
    Fetching,
    /// All is here.
    Done,
    /// Not all is.
    Failed,
}

impl Phase {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Resolving => "resolving",
            Self::Indexing => "indexing",
            Self::Fetching => "fetching",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }

    /// Whether nothing comes after it.
    #[must_use]
    pub const fn is_last(self) -> bool {
        matches!(self, Self::Done | Self::Failed)
    }
}

/// Where a layer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LayerPhase {
    /// Its index is not here yet.
    #[default]
    Waiting,
    /// Its chunks come.
    Fetching,
    /// What was wanted of it is here.
    Done,
    /// It cannot be lazy, so nothing of it can be brought.
    Refused,
    /// Not all of it came.
    Failed,
}

impl LayerPhase {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Fetching => "fetching",
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// How far a layer is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerProgress {
    /// Of the layer.
    pub diff_id: String,
    /// Its blob, by the manifest.
    pub blob: String,
    /// Device bytes of what is wanted that are here.
    pub present_bytes: u64,
    /// Device bytes of what is wanted; 0 until the index is here.
    pub total_bytes: u64,
    /// Where it is.
    pub phase: LayerPhase,
    /// Why it was refused or failed.
    pub error: String,
}

impl LayerProgress {
    /// Of a layer of which nothing is known but what the manifest says.
    #[must_use]
    pub fn of(layer: &LayoutLayer) -> Self {
        let blob = layer.descriptor.as_ref();
        Self {
            diff_id: layer.diff_id.to_string(),
            blob: blob.map(|it| it.digest.clone()).unwrap_or_default(),
            ..Self::default()
        }
    }

    /// It ends without all of it being here.
    pub fn fail(&mut self, error: impl ToString) {
        (self.phase, self.error) = (LayerPhase::Failed, error.to_string());
    }

    /// It cannot be lazy, or its index could not be had.
    pub fn refuse(&mut self, refusal: &Refusal) {
        let (phase, error) = match refusal.kind {
            RefusalKind::NotConverted => (
                LayerPhase::Refused,
                "it has no index: the image is not converted".to_owned(),
            ),
            RefusalKind::NotLazy
            | RefusalKind::Whole
            | RefusalKind::Mismatch
            | RefusalKind::Untrusted => (LayerPhase::Refused, refusal.reason.clone()),
            RefusalKind::Budget => (
                LayerPhase::Failed,
                "its index did not come in time".to_owned(),
            ),
            RefusalKind::Unresolved
            | RefusalKind::Fetch
            | RefusalKind::Index
            | RefusalKind::Local => (LayerPhase::Failed, refusal.reason.clone()),
        };
        (self.phase, self.error) = (phase, error);
    }
}

/// How far a prewarm is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// The image's manifest for this node's platform, once known.
    pub manifest: Option<ManifestDigest>,
    /// Lowest first, once known.
    pub layers: Vec<LayerProgress>,
    /// Why it failed.
    pub error: String,
    /// What else there is to say.
    pub note: String,
}

impl Progress {
    /// It ends without all being here.
    pub fn fail(&mut self, error: impl ToString) {
        (self.phase, self.error) = (Phase::Failed, error.to_string());
    }

    /// It ends, as its layers did.
    pub fn end(&mut self) {
        let short = self.layers.iter().filter(|it| it.phase != LayerPhase::Done);
        match short.count() {
            0 => self.phase = Phase::Done,
            short => self.fail(format!(
                "{short} of {} layers are not prewarmed",
                self.layers.len()
            )),
        }
    }

    /// Device bytes of what is wanted that are here, and of all that is wanted.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        self.layers.iter().fold((0, 0), |(present, total), layer| {
            (present + layer.present_bytes, total + layer.total_bytes)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_back() {
        for scope in [Scope::Full, Scope::Boot] {
            assert_eq!(Scope::parse(scope.as_str()), Some(scope));
        }
        assert_eq!(Scope::parse(""), Some(Scope::Full));
        assert_eq!(Scope::parse("half"), None);
    }

    #[test]
    fn one_layer_that_is_short_fails_the_whole() {
        let layer = |phase, present_bytes| LayerProgress {
            phase,
            present_bytes,
            total_bytes: 5,
            ..LayerProgress::default()
        };
        let mut progress = Progress {
            layers: vec![layer(LayerPhase::Done, 5), layer(LayerPhase::Fetching, 3)],
            ..Progress::default()
        };
        assert_eq!(progress.bytes(), (8, 10));
        progress.end();
        assert_eq!(progress.phase, Phase::Failed);
        assert_eq!(progress.error, "1 of 2 layers are not prewarmed");
        progress.layers.truncate(1);
        progress.end();
        assert!(progress.phase == Phase::Done && progress.phase.is_last());
    }

    #[test]
    fn a_refusal_says_whether_trying_again_helps() {
        for (kind, phase, says) in [
            (
                RefusalKind::NotConverted,
                LayerPhase::Refused,
                "not converted",
            ),
            (RefusalKind::NotLazy, LayerPhase::Refused, "because"),
            (RefusalKind::Untrusted, LayerPhase::Refused, "because"),
            (RefusalKind::Budget, LayerPhase::Failed, "in time"),
            (RefusalKind::Fetch, LayerPhase::Failed, "because"),
        ] {
            let mut layer = LayerProgress::default();
            layer.refuse(&Refusal::new(kind, "because"));
            assert_eq!(layer.phase, phase, "{kind:?}");
            assert!(layer.error.contains(says), "{kind:?} {}", layer.error);
        }
    }
}
