// SPDX-License-Identifier: Apache-2.0
//! Why an operation on a registry failed.

use std::time::Duration;

use crate::source::{Class, SourceError};

/// Why an operation on a registry failed. `endpoint` is `scheme://host:port`; URLs with their query
/// (which may hold secrets) never appear.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The caller called it off.
    #[error("cancelled")]
    Cancelled,
    /// The caller's deadline passed.
    #[error("deadline exceeded")]
    DeadlineExceeded,
    /// No connection, or it broke before the answer's head had come.
    #[error("connect to {endpoint}: {reason}")]
    Connect {
        /// Whom.
        endpoint: String,
        /// What the transport said.
        reason: String,
    },
    /// The TLS certificate of the endpoint is not trusted.
    #[error("certificate of {endpoint}: {reason}")]
    Certificate {
        /// Whose.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The head of the answer did not come in time, or an upload made no progress.
    #[error("{endpoint} did not answer {what} within {after:?}")]
    NoAnswer {
        /// Whom.
        endpoint: String,
        /// What was asked.
        what: String,
        /// The time-out that passed.
        after: Duration,
    },
    /// 429: too many requests.
    #[error("{endpoint} throttles {what}")]
    Throttled {
        /// Whom.
        endpoint: String,
        /// What was asked.
        what: String,
        /// `Retry-After`, if it was sent.
        retry_after: Option<Duration>,
    },
    /// 408 or 5xx.
    #[error("{endpoint} is unavailable for {what}: HTTP {status}")]
    Unavailable {
        /// Whom.
        endpoint: String,
        /// What was asked.
        what: String,
        /// The HTTP status.
        status: u16,
        /// `Retry-After`, if it was sent.
        retry_after: Option<Duration>,
    },
    /// 401 or 403 with every credential that is known.
    #[error("{endpoint} denies {what}: HTTP {status} ({credentials})")]
    Denied {
        /// Whom.
        endpoint: String,
        /// What was asked.
        what: String,
        /// The HTTP status.
        status: u16,
        /// Which credentials were tried, without secrets.
        credentials: String,
    },
    /// 404.
    #[error("{what} not found at {endpoint}")]
    NotFound {
        /// Whom.
        endpoint: String,
        /// What was asked.
        what: String,
    },
    /// Another status that is not success.
    #[error("{endpoint} refuses {what}: HTTP {status}{detail}")]
    Refused {
        /// Whom.
        endpoint: String,
        /// What was asked.
        what: String,
        /// The HTTP status.
        status: u16,
        /// The registry's own words, shortened; empty or starting with `: `.
        detail: String,
    },
    /// An answer that breaks the protocol.
    #[error("{endpoint} answers {what} wrongly: {problem}")]
    Protocol {
        /// Whom.
        endpoint: String,
        /// What was asked.
        what: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// A redirect that must not be followed.
    #[error("redirect from {endpoint} not followed: {problem}")]
    Redirect {
        /// Who redirected.
        endpoint: String,
        /// Why it is not followed.
        problem: String,
    },
    /// More bytes than are accepted for such a thing.
    #[error("{what} is larger than {limit_bytes} bytes")]
    TooLarge {
        /// What.
        what: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// The bytes are not what their digest says.
    #[error("{what}: expected {expected}, got {actual}")]
    DigestMismatch {
        /// What was read.
        what: String,
        /// The digest asked for.
        expected: String,
        /// The digest of the bytes that came.
        actual: String,
    },
    /// The client cannot be set up as configured (a CA file, an endpoint).
    #[error("registry configuration of {host}: {problem}")]
    Configuration {
        /// The host whose options are wrong.
        host: String,
        /// What is wrong.
        problem: String,
    },
    /// Others change it faster than it can be changed.
    #[error("{what} at {endpoint} keeps changing")]
    Contended {
        /// Where.
        endpoint: String,
        /// What.
        what: String,
    },
    /// The caller's stream of bytes to upload failed.
    #[error("read bytes to upload: {reason}")]
    Input {
        /// What the stream said.
        reason: String,
    },
    /// A body could not be read.
    #[error(transparent)]
    Read(Box<SourceError>),
}

impl RegistryError {
    /// What a caller may do about it.
    pub fn class(&self) -> Class {
        match self {
            RegistryError::Cancelled | RegistryError::DeadlineExceeded => Class::Cancelled,
            RegistryError::Connect { .. }
            | RegistryError::NoAnswer { .. }
            | RegistryError::Throttled { .. }
            | RegistryError::Unavailable { .. }
            | RegistryError::Contended { .. } => Class::Transient,
            RegistryError::Denied { .. }
            | RegistryError::Certificate { .. }
            | RegistryError::NotFound { .. }
            | RegistryError::Refused { .. }
            | RegistryError::Redirect { .. }
            | RegistryError::TooLarge { .. }
            | RegistryError::Configuration { .. }
            | RegistryError::Input { .. } => Class::Permanent,
            RegistryError::Protocol { .. } | RegistryError::DigestMismatch { .. } => Class::Corrupt,
            RegistryError::Read(inner) => inner.class(),
        }
    }

    /// How long the registry asked to be left alone, if it did.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            RegistryError::Throttled { retry_after, .. }
            | RegistryError::Unavailable { retry_after, .. } => *retry_after,
            RegistryError::Read(inner) => inner.retry_after(),
            _ => None,
        }
    }
}

impl From<SourceError> for RegistryError {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Cancelled => RegistryError::Cancelled,
            SourceError::DeadlineExceeded => RegistryError::DeadlineExceeded,
            SourceError::Registry(inner) => inner,
            other => RegistryError::Read(Box::new(other)),
        }
    }
}
