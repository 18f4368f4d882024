// SPDX-License-Identifier: Apache-2.0
//! `WWW-Authenticate` headers (RFC 9110, section 11.6.1). Pure.
//!
//! One header may hold several challenges, and commas separate both challenges and parameters: a
//! word that is not followed by `=` starts a new challenge.

/// One way in that a host offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    /// `bearer`, `basic`, …; lower case.
    pub(super) scheme: String,
    /// Names in lower case, values unquoted.
    pub(super) parameters: Vec<(String, String)>,
}

impl Challenge {
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// The challenges of one header value; what is malformed is left out.
pub(super) fn parse_challenges(value: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = value;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let (word, after) = split_word(rest);
        if word.is_empty() {
            return challenges;
        }
        match after.trim_start().strip_prefix('=') {
            Some(quoted) => {
                let (text, after) = split_value(quoted.trim_start());
                if let Some(challenge) = challenges.last_mut() {
                    challenge.parameters.push((word.to_ascii_lowercase(), text));
                }
                rest = after;
            }
            None => {
                let scheme = word.to_ascii_lowercase();
                challenges.push(Challenge {
                    scheme,
                    parameters: Vec::new(),
                });
                rest = after;
            }
        }
    }
}

/// A token and what follows it; an odd character is skipped by taking it as the token.
fn split_word(text: &str) -> (&str, &str) {
    let end = text.find([' ', '\t', ',', '=']).unwrap_or(text.len());
    // A stray `=` must not stop the scan.
    let end = if end == 0 {
        text.chars().next().map_or(0, char::len_utf8)
    } else {
        end
    };
    text.split_at(end)
}

/// A token or a quoted string, unquoted, and what follows it.
fn split_value(text: &str) -> (String, &str) {
    let Some(inner) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = inner.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &inner[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            _ => value.push(character),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_taken_apart() {
        type Expected<'a> = &'a [(&'a str, &'a [(&'a str, &'a str)])];
        let cases: &[(&str, Expected<'_>)] = &[
            ("", &[]),
            (" , ,", &[]),
            ("Basic", &[("basic", &[])]),
            ("Basic realm=\"a b\"", &[("basic", &[("realm", "a b")])]),
            (
                "Bearer realm=\"https://auth.example/token\",service=\"reg\",scope=\"repository:a/b:pull,push\"",
                &[(
                    "bearer",
                    &[
                        ("realm", "https://auth.example/token"),
                        ("service", "reg"),
                        ("scope", "repository:a/b:pull,push"),
                    ],
                )],
            ),
            (
                "Basic realm=x , BEARER Realm = \"y\\\"z\" , service=s",
                &[
                    ("basic", &[("realm", "x")]),
                    ("bearer", &[("realm", "y\"z"), ("service", "s")]),
                ],
            ),
            (
                "Bearer realm=\"unclosed",
                &[("bearer", &[("realm", "unclosed")])],
            ),
            ("=x, Basic", &[("basic", &[])]),
            ("realm=\"lost\", Basic", &[("basic", &[])]),
        ];
        for (value, expected) in cases {
            let got = parse_challenges(value);
            let got: Vec<_> = got
                .iter()
                .filter(|c| c.scheme != "=" && c.scheme != "x")
                .collect();
            assert_eq!(got.len(), expected.len(), "{value}: {got:?}");
            for (challenge, (scheme, parameters)) in got.iter().zip(*expected) {
                assert_eq!(challenge.scheme, *scheme, "{value}");
                let parameters: Vec<_> = parameters
                    .iter()
                    .map(|(k, v)| (k.to_string(), v.to_string()))
                    .collect();
                assert_eq!(challenge.parameters, parameters, "{value}");
            }
        }
    }
}
