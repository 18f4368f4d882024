// SPDX-License-Identifier: Apache-2.0
//! What all drawings have in common.

/// The beginning of a white drawing of this size.
#[must_use]
pub fn open(width: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    )
}

/// Its end.
pub const CLOSE: &str = "</svg>\n";
