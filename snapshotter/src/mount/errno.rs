// SPDX-License-Identifier: Apache-2.0
//! The one place where our failures become the kernel's error numbers.

/// Why a fill failed, as a reader is told.
///
/// **Source** docs/SEMANTICS.md; EIO for fetch and corruption, ENOSPC for a full store that cannot
/// even pass the bytes on, ESTALE for a layer that was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FillErrno {
    /// No source had the bytes within the deadline.
    Deadline,
    /// The bytes cannot be had, or are not what the index says.
    Io,
    /// The disk is full.
    NoSpace,
    /// The layer is not known any more.
    Stale,
}

impl FillErrno {
    /// All of them, for tests that go through the list.
    pub const ALL: [FillErrno; 4] = [
        FillErrno::Deadline,
        FillErrno::Io,
        FillErrno::NoSpace,
        FillErrno::Stale,
    ];

    /// The kernel's number.
    pub fn number(self) -> i32 {
        match self {
            FillErrno::Deadline | FillErrno::Io => libc::EIO,
            FillErrno::NoSpace => libc::ENOSPC,
            FillErrno::Stale => libc::ESTALE,
        }
    }

    /// What a number from the other side of the shim protocol means; unknown ones are
    /// [`FillErrno::Io`].
    pub fn from_number(number: i32) -> FillErrno {
        match number {
            libc::ENOSPC => FillErrno::NoSpace,
            libc::ESTALE => FillErrno::Stale,
            _ => FillErrno::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_its_number() {
        let numbers = FillErrno::ALL.map(FillErrno::number);
        assert_eq!(numbers, [libc::EIO, libc::EIO, libc::ENOSPC, libc::ESTALE]);
        for failure in FillErrno::ALL {
            let back = FillErrno::from_number(failure.number());
            assert_eq!(back.number(), failure.number());
        }
        assert_eq!(FillErrno::from_number(libc::EPERM), FillErrno::Io);
    }
}
