//! Servers that echo datagrams, and clients that query them round after round.

use std::collections::BTreeMap;
use std::net::{SocketAddr, SocketAddrV4};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cmd;
use crate::net::ExecContext;
use crate::process::Process;

/// A server that answers each datagram with its name and the datagram.
pub struct Echo {
    /// Where it listens.
    pub address: SocketAddrV4,
    /// Its process.
    pub process: Process,
}

impl Echo {
    /// Starts a server; `listen` may have port 0.
    ///
    /// # Errors
    /// When it can't listen there.
    pub fn start(place: ExecContext<'_>, name: &str, listen: &str) -> Result<Echo> {
        let mut command = place.command(cmd::built("nohop-load")?);
        command.args(["echo", listen, "--name", name]);
        let process = Process::spawn(&format!("udp {name}"), command)?;
        let line = process.wait_for_line(&["listening on "])?;
        let address = line.trim_start_matches("listening on ").parse().context(line.clone())?;
        Ok(Echo { address, process })
    }
}

/// Sockets that send in turn, without end, each waiting for its answer.
pub struct UdpClients {
    process: Process,
    n_sockets: u64,
}

/// The results of the requests up to the end of a round.
#[derive(Debug)]
pub struct Round {
    /// How many there were.
    pub n_requests: u64,
    /// How many got no answer.
    pub n_lost: u64,
    /// How many answers came from another address than the request's.
    pub n_wrong_source: u64,
    /// How often sockets were disconnected, by ECONNABORTED, because their backend had left.
    pub n_aborted: u64,
    /// How often the socket was that was disconnected most often.
    pub n_most_aborted: u64,
    /// How often each other `std::io::ErrorKind` came.
    pub errors: BTreeMap<String, u64>,
}

impl UdpClients {
    /// Starts `n_sockets` sockets that query `address`.
    ///
    /// # Errors
    /// When they can't be started.
    pub fn start(
        place: ExecContext<'_>,
        address: impl Into<SocketAddr>,
        are_connected: bool,
        n_sockets: u64,
    ) -> Result<UdpClients> {
        let how = if are_connected { "connected" } else { "unconnected" };
        let mut command = place.command(cmd::built("nohop-load")?);
        command.args(["udp-rounds", &address.into().to_string()]);
        command.args(["--sockets", &n_sockets.to_string()]);
        command.args((!are_connected).then_some("--unconnected"));
        Ok(UdpClients { process: Process::spawn(&format!("udp {how}"), command)?, n_sockets })
    }

    /// Waits for the first round in which these answered, and no other, and returns what was
    /// counted up to its end.
    ///
    /// # Errors
    /// When there is none in time.
    pub fn wait_until_answered_by(&self, names: &[&str]) -> Result<Round> {
        let text = format!("\"answered_by\":{}", serde_json::json!(names));
        self.round(&text)
    }

    /// Waits for the end of the `n`th round after the last one.
    ///
    /// # Errors
    /// When there is none yet, or no more in time.
    pub fn wait_for_rounds(&self, n: u64) -> Result<Round> {
        let last = Round::read(&self.process.last_line().context("no round yet")?)?;
        self.round(&format!("\"requests\":{},", last.n_requests + n * self.n_sockets))
    }

    fn round(&self, text: &str) -> Result<Round> {
        Round::read(&self.process.wait_for_line(&[text])?)
    }
}

impl Round {
    fn read(line: &str) -> Result<Round> {
        let report: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let count = |key: &str| report[key].as_u64().with_context(|| format!("no {key}: {report}"));
        Ok(Round {
            n_requests: count("requests")?,
            n_lost: count("lost")?,
            n_wrong_source: count("wrong_source")?,
            n_aborted: count("aborted")?,
            n_most_aborted: count("most_aborted")?,
            errors: serde_json::from_value(report["errors"].clone())?,
        })
    }
}
