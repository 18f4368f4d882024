// SPDX-License-Identifier: Apache-2.0
//! The store against a naive model: three maps (snapshots, parents, targets) and the rules of
//! containerd's metadata written down a second time, as plainly as possible.

use std::collections::BTreeMap;

use proptest::prelude::*;
use sluice_blockindex::digest::ChainId;

use super::tests::{lazy, new};
use super::*;
use crate::snapshots::{Labels, SnapshotKind, Usage};

#[derive(Debug, Clone)]
enum Step {
    Create {
        view: bool,
        key: usize,
        parent: Option<usize>,
    },
    Commit {
        key: usize,
        name: usize,
    },
    Adopt {
        chain: u8,
        parent: Option<usize>,
    },
    Remove {
        name: usize,
    },
    Update {
        name: usize,
        value: u8,
        mask: u8,
    },
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = 0usize..64;
    let parent = prop::option::weighted(0.7, 0usize..64);
    let step = prop_oneof![
        4 => (any::<bool>(), name.clone(), parent.clone())
            .prop_map(|(view, key, parent)| Step::Create { view, key, parent }),
        4 => (name.clone(), name.clone()).prop_map(|(key, name)| Step::Commit { key, name }),
        3 => (0u8..3, parent).prop_map(|(chain, parent)| Step::Adopt { chain, parent }),
        3 => name.clone().prop_map(|name| Step::Remove { name }),
        2 => (name, 0u8..3, 0u8..4)
            .prop_map(|(name, value, mask)| Step::Update { name, value, mask }),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..60)
}

/// What a step did, in words that model and store share.
#[derive(Debug, PartialEq)]
enum Outcome {
    Done,
    Existing(String),
    NotFound,
    ParentNotFound,
    Exists,
    WrongKind,
    HasChildren,
    Immutable,
}

fn outcome(error: &StoreError) -> Outcome {
    match error {
        StoreError::NotFound { .. } => Outcome::NotFound,
        StoreError::ParentNotFound { .. } => Outcome::ParentNotFound,
        StoreError::AlreadyExists { .. } => Outcome::Exists,
        StoreError::ParentNotCommitted { .. } | StoreError::NotActive { .. } => Outcome::WrongKind,
        StoreError::HasChildren { .. } => Outcome::HasChildren,
        StoreError::ImmutableField { .. } => Outcome::Immutable,
        other => panic!("unexpected: {other}"),
    }
}

#[derive(Debug, Default)]
struct Model {
    kinds: BTreeMap<String, (SnapshotKind, Labels)>,
    parents: BTreeMap<String, String>,
    targets: BTreeMap<(u8, Option<String>), String>,
}

impl Model {
    fn parent(&self, parent: Option<&String>) -> Result<(), Outcome> {
        match parent.map(|name| self.kinds.get(name)) {
            None => Ok(()),
            Some(None) => Err(Outcome::ParentNotFound),
            Some(Some((SnapshotKind::Committed, _))) => Ok(()),
            Some(Some(_)) => Err(Outcome::WrongKind),
        }
    }

    fn insert(&mut self, name: &str, kind: SnapshotKind, parent: Option<&String>) {
        self.kinds.insert(name.into(), (kind, Labels::new()));
        if let Some(parent) = parent {
            self.parents.insert(name.into(), parent.clone());
        }
    }

    fn create(&mut self, key: &str, kind: SnapshotKind, parent: Option<&String>) -> Outcome {
        if let Err(outcome) = self.parent(parent) {
            return outcome;
        }
        if self.kinds.contains_key(key) {
            return Outcome::Exists;
        }
        self.insert(key, kind, parent);
        Outcome::Done
    }

    fn commit(&mut self, key: &str, name: &str) -> Outcome {
        if self.kinds.contains_key(name) {
            return Outcome::Exists;
        }
        match self.kinds.get(key) {
            None => return Outcome::NotFound,
            Some((SnapshotKind::Active, _)) => (),
            Some(_) => return Outcome::WrongKind,
        }
        self.kinds.remove(key);
        self.kinds
            .insert(name.into(), (SnapshotKind::Committed, Labels::new()));
        if let Some(parent) = self.parents.remove(key) {
            self.parents.insert(name.into(), parent);
        }
        Outcome::Done
    }

    fn remove(&mut self, name: &str) -> Outcome {
        if !self.kinds.contains_key(name) {
            return Outcome::NotFound;
        }
        if self.parents.values().any(|parent| parent == name) {
            return Outcome::HasChildren;
        }
        self.kinds.remove(name);
        self.parents.remove(name);
        self.targets.retain(|_, target| target != name);
        Outcome::Done
    }

