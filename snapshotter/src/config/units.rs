// SPDX-License-Identifier: Apache-2.0
//! Durations and sizes as people write them.

use std::time::Duration;

/// `300s`, `1m30s`, `500ms`, `2h`; a plain number only if it is 0.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || "want a duration such as 500ms, 5s, 1m30s or 2h".to_owned();
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut rest, mut total) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u32 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return Err(wrong()),
        };
        rest = &rest[letters..];
        total = unit
            .checked_mul(number)
            .and_then(|more| total.checked_add(more))
            .ok_or_else(wrong)?;
    }
    if text.is_empty() {
        Err(wrong())
    } else {
        Ok(total)
    }
}

/// `20GiB`, `500MB`, `4096`.
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || "want a size such as 500MB, 20GiB or a number of bytes".to_owned();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit: u64 = match &text[digits..] {
        "" | "B" => 1,
        "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, expected) in [
            ("0", Some(0)),
            ("0s", Some(0)),
            ("500ms", Some(500)),
            ("5s", Some(5_000)),
            ("1m30s", Some(90_000)),
            ("2h", Some(7_200_000)),
            ("", None),
            ("5", None),
            ("s", None),
            ("5 s", None),
            ("-5s", None),
            ("5s3", None),
            ("1d", None),
            ("1.5s", None),
            ("99999999999s", None),
        ] {
            let got = parse_duration(text).ok();
            assert_eq!(got, expected.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, expected) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("1kB", Some(1000)),
            ("20GiB", Some(20 << 30)),
            ("16777215TiB", Some(16_777_215 << 40)),
            ("16777216TiB", None),
            ("", None),
            ("GiB", None),
            ("1 GiB", None),
            ("1gb", None),
            ("-1", None),
        ] {
            assert_eq!(parse_bytes(text).ok(), expected, "{text}");
        }
    }
}
