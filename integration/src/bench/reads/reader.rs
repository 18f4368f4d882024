// SPDX-License-Identifier: Apache-2.0
//! Who serves the files, and what is done with them.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::bench::start::contender::Contender;

/// A snapshotter, and of Sluice what makes its mounts.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Reader {
    /// containerd's own snapshotter: unpacked layers.
    Overlayfs,
    /// Sluice, the kernel's EROFS alone.
    SluiceErofs,
    /// Sluice as it comes: names by EROFS, bytes over FUSE, for a mount that is older than the image is complete.
    SluiceAuto,
    /// Sluice over FUSE alone.
    SluiceFuse,
    /// stargz-snapshotter, the image converted to eStargz.
    Stargz,
    /// The SOCI snapshotter, the image with an index of version 2.
    Soci,
}

impl Reader {
    /// Its word on the command line and in documents.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::SluiceErofs => "sluice-erofs",
            Self::SluiceAuto => "sluice-auto",
            Self::SluiceFuse => "sluice-fuse",
            Self::Stargz => "stargz",
            Self::Soci => "soci",
        }
    }

    /// What the report calls it.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::SluiceErofs => "Sluice, backend erofs",
            Self::SluiceAuto => "Sluice, backend auto",
            Self::SluiceFuse => "Sluice, backend fuse",
            Self::Stargz => "stargz, eStargz",
            Self::Soci => "SOCI, index v2",
        }
    }

    /// Who it is in a cold start.
    #[must_use]
    pub fn contender(self) -> Contender {
        match self {
            Self::Overlayfs => Contender::Overlayfs,
            Self::SluiceErofs | Self::SluiceAuto | Self::SluiceFuse => Contender::Sluice,
            Self::Stargz => Contender::Stargz,
            Self::Soci => Contender::Soci,
        }
    }

    /// Whether it is Sluice.
    #[must_use]
    pub fn is_ours(self) -> bool {
        self.contender().is_ours()
    }

    /// The part of sluiced's configuration that makes it.
    #[must_use]
    pub fn config(self) -> &'static str {
        match self {
            Self::SluiceErofs => "\n[mount]\nbackend = \"erofs\"\n",
            Self::SluiceAuto => "\n[mount]\nbackend = \"auto\"\n",
            Self::SluiceFuse => "\n[mount]\nbackend = \"fuse\"\n",
            Self::Overlayfs | Self::Stargz | Self::Soci => "",
        }
    }

    /// The image whose chain ID its topmost snapshot has: only eStargz has other diff IDs.
    #[must_use]
    pub fn chain_of(self) -> Contender {
        match self {
            Self::Stargz => Contender::Stargz,
            _ => Contender::Overlayfs,
        }
    }
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// All files are read, nothing of them in memory.
    ColdRead,
    /// Again.
    WarmRead,
    /// All files are listed, nothing of them in memory.
    ColdStat,
    /// Again.
    WarmStat,
    /// Pages of a large file that is in memory.
    RandomRead,
}

impl Operation {
    /// All, in the order of tables.
    pub const ALL: [Self; 5] = [
        Self::ColdRead,
        Self::WarmRead,
        Self::ColdStat,
        Self::WarmStat,
        Self::RandomRead,
    ];

    /// Whether nothing is in memory before.
    #[must_use]
    pub fn is_cold(self) -> bool {
        matches!(self, Self::ColdRead | Self::ColdStat)
    }

    /// What tables call it.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::ColdRead => "cold read",
            Self::WarmRead => "warm read",
            Self::ColdStat => "cold stat",
            Self::WarmStat => "warm stat",
            Self::RandomRead => "random 4 KiB",
        }
    }
}
