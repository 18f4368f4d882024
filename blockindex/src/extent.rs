// SPDX-License-Identifier: Apache-2.0
//! Half-open byte ranges, each in one address space.
//!
//! Invariant: `start <= end`. The address space is a type parameter, so a range of the uncompressed
//! layer device cannot be passed where a range of the compressed blob is meant.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::ops::Range;

/// Address space of a layer device: the bytes of the uncompressed tar.
#[derive(Debug, Clone, Copy)]
pub struct DeviceSpace;

/// Address space of a blob: the bytes as a registry stores them.
#[derive(Debug, Clone, Copy)]
pub struct BlobSpace;

/// Address space of a file of windows, which goes with the index of an unmodified gzip blob.
#[derive(Debug, Clone, Copy)]
pub struct WindowsSpace;

/// A half-open byte range `start..end` in the address space `S`.
pub struct Extent<S> {
    start: u64,
    end: u64,
    space: PhantomData<fn() -> S>,
}

impl<S> Extent<S> {
    /// The range `start..end`; `None` when it would run backwards.
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start <= end {
            Some(Self {
                start,
                end,
                space: PhantomData,
            })
        } else {
            None
        }
    }

    /// The range of `length` bytes from `start`; `None` when its end exceeds `u64`.
    pub const fn from_length(start: u64, length: u64) -> Option<Self> {
        match start.checked_add(length) {
            Some(end) => Some(Self {
                start,
                end,
                space: PhantomData,
            }),
            None => None,
        }
    }

    /// The empty range at 0.
    pub const fn empty() -> Self {
        Self {
            start: 0,
            end: 0,
            space: PhantomData,
        }
    }

    /// First byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether it holds no byte.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The same range as `start..end`.
    pub const fn range(self) -> Range<u64> {
        self.start..self.end
    }

    /// Whether `offset` lies inside.
    pub const fn contains(self, offset: u64) -> bool {
        self.start <= offset && offset < self.end
    }

    /// Whether `other` lies inside; an empty `other` does when its position is in `start..=end`.
    pub const fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// What both have; `None` when they share no byte.
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(Self {
            start,
            end,
            space: PhantomData,
        })
    }

    /// The smallest range that holds both.
    pub fn hull(self, other: Self) -> Self {
        Self {
            start: self.start.min(other.start),
            end: self.end.max(other.end),
            space: PhantomData,
        }
    }
}

impl<S> Clone for Extent<S> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<S> Copy for Extent<S> {}
impl<S> PartialEq for Extent<S> {
    fn eq(&self, other: &Self) -> bool {
        (self.start, self.end) == (other.start, other.end)
    }
}
impl<S> Eq for Extent<S> {}
impl<S> PartialOrd for Extent<S> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<S> Ord for Extent<S> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.start, self.end).cmp(&(other.start, other.end))
    }
}
impl<S> Hash for Extent<S> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.start, self.end).hash(state);
    }
}
impl<S> fmt::Debug for Extent<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}
impl<S> fmt::Display for Extent<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(start: u64, end: u64) -> Extent<DeviceSpace> {
        Extent::new(start, end).unwrap()
    }

    #[test]
    fn backwards_and_overflowing_ranges_do_not_exist() {
        assert_eq!(Extent::<BlobSpace>::new(2, 1), None);
        assert_eq!(Extent::<BlobSpace>::from_length(u64::MAX, 1), None);
        assert_eq!(
            Extent::<BlobSpace>::from_length(u64::MAX, 0).map(Extent::end),
            Some(u64::MAX)
        );
    }

    #[test]
    fn intersection_is_what_both_have() {
        assert_eq!(device(0, 10).intersect(device(5, 20)), Some(device(5, 10)));
        assert_eq!(device(0, 10).intersect(device(10, 20)), None);
        assert_eq!(device(0, 10).intersect(device(3, 3)), None);
        assert!(device(0, 10).covers(device(10, 10)));
        assert!(!device(0, 10).contains(10));
        assert_eq!(device(4, 5).hull(device(9, 10)), device(4, 10));
    }
}
