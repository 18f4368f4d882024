// SPDX-License-Identifier: Apache-2.0
//! Digests as types: a blob's digest cannot be passed where a diff ID is meant.
//!
//! All OCI digests here are sha256, written `sha256:` and 64 lower-case hex digits. The strong
//! digest of a chunk or of a file's content is 32 bytes of the algorithm that the layer index names.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

/// Bytes of every digest here.
pub const DIGEST_BYTES: usize = 32;

const PREFIX: &str = "sha256:";

/// A text that is not `sha256:` and 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("parse digest {text:?}: want \"sha256:\" and 64 lower-case hex digits")]
pub struct ParseDigestError {
    /// The text as given, cut to its first 200 characters.
    pub text: String,
}

fn parse(text: &str) -> Result<[u8; DIGEST_BYTES], ParseDigestError> {
    let error = || ParseDigestError {
        text: text.chars().take(200).collect(),
    };
    let digits = text.strip_prefix(PREFIX).ok_or_else(error)?;
    parse_hex(digits).ok_or_else(error)
}

fn parse_hex(digits: &str) -> Option<[u8; DIGEST_BYTES]> {
    if digits.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    let mut bytes = [0; DIGEST_BYTES];
    hex::decode_to_slice(digits, &mut bytes).ok()?;
    Some(bytes)
}

macro_rules! oci_digest {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; DIGEST_BYTES]);

        impl $name {
            /// The digest with these bytes.
            pub const fn from_bytes(bytes: [u8; DIGEST_BYTES]) -> Self {
                Self(bytes)
            }

            /// Its bytes.
            pub const fn as_bytes(&self) -> &[u8; DIGEST_BYTES] {
                &self.0
            }

            /// The sha256 of `bytes`.
            pub fn of(bytes: &[u8]) -> Self {
                Self(Sha256::digest(bytes).into())
            }

            /// 64 lower-case hex digits, without the algorithm.
            pub fn hex(&self) -> String {
                hex::encode(self.0)
            }

            /// Reads what [`Self::hex`] writes.
            pub fn from_hex(digits: &str) -> Result<Self, ParseDigestError> {
                parse_hex(digits).map(Self).ok_or_else(|| ParseDigestError {
                    text: digits.chars().take(200).collect(),
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{PREFIX}{}", hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseDigestError;
            fn from_str(text: &str) -> Result<Self, ParseDigestError> {
                parse(text).map(Self)
            }
        }
    };
}

oci_digest!(
    /// sha256 of a blob's bytes as the registry stores them.
    BlobDigest
);
oci_digest!(
    /// sha256 of a layer's uncompressed tar.
    DiffId
);
oci_digest!(
    /// Name of a stack of layers, computed from their diff IDs.
    ChainId
);
oci_digest!(
    /// sha256 of a layer index as it is stored, that is of the compressed payload.
    IndexDigest
);
oci_digest!(
    /// sha256 of an image manifest.
    ManifestDigest
);
oci_digest!(
    /// sha256 of an image config.
    ConfigDigest
);

impl ChainId {
    /// The chain ID of `layer` on top of `parent`.
    ///
    /// **Source**: OCI image specification, config, "Layer ChainID".
    pub fn child(parent: Option<Self>, layer: DiffId) -> Self {
        match parent {
            None => Self(layer.0),
            Some(parent) => Self::of(format!("{parent} {layer}").as_bytes()),
        }
    }

    /// The chain ID of a whole stack, lowest layer first; `None` for an empty stack.
    pub fn of_layers(layers: &[DiffId]) -> Option<Self> {
        layers
            .iter()
            .fold(None, |parent, layer| Some(Self::child(parent, *layer)))
    }
}

/// Incremental sha256 of a diff ID or blob digest.
#[derive(Clone, Debug, Default)]
pub struct Sha256Hasher(Sha256);

impl Sha256Hasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The sha256 of all bytes taken, to be wrapped by the type that says what they were.
    pub fn finish(self) -> [u8; DIGEST_BYTES] {
        self.0.finalize().into()
    }
}

/// Algorithm of the strong digests of one layer index.
///
/// The choice is recorded in `docs/decisions/001-strong-digest.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StrongAlgorithm {
    /// BLAKE3 with 32 bytes of output.
    Blake3,
    /// SHA-256.
    Sha256,
}

impl StrongAlgorithm {
    /// What the index file writes for it.
    pub const fn code(self) -> u8 {
        match self {
            Self::Blake3 => 1,
            Self::Sha256 => 2,
        }
    }

