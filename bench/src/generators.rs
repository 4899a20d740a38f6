//! The load generators, each started where the clients of a node run.

use std::net::SocketAddrV4;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::cmd;
use testbed::net::ExecContext;

use crate::peers::n_workers;

/// wrk's results.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Saturated {
    /// Answered requests.
    pub n_answered: u64,
    /// Requests that failed: not sent, not answered in time, or answered with another status.
    pub n_failed: u64,
    /// Answers a second.
    pub rate: f64,
}

/// Has wrk send as many requests as it can, for whole seconds.
///
/// # Errors
/// When it can't be started, or its output can't be read.
pub fn wrk(
    place: ExecContext<'_>,
    address: SocketAddrV4,
    n_connections: usize,
    are_kept: bool,
    seconds: u32,
) -> Result<Saturated> {
    let mut command = place.command("wrk");
    let n_threads = n_workers().min(n_connections);
    command.args(["-t", &n_threads.to_string(), "-c", &n_connections.to_string()]);
    command.args(["-d", &format!("{seconds}s"), "--timeout", "2s"]);
    if !are_kept {
        command.args(["-H", "Connection: close"]);
    }
    command.arg(format!("http://{address}/"));
    let text = cmd::stdout(command)?;
    read_wrk(&text).with_context(|| format!("wrk's output: {text}"))
}

fn read_wrk(text: &str) -> Result<Saturated> {
    let after = |mark: &str| text.lines().find_map(|line| line.trim().strip_prefix(mark));
    let rate = after("Requests/sec:").context("no rate")?.trim().parse().context("its rate")?;
    let requests = text.lines().find(|line| line.contains(" requests in ")).context("no count")?;
    let n_answered = requests.split_whitespace().next().context("no count")?.parse()?;
    let errors = after("Socket errors:").unwrap_or_default();
    let errors = errors.split(',').filter_map(|part| part.rsplit(' ').next()?.parse::<u64>().ok());
    let others = after("Non-2xx or 3xx responses:").unwrap_or("0").trim().parse::<u64>()?;
    Ok(Saturated { n_answered, n_failed: errors.sum::<u64>() + others, rate })
}

/// Runs this project's own generator with arguments separated by spaces, and returns its findings.
///
/// # Errors
/// When it fails, or prints nothing.
pub fn load(place: ExecContext<'_>, arguments: &str) -> Result<Value> {
    let text = place.run(load_program()?, arguments)?;
    let last = text.lines().last().context("nohop-load prints nothing")?;
    serde_json::from_str(last).with_context(|| format!("nohop-load's output: {last}"))
}

/// What [`connect`] strides by: prime to the numbers of services, so that it meets each, far apart.
pub const STRIDE: usize = 7_919;

/// Connects to targets (`ADDR:PORT`, or `@FILE` with one a line) one after another, striding through them,
/// and returns the findings; a sample in which some connections fail is none.
///
/// # Errors
/// When one fails.
pub fn connect(place: ExecContext<'_>, targets: &str, n_times: usize) -> Result<Value> {
    let found = load(place, &format!("connect {targets} --times {n_times} --stride {STRIDE}"))?;
    let failed = found["failed"].as_object().context("nohop-load reports no `failed`")?;
    let n_failed: u64 = failed.values().filter_map(Value::as_u64).sum();
    ensure!(n_failed == 0, "{n_failed} of {n_times} connections failed: {}", found["failed"]);
    Ok(found)
}

/// This project's own generator.
///
/// # Errors
/// When it hasn't been built.
pub fn load_program() -> Result<PathBuf> {
    cmd::built("nohop-load")
}

/// A number in a generator's findings, by its path, such as `/latency_us/p99`.
///
/// # Errors
/// When it isn't there.
pub fn number(found: &Value, path: &str) -> Result<f64> {
    let number = found.pointer(path).and_then(Value::as_f64);
    number.with_context(|| format!("nohop-load reports no {path}: {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_is_read() {
        let text = "\
Running 1s test @ http://10.98.1.0:8080/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   182.43us   46.39us   1.01ms   78.47%
    Req/Sec   167.41k     3.06k  173.19k    81.82%
  183114 requests in 1.10s, 30.04MB read
  Socket errors: connect 1, read 20, write 300, timeout 4000
  Non-2xx or 3xx responses: 50000
Requests/sec: 166487.05
Transfer/sec:     27.31MB
";
        let expected = Saturated { n_answered: 183_114, n_failed: 54_321, rate: 166_487.05 };
        assert_eq!(read_wrk(text).expect("it can be read"), expected);
        assert!(read_wrk("unable to connect").is_err());
    }
}
