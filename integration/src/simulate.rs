// SPDX-License-Identifier: Apache-2.0
//! A cluster of 10 to 10,000 nodes in one process: discrete events, flows instead of packets.
//!
//! What the nodes decide is not modelled: views, homes, scores, searches, uploads, hedges and budgets are
//! the daemon's own code (`sluice_fetcher::cluster`). Modelled are the world around it: links that share
//! their bandwidth among the flows on them, latencies, the registry, what a container reads, and death.
//!
//! - [`scenario`]: what is simulated, as numbers that can be written in a file.
//! - [`world`]: the nodes and the loop; `fetching` is the asking side, `serving` the giving one.
//! - [`network`]: links and flows. [`events`]: the queue. [`slab`], [`random`]: small parts.
//! - [`figures`]: what is measured. [`report`], [`chart`]: tables and curves.
//! - [`variants`]: other policies, other fates. [`calibrate`]: compares with real runs. [`published`]: beside figures that others published.
//!
//! A run is a function of its scenario, the seed included: no clock, no threads, no hash order.

pub mod calibrate;
pub mod chart;
pub mod events;
mod fetching;
pub mod figures;
pub mod network;
pub mod published;
pub mod random;
pub mod report;
pub mod scenario;
mod serving;
pub mod slab;
pub mod variants;
pub mod world;

#[cfg(test)]
mod tests;
