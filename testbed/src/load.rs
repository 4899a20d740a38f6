//! A client that opens connections at a fixed rate, whatever becomes of them, until it is stopped.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::TIMEOUT;
use crate::cmd;
use crate::net::ExecContext;
use crate::process::Process;

/// Enough that a connection that takes long holds no other one up.
const N_THREADS: u32 = 64;

/// The longest that a load runs, in seconds of its schedule: a scenario that takes longer fails.
const MAX_SECONDS: u32 = 1_000;

/// Connections that are being opened.
pub struct Load {
    process: Process,
    rate: u32,
}

/// Their results.
#[derive(Debug)]
pub struct Outcome {
    /// How many were opened.
    pub n_requests: u64,
    /// How often each answer came.
    pub answers: BTreeMap<String, u64>,
    /// How often each `std::io::ErrorKind` came.
    pub errors: BTreeMap<String, u64>,
    /// How long the slowest took, its lookup included.
    pub slowest: Duration,
    /// How long the slowest lookup took that was answered.
    pub slowest_lookup: Duration,
    /// How long all took.
    pub took: Duration,
}

impl Load {
    /// Begins to open `rate` connections a second to `address`.
    ///
    /// # Errors
    /// When the client can't be started.
    pub fn start(
        place: ExecContext<'_>,
        address: impl Into<SocketAddr>,
        rate: u32,
    ) -> Result<Load> {
        Load::start_with(place, &address.into().to_string(), rate)
    }

    /// Begins to look `name` up, at 127.0.0.1 and by one query, `rate` times a second, each time to
    /// open a connection to port 80 of its address.
    ///
    /// # Errors
    /// When the client can't be started.
    pub fn start_by_name(place: ExecContext<'_>, name: &str, rate: u32) -> Result<Load> {
        Load::start_by_resolver(place, name, (Ipv4Addr::LOCALHOST, 53), rate)
    }

    /// The same at another resolver.
    ///
    /// # Errors
    /// When the client can't be started.
    pub fn start_by_resolver(
        place: ExecContext<'_>,
        name: &str,
        resolver: impl Into<SocketAddr>,
        rate: u32,
    ) -> Result<Load> {
        let resolver = resolver.into();
        Load::start_with(place, &format!("127.0.0.1:80 --name {name} --resolver {resolver}"), rate)
    }

    fn start_with(place: ExecContext<'_>, target: &str, rate: u32) -> Result<Load> {
        let mut command = place.command(cmd::built("nohop-load")?);
        let most = rate * MAX_SECONDS;
        let arguments =
            format!("requests {target} --rate {rate} --times {most} --threads {N_THREADS}");
        command.args(arguments.split(' '));
        Ok(Load { process: Process::spawn("load", command)?, rate })
    }

    /// Waits until as many connections were opened as belong to `n_seconds`, from the start on. A
    /// machine that is too slow for the rate takes longer than that.
    ///
    /// # Errors
    /// When it takes ten times as long and [`TIMEOUT`], or the client ends.
    pub fn wait_until_second(&self, n_seconds: u32) -> Result<()> {
        let line = format!("opened {}", self.rate * n_seconds);
        let limit = TIMEOUT + 10 * Duration::from_secs(n_seconds.into());
        self.process.wait_for_line_within(limit, &[&line]).map(drop)
    }

    /// Opens connections for another second at least, so that what has just happened is met by
    /// some, and then no more; waits until each was answered or failed.
    ///
    /// # Errors
    /// When the client has ended before the call: then what happened after that met no
    /// connections. When one of them is unaccounted for.
    pub fn finish(self) -> Result<Outcome> {
        let last = self.process.last_line().unwrap_or_default();
        let n_opened: u32 = match last.strip_prefix("opened ") {
            Some(n_opened) => n_opened.parse().with_context(|| last.clone())?,
            None if last.is_empty() => 0,
            None => anyhow::bail!("the load ended before the scenario did: {last}"),
        };
        self.wait_until_second(n_opened / self.rate + 2)?;
        self.process.signal(Signal::TERM)?;
        let line = self.process.wait_for_line(&["\"requests\""])?;
        let report: Value = serde_json::from_str(&line).context(line)?;
        ensure!(report["was_stopped"] == true, "the load ended before the scenario did: {report}");
        let counts = |key: &str| -> Result<BTreeMap<String, u64>> {
            Ok(serde_json::from_value(report[key].clone())?)
        };
        let number =
            |key: &str| report[key].as_u64().with_context(|| format!("no {key}: {report}"));
        let slowest = |what: &str| {
            let us = report[what]["max"].as_f64().unwrap_or_default();
            Duration::from_micros(us as u64)
        };
        let outcome = Outcome {
            slowest: slowest("request_us"),
            slowest_lookup: slowest("lookup_us"),
            n_requests: number("requests")?,
            answers: counts("answers")?,
            errors: counts("errors")?,
            took: Duration::from_millis(number("took_ms")?),
        };
        let n_ended: u64 = outcome.answers.values().chain(outcome.errors.values()).sum();
        ensure!(n_ended == outcome.n_requests, "{n_ended} ended: {outcome:?}");
        Ok(outcome)
    }
}
