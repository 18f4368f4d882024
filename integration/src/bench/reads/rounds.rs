// SPDX-License-Identifier: Apache-2.0
//! The rounds: what is read, and how long it takes each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::nodes::Nodes;
use super::reader::{Operation, Reader};
use crate::bench::files::{Timed, drop_caches, timed};
use crate::bench::report::Times;

/// Readers of all files: a few, as an application has that starts.
pub const READERS: usize = 4;
/// Pages read at random in one go: enough that starting a program does not count.
pub const RANDOM_READS: usize = 200_000;

/// How often what is in memory is read in a turn: it takes milliseconds, and one time says little.
const WARM: usize = 3;
/// Turns of reads at random in a round: contenders differ by less than the machine does from one second to the next, so
/// each is timed once in a turn, and often.
const RANDOM_TURNS: usize = 9;

/// What one contender took for each operation, and what the line carried for it meanwhile.
type Account = (BTreeMap<Operation, Times>, u64);

/// Reads all files below `path`.
pub(super) fn read_all(path: &Path) -> Result<Timed> {
    timed("read", path, Some(READERS))
}

/// What there is to read, which all contenders must show alike.
#[derive(Debug)]
pub struct Subject {
    /// Entries.
    pub files: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// The largest of them.
    pub large_file: PathBuf,
    /// Its bytes.
    pub large_file_bytes: u64,
}

impl Subject {
    /// Looks at what overlayfs shows.
    pub fn of(paths: &[(Reader, &Path)]) -> Result<Self> {
        let mut paths = paths.iter();
        let (_, root) = paths
            .find(|(reader, _)| *reader == Reader::Overlayfs)
            .context("overlayfs")?;
        let all = read_all(root)?;
        let (bytes, path) = largest(root)?.context("a file")?;
        Ok(Self {
            files: all.count,
            bytes: all.bytes,
            large_file: path.strip_prefix(root)?.to_owned(),
            large_file_bytes: bytes,
        })
    }
}

fn largest(directory: &Path) -> Result<Option<(u64, PathBuf)>> {
    let mut found = None;
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let meta = std::fs::symlink_metadata(&path)?;
        if meta.is_dir() {
            found = found.max(largest(&path)?);
        } else if meta.is_file() {
            found = found.max(Some((meta.len(), path)));
        }
    }
    Ok(found)
}

impl Operation {
    /// How often it is done in a turn.
    fn times(self) -> usize {
        match self {
            Self::ColdRead | Self::ColdStat | Self::RandomRead => 1,
            Self::WarmRead | Self::WarmStat => WARM,
        }
    }
}

/// Goes through all rounds.
pub fn run(
    nodes: &Nodes,
    paths: &[(Reader, &Path)],
    subject: &Subject,
    count: usize,
) -> Result<BTreeMap<Reader, Account>> {
    let mut seconds: BTreeMap<(Reader, Operation), Vec<f64>> = BTreeMap::new();
    let mut carried: BTreeMap<Reader, u64> = BTreeMap::new();
    let line = &nodes.lab.registry.line;
    // The cold one of a pair leaves in memory what the warm one finds there.
    let mut turns: Vec<&[Operation]> = vec![
        &[Operation::ColdRead, Operation::WarmRead],
        &[Operation::ColdStat, Operation::WarmStat],
    ];
    turns.extend([&[Operation::RandomRead] as &[Operation]; RANDOM_TURNS]);
    for round in 0..count {
        for (turn, operations) in turns.iter().enumerate() {
            let mut order = paths.to_vec();
            order.rotate_left((round + turn) % paths.len());
            for (reader, path) in &order {
                let before = line.bytes();
                for operation in *operations {
                    let times = operation.times();
                    for _ in 0..times {
                        let took = once(*operation, path, subject).with_context(|| {
                            format!("{} of {}", operation.title(), reader.name())
                        })?;
                        let seconds = seconds.entry((*reader, *operation)).or_default();
                        seconds.push(took);
                    }
                }
                *carried.entry(*reader).or_default() += line.bytes() - before;
            }
        }
        println!("   round {} of {count}", round + 1);
    }
    let mut accounts: BTreeMap<Reader, Account> = BTreeMap::new();
    for ((reader, operation), seconds) in seconds {
        let account = accounts.entry(reader).or_default();
        account.0.insert(operation, Times::of(seconds)?);
        account.1 = carried.get(&reader).copied().unwrap_or_default();
    }
    Ok(accounts)
}

/// Does it once; gives seconds.
///
/// **Errors**: also when it shows something else than overlayfs does.
fn once(operation: Operation, path: &Path, subject: &Subject) -> Result<f64> {
    if operation.is_cold() {
        drop_caches()?;
    }
    let timed = match operation {
        Operation::ColdRead | Operation::WarmRead => {
            let timed = read_all(path)?;
            let (bytes, expected) = (timed.bytes, subject.bytes);
            ensure!(bytes == expected, "{bytes} bytes, not {expected}");
            timed
        }
        Operation::ColdStat | Operation::WarmStat => timed("stat", path, None)?,
        Operation::RandomRead => {
            let file = path.join(&subject.large_file);
            return Ok(timed("random", &file, Some(RANDOM_READS))?.seconds);
        }
    };
    let (files, expected) = (timed.count, subject.files);
    ensure!(files == expected, "{files} entries, not {expected}");
    Ok(timed.seconds)
}
