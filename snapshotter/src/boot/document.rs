// SPDX-License-Identifier: Apache-2.0
//! What is remembered of a run's list, and what follows from it: pure.
//!
//! ```text
//!   used ── too little of what it loads is read, or starts are slower ──> off (its starts are forgotten)
//!    ^                                                                     │
//!    └──── three further starts were recorded, or another list was attached┘
//! ```

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sluice_blockindex::boot::{BootChunk, BootList};
use sluice_blockindex::digest::IndexDigest;
use sluice_fetcher::clock;

use super::BootSummary;
use super::merge::merge;

/// Starts whose reads are remembered: enough for a majority, few enough to follow a change of use.
const STARTS: usize = 5;
/// Other nodes whose lists are remembered: as many voices as starts here have.
const RECEIVED: usize = 5;
/// Uses, and starts without a list, by which it is judged; and starts after which one that is off is
/// tried again.
const JUDGED: usize = 3;
/// How much slower a start may be with a list than without: a quarter, and what machines differ by.
const SLOWER_PERCENT: u64 = 125;
const SLOWER_MS: u64 = 200;

/// What a start here weighs, and a list that somebody attached on purpose.
const WEIGHT: u32 = 2;
/// What a list weighs that another node sent.
const WEIGHT_RECEIVED: u32 = 1;

/// A list as a document has it: base64 of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredList(pub BootList);

impl Serialize for StoredList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(self.0.encode()))
    }
}

impl<'de> Deserialize<'de> for StoredList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(serde::de::Error::custom)?;
        let list = BootList::decode(&bytes).map_err(serde::de::Error::custom)?;
        Ok(Self(list))
    }
}

/// A list that another node sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Received {
    /// Which node, by its own word.
    pub node: String,
    /// What it sent last.
    pub list: StoredList,
}

/// What one start did with the list that was loaded for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Use {
    /// Compressed bytes that were loaded.
    pub loaded_bytes: u64,
    /// Of these, of chunks that were read.
    pub read_bytes: u64,
    /// From the first read to nine tenths of those of the list.
    pub span_ms: u64,
}

/// How a start was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// With a list.
    Loaded(Use),
    /// With nearly nothing here, and no list; the span as in [`Use::span_ms`].
    Cold(u64),
    /// Most of it was here: says nothing about lists.
    Warm,
}

/// Why a list is not used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Off {
    /// For people.
    pub reason: String,
    /// Seconds since 1970.
    pub at: u64,
}

/// Where a list is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Starts on this node.
    Learned,
    /// The image's annotations.
    Attached,
    /// Another node.
    Received,
}

impl Origin {
    /// The word for people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Learned => "learned",
            Self::Attached => "attached",
            Self::Received => "received",
        }
    }
}

/// All that is remembered of a run's list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootDocument {
    /// Index digests of the run's layers, lowest first.
    pub layers: Vec<String>,
    /// What the last starts here read; the latest last.
    pub recordings: Vec<StoredList>,
    /// What the image's annotations say.
    pub attached: Option<StoredList>,
    /// What other nodes sent; the latest last.
    pub received: Vec<Received>,
    /// The last uses; the latest last.
    pub uses: Vec<Use>,
    /// Spans of the last cold starts without a list.
    pub cold_ms: Vec<u64>,
    /// Why it is not used.
    pub off: Option<Off>,
    /// Seconds since 1970, of the last change.
    pub at: u64,
}

fn push<T>(to: &mut Vec<T>, value: T, most: usize) {
    to.push(value);
    let surplus = to.len().saturating_sub(most);
    to.drain(..surplus);
}

impl BootDocument {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(indexes: &[IndexDigest]) -> Self {
        Self {
            layers: indexes.iter().map(ToString::to_string).collect(),
            recordings: Vec::new(),
            attached: None,
            received: Vec::new(),
            uses: Vec::new(),
            cold_ms: Vec::new(),
            off: None,
            at: clock::unix_seconds(),
        }
    }

