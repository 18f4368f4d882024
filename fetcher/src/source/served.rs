// SPDX-License-Identifier: Apache-2.0
//! Who really gave the bytes of a stream: a source of a registry's blobs may have taken them from a mirror.
//!
//! Bytes are verified by their reader only, so it is the reader who tells the mirror's keeper that they
//! were wrong ([`Served::blame`]): from then on others are asked.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::{BlobSource, Class, ReadContext, SourceError, SourceKind};

/// Takes note that somebody gave wrong bytes.
pub trait Blame: Send + Sync {
    /// They were wrong.
    fn blame(&self);
}

/// Who gives the bytes of a stream.
#[derive(Clone)]
pub struct Served {
    kind: SourceKind,
    keeper: Arc<dyn Blame>,
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Served").field(&self.kind).finish()
    }
}

impl Served {
    /// A stream from this kind of place; `keeper` hears when its bytes are wrong.
    pub fn new(kind: SourceKind, keeper: Arc<dyn Blame>) -> Self {
        Served { kind, keeper }
    }

    /// The kind of place.
    pub fn kind(&self) -> SourceKind {
        self.kind
    }

    /// The bytes were wrong: another place is asked from now on.
    pub fn blame(&self) {
        self.keeper.blame();
    }
}

/// Places that may be blamed, one after the other, before what is wrong is believed to be so everywhere.
const MOST_BLAMED: usize = 4;

/// Reads `extent` of `source` whole. What `check` refuses and a mirror gave is read again from elsewhere.
///
/// **Errors** those of the source; inside, what `check` says of bytes from the registry itself. **Cancel** safe.
pub async fn read_checked<E>(
    source: &dyn BlobSource,
    context: &ReadContext,
    extent: Extent<BlobSpace>,
    check: impl Fn(&[u8]) -> Result<(), E>,
) -> Result<Result<Bytes, E>, SourceError> {
    for attempt in 0.. {
        let stream = source.open(context, extent).await?.narrow(extent)?;
        let served = stream.served.clone().filter(|_| attempt < MOST_BLAMED);
        let bytes = match stream.collect(extent.len()).await {
            Ok(bytes) => bytes,
            // Its keeper knows already.
            Err(error) if served.is_some() && error.class() != Class::Cancelled => continue,
            Err(error) => return Err(error),
        };
        match (check(&bytes), served) {
            (Ok(()), _) => return Ok(Ok(bytes)),
            (Err(_), Some(served)) => served.blame(),
            (Err(error), None) => return Ok(Err(error)),
        }
    }
    unreachable!("the last attempt returns")
}
