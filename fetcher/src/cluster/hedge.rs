// SPDX-License-Identifier: Apache-2.0
//! How much may be asked twice: pure.
//!
//! Each request earns a part of a second one; a few may be saved up. So hedging costs at most that part of
//! the traffic, also when all nodes are slow at once, which is when hedging helps least and hurts most.

/// Second requests per hundred requests.
const PERCENT: u32 = 5;
/// Second requests that may be saved up: one start's worth of bad luck.
const SAVED: u32 = 8;

/// What one whole second request costs.
const ONE: u32 = 100;

/// The budget of second requests.
///
/// Invariant: of n requests at most n x percent / 100 + saved were hedged.
#[derive(Clone, Debug)]
pub struct HedgeBudget {
    percent: u32,
    saved: u32,
    /// In hundredths of a request.
    credit: u32,
}

impl Default for HedgeBudget {
    fn default() -> Self {
        Self::new(PERCENT, SAVED)
    }
}

impl HedgeBudget {
    /// At most `percent` second requests per hundred, and `saved` at once, which are there from the beginning.
    #[must_use]
    pub fn new(percent: u32, saved: u32) -> Self {
        let saved = saved.min(u32::MAX / ONE) * ONE;
        HedgeBudget {
            percent,
            saved,
            credit: saved,
        }
    }

    /// Takes note of a first request.
    pub fn requested(&mut self) {
        self.credit = self.credit.saturating_add(self.percent).min(self.saved);
    }

    /// Whether a second request may be made; if so, it is paid.
    #[must_use]
    pub fn try_hedge(&mut self) -> bool {
        let left = self.credit.checked_sub(ONE);
        self.credit = left.unwrap_or(self.credit);
        left.is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn saved_ones_first_then_a_part_of_the_requests() {
        let mut budget = HedgeBudget::default();
        let hedged = |budget: &mut HedgeBudget| (0..100).filter(|_| budget.try_hedge()).count();
        assert_eq!(hedged(&mut budget), 8);
        let among = |budget: &mut HedgeBudget, requests: u32| {
            let hedges = (0..requests).filter(|_| {
                budget.requested();
                budget.try_hedge()
            });
            hedges.count()
        };
        assert_eq!(among(&mut budget, 1000), 50);
        for _ in 0..10_000 {
            budget.requested();
        }
        assert_eq!(hedged(&mut budget), 8, "credit is capped");
    }

    #[test]
    fn none_is_none() {
        let mut budget = HedgeBudget::new(0, 0);
        budget.requested();
        assert!(!budget.try_hedge());
    }

    proptest! {
        #[test]
        fn never_more_than_its_part(percent in 0u32..200, saved in 0u32..20, steps in prop::collection::vec(any::<bool>(), 0..400)) {
            let mut budget = HedgeBudget::new(percent, saved);
            let (mut requests, mut hedges) = (0, 0);
            for request in steps {
                if request {
                    requests += 1;
                    budget.requested();
                } else if budget.try_hedge() {
                    hedges += 1;
                }
                prop_assert!(hedges * 100 <= requests * percent + saved * 100);
            }
        }
    }
}
