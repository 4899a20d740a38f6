//! A client that opens connections at a fixed rate, whatever becomes of them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::net::Place;
use crate::process::Process;
use crate::run;

/// Enough that a connection that takes long holds no other one up.
const N_THREADS: u32 = 64;

/// How much longer than planned it may take.
const SLACK: Duration = Duration::from_secs(30);

/// Connections that are being opened.
pub struct Load {
    process: Process,
    rate: u32,
    n_seconds: u32,
}

/// What became of them.
#[derive(Debug)]
pub struct Outcome {
    /// How many were asked for.
    pub n_asked: u64,
    /// How often each answer came.
    pub answers: BTreeMap<String, u64>,
    /// How often each `std::io::ErrorKind` came.
    pub errors: BTreeMap<String, u64>,
    /// How long the slowest took, from `connect` to the end of its answer.
    pub slowest: Duration,
    /// How late the latest was opened.
    pub most_behind: Duration,
    /// How long all took.
    pub took: Duration,
}

impl Load {
    /// Begins to open `rate` connections a second to `address`, for `n_seconds`.
    ///
    /// # Errors
    /// When the client can't be started.
    pub fn start(
        place: Place<'_>,
        address: impl Into<SocketAddr>,
        rate: u32,
        n_seconds: u32,
    ) -> Result<Load> {
        let mut command = place.command(run::built("load")?);
        let (address, threads) = (address.into().to_string(), N_THREADS.to_string());
        let (rate_word, seconds) = (rate.to_string(), n_seconds.to_string());
        command.args([&address, "--rate", &rate_word, "--seconds", &seconds]);
        command.args(["--threads", &threads]);
        Ok(Load { process: Process::spawn("load", command)?, rate, n_seconds })
    }

    /// Waits until as many connections were opened as belong to `n_seconds`.
    ///
    /// # Errors
    /// When it takes much longer than that, or the client ends.
    pub fn wait_until_second(&self, n_seconds: u32) -> Result<()> {
        let line = format!("opened {}", self.rate * n_seconds);
        self.process.wait_for_line(&[&line], self.limit()).map(drop)
    }

    /// Waits for the end: each connection that was asked for was answered or failed.
    ///
    /// # Errors
    /// When it takes much longer than planned, or one is unaccounted for.
    pub fn finish(self) -> Result<Outcome> {
        let line = self.process.wait_for_line(&["\"asked\""], self.limit())?;
        let report: Value = serde_json::from_str(&line).context(line)?;
        let counts = |key: &str| -> Result<BTreeMap<String, u64>> {
            Ok(serde_json::from_value(report[key].clone())?)
        };
        let ms = |key: &str| Duration::from_millis(report[key].as_u64().unwrap_or(u64::MAX));
        let outcome = Outcome {
            n_asked: report["asked"].as_u64().context("a report without a number")?,
            answers: counts("answers")?,
            errors: counts("errors")?,
            slowest: ms("slowest_ms"),
            most_behind: ms("most_behind_ms"),
            took: ms("took_ms"),
        };
        let n_ended: u64 = outcome.answers.values().chain(outcome.errors.values()).sum();
        ensure!(n_ended == outcome.n_asked, "{n_ended} ended: {outcome:?}");
        ensure!(outcome.n_asked == u64::from(self.rate * self.n_seconds), "{outcome:?}");
        Ok(outcome)
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.n_seconds.into()) + SLACK
    }
}
