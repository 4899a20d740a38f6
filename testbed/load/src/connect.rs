//! `connect`: what a connection costs, one after another.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{self, RecvFlags, SocketFlags, SocketType};
use serde_json::{Value, json};

use crate::clock::now_ns;
use crate::errors::{self, Failures, Name};
use crate::latency::Latency;
use crate::stream::family;

/// How long a connect, and the first byte, may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Connect {
    /// Where to connect to: an address, or a file with one on each line
    #[arg(value_name = "@FILE|ADDR:PORT", value_parser = Targets::parse)]
    pub targets: Targets,
    /// How many connections
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub times: u64,
    /// Lines from one connection to the next; after the last line comes the first
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub stride: u64,
}

/// Where to connect to; one address at least.
#[derive(Clone, Debug, PartialEq)]
pub struct Targets(Vec<SocketAddr>);

impl Targets {
    fn parse(text: &str) -> Result<Targets, String> {
        let Some(file) = text.strip_prefix('@') else {
            let address = text.parse().map_err(|_| "give ADDR:PORT, or @FILE".to_owned())?;
            return Ok(Targets(vec![address]));
        };
        let lines = fs::read_to_string(file)
            .map_err(|error| format!("{error}; name a file with one ADDR:PORT on each line"))?;
        let mut addresses = Vec::new();
        for (line_n, line) in (1..).zip(lines.lines()) {
            let address = line.trim().parse();
            addresses.push(
                address.map_err(|_| format!("line {line_n} is '{line}'; make it ADDR:PORT"))?,
            );
        }
        if addresses.is_empty() {
            return Err("the file is empty; write one ADDR:PORT on each line".to_owned());
        }
        Ok(Targets(addresses))
    }
}

/// What one connection took, in nanoseconds.
struct Times {
    connect_ns: u64,
    first_byte_ns: u64,
    close_ns: u64,
}

impl Connect {
    /// Connects, and reports.
    ///
    /// # Errors
    /// Never.
    pub fn run(&self) -> anyhow::Result<Value> {
        let Targets(addresses) = &self.targets;
        let mut failures = Failures::of_streams();
        let mut connect = Latency::fine()?;
        let mut first_byte = Latency::fine()?;
        let mut close = Latency::fine()?;
        for n in 0..self.times {
            let address_idx = (n * self.stride % addresses.len() as u64) as usize;
            match connect_once(addresses[address_idx]) {
                Ok(times) => {
                    connect.record(times.connect_ns);
                    first_byte.record(times.first_byte_ns);
                    close.record(times.close_ns);
                }
                Err(name) => failures.add(name),
            }
        }
        Ok(json!({
            "times": self.times,
            "failed": failures.to_json(),
            "connect_ns": connect.to_json_ns(),
            "first_byte_ns": first_byte.to_json_ns(),
            "close_ns": close.to_json_ns(),
        }))
    }
}

/// Connects once. What it takes to set the timeouts isn't part of a connection, and isn't counted.
fn connect_once(address: SocketAddr) -> Result<Times, Name> {
    let start_ns = now_ns();
    let socket = net::socket_with(family(address), SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(errors::of_errno)?;
    let socket_ns = now_ns() - start_ns;
    for timeout in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(&socket, timeout, Some(PATIENCE)).map_err(errors::of_errno)?;
    }
    let began_ns = now_ns();
    net::connect(&socket, &address).map_err(|errno| match errno {
        // A blocking connect reports a timeout so.
        Errno::INPROGRESS => errors::TIMEOUT,
        _ => errors::of_errno(errno),
    })?;
    let connected_ns = now_ns();
    let received = net::recv(&socket, &mut [0; 1], RecvFlags::empty());
    let received_ns = now_ns();
    match received {
        Ok((0, _)) => return Err(errors::CLOSED),
        Ok(_) => {}
        Err(Errno::AGAIN) => return Err(errors::TIMEOUT),
        Err(errno) => return Err(errors::of_errno(errno)),
    }
    drop(socket);
    Ok(Times {
        connect_ns: socket_ns + (connected_ns - began_ns),
        first_byte_ns: socket_ns + (received_ns - began_ns),
        close_ns: now_ns() - received_ns,
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;
    use crate::banner_server;

    #[test]
    fn a_greeter_is_connected() {
        let listener = banner_server::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let greeter = listener.local_addr().unwrap();
        thread::spawn(move || banner_server::serve(&listener));
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let no_server = silent.local_addr().unwrap();
        drop(silent);
        // Of three lines each second one, and from the start again: 0 2 1 0 2 1.
        let targets = Targets(vec![greeter, greeter, no_server]);
        let report = Connect { targets, times: 6, stride: 2 }.run().unwrap();
        assert_eq!(report["times"], 6);
        assert_eq!(report["failed"]["refused"], 2, "{report}");
        let p50 = |name: &str| report[name]["p50"].as_f64().unwrap();
        assert!(p50("connect_ns") > 0.0 && p50("close_ns") > 0.0, "{report}");
        assert!(p50("first_byte_ns") > p50("connect_ns"), "{report}");
    }

    #[test]
    fn targets_say_what_is_wrong_with_them() {
        let table = [
            ("127.0.0.1", "give ADDR:PORT, or @FILE"),
            ("@/dev/null", "the file is empty; write one ADDR:PORT on each line"),
            (
                "@/nonexistent",
                "No such file or directory (os error 2); name a file with one ADDR:PORT on each line",
            ),
        ];
        for (text, expected) in table {
            assert_eq!(Targets::parse(text), Err(expected.to_owned()));
        }
        assert_eq!(
            Targets::parse("127.0.0.1:80"),
            Ok(Targets(vec!["127.0.0.1:80".parse().unwrap()]))
        );
    }
}
