// SPDX-License-Identifier: Apache-2.0
//! What a page of the documentation tells its readers to do.
//!
//! - A fenced block of `sh` is to be run.
//! - One of `toml`, `yaml`, `json` or `ini` is a whole file; the paragraph above it ends with its path in backticks and a
//!   colon.
//! - One of `text` after a block of `sh` is what that prints. A line `...` stands for any lines, `…` within a line for
//!   any text, and spaces in a row for one.
//! - A paragraph `*Not run by our tests: REASON.*` right above a block says that nobody tries it, and why.
//!
//! Any other block is an error: nothing is left out because it was written in another way.

use anyhow::{Context as _, Result, bail, ensure};

/// How the paragraph begins that keeps a block from being run.
const NOT_RUN: &str = "*Not run by our tests: ";

/// One block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The heading that it stands below, without marks.
    pub section: String,
    /// The line of its first text, from 1.
    pub line: usize,
    /// What it is for.
    pub kind: Kind,
    /// Its text; each line ends with a newline.
    pub text: String,
    /// Why it is not tried, if it is not.
    pub not_run: Option<String>,
}

/// What a block is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// It is run.
    Run,
    /// It is the whole file of this path.
    File(String),
    /// The block before prints it.
    Printed,
}

/// The blocks of a page, in order. Code by indentation is an error in the sections for which `strict` holds, and is nothing in the others.
///
/// **Errors**: with the number of the line.
pub fn blocks(page: &str, strict: impl Fn(&str) -> bool) -> Result<Vec<Block>> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut section = String::new();
    let mut paragraph = String::new();
    let mut lines = page.lines().enumerate();
    let mut blank = true;
    while let Some((at, line)) = lines.next() {
        let number = at + 1;
        if let Some(language) = line.strip_prefix("```") {
            let mut text = String::new();
            loop {
                let (_, line) = lines
                    .next()
                    .with_context(|| format!("line {number}: the block has no end"))?;
                if line == "```" {
                    break;
                }
                text.push_str(line);
                text.push('\n');
            }
            if strict(&section) {
                let not_run = not_run(&paragraph)?;
                let kind = kind(language, &paragraph, not_run.is_some(), blocks.last())
                    .with_context(|| format!("line {number}"))?;
                blocks.push(Block {
                    section: section.clone(),
                    line: number + 1,
                    kind,
                    text,
                    not_run,
                });
            }
            paragraph.clear();
            blank = true;
        } else if line.starts_with('#') {
            line.trim_start_matches('#').trim().clone_into(&mut section);
            paragraph.clear();
        } else if line.trim().is_empty() {
            blank = true;
        } else {
            let code = blank && line.starts_with("    ");
            ensure!(
                !(code && strict(&section)),
                "line {number}: code by indentation does not say what it is for"
            );
            if blank {
                paragraph.clear();
            }
            paragraph.push_str(line);
            paragraph.push('\n');
            blank = false;
        }
    }
    Ok(blocks)
}

fn not_run(paragraph: &str) -> Result<Option<String>> {
    let Some(reason) = paragraph.strip_prefix(NOT_RUN) else {
        return Ok(None);
    };
    let reason = reason.trim_end().strip_suffix(".*");
    let reason = reason.with_context(|| format!("no end of {paragraph:?}"))?;
    Ok(Some(reason.replace('\n', " ")))
}

fn kind(language: &str, paragraph: &str, not_run: bool, before: Option<&Block>) -> Result<Kind> {
    Ok(match language {
        "sh" => Kind::Run,
        "toml" | "yaml" | "json" | "ini" if not_run => Kind::File(String::new()),
        "toml" | "yaml" | "json" | "ini" => {
            let path = paragraph.trim_end().strip_suffix("`:").and_then(|text| {
                let (_, path) = text.rsplit_once('`')?;
                path.starts_with('/').then(|| path.to_owned())
            });
            Kind::File(path.context("the paragraph above does not end with the file's path")?)
        }
        "text" => {
            let runs = before.is_some_and(|block| block.kind == Kind::Run);
            ensure!(runs, "nothing prints this");
            Kind::Printed
        }
        other => bail!("a block of {other:?}"),
    })
}

/// nerdctl passes every signal on to the container, also that a child of its own has ended. Where the container has ended
/// just before, it logs this beside what the container printed, and its exit code is the container's all the same.
const RACE: &str = "level=error msg=\"forward signal child exited\" error=\"ttrpc: closed\"";

/// Whether what was printed is what a page shows.
#[must_use]
pub fn is_as_shown(shown: &str, printed: &str) -> bool {
    let lines = |text: &str| -> Vec<String> { text.lines().map(one_space).collect() };
    let (shown, mut printed) = (lines(shown), lines(printed));
    printed.retain(|line| !line.ends_with(RACE));
    let shown: Vec<&str> = shown.iter().map(String::as_str).collect();
    let printed: Vec<&str> = printed.iter().map(String::as_str).collect();
    // A list of parts with anything between them, twice: of lines, and of a line's text.
    matches(&shown, &printed, |it| it == "...", line_is_as_shown)
}

