// SPDX-License-Identifier: Apache-2.0
//! Times that were measured, side by side, as text and as JSON.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The times of one contender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// The middle one; the upper of two.
    pub median_s: f64,
    /// The shortest.
    pub min_s: f64,
    /// The longest.
    pub max_s: f64,
    /// How many there are.
    pub samples: usize,
}

impl Times {
    /// Of these seconds.
    ///
    /// **Errors**: there are none.
    pub fn of(mut seconds: Vec<f64>) -> Result<Self> {
        seconds.sort_by(f64::total_cmp);
        let (min_s, max_s) = (seconds.first(), seconds.last());
        Ok(Self {
            median_s: *seconds.get(seconds.len() / 2).context("nothing measured")?,
            min_s: *min_s.context("nothing measured")?,
            max_s: *max_s.context("nothing measured")?,
            samples: seconds.len(),
        })
    }

    /// The median.
    #[must_use]
    pub fn median(&self) -> Duration {
        Duration::from_secs_f64(self.median_s)
    }
}

/// Sluice beside what does the same.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Who is compared with.
    pub reference: String,
    /// Its times.
    pub theirs: Times,
    /// Sluice's.
    pub ours: Times,
    /// How many times as fast Sluice is.
    pub speed: f64,
}

impl Comparison {
    /// Prints it, and keeps it.
    pub fn print(reference: &str, theirs: Times, name: &str, ours: Times) -> Self {
        for (name, times) in [(reference, &theirs), (name, &ours)] {
            let Times {
                median_s,
                min_s,
                max_s,
                ..
            } = times;
            println!("   {name:<60} {median_s:>8.3} s  [{min_s:.3} .. {max_s:.3}]");
        }
        let speed = theirs.median_s / ours.median_s;
        println!("   speed against the reference: {speed:.2} times");
        Self {
            reference: reference.to_owned(),
            theirs,
            ours,
            speed,
        }
    }
}

/// What [`store`] kept of a benchmark.
#[derive(Debug, Clone, Deserialize)]
pub struct Entry<T> {
    /// The kernel of the last measurement.
    pub kernel: String,
    /// Its cores.
    pub cores: usize,
    /// What was measured.
    pub figures: T,
}

/// What the document at `path` has of a benchmark; `None` where there is none.
pub fn stored<T: DeserializeOwned>(path: &Path, benchmark: &str) -> Result<Option<Entry<T>>> {
    let mut document: Value = read(path)?;
    let entry = document.get_mut(benchmark).map(Value::take);
    let entry = entry.map(serde_json::from_value).transpose();
    entry.with_context(|| format!("read the figures of {benchmark} in {}", path.display()))
}

/// Keeps a benchmark that has a report of its own: its figures in `BENCHMARK.json` of a directory, and what they are in
/// words in `BENCHMARK.md`.
pub fn keep<T: DeserializeOwned>(
    directory: &Path,
    benchmark: &str,
    figures: Value,
    markdown: fn(&Entry<T>) -> String,
) -> Result<()> {
    store(
        &directory.join(format!("{benchmark}.json")),
        benchmark,
        figures,
    )?;
    redraw(directory, benchmark, markdown)
}

/// Writes `BENCHMARK.md` again from `BENCHMARK.json`.
pub fn redraw<T: DeserializeOwned>(
    directory: &Path,
    benchmark: &str,
    markdown: fn(&Entry<T>) -> String,
) -> Result<()> {
    let json = directory.join(format!("{benchmark}.json"));
    let entry = stored(&json, benchmark)?;
    let entry = entry.with_context(|| format!("no figures in {}", json.display()))?;
    let path = directory.join(format!("{benchmark}.md"));
    std::fs::write(&path, markdown(&entry)).with_context(|| format!("write {}", path.display()))
}

/// How many processes wanted to run on average in the last minute.
pub fn load() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    let first = text.split(' ').next().context("an average")?;
    Ok(first.parse()?)
}

/// The document at `path`; an empty one where there is none.
pub fn read<T: DeserializeOwned + Default>(path: &Path) -> Result<T> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .with_context(|| format!("read the figures in {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Writes a document.
pub fn write(path: &Path, document: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(document)?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// The kernel, and how many cores there are.
pub fn machine() -> Result<(String, usize)> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok((kernel.trim().to_owned(), cores))
}

/// Writes what one benchmark measured into the document at `path`, beside what others did.
pub fn store(path: &Path, benchmark: &str, figures: Value) -> Result<()> {
    let mut document: Value = read(path)?;
    if document.is_null() {
        document = json!({});
    }
    let (kernel, cores) = machine()?;
    let entry = json!({
        "command": format!("make bench BENCH={benchmark}"),
        "kernel": kernel,
        "cores": cores,
        "figures": figures,
    });
    let entries = document.as_object_mut().context("an object of figures")?;
    entries.insert(benchmark.to_owned(), entry);
    write(path, &document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        let times = Times::of(vec![3.0, 1.0, 2.0, 9.0]).unwrap();
        assert_eq!((times.median_s, times.min_s, times.max_s), (3.0, 1.0, 9.0));
        assert_eq!(times.samples, 4);
        assert_eq!(Times::of(vec![5.0, 1.0, 2.0]).unwrap().median_s, 2.0);
        assert!(Times::of(Vec::new()).is_err());
    }

    #[test]
    fn one_benchmark_leaves_the_figures_of_others_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("figures.json");
        store(&path, "a", json!({"x": 1})).unwrap();
        store(&path, "b", json!(2)).unwrap();
        store(&path, "a", json!({"x": 3})).unwrap();
        let document: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(document["a"]["figures"]["x"], 3);
        assert_eq!(document["b"]["figures"], 2);
        assert_eq!(document["b"]["command"], "make bench BENCH=b");
        let entry: Entry<i32> = stored(&path, "b").unwrap().unwrap();
        assert_eq!(entry.figures, 2);
        assert!(stored::<i32>(&path, "c").unwrap().is_none());
        let nowhere = directory.path().join("none.json");
        assert!(stored::<i32>(&nowhere, "b").unwrap().is_none());
        std::fs::write(&path, "[]").unwrap();
        assert!(store(&path, "a", json!(1)).is_err());
    }
}
