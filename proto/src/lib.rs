// SPDX-License-Identifier: Apache-2.0
//! The generated code of Sluice's own APIs; the `.proto` files in `proto/proto/` are their definition.
#![forbid(unsafe_code)]
#![allow(missing_docs, missing_debug_implementations, reason = "generated code")]
#![allow(clippy::all, reason = "generated code")]

/// The control API: what `sluice` asks of `sluiced`, over a unix socket that only root may open.
pub mod control {
    tonic::include_proto!("sluice.control.v1");
}

/// The shim API: length-delimited [`shim::Envelope`] messages between the shim's worker and `sluiced`.
pub mod shim {
    tonic::include_proto!("sluice.shim.v1");
}

/// The peer API: what nodes of a cluster ask of each other.
pub mod peer {
    tonic::include_proto!("sluice.peer.v1");
}