    /// Reads what [`Self::code`] writes.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Blake3),
            2 => Some(Self::Sha256),
            _ => None,
        }
    }

    /// The digest of `bytes`.
    pub fn digest(self, bytes: &[u8]) -> [u8; DIGEST_BYTES] {
        match self {
            Self::Blake3 => *blake3::hash(bytes).as_bytes(),
            Self::Sha256 => Sha256::digest(bytes).into(),
        }
    }

    /// An incremental hasher.
    pub fn hasher(self) -> StrongHasher {
        match self {
            Self::Blake3 => StrongHasher(Inner::Blake3(Box::default())),
            Self::Sha256 => StrongHasher(Inner::Sha256(Box::default())),
        }
    }
}

impl fmt::Display for StrongAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blake3 => "blake3",
            Self::Sha256 => "sha256",
        })
    }
}

/// Incremental strong digest.
#[derive(Debug, Clone)]
pub struct StrongHasher(Inner);

#[derive(Debug, Clone)]
enum Inner {
    Blake3(Box<blake3::Hasher>),
    Sha256(Box<Sha256>),
}

impl StrongHasher {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Inner::Blake3(hasher) => {
                hasher.update(bytes);
            }
            Inner::Sha256(hasher) => hasher.update(bytes),
        }
    }

    /// The digest of all bytes taken; the hasher starts afresh.
    pub fn finish_reset(&mut self) -> [u8; DIGEST_BYTES] {
        match &mut self.0 {
            Inner::Blake3(hasher) => {
                let digest = *hasher.finalize().as_bytes();
                hasher.reset();
                digest
            }
            Inner::Sha256(hasher) => hasher.finalize_reset().into(),
        }
    }
}

macro_rules! strong_digest {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; DIGEST_BYTES]);

        impl $name {
            /// The digest of `bytes` by `algorithm`.
            pub fn of(algorithm: StrongAlgorithm, bytes: &[u8]) -> Self {
                Self(algorithm.digest(bytes))
            }

            /// 64 lower-case hex digits.
            pub fn hex(&self) -> String {
                hex::encode(self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

strong_digest!(
    /// Strong digest of a chunk's device bytes, by the algorithm that the layer index names.
    ChunkDigest
);
strong_digest!(
    /// Strong digest of a file's content, by the algorithm that the layer index names.
    FileDigest
);

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn text_round_trips() {
        let digest = DiffId::of(b"");
        assert_eq!(digest.to_string(), EMPTY);
        assert_eq!(EMPTY.parse::<DiffId>().unwrap(), digest);
        assert_eq!(DiffId::from_hex(&digest.hex()).unwrap(), digest);
    }

    #[test]
    fn other_texts_are_refused() {
        let upper = EMPTY.to_uppercase().replace("SHA256", "sha256");
        for text in [
            "",
            "sha256:",
            "sha512:00",
            &EMPTY[7..],
            &EMPTY[..70],
            &upper,
        ] {
            assert!(text.parse::<DiffId>().is_err(), "{text}");
        }
        assert!(format!("{EMPTY}0").parse::<DiffId>().is_err());
    }

    /// Example of two layers, computed with `printf '%s %s' A B | sha256sum`.
    #[test]
    fn chain_ids_follow_the_specification() {
        let a = DiffId::of(b"a");
        let b = DiffId::of(b"b");
        assert_eq!(ChainId::of_layers(&[]), None);
        assert_eq!(ChainId::of_layers(&[a]).unwrap().as_bytes(), a.as_bytes());
        assert_eq!(
            ChainId::of_layers(&[a, b]).unwrap().to_string(),
            "sha256:51c0c8ace48498d6f5fee6b0592cc06f2da0f3cbe09c5a34a97dce85c3889676",
        );
    }

    #[test]
    fn incremental_equals_whole() {
        for algorithm in [StrongAlgorithm::Blake3, StrongAlgorithm::Sha256] {
            assert_eq!(
                StrongAlgorithm::from_code(algorithm.code()),
                Some(algorithm)
            );
            let mut hasher = algorithm.hasher();
            for _ in 0..2 {
                hasher.update(b"one ");
                hasher.update(b"two");
                assert_eq!(hasher.finish_reset(), algorithm.digest(b"one two"));
            }
        }
        assert_eq!(StrongAlgorithm::from_code(0), None);
    }
}
