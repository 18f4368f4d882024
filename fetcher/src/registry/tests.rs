// SPDX-License-Identifier: Apache-2.0
//! The client against the fake registry, with exact requests, and against the real one.

mod access;
mod proxied;
mod reads;
mod real;
mod secrets;
mod writes;

use std::time::Duration;

use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::*;
use crate::source::{Priority, ReadContext, RetryPolicy};

fn context() -> ReadContext {
    ReadContext::new(Priority::Foreground).with_timeout(Duration::from_secs(20))
}

fn quick_options() -> RegistryOptions {
    RegistryOptions {
        header_timeout: Duration::from_millis(600),
        stall_timeout: Duration::from_millis(400),
        retry: RetryPolicy {
            base: Duration::from_millis(2),
            max_attempts: 3,
            ..RetryPolicy::default()
        },
        ..RegistryOptions::default()
    }
}

fn client(options: RegistryOptions) -> RegistryClient {
    RegistryClient::new(options, Arc::new(NoCredentials)).unwrap()
}

fn extent(start: u64, end: u64) -> Extent<BlobSpace> {
    Extent::new(start, end).unwrap()
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap()
}

fn blob_path(name: &str, blob: BlobDigest) -> String {
    format!("/v2/{name}/blobs/{blob}")
}
