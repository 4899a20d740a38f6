//! How many instructions the verifier goes through for each program, on each kernel: kept in
//! docs/verifier.md, so that growth shows in review.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::setup::kernels::Version;

/// The in-kernel test that reports it.
pub const TRIAL: &str = "verified_instructions_are_told";

/// The prefix of a line of that test: `verifier: 6.1 nohop_connect4 1234`.
const MARK: &str = "verifier: ";

/// A difference of more than this calls for a fresh file.
const TOLERATED_PERCENT: u64 = 5;

const HEADING: &str = "\
# What the verifier goes through

The kernel's verifier follows every path through a program before it accepts it, and gives up at a \
million instructions. This is how many it processed for each program, on each kernel, with the \
configuration that leaves the programs the most to do: both pools, public networks, pins far apart, bypassed cgroups.

`sudo -E cargo xtask vm` writes this file; `cargo xtask test` fails when a number has moved by more \
than 5%.
";

/// Counts by kernel and program; `None` where the kernel doesn't report it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table(BTreeMap<Version, BTreeMap<String, Option<u64>>>);

impl Table {
    /// Reads a line of the tests' output, if it is about the verifier.
    pub fn read(&mut self, line: &str) {
        let Some((_, reported)) = line.split_once(MARK) else { return };
        let words: Vec<_> = reported.split_whitespace().collect();
        if let [kernel, program, count] = words[..]
            && let Ok(kernel) = kernel.parse()
        {
            self.0.entry(kernel).or_default().insert(program.to_owned(), count.parse().ok());
        }
    }

    fn parse(markdown: &str) -> Table {
        let mut rows = markdown.lines().filter(|line| line.starts_with('|')).map(cells);
        let header = rows.next().unwrap_or_default();
        let kernels: Vec<Option<Version>> =
            header.iter().skip(1).map(|cell| cell.parse().ok()).collect();
        let mut table = Table::default();
        for row in rows.skip(1) {
            let Some((program, counts)) = row.split_first() else { continue };
            for (kernel, count) in kernels.iter().zip(counts) {
                let (Some(kernel), false) = (kernel, count.is_empty()) else { continue };
                let column = table.0.entry(*kernel).or_default();
                column.insert(program.clone(), count.replace(',', "").parse().ok());
            }
        }
        table
    }

    /// This table, with the columns of `measured` in place of its own.
    fn updated_by(mut self, measured: &Table) -> Table {
        for (kernel, column) in &measured.0 {
            self.0.insert(*kernel, column.clone());
        }
        self
    }

    fn programs(&self) -> BTreeSet<&str> {
        self.0.values().flat_map(BTreeMap::keys).map(String::as_str).collect()
    }

    /// Where `measured` differs from this table. Kernels that only one of the two
    /// knows don't count.
    fn differences(&self, measured: &Table) -> Vec<String> {
        let mut differences = Vec::new();
        for (kernel, now) in &measured.0 {
            let Some(kept) = self.0.get(kernel) else { continue };
            let programs: BTreeSet<_> = kept.keys().chain(now.keys()).collect();
            for program in programs {
                let (kept, now) = (kept.get(program), now.get(program));
                let same = match (kept, now) {
                    (Some(Some(kept)), Some(Some(now))) => {
                        kept.abs_diff(*now) * 100 <= kept * TOLERATED_PERCENT
                    }
                    (kept, now) => kept == now,
                };
                if !same {
                    let [kept, now] = [kept, now].map(|count| shown(count.copied()));
                    differences.push(format!("{program} on {kernel}: {kept}, now {now}"));
                }
            }
        }
        differences
    }
}

/// The cells of a Markdown table's row.
fn cells(row: &str) -> Vec<String> {
    row.trim().trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
}

/// A count as the table shows it; an empty cell where there is none.
fn shown(count: Option<Option<u64>>) -> String {
    match count {
        Some(Some(count)) => count.to_string(),
        Some(None) => "-".to_owned(),
        None => String::new(),
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, cells: Vec<String>| {
            writeln!(f, "| {} |", cells.join(" | "))
        };
        let kernels = self.0.keys().map(Version::to_string);
        row(f, ["program".to_owned()].into_iter().chain(kernels).collect())?;
        writeln!(f, "|---|{}", "--:|".repeat(self.0.len()))?;
        for program in self.programs() {
            let counts = self.0.values().map(|column| shown(column.get(program).copied()));
            row(f, [program.to_owned()].into_iter().chain(counts).collect())?;
        }
        Ok(())
    }
}

fn file() -> PathBuf {
    crate::repository::root().join("docs/verifier.md")
}

fn kept() -> Result<Table> {
    let file = file();
    if !file.exists() {
        return Ok(Table::default());
    }
    let markdown =
        fs::read_to_string(&file).with_context(|| format!("can't read {}", file.display()))?;
    Ok(Table::parse(&markdown))
}

/// Updates docs/verifier.md to the measured counts; other kernels stay as they are.
/// Returns the table.
///
/// # Errors
/// When the file can't be read or written.
pub fn update(measured: &Table) -> Result<Table> {
    let (table, file) = (kept()?.updated_by(measured), file());
    let folder = file.parent().context("docs/verifier.md has no folder")?;
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&file, format!("{HEADING}\n{table}")))
        .with_context(|| format!("can't write {}", file.display()))?;
    Ok(table)
}

/// Compares docs/verifier.md with the measured counts.
///
/// # Errors
/// When they differ by more than is tolerated.
pub fn check(measured: &Table) -> Result<()> {
    let differences = kept()?.differences(measured);
    if !differences.is_empty() {
        bail!(
            "docs/verifier.md is out of date:\n  {}\nrun `sudo -E cargo xtask vm` and commit it",
            differences.join("\n  ")
        );
    }
    print!("{measured}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{HEADING, Table};

    fn table(lines: &[&str]) -> Table {
        let mut table = Table::default();
        lines.iter().for_each(|line| table.read(line));
        table
    }

    #[test]
    fn what_is_written_is_read() {
        let table = table(&[
            "verifier: 6.12 connect 100",
            "test x ... verifier: 5.10 connect -",
            "verifier: 6.12 getpeer 7",
            "verifier: nonsense",
            "test verified_instructions_are_told ... ok",
        ]);
        let expected = "\
| program | 5.10 | 6.12 |
|---|--:|--:|
| connect | - | 100 |
| getpeer |  | 7 |
";
        assert_eq!(table.to_string(), expected);
        assert_eq!(Table::parse(&format!("{HEADING}\n{table}")), table);
    }

    #[test]
    fn columns_are_replaced_whole() {
        let kept = table(&["verifier: 6.1 gone 1", "verifier: 6.18 connect 1"]);
        let measured = table(&["verifier: 6.1 connect 2"]);
        let expected = table(&["verifier: 6.1 connect 2", "verifier: 6.18 connect 1"]);
        assert_eq!(kept.updated_by(&measured), expected);
    }

    #[test]
    fn more_than_five_percent_is_a_difference() {
        let kept = table(&["verifier: 6.1 connect 100", "verifier: 5.10 connect -"]);
        for (line, n_differences) in [
            ("verifier: 6.1 connect 105", 0),
            ("verifier: 6.1 connect 95", 0),
            ("verifier: 6.1 connect 106", 1),
            ("verifier: 6.1 connect 94", 1),
            ("verifier: 6.1 connect -", 1),
            ("verifier: 6.1 another 100", 2),
            ("verifier: 5.10 connect -", 0),
            ("verifier: 7.2 connect 1", 0),
        ] {
            assert_eq!(kept.differences(&table(&[line])).len(), n_differences, "{line}");
        }
    }
}
