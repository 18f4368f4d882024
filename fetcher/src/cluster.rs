// SPDX-License-Identifier: Apache-2.0
//! Many nodes, each byte once: who is there, who fetches what, and whom to ask.
//!
//! - [`node`]: a node, and the view that one node has of its zone and of others.
//! - [`home`]: which node fetches a piece from the origin.
//! - [`membership`]: who is there, by gossip or from a list.
//! - [`remember`]: who was there, over a restart.
//! - [`link`]: connections between nodes, with [`tls`] and [`allow`].
//! - [`seed`]: where a node that starts looks for others.
//! - [`choice`]: which of those that could have something is asked first, and who is avoided.
//! - [`hedge`]: how much may be asked twice.
//! - [`bucket`]: bytes per second, and a node's share of what its zone may take.
//! - [`holders`]: whom to name instead when all upload slots are taken.
//! - [`uploads`]: whom a node serves, and whom it sends on.
//! - [`search`]: how a node finds somebody who gives it a thing.
//!
//! What decides is pure: it takes a view, events and a time, and gives a decision. The daemon and the
//! simulator run the same code.

pub mod allow;
pub mod bucket;
pub mod choice;
mod gossip;
pub mod hedge;
pub mod holders;
pub mod home;
pub mod link;
pub mod membership;
pub mod metrics;
pub mod node;
pub mod remember;
pub mod route;
pub mod search;
pub mod seed;
pub mod tls;
pub mod uploads;
