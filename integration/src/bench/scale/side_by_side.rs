// SPDX-License-Identifier: Apache-2.0
//! Work on all cores.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};

/// Does `make` of all of these, as many at once as there are cores, and gives the results in order.
pub fn side_by_side<T: Sync, R: Send>(
    of: &[T],
    make: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<Option<Result<R>>>> = Mutex::new(of.iter().map(|_| None).collect());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some((at, it)) = take(&next, of) {
                    let made = make(it);
                    done.lock().expect("no holder panics")[at] = Some(made);
                }
            });
        }
    });
    let done = done.into_inner().expect("no holder panics");
    done.into_iter()
        .map(|it| it.context("each is made")?)
        .collect()
}

fn take<'a, T>(next: &AtomicUsize, of: &'a [T]) -> Option<(usize, &'a T)> {
    let at = next.fetch_add(1, Ordering::Relaxed);
    Some((at, of.get(at)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_side_by_side_keeps_its_order() {
        let numbers: Vec<usize> = (0..100).collect();
        let doubled = side_by_side(&numbers, |it| Ok(it * 2)).unwrap();
        assert!(
            doubled
                .iter()
                .zip(0..)
                .all(|(it, number)| *it == 2 * number)
        );
        let failed = side_by_side(&numbers, |it| {
            anyhow::ensure!(*it != 7, "seven");
            Ok(())
        });
        assert_eq!(failed.unwrap_err().to_string(), "seven");
    }
}
