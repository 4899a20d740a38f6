//! Bulk TCP: how much goes through, by one stream and by eight, and the processor time that it costs.

use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use testbed::cmd;
use testbed::net::ExecContext;
use testbed::process::Process;

use crate::node::{Layout, Node};
use crate::peers::{self, DIRECT, Protocol, Services};
use crate::progress::Progress;
use crate::report_builder::{Draft, Quantity};
use crate::suites::site;

const RATE: Quantity = Quantity::higher("bulk TCP", "Gbit/s").over(DIRECT);
const CPU: Quantity =
    Quantity::lower("processor time for a GByte, both sides and what is between", "s").over(DIRECT);
const HOP_CPU: Quantity = Quantity::lower("of that the hop's own processes, for a GByte", "s");

type Site = site::Site<Process>;

/// The port of the only backend: iperf3 uses it for what it agrees upon and for data alike, so that
/// all has to reach the same server.
const PORT: u16 = 5201;

/// How much longer than its transfer iperf3 may take before it counts as failed, in seconds.
const SPARE_S: u32 = 10;

/// The conditions of a run.
struct Plan {
    n_rounds: usize,
    layouts: &'static [Layout],
    n_streams: &'static [usize],
    /// iperf3 takes whole ones.
    seconds: u32,
}

const FULL: Plan = Plan {
    n_rounds: 7,
    layouts: &[Layout::OneHost, Layout::TwoHosts],
    n_streams: &[1, 8],
    seconds: 1,
};
const QUICK: Plan =
    Plan { n_rounds: 1, layouts: &[Layout::OneHost], n_streams: &[1, 8], seconds: 1 };

/// iperf3's results.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Moved {
    /// What arrived, by the receiver's clock.
    gbits_per_s: f64,
    /// What arrived, in units of 10^9 bytes.
    gbytes: f64,
}

/// Runs the suite.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(is_quick: bool) -> Result<Draft> {
    let plan = if is_quick { QUICK } else { FULL };
    let mut draft = Draft::new("bulk TCP by one stream and by eight", plan.n_rounds);
    let (able, contenders) = peers::able(Protocol::Tcp);
    draft.contenders = contenders;
    note_iperf3(&mut draft)?;
    let n_conditions = plan.layouts.len() * plan.n_streams.len();
    let mut progress = Progress::new("throughput", n_conditions * able.len() * plan.n_rounds);
    for &layout in plan.layouts {
        progress.preparing(layout.name());
        let sites = Site::start_all(&able, layout, &mut draft, backend);
        for &n_streams in plan.n_streams {
            for round in 0..plan.n_rounds {
                for site in draft.shuffled(&sites) {
                    let condition = condition(layout, n_streams);
                    progress.step(&format!("{condition}: {}", site.peer.name));
                    let how = (n_streams, plan.seconds);
                    sample(&mut draft, site, &condition, round, how);
                }
            }
        }
    }
    draft.finish();
    Ok(draft)
}

fn note_iperf3(draft: &mut Draft) -> Result<()> {
    let text = cmd::words("iperf3", "--version")?;
    let version = text.lines().next().unwrap_or_default().trim();
    draft.note(format!("generator and backend: {version}"));
    if is_single_threaded(version) {
        draft.note(
            "this iperf3 has one thread on each side, whatever the number of streams: eight streams \
             share one processor there",
        );
    }
    Ok(())
}

/// Whether it's older than 3.16, from which on each stream has a thread of its own.
fn is_single_threaded(version: &str) -> bool {
    let number = version.split_whitespace().nth(1).unwrap_or_default();
    let mut parts = number.split(['.', '-', '+']).map_while(|part| part.parse::<u32>().ok());
    let major_minor = (parts.next(), parts.next());
    matches!(major_minor, (Some(major), Some(minor)) if (major, minor) < (3, 16))
}

