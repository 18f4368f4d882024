// SPDX-License-Identifier: Apache-2.0
//! Reads a filter by recursive descent over its characters.

use regex::Regex;

use super::{Field, Filter, Selector, Test};

/// A filter that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("parse filter {filter:?} at byte {offset}: {reason}")]
pub struct FilterError {
    /// The filter as given.
    pub filter: String,
    /// Where reading stopped.
    pub offset: usize,
    /// Why.
    pub reason: &'static str,
}

pub(super) fn filter(text: &str) -> Result<Filter, FilterError> {
    let mut cursor = Cursor { text, offset: 0 };
    let mut selectors = Vec::new();
    if text.is_empty() {
        return Ok(Filter(selectors));
    }
    loop {
        selectors.push(selector(&mut cursor)?);
        match cursor.peek() {
            None => return Ok(Filter(selectors)),
            Some(',') => cursor.skip(','),
            Some(_) => return Err(cursor.error("unexpected input")),
        }
    }
}

fn selector(cursor: &mut Cursor<'_>) -> Result<Selector, FilterError> {
    let mut path = vec![field(cursor)?];
    while cursor.peek() == Some('.') {
        cursor.skip('.');
        path.push(field(cursor)?);
    }
    let field = Field::of_path(&path);
    if matches!(cursor.peek(), None | Some(',')) {
        return Ok(Selector {
            field,
            test: Test::Present,
        });
    }
    cursor.skip_spaces();
    let test = match cursor.take_while(|c| matches!(c, '=' | '!' | '~')) {
        "==" => Test::Equal(value(cursor, &['"'])?),
        "!=" => Test::NotEqual(value(cursor, &['"'])?),
        "~=" => Test::Matches(pattern(&value(cursor, &['"', '/', '|'])?)),
        _ => return Err(cursor.error("expected an operator: ==, != or ~=")),
    };
    Ok(Selector { field, test })
}

fn pattern(bytes: &[u8]) -> Option<Regex> {
    Regex::new(std::str::from_utf8(bytes).ok()?).ok()
}

fn field(cursor: &mut Cursor<'_>) -> Result<Vec<u8>, FilterError> {
    cursor.skip_spaces();
    if cursor.peek() == Some('"') {
        return quoted(cursor, '"');
    }
    let name = cursor.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
    if name.is_empty() {
        return Err(cursor.error("expected a field, plain or in double quotes"));
    }
    Ok(name.as_bytes().to_vec())
}

fn value(cursor: &mut Cursor<'_>, quotes: &[char]) -> Result<Vec<u8>, FilterError> {
    cursor.skip_spaces();
    match cursor.peek() {
        Some(quote @ ('"' | '/' | '|')) if quotes.contains(&quote) => quoted(cursor, quote),
        None | Some('"' | '/' | '|' | ',' | '.' | '=' | '!' | '~') => {
            Err(cursor.error("expected a value, plain or in double quotes"))
        }
        Some(_) => {
            let plain = cursor.take_while(|c| c != ',' && !c.is_whitespace() && !c.is_control());
            if plain.is_empty() {
                return Err(cursor.error("unexpected control character"));
            }
            Ok(plain.as_bytes().to_vec())
        }
    }
}

/// A quoted text with the escapes of a Go string; they can make bytes that are not UTF-8.
fn quoted(cursor: &mut Cursor<'_>, quote: char) -> Result<Vec<u8>, FilterError> {
    cursor.skip(quote);
    let mut bytes = Vec::new();
    loop {
        match cursor.next() {
            None | Some('\n' | '\0') => {
                return Err(cursor.error("quoted text is not terminated"));
            }
            Some('\\') => escape(cursor, quote, &mut bytes)?,
            Some(c) if c == quote => return Ok(bytes),
            Some(c) => push(&mut bytes, c),
        }
    }
}

fn escape(cursor: &mut Cursor<'_>, quote: char, bytes: &mut Vec<u8>) -> Result<(), FilterError> {
    let kind = cursor
        .next()
        .ok_or_else(|| cursor.error("quoted text is not terminated"))?;
    match kind {
        'a' => bytes.push(7),
        'b' => bytes.push(8),
        'f' => bytes.push(12),
        'n' => bytes.push(b'\n'),
        'r' => bytes.push(b'\r'),
        't' => bytes.push(b'\t'),
        'v' => bytes.push(11),
        '\\' => bytes.push(b'\\'),
        c if c == quote => push(bytes, c),
        'x' => {
            let byte = digits(cursor, 16, 2, 0)?;
            bytes.push(u8::try_from(byte).map_err(|_| cursor.error("escape exceeds a byte"))?);
        }
        '0'..='7' => {
            let byte = digits(cursor, 8, 2, kind.to_digit(8).unwrap_or(0))?;
            bytes.push(u8::try_from(byte).map_err(|_| cursor.error("escape exceeds a byte"))?);
        }
        'u' | 'U' => {
            let code = digits(cursor, 16, if kind == 'u' { 4 } else { 8 }, 0)?;
            if code > u32::from(char::MAX) {
                return Err(cursor.error("escape is no Unicode code point"));
            }
            // Go writes the replacement character for half a surrogate pair.
            push(
                bytes,
                char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER),
            );
        }
        _ => return Err(cursor.error("unknown escape")),
    }
    Ok(())
}

/// Exactly `count` more digits of a number that begins with `first`.
fn digits(cursor: &mut Cursor<'_>, base: u32, count: u32, first: u32) -> Result<u32, FilterError> {
    let mut number = first;
    for _ in 0..count {
        let digit = cursor.next().and_then(|c| c.to_digit(base));
        let digit = digit.ok_or_else(|| cursor.error("escape has too few digits"))?;
        // At most eight hex digits, so this cannot overflow.
        number = number * base + digit;
    }
    Ok(number)
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

/// A place in the filter.
#[derive(Debug)]
struct Cursor<'a> {
    text: &'a str,
    offset: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.offset..).unwrap_or("")
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.offset += c.len_utf8();
        Some(c)
    }

    /// Steps over a character that was peeked at.
    fn skip(&mut self, c: char) {
        self.offset += c.len_utf8();
    }

    fn skip_spaces(&mut self) {
        self.take_while(char::is_whitespace);
    }

    fn take_while(&mut self, accept: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let taken = rest.find(|c| !accept(c)).unwrap_or(rest.len());
        self.offset += taken;
        &rest[..taken]
    }

    fn error(&self, reason: &'static str) -> FilterError {
        FilterError {
            filter: self.text.into(),
            offset: self.offset,
            reason,
        }
    }
}
