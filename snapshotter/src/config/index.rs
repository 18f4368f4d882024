// SPDX-License-Identifier: Apache-2.0
//! `[index]` as meant: which indexes of blobs that Sluice did not write may be used.

use super::written::Index;
use super::{Check, ConfigError};

/// What an index from one kind of place is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IndexUse {
    /// Nothing: it is not looked for.
    Off,
    /// It is used where this node has made the very same one of the blob itself.
    Verify,
    /// It is used; the image's diff ID proves the bytes once all are here.
    #[default]
    On,
}

/// By kind of place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexPolicy {
    /// Artifacts that refer to an image.
    pub referrer: IndexUse,
    /// Nodes: this one makes indexes while layers are unpacked, unless it is off; those of others are used when it
    /// is on.
    pub node: IndexUse,
    /// Tables of contents that others wrote into a blob and its image's manifest pins; off or on.
    pub toc: IndexUse,
}

impl IndexPolicy {
    /// No index but those in blobs.
    pub const NONE: Self = Self {
        referrer: IndexUse::Off,
        node: IndexUse::Off,
        toc: IndexUse::Off,
    };
}

impl Index {
    /// Turns what is written into what is meant.
    pub(super) fn validate(self, check: &Check<'_>) -> Result<IndexPolicy, ConfigError> {
        let index_use = |text: &str| match text {
            "off" => Ok(IndexUse::Off),
            "verify" => Ok(IndexUse::Verify),
            "on" => Ok(IndexUse::On),
            _ => Err("want \"off\", \"verify\" or \"on\"".to_owned()),
        };
        let switch = |text: &str| match text {
            "off" => Ok(IndexUse::Off),
            "on" => Ok(IndexUse::On),
            _ => Err("want \"off\" or \"on\"".to_owned()),
        };
        Ok(IndexPolicy {
            toc: check.value("index.toc", &self.toc, switch)?,
            referrer: check.value("index.referrer", &self.referrer, index_use)?,
            node: check.value("index.node", &self.node, index_use)?,
        })
    }
}
