// SPDX-License-Identifier: Apache-2.0
//! Layers as nobody should write them, and as somebody does: what each makes of a tree is what containerd makes of it.

pub mod entry;
mod refused;
mod shown;

use entry::Entry;

/// What becomes of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Shown, and lazily.
    Lazy,
    /// Shown, but it cannot be lazy.
    Ordinary,
    /// Nobody unpacks it.
    Refused,
}

/// One oddity.
#[derive(Debug, Clone)]
pub struct Case {
    /// What it is called; its entries stand below `odd/NAME`.
    pub name: &'static str,
    /// Its layers, the lowest first: whole tars.
    pub layers: Vec<Vec<u8>>,
    /// What becomes of it.
    pub outcome: Outcome,
    /// Entries that others may stand beside in one tar.
    entries: Vec<Vec<u8>>,
}

impl Case {
    /// An oddity made of entries, a list for each layer.
    fn of(name: &'static str, outcome: Outcome, layers: &[&[Entry]]) -> Self {
        let entries: Vec<Vec<u8>> = layers
            .iter()
            .map(|layer| layer.iter().flat_map(Entry::bytes).collect())
            .collect();
        Self {
            name,
            layers: entries.iter().map(|entries| ended(entries)).collect(),
            outcome,
            entries,
        }
    }

    /// An oddity of the tar as a whole.
    fn whole(name: &'static str, outcome: Outcome, tar: Vec<u8>) -> Self {
        Self {
            name,
            layers: vec![tar],
            outcome,
            entries: Vec::new(),
        }
    }
}

/// A tar of these entries, with the two blocks that end it.
fn ended(entries: &[u8]) -> Vec<u8> {
    [entries, &[0; 1024]].concat()
}

/// All of them.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut cases = shown::cases();
    cases.extend(refused::cases());
    cases
}

/// The layers of one image with all oddities that can be lazy and stand beside each other.
#[must_use]
pub fn together() -> Vec<Vec<u8>> {
    let mut layers: Vec<Vec<u8>> = Vec::new();
    for case in shown::cases() {
        if case.outcome != Outcome::Lazy {
            continue;
        }
        for (at, entries) in case.entries.iter().enumerate() {
            if layers.len() <= at {
                layers.push(Vec::new());
            }
            layers[at].extend(entries);
        }
    }
    layers.iter().map(|entries| ended(entries)).collect()
}