    /// How many starts of this node it remembers.
    #[must_use]
    pub fn starts(&self) -> usize {
        self.recordings.len()
    }

    /// The chunks to load, in their order, whether it is off or not.
    #[must_use]
    pub fn chunks(&self) -> Vec<BootChunk> {
        let attached = self.attached.iter();
        let of_weight = self.recordings.iter().chain(attached);
        let mut lists: Vec<(u32, &BootList)> = of_weight.map(|it| (WEIGHT, &it.0)).collect();
        let received = self.merged(None);
        lists.extend(received.iter().map(|list| (WEIGHT_RECEIVED, list)));
        merge(&lists)
    }

    /// What others sent, and `own`, made one; `None` when nothing is in it.
    fn merged(&self, own: Option<&BootList>) -> Option<BootList> {
        let received = self.received.iter().map(|it| &it.list.0);
        let lists: Vec<(u32, &BootList)> = own
            .into_iter()
            .chain(received)
            .map(|list| (1, list))
            .collect();
        let layers = lists.first()?.1.layers().to_vec();
        let merged = BootList::new(layers, merge(&lists)).ok();
        merged.filter(|list| !list.chunks().is_empty())
    }

    /// Where the list is from, by what weighs most in it.
    #[must_use]
    pub fn origin(&self) -> Option<Origin> {
        if !self.recordings.is_empty() {
            Some(Origin::Learned)
        } else if self.attached.is_some() {
            Some(Origin::Attached)
        } else {
            self.received.first().map(|_| Origin::Received)
        }
    }

    /// What the starts of this node alone say.
    #[must_use]
    pub fn learned(&self) -> Option<BootList> {
        let first = self.recordings.first()?;
        let lists: Vec<(u32, &BootList)> =
            self.recordings.iter().map(|it| (WEIGHT, &it.0)).collect();
        BootList::new(first.0.layers().to_vec(), merge(&lists)).ok()
    }

    /// What other nodes may have of it: what this one learnt and what others sent, each with one voice.
    #[must_use]
    pub fn shared(&self) -> Option<BootList> {
        if self.off.is_some() {
            return None;
        }
        self.merged(self.learned().as_ref())
    }

    /// For `sluice status` and `sluice why`.
    #[must_use]
    pub fn summary(&self) -> BootSummary {
        BootSummary {
            chunks: self.chunks().len(),
            origin: self.origin(),
            starts: self.starts(),
            off: self.off.as_ref().map(|off| off.reason.clone()),
            loaded_bytes: self.uses.iter().map(|it| it.loaded_bytes).sum(),
            read_bytes: self.uses.iter().map(|it| it.read_bytes).sum(),
        }
    }

    /// Takes the list that the image's annotations carry; says whether it is another one. A new one is
    /// tried also where the list was off: somebody has recorded it since.
    pub fn attach(&mut self, list: BootList) -> bool {
        let list = Some(StoredList(list));
        if self.attached == list {
            return false;
        }
        self.attached = list;
        self.off = None;
        self.uses.clear();
        self.at = clock::unix_seconds();
        true
    }

    /// Takes a list of another node, in the place of what that node sent before, unless lists of this run
    /// are off here.
    pub fn receive(&mut self, node: String, list: BootList) {
        if self.off.is_none() {
            self.received.retain(|it| it.node != node);
            let list = StoredList(list);
            push(&mut self.received, Received { node, list }, RECEIVED);
            self.at = clock::unix_seconds();
        }
    }

