//! Runs dnsperf and reads its output.

use std::fs::{self, File};
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use testbed::cmd;
use testbed::net::ExecContext;

use crate::pin;
use crate::stats::quantile;

/// Where dnsperf runs, and the server.
pub type At<'a> = (ExecContext<'a>, SocketAddrV4);

/// dnsperf's results.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Queries that were sent.
    pub n_sent: u64,
    /// Queries that were answered with NOERROR.
    pub n_good: u64,
    /// How long it took.
    pub seconds: f64,
}

impl Summary {
    /// Good answers a second.
    pub fn rate(self) -> f64 {
        self.n_good as f64 / self.seconds
    }

    /// Queries that got no answer or a bad one.
    pub fn n_failed(self) -> u64 {
        self.n_sent.saturating_sub(self.n_good)
    }
}

/// Queries a server with further arguments, separated by spaces.
///
/// # Errors
/// When dnsperf can't be started, its output can't be read, or no query is answered.
pub fn query(at: At<'_>, questions: &Path, arguments: &str) -> Result<Summary> {
    read(&start(at, questions, arguments)?)
}

/// The same from two threads on all processors.
///
/// # Errors
/// As [`query`].
pub fn query_from_all(at: At<'_>, questions: &Path, arguments: &str) -> Result<Summary> {
    let (output, file) = command(at, questions, &format!("{arguments} -T 2"))?;
    read(&finish(cmd::output(output)?, &file)?)
}

/// The same as [`query`], and how long the slowest hundredth of those that were answered took at least, in
/// microseconds.
///
/// # Errors
/// As [`query`].
pub fn query_and_list(at: At<'_>, questions: &Path, arguments: &str) -> Result<(Summary, f64)> {
    let text = start(at, questions, &format!("{arguments} -v"))?;
    Ok((read(&text)?, quantile(&waits_us(&text), 0.99)))
}

fn start(at: At<'_>, questions: &Path, arguments: &str) -> Result<String> {
    let (command, file) = command(at, questions, arguments)?;
    finish(pin::on(pin::CLIENT, || cmd::output(command))?, &file)
}

/// The command, and the file to which it writes: its lines for each query, which no other process then
/// has to read meanwhile.
fn command(
    (place, address): At<'_>,
    questions: &Path,
    arguments: &str,
) -> Result<(Command, PathBuf)> {
    let mut command = place.command("dnsperf");
    command.args(["-s", &address.ip().to_string(), "-p", &address.port().to_string(), "-d"]);
    command.arg(questions).args(arguments.split_whitespace());
    let file = questions.with_extension("out");
    command.stdout(File::create(&file).with_context(|| format!("make {}", file.display()))?);
    Ok((command, file))
}

fn finish(output: Output, file: &Path) -> Result<String> {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "dnsperf failed, {}: {errors}", output.status);
    fs::read_to_string(file).with_context(|| format!("read {}", file.display()))
}

fn read(text: &str) -> Result<Summary> {
    let after = |mark: &str| {
        let line = text.lines().find_map(|line| line.trim_start().strip_prefix(mark));
        line.map(str::trim).with_context(|| format!("dnsperf prints no `{mark}`"))
    };
    let n_sent = after("Queries sent:")?.parse().context("dnsperf's number of queries")?;
    let codes = after("Response codes:").unwrap_or_default();
    let n_good = codes.split(", ").find_map(|code| code.strip_prefix("NOERROR "));
    let n_good = n_good.and_then(|count| count.split(' ').next()?.parse().ok()).unwrap_or(0);
    let seconds = after("Run time (s):")?.parse().context("dnsperf's run time")?;
    ensure!(n_good > 0, "of {n_sent} queries none got a good answer; {codes}");
    Ok(Summary { n_sent, n_good, seconds })
}

/// How long each good answer took, in microseconds.
fn waits_us(text: &str) -> Vec<f64> {
    let wait = |line: &str| -> Option<f64> {
        line.strip_prefix("> NOERROR ")?.rsplit(' ').next()?.parse().ok()
    };
    text.lines().filter_map(wait).map(|seconds| seconds * 1e6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
DNS Performance Testing Tool
Version 2.10.0

[Status] Sending queries (to 127.0.0.1:53)
> NOERROR n0.service A 0.000120
> SERVFAIL n1.service A 0.000999
> NOERROR n2.service A 0.000300
[Status] Testing complete (time limit)

Statistics:

  Queries sent:         5650
  Queries completed:    5640 (99.82%)
  Queries lost:         10 (0.18%)

  Response codes:       SERVFAIL 40 (0.71%), NOERROR 5600 (99.29%)
  Average packet size:  request 28, response 44
  Run time (s):         0.500000
  Queries per second:   11280.000000
";

    #[test]
    fn dnsperf_is_read() {
        let summary = read(OUTPUT).expect("it can be read");
        assert_eq!(summary, Summary { n_sent: 5650, n_good: 5600, seconds: 0.5 });
        assert_eq!((summary.rate(), summary.n_failed()), (11_200.0, 50));
        assert_eq!(waits_us(OUTPUT).map_round(), [120.0, 300.0]);
        let none = OUTPUT.replace("NOERROR 5600", "NXDOMAIN 5600");
        let error = read(&none).expect_err("no good answer").to_string();
        assert!(error.contains("NXDOMAIN"), "{error}");
        assert!(read("Error: unable to bind").is_err());
    }

    trait MapRound {
        fn map_round(self) -> Vec<f64>;
    }
    impl MapRound for Vec<f64> {
        fn map_round(self) -> Vec<f64> {
            self.into_iter().map(f64::round).collect()
        }
    }
}
