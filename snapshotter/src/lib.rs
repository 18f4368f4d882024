// SPDX-License-Identifier: Apache-2.0
//! containerd's side of Sluice: the snapshots service, the metadata store, chains of merged trees,
//! their mounts, the shim that serves them, and the daemon `sluiced` that holds it all together.

pub mod background;
pub mod below;
pub mod boot;
pub mod chain;
pub mod config;
pub mod control;
pub mod disk;
pub mod durable;
pub mod examine;
pub mod filters;
pub mod indexes;
pub mod labels;
pub mod layers;
pub mod lazy;
mod listen;
pub mod mirror;
pub mod mount;
pub mod mounts;
pub mod node_indexes;
pub mod notifications;
pub mod plan;
pub mod prewarm;
pub mod resolve;
pub mod reuse;
pub mod run;
pub mod service;
pub mod shelf;
pub mod shim;
pub mod snapshots;
pub mod store;
pub mod sys;
pub mod telemetry;
mod tree_check;
pub mod trees;
pub mod trust;
pub mod unpack;
pub mod zone_indexes;
