// SPDX-License-Identifier: Apache-2.0
//! The annotations by which a converted manifest pins a layer's index.
//!
//! They stand on the layer descriptor. Their names start with `containerd.io/snapshot/`, because
//! containerd's unpackers copy just those into the labels of `Prepare`. The registry host and the
//! repository are not among them: they change when an image is copied.

use std::collections::BTreeMap;

use crate::digest::{BlobDigest, ConfigDigest, DiffId, IndexDigest, ParseDigestError};
use crate::extent::{BlobSpace, Extent};

/// First byte of the index payload in the blob, decimal.
pub const INDEX_OFFSET: &str = "containerd.io/snapshot/sluice.index.offset";
/// Compressed bytes of the index payload, decimal.
pub const INDEX_SIZE: &str = "containerd.io/snapshot/sluice.index.size";
/// sha256 of exactly those bytes.
pub const INDEX_DIGEST: &str = "containerd.io/snapshot/sluice.index.digest";
/// Digest of the blob.
pub const BLOB: &str = "containerd.io/snapshot/sluice.blob";
/// Size of the blob in bytes, decimal.
pub const BLOB_SIZE: &str = "containerd.io/snapshot/sluice.blob.size";
/// Diff ID of the layer.
pub const DIFF: &str = "containerd.io/snapshot/sluice.diff";
/// Digest of the image config, by which the daemon finds the manifests that name it.
pub const CONFIG: &str = "containerd.io/snapshot/sluice.config";
/// Port of the registry that the image was converted to, decimal, where it is not the default one.
///
/// containerd's own `containerd.io/distribution.source.<host>` label drops the port. Only a number,
/// never a host: an annotation cannot send the daemon to another machine.
pub const PORT: &str = "containerd.io/snapshot/sluice.port";
/// The layer's part of the image's boot list, as texts: see [`crate::boot::BootPart::to_texts`]. A text has what a label
/// holds, the next name what follows; so many chunks are read while programs with large libraries start.
pub const BOOT: [&str; 8] = [
    "containerd.io/snapshot/sluice.boot",
    "containerd.io/snapshot/sluice.boot.2",
    "containerd.io/snapshot/sluice.boot.3",
    "containerd.io/snapshot/sluice.boot.4",
    "containerd.io/snapshot/sluice.boot.5",
    "containerd.io/snapshot/sluice.boot.6",
    "containerd.io/snapshot/sluice.boot.7",
    "containerd.io/snapshot/sluice.boot.8",
];
/// Why this layer cannot be lazy; stands alone, instead of all others.
pub const NOT_LAZY: &str = "containerd.io/snapshot/sluice.not-lazy";

/// The most bytes of a reason in [`NOT_LAZY`]; containerd refuses labels above 4096 bytes.
pub const REASON_MAX_BYTES: usize = 1024;

/// The most bytes of a [`BOOT`] text: with its name it stays below the 4096 bytes of a label.
pub const BOOT_MAX_BYTES: usize = 4095 - BOOT[1].len();

/// The most compressed bytes of an index that a reader accepts: 256 MiB, an index of about two
/// million files. A larger value would let a manifest make the daemon allocate as much.
pub const INDEX_MAX_BYTES: u64 = 256 * 1024 * 1024;

/// What pins one lazy layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerAnnotations {
    /// Where the compressed index payload lies in the blob.
    pub index_extent: Extent<BlobSpace>,
    /// sha256 of that payload.
    pub index_digest: IndexDigest,
    /// Digest of the blob.
    pub blob: BlobDigest,
    /// Size of the blob.
    pub blob_bytes: u64,
    /// Diff ID of the layer.
    pub diff_id: DiffId,
    /// Config of the image it belongs to.
    pub config: ConfigDigest,
    /// Port of the registry that it was converted to, where that is not the default one.
    pub port: Option<u16>,
    /// Its part of the boot list, as texts, none for no list: a hint, which nobody has looked at yet.
    pub boot: Vec<String>,
}

/// What the annotations of a layer descriptor say about laziness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerMark {
    /// It has an index.
    Lazy(LayerAnnotations),
    /// The converter says why it has none.
    NotLazy(String),
    /// Sluice never saw it, or a tool dropped its annotations.
    Unmarked,
}

