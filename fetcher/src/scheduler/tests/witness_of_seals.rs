// SPDX-License-Identifier: Apache-2.0
//! A witness has a say in a seal: what it objects to is not readable any more.

use super::*;
use crate::store::{Objection, SealWitness, StoreError, Witnesses};

/// Says the same each time; keeps what it saw.
#[derive(Debug)]
struct Says {
    verdict: Mutex<Result<(), Objection>>,
    seen: Mutex<Vec<u8>>,
}

struct Seeing(Arc<Says>);

impl Witnesses for Says {
    fn witness(self: Arc<Self>) -> Box<dyn SealWitness> {
        lock(&self.seen).clear();
        Box::new(Seeing(self))
    }
}

impl SealWitness for Seeing {
    fn push(&mut self, bytes: &[u8]) {
        lock(&self.0.seen).extend_from_slice(bytes);
    }

    fn finish(self: Box<Self>) -> Result<(), Objection> {
        lock(&self.0.verdict).clone()
    }
}

#[tokio::test(start_paused = true)]
async fn a_seal_that_its_witness_objects_to_fails_and_one_that_it_cannot_judge_waits() {
    let layer = TestLayer::even(40, 6, 4000);
    for forged in [false, true] {
        let fetcher = fetcher();
        let line = Line::new("a", &layer.blob);
        let says = Arc::new(Says {
            verdict: Mutex::new(Err(Objection::Unknown("no index".into()))),
            seen: Mutex::default(),
        });
        let mut spec = layer.spec(vec![Arc::new(line)]);
        spec.witnesses = Some(Arc::clone(&says) as Arc<dyn Witnesses>);
        let handle = fetcher.add_layer(spec).await.unwrap();
        let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
        let fill = || fetcher.fill(&handle, whole, Priority::Foreground, None);
        fill().await.unwrap();
        let unknown = fetcher.seal(&handle).await.unwrap_err();
        assert!(matches!(unknown, StoreError::Io { .. }), "{unknown:?}");
        assert!(!handle.device.is_sealed() && handle.device.failure().is_none());
        assert!(*lock(&says.seen) == layer.tar);
        fill().await.unwrap();
        if forged {
            *lock(&says.verdict) = Err(Objection::Forged("another tree".into()));
            let failed = fetcher.seal(&handle).await.unwrap_err();
            assert!(matches!(failed, StoreError::Failed(_)), "{failed:?}");
            assert!(!handle.device.is_sealed());
            let failed = fill().await.unwrap_err();
            assert!(matches!(failed, FillError::Failed(_)), "{failed:?}");
            assert_eq!(fetcher.metrics().seals(), (0, 1));
        } else {
            *lock(&says.verdict) = Ok(());
            fetcher.seal(&handle).await.unwrap();
            assert!(handle.device.is_sealed());
            assert_eq!(fetcher.metrics().seals(), (1, 0));
        }
    }
}