    fn update(&mut self, name: &str, value: u8, mask: u8) -> Outcome {
        let Some((_, labels)) = self.kinds.get_mut(name) else {
            return Outcome::NotFound;
        };
        match mask {
            0 | 1 => *labels = given(value),
            2 => match given(value).remove("a") {
                Some(a) if !a.is_empty() => {
                    labels.insert("a".into(), a);
                }
                _ => {
                    labels.remove("a");
                }
            },
            _ => return Outcome::Immutable,
        }
        labels.retain(|_, value| !value.is_empty());
        Outcome::Done
    }
}

fn given(value: u8) -> Labels {
    match value {
        0 => Labels::new(),
        1 => Labels::from([("a".into(), "1".into()), ("b".into(), String::new())]),
        _ => Labels::from([("b".into(), "2".into())]),
    }
}

fn mask(mask: u8) -> Vec<String> {
    match mask {
        0 => Vec::new(),
        1 => vec!["labels".into()],
        2 => vec!["labels.a".into()],
        _ => vec!["labels.a".into(), "parent".into()],
    }
}

/// The name of a step's operand: one that exists, mostly, else a fresh or missing one.
fn pick(model: &Model, index: usize) -> String {
    if index.is_multiple_of(3) || model.kinds.is_empty() {
        return format!("n{}", index % 8);
    }
    model
        .kinds
        .keys()
        .nth(index % model.kinds.len())
        .cloned()
        .unwrap_or_default()
}

fn run(steps: Vec<Step>) {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("m");
    let mut store = MetadataStore::open(&path).unwrap();
    let mut model = Model::default();
    for step in steps {
        let (expected, got) = match step {
            Step::Create { view, key, parent } => {
                let kind = if view {
                    SnapshotKind::View
                } else {
                    SnapshotKind::Active
                };
                let key = format!("n{}", key % 8);
                let parent = parent.map(|index| pick(&model, index));
                let got = store.create(new(&store, &key, kind, parent.as_deref()));
                (model.create(&key, kind, parent.as_ref()), got.map(|_| ()))
            }
            Step::Commit { key, name } => {
                let (key, name) = (pick(&model, key), format!("n{}", name % 8));
                let got = store.commit(&key, &name, Usage::default(), Labels::new());
                (model.commit(&key, &name), got.map(|_| ()))
            }
            Step::Adopt { chain, parent } => {
                let parent = parent.map(|index| pick(&model, index));
                let got = store.adopt(lazy(&store, ChainId::of(&[chain]), parent.as_deref()));
                let target = (chain, parent.clone());
                let expected = match (model.parent(parent.as_ref()), model.targets.get(&target)) {
                    (Err(outcome), _) => outcome,
                    (Ok(()), Some(name)) => Outcome::Existing(name.clone()),
                    (Ok(()), None) => Outcome::Done,
                };
                let got = got.map(|adopted| {
                    if adopted.created {
                        let name = adopted.record.name;
                        model.insert(&name, SnapshotKind::Committed, parent.as_ref());
                        let labels = adopted.record.labels;
                        model
                            .kinds
                            .insert(name.clone(), (SnapshotKind::Committed, labels));
                        model.targets.insert(target, name);
                        Outcome::Done
                    } else {
                        Outcome::Existing(adopted.record.name)
                    }
                });
                assert_eq!(got.unwrap_or_else(|error| outcome(&error)), expected);
                continue;
            }
            Step::Remove { name } => {
                let name = pick(&model, name);
                (model.remove(&name), store.remove(&name).map(|_| ()))
            }
            Step::Update {
                name,
                value,
                mask: fields,
            } => {
                let name = pick(&model, name);
                let got = store.update_labels(&name, given(value), &mask(fields));
                (model.update(&name, value, fields), got.map(|_| ()))
            }
            Step::Reopen => {
                drop(store);
                store = MetadataStore::open(&path).unwrap();
                continue;
            }
        };
        assert_eq!(
            got.map_or_else(|error| outcome(&error), |()| Outcome::Done),
            expected
        );
    }
    store.check().unwrap();
    let stored = store.list(|_| true).unwrap();
    assert_eq!(stored.len(), model.kinds.len());
    for record in stored {
        let (kind, labels) = &model.kinds[&record.name];
        assert_eq!(
            (record.kind, &record.labels),
            (*kind, labels),
            "{}",
            record.name
        );
        assert_eq!(record.parent.as_ref(), model.parents.get(&record.name));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_store_does_what_three_maps_do(steps in steps()) {
        run(steps);
    }
}