/// Adds what went through in a round, and the processor time that it took.
fn sample(
    draft: &mut Draft,
    site: &Site,
    condition: &str,
    round: usize,
    (n_streams, seconds): (usize, u32),
) {
    let (place, address) = (site.node.client_place(), site.running.address(0));
    let act = || transfer(place, address, n_streams, seconds);
    let (moved, cpu) = site.measure(draft, condition, act);
    let per_gbyte = |time: Duration| Some(time.as_secs_f64() / moved?.gbytes);
    draft.add(RATE, condition, site.peer.name, round, moved.map(|moved| moved.gbits_per_s));
    site.add_cpu(draft, [CPU, HOP_CPU], (condition, round), cpu, per_gbyte);
}

fn backend(node: &Node) -> Result<(Process, Services)> {
    let services = Services::one(Protocol::Tcp, vec![Node::backend(0, PORT)]);
    Ok((start_server(node)?, services))
}

/// Starts the only backend, and waits until it listens.
fn start_server(node: &Node) -> Result<Process> {
    let at = Node::backend(0, PORT);
    let mut command = node.backend_place().command("iperf3");
    command.args(["-s", "-B", &at.ip().to_string(), "-p", &PORT.to_string(), "--forceflush"]);
    let process = Process::spawn("iperf3", command)?;
    process.wait_for_line(&["Server listening"])?;
    Ok(process)
}

/// Has iperf3 send as much as it can, for whole seconds.
fn transfer(
    place: ExecContext<'_>,
    address: SocketAddrV4,
    n_streams: usize,
    seconds: u32,
) -> Result<Moved> {
    // It would wait for a silent server for ever.
    let mut command = place.command("timeout");
    command.args([&(seconds + SPARE_S).to_string(), "iperf3", "-J", "--connect-timeout", "2000"]);
    command.args(["-c", &address.ip().to_string(), "-p", &address.port().to_string()]);
    command.args(["-P", &n_streams.to_string(), "-t", &seconds.to_string()]);
    let output = cmd::output(command)?;
    ensure!(output.status.code() != Some(124), "iperf3 doesn't end {SPARE_S} s after it should");
    read_iperf3(&String::from_utf8_lossy(&output.stdout))
}

fn read_iperf3(text: &str) -> Result<Moved> {
    let found: Value =
        serde_json::from_str(text).with_context(|| format!("iperf3's output: {text:?}"))?;
    if let Some(error) = found["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let number = |key: &str| {
        let number = found["end"]["sum_received"][key].as_f64().filter(|number| *number > 0.0);
        number.with_context(|| format!("iperf3 reports no end.sum_received.{key}: nothing arrived"))
    };
    Ok(Moved { gbits_per_s: number("bits_per_second")? / 1e9, gbytes: number("bytes")? / 1e9 })
}

fn condition(layout: Layout, n_streams: usize) -> String {
    let plural = if n_streams == 1 { "" } else { "s" };
    format!("{}, {n_streams} stream{plural}", layout.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iperf3_is_read() {
        let text = r#"{ "start": {}, "intervals": [], "end": {
            "sum_sent": { "bytes": 9000000000, "bits_per_second": 36e9 },
            "sum_received": { "seconds": 2.0, "bytes": 8000000000, "bits_per_second": 32e9 } } }"#;
        let expected = Moved { gbits_per_s: 32.0, gbytes: 8.0 };
        assert_eq!(read_iperf3(text).expect("it can be read"), expected);
        for (text, expected) in [
            ("", "iperf3's output: \"\""),
            (r#"{ "end": {}, "error": "the server is busy" }"#, "iperf3: the server is busy"),
            (
                r#"{ "end": { "sum_received": { "bytes": 0, "bits_per_second": 0 } } }"#,
                "iperf3 reports no end.sum_received.bits_per_second: nothing arrived",
            ),
        ] {
            assert_eq!(read_iperf3(text).expect_err(text).to_string(), expected);
        }
    }

    #[test]
    fn threads_came_with_iperf3_3_16() {
        for (version, expected) in [
            ("iperf 3.12 (cJSON 1.7.15)", true),
            ("iperf 3.15+", true),
            ("iperf 3.16 (cJSON 1.7.15)", false),
            ("iperf 3.17.1+ (cJSON 1.7.15)", false),
            ("iperf 4.0", false),
            ("", false),
        ] {
            assert_eq!(is_single_threaded(version), expected, "{version}");
        }
    }
}