/// Annotations that contradict themselves; the layer is then not lazy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AnnotationError {
    /// Some are there and this one is not.
    #[error("annotation {name} is missing")]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// Not a decimal number.
    #[error("annotation {name} is {value:?}: want a decimal number")]
    Number {
        /// Its name.
        name: &'static str,
        /// Its value, cut to 100 characters.
        value: String,
    },
    /// Not a digest.
    #[error("annotation {name}: {source}")]
    Digest {
        /// Its name.
        name: &'static str,
        /// What is wrong.
        source: ParseDigestError,
    },
    /// The index is empty, too large, or not inside the blob.
    #[error(
        "annotated index of {index_bytes} bytes at {offset} does not fit a blob of {blob_bytes} bytes"
    )]
    Geometry {
        /// First byte of the index.
        offset: u64,
        /// Its size.
        index_bytes: u64,
        /// Size of the blob.
        blob_bytes: u64,
    },
}

impl LayerAnnotations {
    /// The annotations, by name.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        [
            (INDEX_OFFSET, self.index_extent.start().to_string()),
            (INDEX_SIZE, self.index_extent.len().to_string()),
            (INDEX_DIGEST, self.index_digest.to_string()),
            (BLOB, self.blob.to_string()),
            (BLOB_SIZE, self.blob_bytes.to_string()),
            (DIFF, self.diff_id.to_string()),
            (CONFIG, self.config.to_string()),
        ]
        .into_iter()
        .chain(self.port.map(|port| (PORT, port.to_string())))
        .chain(BOOT.into_iter().zip(self.boot.iter().cloned()))
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }
}

impl LayerMark {
    /// The annotations, by name; none for [`Self::Unmarked`].
    ///
    /// A reason is cut to [`REASON_MAX_BYTES`] at a character boundary.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        match self {
            Self::Lazy(annotations) => annotations.to_map(),
            Self::NotLazy(reason) => {
                let end = reason.floor_char_boundary(REASON_MAX_BYTES);
                BTreeMap::from([(NOT_LAZY.to_owned(), reason[..end].to_owned())])
            }
            Self::Unmarked => BTreeMap::new(),
        }
    }

    /// Reads annotations, or the labels that an unpacker made of them, through `get`.
    ///
    /// **Errors**: annotations of ours that are incomplete or contradict themselves. A reason not to
    /// be lazy outranks all others.
    pub fn parse<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Result<Self, AnnotationError> {
        if let Some(reason) = get(NOT_LAZY) {
            let end = reason.floor_char_boundary(REASON_MAX_BYTES);
            return Ok(Self::NotLazy(reason[..end].to_owned()));
        }
        let names = [
            INDEX_OFFSET,
            INDEX_SIZE,
            INDEX_DIGEST,
            BLOB,
            BLOB_SIZE,
            DIFF,
            CONFIG,
        ];
        if names.iter().all(|name| get(name).is_none()) {
            return Ok(Self::Unmarked);
        }
        let text = |name| get(name).ok_or(AnnotationError::Missing { name });
        let number = |name| {
            let value = text(name)?;
            parse_decimal(value).ok_or_else(|| not_a_number(name, value))
        };
        let offset = number(INDEX_OFFSET)?;
        let index_bytes = number(INDEX_SIZE)?;
        let blob_bytes = number(BLOB_SIZE)?;
        let geometry = AnnotationError::Geometry {
            offset,
            index_bytes,
            blob_bytes,
        };
        let index_extent = Extent::from_length(offset, index_bytes)
            .filter(|extent| extent.end() <= blob_bytes)
            .filter(|extent| !extent.is_empty() && extent.len() <= INDEX_MAX_BYTES)
            .ok_or(geometry)?;
        Ok(Self::Lazy(LayerAnnotations {
            index_extent,
            index_digest: digest(INDEX_DIGEST, text(INDEX_DIGEST)?)?,
            blob: digest(BLOB, text(BLOB)?)?,
            blob_bytes,
            diff_id: digest(DIFF, text(DIFF)?)?,
            config: digest(CONFIG, text(CONFIG)?)?,
            port: get(PORT)
                .map(|value| port(value).ok_or_else(|| not_a_number(PORT, value)))
                .transpose()?,
            // A hint that is too long is none, and what follows it says nothing; the layer is lazy without it.
            boot: BOOT
                .into_iter()
                .map_while(|name| get(name).filter(|text| text.len() <= BOOT_MAX_BYTES))
                .map(str::to_owned)
                .collect(),
        }))
    }
}

