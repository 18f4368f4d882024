// SPDX-License-Identifier: Apache-2.0
//! containerd's filter syntax, as List takes it.
//!
//! A filter is a comma-separated list of selectors, all of which must hold; several filters are
//! alternatives. A selector is a field path alone (the field is present) or with `==`, `!=` or
//! `~=` (a regular expression, unanchored) and a value:
//!
//! ```text
//! filter   := selector ("," selector)*
//! selector := path (operator value)?
//! path     := field ("." field)*
//! field    := [A-Za-z0-9_]+ | quoted
//! value    := quoted | anything without a space or a comma
//! quoted   := "…" with the escapes of a Go string; as the value of `~=` also /…/ and |…|
//! ```
//!
//! Spaces are allowed before a field, an operator and a value, and nowhere else. An unquoted value
//! does not begin with one of `"/|.,=!~`. The path is a place in a snapshot: `kind`, `name`,
//! `parent`, or `labels` and the key, which may contain dots. The fields of a path below `labels`
//! are joined by dots, so `labels.a.b` and `labels."a.b"` are the same label.

mod parse;

use regex::Regex;

pub use parse::FilterError;

use crate::snapshots::SnapshotRecord;

/// Alternatives of which one must hold; none at all accepts everything.
#[derive(Debug, Default)]
pub struct Filters(Vec<Filter>);

impl Filters {
    /// Reads filters as List gives them.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Self, FilterError> {
        filters
            .iter()
            .map(|text| parse::filter(text.as_ref()))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether a snapshot is asked for.
    pub fn accept(&self, record: &SnapshotRecord) -> bool {
        self.0.is_empty() || self.0.iter().any(|filter| filter.accepts(record))
    }
}

/// Selectors all of which must hold; the empty filter accepts everything.
#[derive(Debug, Default)]
struct Filter(Vec<Selector>);

impl Filter {
    fn accepts(&self, record: &SnapshotRecord) -> bool {
        self.0.iter().all(|selector| selector.accepts(record))
    }
}

/// A test of one field.
#[derive(Debug)]
struct Selector {
    field: Field,
    test: Test,
}

/// A place in a snapshot.
#[derive(Debug, PartialEq, Eq)]
enum Field {
    Kind,
    Name,
    Parent,
    Label(Vec<u8>),
    /// No snapshot has it.
    Unknown,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(Vec<u8>),
    NotEqual(Vec<u8>),
    /// `None`: no regular expression; containerd lets it match nothing.
    Matches(Option<Regex>),
}

impl Field {
    fn of_path(path: &[Vec<u8>]) -> Self {
        match path.split_first() {
            // What follows these three is ignored, as containerd does.
            Some((first, _)) if first == b"kind" => Field::Kind,
            Some((first, _)) if first == b"name" => Field::Name,
            Some((first, _)) if first == b"parent" => Field::Parent,
            Some((first, rest)) if first == b"labels" => Field::Label(rest.join(&b'.')),
            _ => Field::Unknown,
        }
    }

    fn value<'a>(&self, record: &'a SnapshotRecord) -> Option<&'a str> {
        match self {
            Field::Kind => Some(record.kind.as_str()),
            Field::Name => Some(&record.name),
            Field::Parent => Some(record.parent.as_deref().unwrap_or("")),
            Field::Label(key) => {
                let key = std::str::from_utf8(key).ok()?;
                record.labels.get(key).map(String::as_str)
            }
            Field::Unknown => None,
        }
    }
}

impl Selector {
    fn accepts(&self, record: &SnapshotRecord) -> bool {
        let value = self.field.value(record);
        // A missing field is the empty string to `!=` and `~=`, and equal to nothing.
        let text = value.unwrap_or("");
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.is_some() && text.as_bytes() == wanted,
            Test::NotEqual(unwanted) => text.as_bytes() != unwanted,
            Test::Matches(pattern) => pattern.as_ref().is_some_and(|p| p.is_match(text)),
        }
    }
}

#[cfg(test)]
mod tests;
