// SPDX-License-Identifier: Apache-2.0
//! Checks bytes against the digest and size that name them, while they pass.

use bytes::Bytes;
use futures::StreamExt;
use sluice_blockindex::digest::{BlobDigest, Sha256Hasher};

use crate::image::{BlobBody, ImageError};

/// Hashes and counts what passes, then says whether it was what was named.
#[derive(Debug)]
pub struct Verifier {
    what: String,
    digest: BlobDigest,
    bytes: u64,
    hasher: Sha256Hasher,
    seen_bytes: u64,
}

impl Verifier {
    /// Expects `bytes` bytes with `digest`; `what` names them in messages.
    pub fn new(what: impl ToString, digest: BlobDigest, bytes: u64) -> Self {
        Self {
            what: what.to_string(),
            digest,
            bytes,
            hasher: Sha256Hasher::new(),
            seen_bytes: 0,
        }
    }

    /// Takes the next bytes. **Errors**: `Corrupt` as soon as there are too many.
    pub fn update(&mut self, part: &[u8]) -> Result<(), ImageError> {
        self.seen_bytes = self.seen_bytes.saturating_add(part.len() as u64);
        if self.seen_bytes > self.bytes {
            return Err(self.corrupt(
                format!("{} bytes", self.bytes),
                format!("at least {} bytes", self.seen_bytes),
            ));
        }
        self.hasher.update(part);
        Ok(())
    }

    /// After the last byte. **Errors**: `Corrupt` if there were too few or others.
    pub fn finish(self) -> Result<(), ImageError> {
        if self.seen_bytes != self.bytes {
            let (expected, actual) = (self.bytes, self.seen_bytes);
            return Err(self.corrupt(format!("{expected} bytes"), format!("{actual} bytes")));
        }
        let (expected, hasher) = (self.digest, self.hasher);
        let actual = BlobDigest::from_bytes(hasher.finish());
        match actual == expected {
            true => Ok(()),
            false => Err(ImageError::Corrupt {
                what: self.what,
                expected: expected.to_string(),
                actual: actual.to_string(),
            }),
        }
    }

    fn corrupt(&self, expected: String, actual: String) -> ImageError {
        ImageError::Corrupt {
            what: self.what.clone(),
            expected,
            actual,
        }
    }
}

/// The body, followed by an error in place of its end if it was not what was named.
///
/// Each part is handed on before the whole is known: a consumer that acts before the end of the
/// stream acts on unverified bytes.
pub fn verified(body: BlobBody, verifier: Verifier) -> BlobBody {
    let state = (body, Some(verifier));
    Box::pin(futures::stream::unfold(
        state,
        |(mut body, verifier)| async move {
            let mut verifier = verifier?;
            match body.next().await {
                Some(Ok(part)) => match verifier.update(&part) {
                    Ok(()) => Some((Ok::<Bytes, ImageError>(part), (body, Some(verifier)))),
                    Err(e) => Some((Err(e), (body, None))),
                },
                Some(Err(e)) => Some((Err(e), (body, None))),
                None => verifier.finish().err().map(|e| (Err(e), (body, None))),
            }
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn outcome(
        parts: &[&'static [u8]],
        expected: &[u8],
        bytes: u64,
    ) -> Result<usize, String> {
        let parts: Vec<_> = parts
            .iter()
            .map(|part| Ok(Bytes::from_static(part)))
            .collect();
        let verifier = Verifier::new("blob", BlobDigest::of(expected), bytes);
        let mut body = verified(Box::pin(futures::stream::iter(parts)), verifier);
        let mut length = 0;
        while let Some(part) = body.next().await {
            length += part.map_err(|e| e.to_string())?.len();
        }
        Ok(length)
    }

    #[tokio::test]
    async fn only_the_named_bytes_pass() {
        assert_eq!(outcome(&[b"ab", b"c"], b"abc", 3).await, Ok(3));
        assert_eq!(outcome(&[], b"", 0).await, Ok(0));
        for (parts, bytes, message) in [
            (&[b"ab".as_slice()][..], 3, "expected 3 bytes, got 2 bytes"),
            (
                &[b"abcd".as_slice()][..],
                3,
                "expected 3 bytes, got at least 4 bytes",
            ),
            (
                &[b"abd".as_slice()][..],
                3,
                "is corrupt: expected sha256:ba7816bf",
            ),
        ] {
            let error = outcome(parts, b"abc", bytes).await.expect_err(message);
            assert!(error.contains(message), "{error}");
        }
    }
}
