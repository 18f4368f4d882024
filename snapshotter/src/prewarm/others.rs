// SPDX-License-Identifier: Apache-2.0
//! Prewarming on other nodes: which, and what they say.
//!
//! Each node is asked by itself and brings the image into its own store. Chunks go round as in every burst:
//! of each piece one node of a zone, its home, asks the origin.

use futures::StreamExt as _;
use sluice_fetcher::cluster::node::{Node, Role, View};
use sluice_fetcher::peer::{Refused, Reports, WantedPrewarm};
use sluice_proto::peer::{PrewarmReport, PrewarmedLayer};

use super::{Prewarms, Progress, Scope};

/// The most nodes that one request may mean.
const NODES_MAX: usize = 4096;

/// Which nodes are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// These.
    pub nodes: Vec<String>,
    /// All of this node's zone.
    pub zone: bool,
    /// The supernodes of this node's zone.
    pub supernodes: bool,
}

/// Why nodes cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SelectionError {
    /// There are no others.
    #[error("this node is in no cluster: [cluster] is not enabled in the configuration of sluiced")]
    Alone,
    /// One is not there.
    #[error("no node {0:?} in the cluster, as this one sees it")]
    Unknown(String),
    /// Nobody has the role.
    #[error("no supernode in zone {0:?}")]
    NoSupernode(String),
    /// More than can be watched.
    #[error("{0} nodes, at most {NODES_MAX}")]
    TooMany(usize),
}

/// The nodes that are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meant {
    /// This node itself, and its name where it has one.
    pub me: Option<String>,
    /// Others, each once.
    pub others: Vec<Node>,
}

impl Selection {
    /// The nodes of a view that are meant; without a word this one is.
    ///
    /// **Errors** [`SelectionError`].
    pub fn of(&self, view: Option<&View>) -> Result<Meant, SelectionError> {
        let all = self.zone || self.supernodes || !self.nodes.is_empty();
        let view = match (view, all) {
            (Some(view), true) => view,
            (None, true) => return Err(SelectionError::Alone),
            (view, false) => {
                let name = view.map(|view| view.me.id.to_string());
                return Ok(Meant {
                    me: Some(name.unwrap_or_default()),
                    others: Vec::new(),
                });
            }
        };
        let known = || std::iter::once(&view.me).chain(&view.others);
        for name in &self.nodes {
            if !known().any(|node| node.id.as_str() == name) {
                return Err(SelectionError::Unknown(name.clone()));
            }
        }
        let zone = &view.me.zone;
        let is_super = |node: &Node| node.zone == *zone && node.role == Role::Supernode;
        if self.supernodes && !known().any(is_super) {
            return Err(SelectionError::NoSupernode(zone.clone()));
        }
        let meant = |node: &Node| {
            (self.zone && node.zone == *zone)
                || (self.supernodes && is_super(node))
                || self.nodes.iter().any(|name| name == node.id.as_str())
        };
        let others: Vec<Node> = view.others.iter().filter(|it| meant(it)).cloned().collect();
        if others.len() > NODES_MAX {
            return Err(SelectionError::TooMany(others.len()));
        }
        Ok(Meant {
            me: meant(&view.me).then(|| view.me.id.to_string()),
            others,
        })
    }
}

/// How far this node is, for another one.
#[must_use]
pub fn report_of(progress: &Progress) -> PrewarmReport {
    let manifest = progress.manifest.map(|digest| digest.to_string());
    let layers = progress.layers.iter().map(|layer| PrewarmedLayer {
        diff_id: layer.diff_id.clone(),
        blob_digest: layer.blob.clone(),
        present_bytes: layer.present_bytes,
        total_bytes: layer.total_bytes,
        phase: layer.phase.as_str().to_owned(),
        error: layer.error.clone(),
    });
    PrewarmReport {
        phase: progress.phase.as_str().to_owned(),
        manifest_digest: manifest.unwrap_or_default(),
        layers: layers.collect(),
        error: progress.error.clone(),
        note: progress.note.clone(),
    }
}

impl Prewarms {
    /// Begins what another node asks for.
    ///
    /// **Errors** [`Refused`]: there is too much of it.
    pub fn start_for(&self, wanted: WantedPrewarm) -> Result<Reports, Refused> {
        let scope = match wanted.boot {
            true => Scope::Boot,
            false => Scope::Full,
        };
        let (node, image) = (&wanted.node, &wanted.reference);
        tracing::info!(%node, %image, scope = scope.as_str(), "a node asks for a prewarm");
        let begun = self.start(wanted.reference, scope, false);
        let watching = begun.map_err(|refused| Refused::Failed(refused.to_string()))?;
        Ok(watching.told().map(|it| report_of(&it)).boxed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_fetcher::cluster::node::NodeId;

    fn node(id: &str, zone: &str, role: Role) -> Node {
        Node {
            id: NodeId::parse(id).unwrap(),
            zone: zone.into(),
            rack: String::new(),
            role,
            address: ([10, 0, 0, 1], 9641).into(),
            version: "0.1.0".into(),
            protocol: 1,
            load: 0,
            free_slots: 1,
        }
    }

    #[test]
    fn nodes_are_meant_by_name_zone_and_role() {
        let view = View {
            me: node("m", "z", Role::Node),
            others: vec![
                node("a", "z", Role::Supernode),
                node("b", "z", Role::Leech),
                node("c", "y", Role::Supernode),
            ],
        };
        let names = |names: &[&str]| names.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
        let select = |nodes: &[&str], zone, supernodes| Selection {
            nodes: names(nodes),
            zone,
            supernodes,
        };
        for (selection, me, others) in [
            (select(&[], false, false), true, &[][..]),
            (select(&["c", "m", "c"], false, false), true, &["c"]),
            (select(&[], true, false), true, &["a", "b"]),
            (select(&[], false, true), false, &["a"]),
            (select(&["c"], true, true), true, &["a", "b", "c"]),
        ] {
            let meant = selection.of(Some(&view)).unwrap();
            assert_eq!(meant.me.as_deref(), me.then_some("m"), "{selection:?}");
            let found: Vec<&str> = meant.others.iter().map(|it| it.id.as_str()).collect();
            assert_eq!(found, others, "{selection:?}");
        }
        let unknown = select(&["x"], true, false).of(Some(&view));
        assert_eq!(unknown, Err(SelectionError::Unknown("x".into())));
        let alone = select(&[], true, false);
        assert_eq!(alone.of(None), Err(SelectionError::Alone));
        assert_eq!(
            Selection::default().of(None).unwrap().me.as_deref(),
            Some("")
        );
        let lone = View::alone(node("m", "z", Role::Node));
        let none = select(&[], false, true).of(Some(&lone));
        assert_eq!(none, Err(SelectionError::NoSupernode("z".into())));
    }
}
