// SPDX-License-Identifier: Apache-2.0
//! The control service: what the command line asks of the daemon.

pub mod ingest;
