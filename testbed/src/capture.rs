//! The connections that a host begins to some servers, as their packets show them.

use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::Value;

use crate::cmd;
use crate::net::ExecContext;
use crate::process::Process;

/// Packets that are looked at, by a packet socket in the host's network namespace.
pub struct Capture(Process);

/// The connections to one server, in the order in which they began.
#[derive(Clone, Debug, Default)]
pub struct Connects(Vec<Connect>);

/// A connection, since the first of a capture to this server; retransmitted SYNs belong to the first.
/// Times are when the kernel sent or received a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect {
    /// When its SYN was sent.
    pub syn: Duration,
    /// When its SYN was answered, by a SYN-ACK or a RST.
    pub answered: Option<Duration>,
    /// Whether its SYN was answered by a RST.
    pub is_refused: bool,
    /// When it was reset after it had been established.
    pub reset: Option<Duration>,
}

impl Capture {
    /// Begins to look at packets to and from these servers.
    ///
    /// # Errors
    /// Without the right to.
    pub fn start(place: ExecContext<'_>, servers: &[SocketAddrV4]) -> Result<Capture> {
        let mut command = place.command(cmd::built("nohop-load")?);
        command.arg("capture").args(servers.iter().map(SocketAddrV4::to_string));
        let process = Process::spawn("nohop-load capture", command)?;
        process.wait_for_line(&["capturing"])?;
        Ok(Capture(process))
    }

    /// Ends it, and returns the connections to each of the servers.
    ///
    /// # Errors
    /// When it ended before.
    pub fn finish(self, servers: &[SocketAddrV4]) -> Result<Vec<Connects>> {
        self.0.signal(Signal::TERM)?;
        let line = self.0.wait_for_line(&["\"servers\""])?;
        let report: Value = serde_json::from_str(&line).context("read the capture's report")?;
        let connects = |server: &SocketAddrV4| {
            let listed = report["servers"][server.to_string()].as_array();
            Connects::read(listed.with_context(|| format!("no {server} in the capture"))?)
        };
        servers.iter().map(connects).collect()
    }
}

impl Connects {
    fn read(listed: &[Value]) -> Result<Connects> {
        let start = listed.first().and_then(|first| first["syn_ns"].as_u64()).unwrap_or(0);
        let at = |value: &Value| value.as_u64().map(|ns| Duration::from_nanos(ns - start.min(ns)));
        let connect = |value: &Value| {
            let refused = at(&value["refused_ns"]);
            Ok(Connect {
                syn: at(&value["syn_ns"]).context("a connection without a SYN")?,
                answered: refused.or(at(&value["accepted_ns"])),
                is_refused: refused.is_some(),
                reset: at(&value["reset_ns"]),
            })
        };
        Ok(Connects(listed.iter().map(connect).collect::<Result<_>>()?))
    }

    /// Them.
    pub fn all(&self) -> &[Connect] {
        &self.0
    }

    /// When the first RST came that answered a SYN.
    pub fn first_refusal(&self) -> Option<Duration> {
        self.0.iter().filter(|connect| connect.is_refused).filter_map(|c| c.answered).min()
    }

    /// When the first SYN was sent that was never answered.
    pub fn first_unanswered(&self) -> Option<Duration> {
        self.0.iter().find(|connect| connect.answered.is_none()).map(|connect| connect.syn)
    }

    /// When each connection began that did so later than this, since then.
    pub fn since(&self, start: Duration) -> Vec<Duration> {
        let later = self.0.iter().filter(|connect| connect.syn > start);
        later.map(|connect| connect.syn - start).collect()
    }
}
