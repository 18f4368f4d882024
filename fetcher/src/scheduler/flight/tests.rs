// SPDX-License-Identifier: Apache-2.0
//! Single flight, promotion, and who may end what.

use super::*;
use crate::source::SourceError;

fn flights() -> Arc<Flights> {
    Arc::new(Flights::new(Arc::new(Gate::new())))
}

#[tokio::test]
async fn one_transfer_owns_a_chunk_and_all_waiters_wake() {
    let flights = flights();
    let (first, second) = (
        Transfer::new(Priority::Background),
        Transfer::new(Priority::Boot),
    );
    assert_eq!(flights.claim(&first, [1, 2]), 2);
    assert_eq!(flights.claim(&second, [2, 3]), 1);
    assert_eq!(
        (flights.claims(&first), flights.claims(&second)),
        (vec![1, 2], vec![3])
    );
    let mut waiters: Vec<Waiter> = (0..8)
        .map(|_| flights.join(2, Priority::Foreground).unwrap())
        .collect();
    assert!(flights.join(4, Priority::Foreground).is_none());
    assert_eq!(first.urgency.effective(), Priority::Foreground);
    // Landed before anybody polled: no wake-up is lost.
    flights.finish(2, None);
    for waiter in &mut waiters {
        waiter.landed().await.unwrap();
    }
    assert_eq!(first.urgency.effective(), Priority::Background);
    flights.finish_all(&first, None);
    flights.finish_all(&second, None);
    assert!(flights.is_done(&first) && flights.len() == 0);
}

#[tokio::test]
async fn a_waiter_that_leaves_takes_only_its_urgency() {
    let flights = flights();
    let transfer = Transfer::new(Priority::Background);
    flights.claim(&transfer, [7]);
    let boot = flights.join(7, Priority::Boot).unwrap();
    let reader = flights.join(7, Priority::Foreground).unwrap();
    drop(reader);
    assert_eq!(transfer.urgency.effective(), Priority::Boot);
    assert_eq!(flights.claims(&transfer), [7]);
    flights.finish(7, None);
    // A second flight of the chunk is not touched by the waiter of the first.
    let later = Transfer::new(Priority::Background);
    flights.claim(&later, [7]);
    let _waits = flights.join(7, Priority::Boot).unwrap();
    drop(boot);
    assert_eq!(
        (later.urgency.waiters(), later.urgency.effective()),
        (1, Priority::Boot)
    );
}

#[tokio::test]
async fn a_final_failure_reaches_those_who_wait() {
    let flights = flights();
    let transfer = Transfer::new(Priority::Background);
    flights.claim(&transfer, [1, 2]);
    let mut waiter = flights.join(1, Priority::Foreground).unwrap();
    let failure = FetchFailure::Source {
        label: "x".into(),
        error: SourceError::Cancelled,
    };
    transfer.note(&failure);
    assert!(waiter.last_failure().is_some());
    flights.finish_unwanted(&transfer);
    assert_eq!(flights.claims(&transfer), [1]);
    flights.finish_all(&transfer, Some(&failure));
    assert!(matches!(
        waiter.landed().await,
        Err(FetchFailure::Source { .. })
    ));
}

#[tokio::test]
async fn claims_are_handed_over_with_their_waiters() {
    let flights = flights();
    let (from, to) = (
        Transfer::new(Priority::Boot),
        Transfer::new(Priority::Background),
    );
    flights.claim(&from, [1, 2]);
    flights.claim(&to, [3]);
    let mut waiter = flights.join(1, Priority::Foreground).unwrap();
    flights.hand_over(&from, &to);
    assert_eq!(from.urgency.effective(), Priority::Boot);
    assert_eq!(to.urgency.effective(), Priority::Foreground);
    assert!(flights.is_done(&from));
    assert_eq!(flights.claims(&to), [1, 2, 3]);
    flights.finish(1, None);
    waiter.landed().await.unwrap();
    assert_eq!(to.urgency.effective(), Priority::Background);
}

#[tokio::test]
async fn who_takes_claims_over_asks_nobody_whom_their_waiters_may_not_ask() {
    let flights = flights();
    let of_peer = Transfer::within(Priority::Foreground, Reach::Origin);
    let other = Transfer::new(Priority::Background);
    flights.claim(&of_peer, [1]);
    flights.claim(&other, [2]);
    flights.hand_over(&other, &of_peer);
    assert_eq!(of_peer.reach(), Reach::Origin);
    flights.claim(&other, [3]);
    flights.hand_over(&of_peer, &other);
    assert_eq!(other.reach(), Reach::Origin);
    assert_eq!(flights.claims(&other), [1, 2, 3]);
}
