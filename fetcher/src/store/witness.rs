// SPDX-License-Identifier: Apache-2.0
//! Who else has a say when a device is sealed: whoever knows more of a layer than its diff ID.

use std::fmt;
use std::sync::Arc;

/// Why a device is not to be sealed although it has its diff ID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Objection {
    /// What is said of the layer is not so. It is treated as a layer that does not have its diff ID.
    #[error("{0}")]
    Forged(String),
    /// That cannot be told now; the seal is tried again later.
    #[error("{0}")]
    Unknown(String),
}

/// Sees a device while it is sealed.
pub trait SealWitness: Send {
    /// Takes the next bytes of the device. **Blocks** no longer than a look at them takes.
    fn push(&mut self, bytes: &[u8]);

    /// After the last byte of a device that has its diff ID. **Blocks**.
    ///
    /// **Errors** [`Objection`].
    fn finish(self: Box<Self>) -> Result<(), Objection>;
}

/// Gives each seal of a layer a witness.
pub trait Witnesses: Send + Sync + fmt::Debug {
    /// One that has seen nothing.
    fn witness(self: Arc<Self>) -> Box<dyn SealWitness>;
}
