//! A report as plain text for a terminal.

use crate::format::{self, NONE};
use crate::report::{Figure, Outcome, Report, Row, Sheet};

/// How many columns a terminal has at least, as far as tables care.
const WIDTH: usize = 100;
/// Longer conditions take a line of their own.
const MOST_CONDITION: usize = 40;

/// The whole report.
pub fn render(report: &Report) -> String {
    let mut text = format!("{}: {}\n", report.suite, report.title);
    text += &format!("{}, {}\n", report.rounds(), report.machine.caption());
    for sheet in report.sheets() {
        let bases = sheet.bases();
        let ratios = if bases.is_empty() { String::new() } else { format!("; ratios to {bases}") };
        text += &format!("\n{} ({}{ratios})\n", sheet.name, sheet.subtitle());
        text += &matrix(&sheet).unwrap_or_else(|| list(&sheet));
    }
    let absent = report.contenders.iter().filter_map(|contender| {
        Some(format!("absent: {}: {}\n", contender.name, contender.absent.as_ref()?))
    });
    let notes = report.notes.iter().map(|note| format!("note: {note}\n"));
    let rest: String = absent.chain(notes).collect();
    if !rest.is_empty() {
        text += &format!("\n{rest}");
    }
    if !report.goals.is_empty() {
        text += "\nGoals\n";
    }
    for goal in &report.goals {
        let outcome = match goal.outcome {
            Outcome::Reached => "reached",
            Outcome::Missed => "NOT reached",
            Outcome::Undecided => "undecided",
            Outcome::NotMeasured => "not measured",
        };
        let is = if goal.is.is_empty() { NONE } else { &goal.is };
        text += &format!("  {outcome:<12}  {}: {}, is {is}\n", goal.what, goal.goal);
    }
    text
}

/// Conditions by contenders, a median and a ratio in each cell, where that is narrow enough.
fn matrix(sheet: &Sheet) -> Option<String> {
    let names = sheet.contenders.iter().map(|name| lines_of_name(name));
    let names: Vec<Vec<String>> = names.collect();
    let n_head = names.iter().map(Vec::len).max()?;
    let mut rows: Vec<Vec<String>> = vec![];
    for line_idx in 0..n_head {
        let mut row = vec![String::new()];
        for name in &names {
            // The last lines of all names stand side by side.
            let own_idx = (line_idx + name.len()).checked_sub(n_head);
            row.push(own_idx.and_then(|idx| name.get(idx)).cloned().unwrap_or_default());
        }
        rows.push(row);
    }
    for figure in &sheet.figures {
        let mut row = vec![figure.label()];
        row.extend(sheet.contenders.iter().map(|name| brief(sheet, figure, name)));
        rows.push(row);
    }
    let first = rows.iter().map(|row| row[0].chars().count());
    let first = first.filter(|width| *width <= MOST_CONDITION).max().unwrap_or(0);
    let widths: Vec<usize> = (1..=sheet.contenders.len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    if 2 + first + widths.iter().map(|width| width + 2).sum::<usize>() > WIDTH {
        return None;
    }
    let lines = rows.iter().map(|row| {
        let (mut lines, mut condition) = (String::new(), row[0].as_str());
        if condition.chars().count() > first {
            lines += &format!("  {condition}\n");
            condition = "";
        }
        let mut line = format!("  {condition:<first$}");
        for (cell, width) in row[1..].iter().zip(&widths) {
            line += &format!("  {cell:>width$}");
        }
        format!("{lines}{}\n", line.trim_end())
    });
    Some(lines.collect())
}

/// A name in lines of a word or few.
fn lines_of_name(name: &str) -> Vec<String> {
    let mut lines: Vec<String> = vec![];
    for word in name.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + word.chars().count() < 12 => {
                *line += &format!(" {word}");
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn brief(sheet: &Sheet, figure: &Figure, contender: &str) -> String {
    let Some(Row { spread: Some(spread), ratio, .. }) = figure.row(contender) else {
        return NONE.to_owned();
    };
    let median = format::humane(spread.median, sheet.unit);
    let mut column = sheet.figures.iter().filter_map(|figure| figure.row(contender));
    match ratio {
        Some(ratio) => format!("{median} {:>5}", format::ratio(ratio.median)),
        // As wide as a ratio, so that medians stand below each other.
        None if column.any(|row| row.ratio.is_some()) => format!("{median}      "),
        None => median,
    }
}

/// A line for each contender below each condition, with the spreads.
fn list(sheet: &Sheet) -> String {
    let rows = |figure: &Figure| -> Vec<[String; 3]> {
        let rows = sheet.contenders.iter().filter_map(|name| figure.row(name));
        rows.map(|row| {
            let Some(spread) = row.spread else {
                return [row.contender.clone(), NONE.to_owned(), String::new()];
            };
            let ratio = row.ratio.map_or(String::new(), |ratio| {
                let [median, least, most] =
                    [ratio.median, ratio.least, ratio.most].map(format::ratio);
                format!("{median:>5} ({least}–{most})")
            });
            [row.contender.clone(), format::humane(spread.median, sheet.unit), ratio]
        })
        .collect()
    };
    let tables: Vec<Vec<[String; 3]>> = sheet.figures.iter().map(|figure| rows(figure)).collect();
    let width = |column: usize| {
        let cells = tables.iter().flatten().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let (names, medians) = (width(0), width(1));
    let mut text = String::new();
    for (figure, rows) in sheet.figures.iter().zip(&tables) {
        text += &format!("  {}\n", figure.label());
        for [name, median, ratio] in rows {
            let line = format!("    {name:<names$}  {median:>medians$}  {ratio}");
            text += &format!("{}\n", line.trim_end());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn a_small_report() {
        let expected = "\
http: What an HTTP request costs
3 interleaved rounds in random order (seed 7), AMD EPYC, 2 CPUs, 23.5 GiB, Linux 6.12.9, Debian GNU/Linux 12 (bookworm), \
commit 23dc178

keep-alive (requests/s, higher is better; ratios to direct)
                                        direct       nohop  HAProxy tcp
  one host, kept alive, 32 connections    122k  123k  0.99  64.0k  0.52
  a new connection for each request       122k  123k  0.99            –

absent: Envoy: envoy is not installed: see docs/bench.md
note: The load generator reached 99% of its rate.

Goals
  reached       keep-alive, nohop over direct: at least 0.99, is 0.99 (0.99 to 1.01)
  NOT reached   a new connection, nohop over direct: at least 0.995, is 0.99
  not measured  streams, nohop over direct: at least 0.99, is –
";
        let is = render(&sample::small());
        assert_eq!(is, expected, "{is}");
    }

    #[test]
    fn many_contenders_make_a_list_and_no_line_is_too_long() {
        let text = render(&sample::large());
        assert!(text.contains("    HAProxy tcp "), "{text}");
        let is_prose = |line: &str| line.contains("GiB") || line.contains("KiB");
        for line in text.lines().filter(|line| !is_prose(line)) {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
    }

    #[test]
    fn odd_reports_make_text_all_the_same() {
        let text = render(&sample::odd());
        assert!(text.contains("empty (us, lower is better)\n"), "{text}");
    }
}
