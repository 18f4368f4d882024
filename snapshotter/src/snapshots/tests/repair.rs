// SPDX-License-Identifier: Apache-2.0
//! A layer that exists and has lost its index.

use super::*;

#[tokio::test]
async fn a_lost_index_is_fetched_again_by_the_next_prepare() {
    let world = World::new(Script::Lazy);
    let labels = reference(ChainId::of(b"one"));
    let prepare = async || {
        let prepared = world.snapshots.prepare("p", "", labels.clone()).await;
        let Prepared::Exists { name } = prepared.unwrap() else {
            panic!("a layer exists")
        };
        name
    };
    let decided = || world.lazy.decided.load(Ordering::SeqCst);
    let name = prepare().await;
    assert_eq!((prepare().await, decided()), (name.clone(), 1));
    *world.lazy.lost.lock().unwrap() = true;
    // Whatever comes of it, the layer is the answer, within the budget.
    let scripts = [
        Script::Lazy,
        Script::Ordinary,
        Script::Unpack,
        Script::WrongLayer,
        Script::Hang,
    ];
    for (number, script) in scripts.into_iter().enumerate() {
        world.script(script);
        assert_eq!((prepare().await, decided()), (name.clone(), number + 2));
    }
    *world.lazy.lost.lock().unwrap() = false;
    assert_eq!((prepare().await, decided()), (name, scripts.len() + 1));
}
