//! A report as Markdown, which reads well raw, too.

use crate::format::{self, NONE};
use crate::report::{Chart, Contender, Figure, Goal, Outcome, Report, Row};
use crate::stats::Spread;

/// Where the text finds what it links to.
#[derive(Clone, Debug, Default)]
pub struct Links {
    /// Names of figures and the files with their pictures, relative to the text.
    pub pictures: Vec<(String, String)>,
    /// What leads from the text's directory to the repository's, such as `../../`; without it, nothing
    /// in there is linked to.
    pub to_root: Option<String>,
}

/// The whole report.
pub fn render(report: &Report, links: &Links) -> String {
    let mut parts = vec![format!("# {}: {}\n", report.suite, inline(&report.title))];
    parts.push(format!("{}, {}, in {}.\n", report.date, report.rounds(), took(report.took_s)));
    parts.push(report.machine.markdown());
    if !report.goals.is_empty() {
        parts.push(format!("## Goals\n\n{}", goals(&report.goals)));
    }
    let charts = report.charts();
    if !charts.is_empty() {
        parts.push("## Figures\n".to_owned());
        parts.push(how_to_read(report, &charts));
    }
    parts.extend(charts.iter().map(|chart| figures(chart, links)));
    let absent: String = report.contenders.iter().filter_map(absence).collect();
    if !absent.is_empty() {
        parts.push(format!("## Absent\n\n{absent}"));
    }
    let present: Vec<&Contender> =
        report.contenders.iter().filter(|contender| contender.absent.is_none()).collect();
    if !present.is_empty() {
        parts.push(format!("## Contenders\n\n{}", contenders(&present, links)));
    }
    if !report.notes.is_empty() {
        let notes: String =
            report.notes.iter().map(|note| format!("- {}\n", inline(note))).collect();
        parts.push(format!("## Notes\n\n{notes}"));
    }
    parts.join("\n")
}

fn took(seconds: f64) -> String {
    match seconds.round() as u64 {
        seconds @ ..120 => format!("{seconds} s"),
        seconds => format!("{} min", (seconds + 30) / 60),
    }
}

fn how_to_read(report: &Report, charts: &[Chart]) -> String {
    let has_ratios = charts.iter().any(|chart| !chart.bases().is_empty());
    let cell = match (has_ratios, report.n_rounds > 1) {
        (true, true) => {
            "median (ratio to the base, taken round by round; its 95% interval, or of fewer than six \
             rounds its min–max). Where there is no ratio: median (min–max)"
        }
        (true, false) => "value (ratio to the base)",
        (false, true) => "median (min–max)",
        (false, false) => "value",
    };
    format!("Each cell: {cell}.\n")
}

fn goals(goals: &[Goal]) -> String {
    let mut rows = vec![["goal", "aim", "measured", ""].map(str::to_owned).to_vec()];
    for goal in goals {
        let outcome = match goal.outcome {
            Outcome::Reached => "reached",
            Outcome::Missed => "**missed**",
            Outcome::Undecided => "undecided",
            Outcome::NotMeasured => "not measured",
        };
        let is = if goal.is.is_empty() { NONE } else { &goal.is };
        rows.push([&goal.what, &goal.goal, is, outcome].map(inline).to_vec());
    }
    table(&rows)
}

fn figures(chart: &Chart, links: &Links) -> String {
    let name = inline(chart.name);
    let bases = chart.bases();
    let ratios =
        if bases.is_empty() { String::new() } else { format!("; ratios to {}", inline(&bases)) };
    let mut text = format!("### {name}\n\n{}{ratios}.\n\n", inline(&chart.subtitle()));
    if let Some((_, file)) = links.pictures.iter().find(|(figure, _)| figure == chart.name) {
        text += &format!("![{name}]({file})\n\n");
    }
    let mut rows = vec![vec![chart.axis.unwrap_or_default().to_owned()]];
    rows[0].extend(chart.contenders.iter().map(|name| inline(name)));
    for figure in &chart.figures {
        let mut row = vec![inline(&condition(chart, figure))];
        let cells = chart.contenders.iter().map(|name| cell(figure.row(name), chart.unit));
        row.extend(cells);
        rows.push(row);
    }
    if chart.contenders.is_empty() {
        text += "Nothing was measured.\n";
    } else {
        text += &table(&rows);
    }
    text
}