fn digest<D>(name: &'static str, value: &str) -> Result<D, AnnotationError>
where
    D: std::str::FromStr<Err = ParseDigestError>,
{
    value
        .parse()
        .map_err(|source| AnnotationError::Digest { name, source })
}

fn not_a_number(name: &'static str, value: &str) -> AnnotationError {
    AnnotationError::Number {
        name,
        value: value.chars().take(100).collect(),
    }
}

fn port(value: &str) -> Option<u16> {
    parse_decimal(value)
        .and_then(|port| u16::try_from(port).ok())
        .filter(|port| *port != 0)
}

/// A decimal number without sign, spaces or leading zeros: each value has one spelling.
fn parse_decimal(text: &str) -> Option<u64> {
    let value: u64 = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> LayerAnnotations {
        LayerAnnotations {
            index_extent: Extent::new(100, 150).unwrap(),
            index_digest: IndexDigest::of(b"index"),
            blob: BlobDigest::of(b"blob"),
            blob_bytes: 200,
            diff_id: DiffId::of(b"tar"),
            config: ConfigDigest::of(b"config"),
            port: None,
            boot: Vec::new(),
        }
    }

    fn parse(map: &BTreeMap<String, String>) -> Result<LayerMark, AnnotationError> {
        LayerMark::parse(|name| map.get(name).map(String::as_str))
    }

    #[test]
    fn marks_round_trip() {
        for mark in [
            LayerMark::Lazy(example()),
            LayerMark::Lazy(LayerAnnotations {
                port: Some(5000),
                boot: ["AQI=", "AQM=", "AQQ="].map(str::to_owned).to_vec(),
                ..example()
            }),
            LayerMark::NotLazy("sparse file".to_owned()),
            LayerMark::Unmarked,
        ] {
            assert_eq!(parse(&mark.to_map()), Ok(mark));
        }
    }

    #[test]
    fn each_annotation_is_needed() {
        let whole = example().to_map();
        for name in whole.keys() {
            let mut map = whole.clone();
            map.remove(name);
            assert!(
                matches!(parse(&map), Err(AnnotationError::Missing { name: n }) if n == name),
                "{name}"
            );
        }
    }

    #[test]
    fn bad_values_are_refused() {
        let cases = [
            (INDEX_OFFSET, "-1"),
            (INDEX_OFFSET, "+1"),
            (INDEX_OFFSET, "007"),
            (INDEX_OFFSET, "18446744073709551615"),
            (INDEX_OFFSET, "18446744073709551616"),
            (INDEX_OFFSET, "151"),
            (INDEX_SIZE, "0"),
            (INDEX_SIZE, "101"),
            (BLOB_SIZE, "149"),
            (BLOB_SIZE, ""),
            (INDEX_DIGEST, "sha256:00"),
            (BLOB, "x"),
            (DIFF, "md5:00"),
            (CONFIG, ""),
            (PORT, ""),
            (PORT, "0"),
            (PORT, "65536"),
            (PORT, "host:5000"),
        ];
        for (name, value) in cases {
            let mut map = example().to_map();
            map.insert(name.to_owned(), value.to_owned());
            assert!(parse(&map).is_err(), "{name}={value}");
        }
    }

    #[test]
    fn an_index_above_the_cap_is_refused() {
        let mut annotations = example();
        annotations.blob_bytes = u64::MAX;
        annotations.index_extent = Extent::from_length(0, INDEX_MAX_BYTES + 1).unwrap();
        assert!(parse(&annotations.to_map()).is_err());
    }

    #[test]
    fn a_boot_list_that_is_too_long_is_no_reason_not_to_be_lazy() {
        let mut map = example().to_map();
        for name in BOOT {
            map.insert(name.to_owned(), "A".repeat(BOOT_MAX_BYTES));
            assert!(name.len() + map[name].len() < 4096);
        }
        let texts = |map: &BTreeMap<String, String>| match parse(map) {
            Ok(LayerMark::Lazy(layer)) => layer.boot.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(texts(&map), BOOT.len());
        map.insert(BOOT[2].to_owned(), "A".repeat(BOOT_MAX_BYTES + 1));
        assert_eq!(texts(&map), 2);
        map.remove(BOOT[1]);
        assert_eq!(texts(&map), 1);
        map.remove(BOOT[0]);
        assert_eq!(texts(&map), 0);
    }

    #[test]
    fn long_reasons_are_cut() {
        let map = LayerMark::NotLazy("é".repeat(REASON_MAX_BYTES)).to_map();
        assert_eq!(map[NOT_LAZY].len(), REASON_MAX_BYTES);
    }
}
