// SPDX-License-Identifier: Apache-2.0
//! Examining the daemon's state on behalf of `sluice doctor`.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use sluice_proto::control::examine_event::Event as Sent;
use sluice_proto::control::{
    CheckDone, ExamineEvent, ExamineProgress, ExamineRequest, Examiner as Hello, Finding as Told,
    Severity as Level,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::ControlService;
use crate::examine::{Event, Examiner, Finding, QUEUED, Severity, Wanted, WantedImage};
use crate::lazy::ImageDocument;
use crate::store::DocumentTable;

/// Events as they come.
pub(super) type ExamineStream =
    Pin<Box<dyn Stream<Item = Result<ExamineEvent, Status>> + Send + 'static>>;

/// An event in the words of the wire.
fn sent(event: Event) -> ExamineEvent {
    let event = match event {
        Event::Finding(check, finding) => {
            let Finding {
                severity,
                subject,
                problem,
                advice,
                repairable,
                repaired,
            } = finding;
            let severity = match severity {
                Severity::Info => Level::Info,
                Severity::Warning => Level::Warning,
                Severity::Error => Level::Error,
            };
            Sent::Finding(Told {
                check: check.into(),
                severity: severity.into(),
                subject,
                problem,
                advice,
                repairable,
                repaired,
            })
        }
        Event::Done(check, looked_at) => Sent::Done(CheckDone {
            check: check.into(),
            looked_at,
        }),
        Event::Progress(check, subject, looked_at) => Sent::Progress(ExamineProgress {
            check: check.into(),
            subject,
            looked_at,
        }),
    };
    ExamineEvent { event: Some(event) }
}

impl ControlService {
    /// Starts the examination; it ends when the client goes away.
    pub(super) fn examine(&self, request: ExamineRequest) -> ExamineStream {
        let ExamineRequest { deep, fix, image } = request;
        let (events, receiver) = mpsc::channel(QUEUED);
        let hello = Sent::Examiner(Hello {
            version: env!("CARGO_PKG_VERSION").into(),
            root: self.lazy.root().to_string_lossy().into_owned(),
            run: self.run_dir.to_string_lossy().into_owned(),
        });
        let (service, closed) = (self.clone(), events.clone());
        self.tasks.spawn(async move {
            let work = async {
                let image = match image.is_empty() {
                    true => None,
                    false => Some(service.wanted_image(image).await),
                };
                let wanted = Wanted { deep, fix, image };
                let lazy = (service.lazy.clone(), Arc::clone(&service.shim));
                let client = service.client.clone();
                let names = service.names_by_chain().await;
                Examiner::new(lazy, client, wanted, names, events)
                    .run()
                    .await;
            };
            tokio::select! {
                () = work => {}
                () = closed.closed() => {}
                () = service.stop.cancelled() => {}
            }
        });
        let hello = ExamineEvent { event: Some(hello) };
        let events = ReceiverStream::new(receiver).map(|event| Ok(sent(event)));
        Box::pin(futures::stream::iter([Ok(hello)]).chain(events))
    }

    /// What containerd knows of the image; nothing when it does not answer.
    async fn wanted_image(&self, image: String) -> WantedImage {
        let name = image.strip_prefix("docker://").unwrap_or(&image).to_owned();
        let found = self.find(&name, "").await.unwrap_or_default();
        let known = found.into_iter().flat_map(|found| {
            let digest = found.digest;
            let origins = found.origins.into_iter();
            origins.map(move |origin| (origin, digest.clone()))
        });
        WantedImage {
            known: known.collect(),
            name,
        }
    }

    /// What images are called, by the chain IDs of their layers: by name, else by manifest.
    pub(super) async fn names_by_chain(&self) -> BTreeMap<String, Vec<String>> {
        let documents =
            self.metadata(|metadata| metadata.documents::<ImageDocument>(DocumentTable::Images));
        let documents = documents.await.unwrap_or_default();
        let mut names: BTreeMap<String, Vec<(String, Vec<String>)>> = BTreeMap::new();
        let mut by_chain: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (_, document) in documents {
            let namespace = &document.namespace;
            if !names.contains_key(namespace) {
                names.insert(namespace.clone(), self.names(namespace).await);
            }
            let named = names.get(namespace).into_iter().flatten();
            let mut called: Vec<String> = named
                .filter(|(_, digests)| digests.contains(&document.manifest))
                .map(|(name, _)| name.clone())
                .collect();
            if called.is_empty() {
                called.push(document.manifest);
            }
            for layer in document.layers {
                let all = by_chain.entry(layer.chain_id).or_default();
                all.extend(called.iter().cloned());
            }
        }
        let lists = by_chain.into_iter();
        lists
            .map(|(chain, names)| (chain, names.into_iter().collect()))
            .collect()
    }
}