    /// Takes what a start read, and judges the list; says whether it was turned off by that.
    pub fn record(&mut self, read: BootList, start: Start) -> bool {
        self.at = clock::unix_seconds();
        push(&mut self.recordings, StoredList(read), STARTS);
        match start {
            Start::Loaded(of_it) => push(&mut self.uses, of_it, JUDGED),
            Start::Cold(span_ms) => push(&mut self.cold_ms, span_ms, JUDGED),
            Start::Warm => {}
        }
        if self.off.is_some() {
            if self.recordings.len() >= JUDGED {
                self.off = None;
            }
            return false;
        }
        let Some(reason) = verdict(&self.uses, &self.cold_ms) else {
            return false;
        };
        self.off = Some(Off {
            reason,
            at: self.at,
        });
        // What it was made of was wrong; it is made anew of what comes.
        self.recordings.clear();
        self.received.clear();
        self.uses.clear();
        true
    }
}

/// Why a list with these uses is not to be used any more.
fn verdict(uses: &[Use], cold_ms: &[u64]) -> Option<String> {
    if uses.len() < JUDGED {
        return None;
    }
    let loaded: u64 = uses.iter().map(|it| it.loaded_bytes).sum();
    let read: u64 = uses.iter().map(|it| it.read_bytes).sum();
    if read.saturating_mul(2) < loaded {
        return Some(format!(
            "the last {JUDGED} starts read {read} of the {loaded} bytes that it loaded"
        ));
    }
    let middle = |mut spans: Vec<u64>| {
        spans.sort_unstable();
        spans.get(spans.len() / 2).copied()
    };
    let with = middle(uses.iter().map(|it| it.span_ms).collect())?;
    let without = middle(cold_ms.to_vec())?;
    let limit = without.saturating_mul(SLOWER_PERCENT) / 100 + SLOWER_MS;
    (with > limit)
        .then(|| format!("starts take {with} ms with it, and took {without} ms without it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(chunks: &[u32]) -> BootList {
        let chunk = |chunk: &u32| BootChunk {
            layer: 0,
            chunk: *chunk,
        };
        let chunks = chunks.iter().map(chunk).collect();
        BootList::new(vec![IndexDigest::of(b"i")], chunks).unwrap()
    }

    fn document() -> BootDocument {
        BootDocument::new(&[IndexDigest::of(b"i")])
    }

    fn ordinals(chunks: &[BootChunk]) -> Vec<u32> {
        chunks.iter().map(|at| at.chunk).collect()
    }

    fn loaded(loaded_bytes: u64, read_bytes: u64, span_ms: u64) -> Start {
        Start::Loaded(Use {
            loaded_bytes,
            read_bytes,
            span_ms,
        })
    }

    #[test]
    fn a_list_is_of_the_last_starts_and_of_what_others_say() {
        let mut document = document();
        assert_eq!((document.origin(), document.shared()), (None, None));
        document.receive("n".into(), list(&[9, 1]));
        assert_eq!(document.origin(), Some(Origin::Received));
        assert_eq!(document.shared(), Some(list(&[9, 1])));
        assert_eq!(document.learned(), None);
        assert!(document.attach(list(&[1, 2])) && !document.attach(list(&[1, 2])));
        assert_eq!(document.origin(), Some(Origin::Attached));
        assert_eq!(ordinals(&document.chunks()), [1, 2]);
        for _ in 0..6 {
            document.record(list(&[3, 2]), Start::Warm);
        }
        assert_eq!(
            (document.starts(), document.origin()),
            (5, Some(Origin::Learned))
        );
        assert_eq!(ordinals(&document.chunks()), [3, 2]);
        assert_eq!(document.learned(), Some(list(&[3, 2])));
        // It is what is stored.
        let bytes = serde_json::to_vec(&document).unwrap();
        assert_eq!(
            serde_json::from_slice::<BootDocument>(&bytes).unwrap(),
            document
        );
        let broken = String::from_utf8(bytes).unwrap().replace("AQEB", "AQEC");
        assert!(serde_json::from_str::<BootDocument>(&broken).is_err());
    }

    #[test]
    fn a_list_that_is_not_read_is_turned_off_until_it_is_learnt_anew() {
        let mut document = document();
        document.receive("n".into(), list(&[1, 2]));
        assert!(!document.record(list(&[7]), loaded(100, 10, 50)));
        assert!(!document.record(list(&[7]), loaded(100, 60, 50)));
        assert!(document.record(list(&[7]), loaded(100, 60, 50)));
        let reason = document.off.clone().unwrap().reason;
        assert!(reason.contains("130 of the 300 bytes"), "{reason}");
        assert_eq!((document.starts(), document.shared()), (0, None));
        // Others are not asked, and nothing helps but starts.
        document.receive("n".into(), list(&[1, 2]));
        assert_eq!(document.received, []);
        document.record(list(&[7, 8]), Start::Warm);
        document.record(list(&[7, 8]), Start::Cold(900));
        assert!(document.off.is_some());
        document.record(list(&[7, 8]), Start::Warm);
        assert_eq!((document.off.as_ref(), document.starts()), (None, 3));
        assert_eq!(document.shared(), Some(list(&[7, 8])));
    }

    #[test]
    fn lists_of_other_nodes_are_merged_and_bounded() {
        let mut document = document();
        let mut receive = |node: usize, chunks: &[u32]| {
            document.receive(format!("n{node}"), list(chunks));
            document.shared().map(|list| ordinals(list.chunks()))
        };
        assert_eq!(receive(0, &[1, 2]), Some(vec![1, 2]));
        // The same node again does not count twice.
        assert_eq!(receive(0, &[1, 3]), Some(vec![1, 3]));
        receive(1, &[1, 3]);
        // One that lies is outvoted.
        assert_eq!(receive(2, &[70, 80, 90]), Some(vec![1, 3]));
        for node in 3..9 {
            receive(node, &[5, 6]);
        }
        assert_eq!(receive(9, &[5, 6]), Some(vec![5, 6]));
        assert_eq!(document.received.len(), RECEIVED);
        assert_eq!(ordinals(&document.chunks()), [5, 6]);
        // Of what was learnt here all five together weigh half a start; to others each is one voice.
        document.record(list(&[8]), Start::Warm);
        assert_eq!(ordinals(&document.chunks()), [8]);
        assert_eq!(document.shared(), Some(list(&[5, 6])));
        assert_eq!(document.learned(), Some(list(&[8])));
        // Where nodes do not agree on anything, there is nothing to say.
        let mut document = BootDocument::new(&[IndexDigest::of(b"i")]);
        for node in 0..3 {
            document.receive(format!("n{node}"), list(&[node]));
        }
        assert_eq!(document.shared(), None);
    }

    #[test]
    fn another_attached_list_is_tried() {
        let mut document = document();
        document.attach(list(&[1]));
        for _ in 0..3 {
            document.record(list(&[7]), loaded(100, 0, 50));
        }
        assert!(document.off.is_some());
        assert!(!document.attach(list(&[1])) && document.off.is_some());
        assert!(document.attach(list(&[7])) && document.off.is_none());
    }

    #[test]
    fn verdicts() {
        let uses = |read_bytes, span_ms| {
            let one = Use {
                loaded_bytes: 100,
                read_bytes,
                span_ms,
            };
            vec![one; 3]
        };
        let slower = "starts take 2000 ms with it, and took 1000 ms without it";
        let cases = [
            (uses(100, 2000)[..2].to_vec(), vec![10], None),
            (uses(50, 2000), vec![], None),
            (uses(100, 1450), vec![1000], None),
            (uses(100, 2000), vec![1000, 100, 1000], Some(slower)),
            (uses(100, 2000), vec![3000, 100, 3000], None),
        ];
        for (uses, cold, expected) in cases {
            let verdict = verdict(&uses, &cold);
            assert_eq!(verdict.as_deref(), expected, "{uses:?} {cold:?}");
        }
        assert!(verdict(&uses(49, 1), &[]).is_some());
    }
}
