// SPDX-License-Identifier: Apache-2.0
//! What is passed on as it is: the version check, lists of tags, referrers, and content whose digest is of
//! an algorithm that is not kept.

use std::sync::Arc;

use axum::body::Body;
use axum::http::HeaderName;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, LINK};
use sluice_fetcher::registry::{Passed, Repository};

use super::answer::{self, CONTENT_DIGEST};
use super::{Answered, BODY_DEADLINE, Client, Kind, Outcome, Shared};

/// Headers of a registry's answer that are passed on.
const KEPT: [HeaderName; 6] = [
    CONTENT_TYPE,
    CONTENT_LENGTH,
    CONTENT_DIGEST,
    LINK,
    HeaderName::from_static("oci-filters-applied"),
    HeaderName::from_static("docker-distribution-api-version"),
];

impl Shared {
    /// `/v2/`: how the registry lets in, if one is named. A registry that cannot be asked is none that the
    /// client should take for absent: what is kept may be all that it wants.
    pub(super) async fn version(&self, host: Option<String>, client: &Client) -> Answered {
        let mine = |outcome| (Kind::Version, outcome, answer::empty(200));
        let Some(host) = host else {
            return mine(Outcome::Cached);
        };
        // A name that makes a host valid, whatever the repository.
        let known =
            Repository::new(&host, "x").is_ok_and(|place| place.host() != self.listen.to_string());
        if !known {
            let response = answer::error(400, "NAME_INVALID", "no registry host");
            return (Kind::Version, Outcome::Refused, response);
        }
        let context = self.asking();
        match self.client.pass_ping(&context, &host, &client.shown).await {
            Ok(answer) if answer.denied() => {
                (Kind::Version, Outcome::Passed, answer::refusal(&answer))
            }
            Ok(answer) if answer.accepted() => mine(Outcome::Passed),
            Ok(_) | Err(_) => mine(Outcome::Stale),
        }
    }

    /// Passes a question on, and the answer back.
    pub(super) async fn other(
        self: &Arc<Self>,
        place: &Repository,
        rest: &str,
        client: &Client,
    ) -> Answered {
        let (accept, _) = client.accept();
        let request = Passed {
            head: client.head,
            rest: rest.to_owned(),
            accept,
            unless: None,
            shown: client.shown.clone(),
        };
        let context = self.asking().with_timeout(BODY_DEADLINE);
        match self.client.pass(&context, place, &request).await {
            Ok(answer) if answer.accepted() => {
                let mut response = answer::empty(answer.status);
                for name in KEPT {
                    if let Some(value) = answer.headers.get(&name) {
                        response.headers_mut().insert(name, value.clone());
                    }
                }
                if !client.head {
                    *response.body_mut() = Body::from_stream(answer.body);
                }
                (Kind::Other, Outcome::Passed, response)
            }
            Ok(answer) => {
                let outcome = match answer.status {
                    _ if answer.denied() => Outcome::Denied,
                    404 => Outcome::NotFound,
                    _ => Outcome::Unavailable,
                };
                (Kind::Other, outcome, answer::refusal(&answer))
            }
            Err(error) => {
                let response = answer::unreachable(&error.to_string());
                (Kind::Other, Outcome::Unavailable, response)
            }
        }
    }
}
