//! The backends of the tests, and the client that counts which of them answered.

use std::collections::BTreeMap;
use std::net::{SocketAddr, SocketAddrV4};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cmd;
use crate::net::ExecContext;
use crate::process::Process;

/// A server that answers every HTTP request with `hello from NAME`.
pub struct Helloworld {
    /// Where it listens.
    pub address: SocketAddrV4,
    /// Its process.
    pub process: Process,
}

impl Helloworld {
    /// Starts a server; `listen` may have port 0.
    ///
    /// # Errors
    /// When it can't listen there.
    pub fn start(place: ExecContext<'_>, name: &str, listen: &str) -> Result<Helloworld> {
        let mut command = place.command(cmd::built("nohop-load")?);
        command.args(["hello", listen, "--name", name]);
        let process = Process::spawn(&format!("helloworld {name}"), command)?;
        let line = process.wait_for_line(&["listening on "])?;
        let address = line.trim_start_matches("listening on ").parse().context(line.clone())?;
        Ok(Helloworld { address, process })
    }
}

/// The results of a number of connections.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Connects {
    /// How often each answer came.
    pub answers: BTreeMap<String, u64>,
    /// How often each `std::io::ErrorKind` came.
    pub errors: BTreeMap<String, u64>,
    /// How often getpeername() of a connected socket returned each address.
    pub peers: BTreeMap<String, u64>,
}

impl Connects {
    /// Whether each of them ended in this error.
    pub fn all_failed_with(&self, error: &str) -> bool {
        self.answers.is_empty() && self.errors.keys().eq([error])
    }

    /// Whether each of them was answered, and each answer fits.
    pub fn all_answered(&self, fits: impl Fn(&str) -> bool) -> bool {
        self.errors.is_empty() && !self.answers.is_empty() && self.answers.keys().all(|a| fits(a))
    }
}

/// Connects to `address` a number of times, several connections at once, each with a request.
///
/// # Errors
/// When the client doesn't work; a failed connection is none.
pub fn connect(
    place: ExecContext<'_>,
    address: impl Into<SocketAddr>,
    n_times: u32,
) -> Result<Connects> {
    requests(place, &format!("{} --times {n_times}", address.into()))
}

/// The same, one connection after the other: each knows what became of the one before.
///
/// # Errors
/// When the client doesn't work; a failed connection is none.
pub fn connect_in_turn(
    place: ExecContext<'_>,
    address: impl Into<SocketAddr>,
    n_times: u32,
) -> Result<Connects> {
    requests(place, &format!("{} --times {n_times} --threads 1", address.into()))
}

fn requests(place: ExecContext<'_>, arguments: &str) -> Result<Connects> {
    let report = place.run(cmd::built("nohop-load")?, &format!("requests {arguments}"))?;
    let report: Value = serde_json::from_str(&report).context("read the client's report")?;
    let counts = |key: &str| -> Result<BTreeMap<String, u64>> {
        Ok(serde_json::from_value(report[key].clone())?)
    };
    Ok(Connects { answers: counts("answers")?, errors: counts("errors")?, peers: counts("peers")? })
}