/// Of a point, the number alone: the head has the unit.
fn condition(chart: &Chart, figure: &Figure) -> String {
    match &figure.point {
        Some(point) if chart.axis.is_some() && figure.condition.is_empty() => {
            format::count(point.value)
        }
        _ => figure.label(),
    }
}

fn absence(contender: &Contender) -> Option<String> {
    let why = contender.absent.as_ref()?;
    Some(format!("- {}: {}\n", inline(&contender.name), inline(why)))
}

fn contenders(contenders: &[&Contender], links: &Links) -> String {
    let mut rows = vec![["contender", "version", "configuration"].map(str::to_owned).to_vec()];
    for contender in contenders {
        let config = match &links.to_root {
            _ if contender.config.is_empty() => NONE.to_owned(),
            Some(to_root) => format!("[{0}]({to_root}{0})", contender.config),
            None => contender.config.clone(),
        };
        let version = if contender.version.is_empty() { NONE } else { &contender.version };
        rows.push(vec![inline(&contender.name), inline(version), config]);
    }
    table(&rows)
}

/// Cells that are longer don't widen their column: one long condition shall not move all others.
const MAX_PADDED: usize = 72;

/// A table whose first row is its head, with columns as wide as their widest cells.
fn table(rows: &[Vec<String>]) -> String {
    let n_columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..n_columns)
        .map(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.filter(|width| *width <= MAX_PADDED).max().unwrap_or(0).max(3)
        })
        .collect();
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let padded = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        line(cells.collect())
    };
    let mut lines: Vec<String> = rows.iter().map(padded).collect();
    lines.insert(1.min(lines.len()), line(widths.iter().map(|width| "-".repeat(*width)).collect()));
    lines.concat()
}

/// Text that starts no markup and ends no cell.
fn inline(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;").replace(['\n', '\r'], " ")
}

/// A table's cell: the median, the ratio to the base, and the 95% interval of that, or its spread where
/// there are few rounds, or the spread of the value where there is no ratio: `121k (0.99; 0.95–1.02)`, `122k (118k–125k)`.
fn cell(row: Option<&Row>, unit: &str) -> String {
    let Some(Row { spread: Some(spread), ratio: ratios, interval, .. }) = row else {
        return NONE.to_owned();
    };
    let median = format::humane(spread.median, unit);
    match ratios {
        Some(ratios) if is_spread(ratios) => {
            let (low, high) =
                interval.map_or((ratios.min, ratios.max), |interval| (interval.low, interval.high));
            format!(
                "{median} ({}; {}–{})",
                format::ratio(ratios.median),
                format::ratio(low),
                format::ratio(high)
            )
        }
        Some(ratios) => format!("{median} ({})", format::ratio(ratios.median)),
        None if is_spread(spread) => {
            format!("{median} ({})", format::range(spread.min, spread.max, unit))
        }
        None => median,
    }
}

