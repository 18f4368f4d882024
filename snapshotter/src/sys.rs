// SPDX-License-Identifier: Apache-2.0
//! What the kernel offers and the standard library does not: the only place with `unsafe`.
//!
//! Each child wraps one ability behind a safe function; no policy lives here. Every descriptor that
//! leaves this module is close-on-exec.
#![allow(unsafe_code, reason = "system calls; each block says why it is sound")]

pub mod fanotify;
pub mod fdpass;
pub mod fdstore;
pub mod fusefd;
pub mod lease;
pub mod map;
pub mod mountpoint;
pub mod newmount;
pub mod privileges;
pub mod process;
pub mod slots;
