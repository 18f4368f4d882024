// SPDX-License-Identifier: Apache-2.0
//! Whether the registry of an image answers, and lets this node in with the credentials it has.

use std::sync::Arc;
use std::time::Duration;

use sluice_fetcher::registry::{ImageReference, RegistryError, Repository};
use sluice_fetcher::source::{Priority, ReadContext};

use super::{Examiner, Finding, Report, Severity, WantedImage};
use crate::snapshots::BlobOrigin;

/// How long a registry may take: less than a check, so that several places are asked.
const ANSWER_DEADLINE: Duration = Duration::from_secs(15);

/// What a registry's refusal means to the node.
fn judge(reference: &ImageReference, error: &RegistryError) -> Finding {
    let host = reference.host();
    let advice = match error {
        RegistryError::Denied { .. } => format!(
            "give this node credentials for {host}: [registry] docker_config, or `docker login` as root"
        ),
        RegistryError::Certificate { .. } => {
            format!("add its authority to [registry.hosts.\"{host}\"] ca_files")
        }
        RegistryError::NotFound { .. } => {
            "the image is not there, or hidden from these credentials".to_owned()
        }
        RegistryError::Connect { .. }
        | RegistryError::NoAnswer { .. }
        | RegistryError::Cancelled
        | RegistryError::DeadlineExceeded => format!(
            "look at the network and name resolution of this node, and whether {host} runs; with plain HTTP set [registry.hosts.\"{host}\"] plain_http"
        ),
        RegistryError::Throttled { .. } | RegistryError::Unavailable { .. } => {
            format!("{host} is overloaded: reads of missing data wait for it")
        }
        _ => format!("look at the log of {host}"),
    };
    Finding::new(Severity::Error, reference, error).advice(advice)
}

/// Whether both mean one place: containerd's labels name hosts without their ports.
fn is_same(asked: &Repository, known: &Repository) -> bool {
    let host = asked.host();
    let bare = host.rsplit_once(':').map_or(host, |(bare, _)| bare);
    asked.name() == known.name() && [host, bare].contains(&known.host())
}

/// The references to ask for: the one that was named, and what is known of its places.
fn references(image: &WantedImage) -> Vec<ImageReference> {
    let named: Option<ImageReference> = image.name.parse().ok();
    let mut all: Vec<ImageReference> = named.into_iter().collect();
    for (origin, digest) in &image.known {
        let place = Repository::new(&origin.host, &origin.repository);
        let (Ok(place), Ok(digest)) = (place, digest.parse()) else {
            continue;
        };
        // One question for each place.
        if all.iter().all(|it| !is_same(it.place(), &place)) {
            all.push(place.with_digest(digest));
        }
    }
    all
}

impl Examiner {
    pub(super) async fn registry(&self, report: Arc<Report<'_>>, image: &WantedImage) {
        let references = references(image);
        if references.is_empty() {
            let problem = "is neither a reference nor an image that containerd has";
            let finding = Finding::new(Severity::Error, &image.name, problem)
                .advice("name it as in `nerdctl pull`, with its registry");
            return report.finding(finding).await;
        }
        let named = references.first().cloned();
        for reference in references {
            report.looks_at(&reference);
            let context = ReadContext::new(Priority::Foreground).with_timeout(ANSWER_DEADLINE);
            let asked = self.client.resolve(&context, &reference);
            let answer = tokio::time::timeout(ANSWER_DEADLINE * 2, asked).await;
            let answer = answer.unwrap_or(Err(RegistryError::DeadlineExceeded));
            if let Err(error) = answer {
                let mut finding = judge(&reference, &error);
                if Some(&reference) != named.as_ref() {
                    // Another place that had it once: a read that the first one answers does not need it.
                    finding.severity = Severity::Warning;
                }
                report.finding(finding).await;
            }
            let origin = BlobOrigin::from(reference.place());
            if !self.lazy.trusts(&origin) {
                let problem = "its layers are not lazy: [trust] lazy does not list it";
                let finding = Finding::new(Severity::Warning, origin, problem)
                    .advice("add it to [trust] lazy if you trust it");
                report.finding(finding).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_asked_once() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let known = |host: &str| {
            let origin = BlobOrigin {
                host: host.into(),
                repository: "a".into(),
            };
            (origin, digest.clone())
        };
        let image = WantedImage {
            name: "r.test/a:1".into(),
            known: vec![known("r.test"), known("other.test"), known("other.test")],
        };
        let asked: Vec<String> = references(&image).iter().map(ToString::to_string).collect();
        assert_eq!(
            asked,
            ["r.test/a:1".to_owned(), format!("other.test/a@{digest}")]
        );
        let image = WantedImage {
            name: "r.test:5000/a:1".into(),
            known: vec![known("r.test"), known("r.test:5000")],
        };
        assert_eq!(references(&image).len(), 1, "a label without the port");
        assert!(references(&WantedImage::default()).is_empty());
    }

    #[test]
    fn advice_fits_the_refusal() {
        let reference: ImageReference = "r.test/a:1".parse().unwrap();
        let denied = RegistryError::Denied {
            endpoint: "https://r.test".into(),
            what: "manifest".into(),
            status: 401,
            credentials: "anonymous".into(),
        };
        let finding = judge(&reference, &denied);
        assert!(
            finding.advice.contains("credentials for r.test"),
            "{finding:?}"
        );
        let down = RegistryError::Connect {
            endpoint: "https://r.test".into(),
            reason: "refused".into(),
        };
        assert!(judge(&reference, &down).advice.contains("network"));
    }
}