fn is_spread(spread: &Spread) -> bool {
    spread.min < spread.max
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Interval;
    use crate::tests::sample;

    #[test]
    fn a_small_report() {
        let links = Links {
            pictures: vec![("keep-alive".to_owned(), "2026-11-25-http-keep-alive.svg".to_owned())],
            to_root: Some("../../".to_owned()),
        };
        let expected = "\
# http: What an HTTP request costs

2026-11-25, 3 interleaved rounds in random order (seed 7), in 93 s.

- Machine: AMD EPYC, 2 CPUs, 23.5 GiB
- Kernel: 6.12.9 #1 SMP
- System: Debian GNU/Linux 12 (bookworm)
- Load before the run: 0.20
- Commit: 23dc178

## Goals

| goal                                | aim            | measured            |              |
| ----------------------------------- | -------------- | ------------------- | ------------ |
| keep-alive, nohop over direct       | at least 0.99  | 0.99 (0.99 to 1.01) | reached      |
| a new connection, nohop over direct | at least 0.995 | 0.99                | **missed**   |
| streams, nohop over direct          | at least 0.99  | –                   | not measured |

## Figures

Each cell: median (ratio to the base, taken round by round; its 95% interval, or of fewer than six \
rounds its min–max). Where there is no ratio: median (min–max).

### keep-alive

requests/s, higher is better; ratios to direct.

![keep-alive](2026-11-25-http-keep-alive.svg)

|                                      | direct           | nohop                  | HAProxy tcp             |
| ------------------------------------ | ---------------- | ---------------------- | ----------------------- |
| one host, kept alive, 32 connections | 122k (120k–125k) | 123k (0.99; 0.99–1.01) | 64.0k (0.52; 0.50–0.52) |
| a new connection for each request    | 122k (120k–125k) | 123k (0.99; 0.99–1.01) | –                       |

## Absent

- Envoy: envoy is not installed: see docs/bench.md

## Contenders

| contender   | version       | configuration                                                    |
| ----------- | ------------- | ---------------------------------------------------------------- |
| direct      | –             | –                                                                |
| nohop       | –             | –                                                                |
| HAProxy tcp | HAProxy 3.0.2 | [bench/peers/haproxy-tcp.cfg](../../bench/peers/haproxy-tcp.cfg) |

## Notes

- The load generator reached 99% of its rate.
";
        let is = render(&sample::small(), &links);
        assert_eq!(is, expected, "{is}");
    }

    #[test]
    fn odd_reports_make_text_all_the_same() {
        let text = render(&sample::odd(), &Links::default());
        for expected in [
            "| a \\| b &lt;c> | –      | –     | 1 ms |",
            "### empty\n\nus, lower is better.\n\nNothing was measured.\n",
            "| a \\| b &lt;c> | –      | –     |",
        ] {
            let expected = expected.replace("1 ms", "1 us");
            assert!(text.contains(&expected), "{expected} in\n{text}");
        }
        let mut quick = sample::odd();
        quick.is_quick = true;
        assert!(render(&quick, &Links::default()).contains("QUICK RUN of 3 interleaved rounds"));
        quick.figures.clear();
        quick.contenders.clear();
        assert!(!render(&quick, &Links::default()).contains("##"));
    }

    #[test]
    fn durations() {
        for (seconds, expected) in [(0.4, "0 s"), (93.0, "93 s"), (600.0, "10 min")] {
            assert_eq!(took(seconds), expected);
        }
    }

    #[test]
    fn cells() {
        let spread = |median, min, max| Some(Spread { median, min, max });
        let cell = |spread, ratio| {
            let row =
                Row { contender: String::new(), rounds: vec![], spread, ratio, interval: None };
            super::cell(Some(&row), "requests/s")
        };
        for (value, ratio, expected) in [
            (None, None, "–"),
            (spread(121e3, 118e3, 125e3), None, "121k (118k–125k)"),
            (spread(121e3, 121e3, 121e3), None, "121k"),
            (spread(121e3, 118e3, 125e3), spread(0.99, 0.95, 1.02), "121k (0.99; 0.95–1.02)"),
            (spread(121e3, 121e3, 121e3), spread(0.99, 0.99, 0.99), "121k (0.99)"),
        ] {
            assert_eq!(cell(value, ratio), expected);
        }
        assert_eq!(super::cell(None, "us"), "–");
        let row = Row {
            contender: String::new(),
            rounds: vec![],
            spread: spread(121e3, 118e3, 125e3),
            ratio: spread(0.99, 0.90, 1.10),
            interval: Some(Interval { median: 0.99, low: 0.98, high: 1.0 }),
        };
        assert_eq!(super::cell(Some(&row), "requests/s"), "121k (0.99; 0.98–1.00)");
    }
}
