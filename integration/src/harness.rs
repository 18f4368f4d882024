// SPDX-License-Identifier: Apache-2.0
//! The pieces of an end-to-end set-up and the guards that take them down.

pub mod command;
pub mod containerd;
pub mod containers;
pub mod daemon;
pub mod faulty;
pub mod http;
pub mod images;
pub mod kubernetes;
pub mod layout;
pub mod look;
pub mod mounts;
pub mod nerdctl;
pub mod network;
pub mod process;
pub mod proxy;
pub mod rebuilt;
pub mod registry;
pub mod root;
pub mod rootfs;
pub mod service_manager;
pub mod site;
pub mod tools;
pub mod units;
pub mod wait;
pub mod world;
