// SPDX-License-Identifier: Apache-2.0
//! Image in, image out, and the command line `sluice`.
//!
//! [`plan`] decides, [`pack`] changes the compression of layers, [`verify`] checks what passes, [`push`]
//! moves blobs, [`records`] remember what was converted, [`convert`] runs them all, [`index`] indexes images as they are, [`optimize`] attaches learned boot lists, [`doctor`] looks for what is wrong on a node, [`image`] reads and writes images wherever they are, and
//! [`cli`] is the only part that talks to a user.

#![forbid(unsafe_code)]

pub mod cli;
pub mod containerd;
pub mod convert;
pub mod doctor;
#[cfg(test)]
mod fixture;
pub mod grpc;
pub mod image;
pub mod index;
pub mod inspect;
pub mod optimize;
pub mod pack;
pub mod plan;
pub mod pool;
pub mod pull;
pub mod push;
pub mod records;
pub mod report;
pub mod setup;
pub mod spool;
pub mod verify;