/// Columns are as wide as what stands in them: spaces in a row count as one.
fn one_space(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn line_is_as_shown(shown: &str, printed: &str) -> bool {
    let shown: Vec<char> = shown.chars().collect();
    let printed: Vec<char> = printed.chars().collect();
    matches(&shown, &printed, |it| it == '…', |a, b| a == b)
}

/// Whether `text` is `pattern`, of whose items those that are `any` stand for any number of items.
fn matches<T: Copy>(
    pattern: &[T],
    text: &[T],
    any: impl Fn(T) -> bool,
    same: impl Fn(T, T) -> bool,
) -> bool {
    let (mut at, mut seen) = (0, 0);
    // Where to go on with one item more behind the last wildcard.
    let mut again: Option<(usize, usize)> = None;
    while seen < text.len() {
        if at < pattern.len() && any(pattern[at]) {
            again = Some((at + 1, seen));
            at += 1;
        } else if at < pattern.len() && same(pattern[at], text[seen]) {
            (at, seen) = (at + 1, seen + 1);
        } else if let Some((pattern_at, text_at)) = again {
            again = Some((pattern_at, text_at + 1));
            (at, seen) = (pattern_at, text_at + 1);
        } else {
            return false;
        }
    }
    pattern[at..].iter().all(|item| any(*item))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_page_says_to_do() {
        let page = "# A\n\nRun:\n\n```sh\none\ntwo\n```\n\nprints\n\n```text\n1\n```\n## B\n\nIn `x`, and\n`/etc/x.toml`:\n\n\
                    ```toml\na = 1\n```\n\n*Not run by our tests: needs\na cluster.*\n\n```sh\nkubectl\n```\n";
        let blocks = blocks(page, |_| true).unwrap();
        let seen: Vec<_> = blocks
            .iter()
            .map(|it| {
                (
                    &*it.section,
                    it.line,
                    &it.kind,
                    &*it.text,
                    it.not_run.as_deref(),
                )
            })
            .collect();
        let file = Kind::File("/etc/x.toml".to_owned());
        assert_eq!(
            seen,
            [
                ("A", 6, &Kind::Run, "one\ntwo\n", None),
                ("A", 13, &Kind::Printed, "1\n", None),
                ("B", 21, &file, "a = 1\n", None),
                ("B", 28, &Kind::Run, "kubectl\n", Some("needs a cluster")),
            ]
        );
    }

    #[test]
    fn what_nobody_would_try_is_an_error() {
        for (page, said) in [
            ("```sh\n", "no end"),
            ("```\nx\n```\n", "a block of"),
            ("```text\nx\n```\n", "nothing prints"),
            ("In the file:\n\n```toml\n```\n", "path"),
            ("In `x.toml`:\n\n```toml\n```\n", "path"),
            ("Run:\n\n    sluiced\n", "by indentation"),
            ("*Not run by our tests: x\n\n```sh\n```\n", "no end of"),
        ] {
            let error = format!("{:#}", blocks(page, |_| true).unwrap_err());
            assert!(error.contains(said), "{page:?}: {error}");
        }
        // Other sections are none of our business.
        let page = "# A\n\n    code\n\n```rust\n```\n";
        assert_eq!(blocks(page, |it| it != "A").unwrap(), []);
        // The second line of an entry of a list is no code.
        assert_eq!(blocks("- a\n    b\n", |_| true).unwrap(), []);
    }

    #[test]
    fn what_is_shown_stands_for_what_is_printed() {
        for (shown, printed, same) in [
            ("a\nb\n", "a\nb\n", true),
            ("a\n", "a\nb\n", false),
            ("a\n...\n", "a\nb\nc\n", true),
            ("...\nc\n", "a\nb\nc\n", true),
            ("...\nb\n", "a\nb\nc\n", false),
            ("a …\n", "a 17 s\n", true),
            ("a … s\n", "a 17 s\n", true),
            ("a … m\n", "a 17 s\n", false),
            ("…\n", "a\nb\n", false),
            ("a  b\n", "a      b \n", true),
            ("a b\n", "ab\n", false),
            ("...\n", "", true),
            ("a\n", "", false),
        ] {
            assert_eq!(is_as_shown(shown, printed), same, "{shown:?} {printed:?}");
        }
        let logged = |what: &str| format!("a\ntime=\"2026-11-26T21:11:12Z\" {what}\n");
        assert!(is_as_shown("a\n", &logged(RACE)));
        assert!(!is_as_shown("a\n", &logged("level=error msg=\"other\"")));
    }
}
