//! The clients and servers of tests, benchmarks and demo where no existing tool fits. A client prints
//! one JSON document as the last line; a server prints `listening on ADDR:PORT` and serves until it is killed.
//! Times come from CLOCK_MONOTONIC.
#![forbid(unsafe_code)]

mod answer;
mod banner_server;
mod capture;
mod clock;
mod connect;
mod delay;
mod echo;
mod epoll;
mod errors;
mod hello;
mod http;
mod latency;
mod limits;
mod pacer;
mod probe;
mod requests;
mod stream;
mod udp;
mod udp_rounds;

use std::io::{self, Write};
use std::net::SocketAddr;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use serde_json::Value;

/// Makes load, and serves it.
#[derive(Parser)]
#[command(name = "nohop-load", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The connections to some servers, as their packets show them, until SIGTERM
    Capture(capture::Capture),
    /// HTTP requests at a fixed rate, whatever became of those before
    Http(http::Http),
    /// Connects one after another, and what each step of them takes
    Connect(connect::Connect),
    /// Serves: writes a byte to each client, and hangs up
    Greet(banner_server::Greet),
    /// Serves: sends each datagram back, after its name if it has one
    Echo(echo::Echo),
    /// Serves: answers HTTP requests with `hello from NAME`
    Hello(hello::Hello),
    /// HTTP requests on a connection each, and what became of each
    Requests(requests::Requests),
    /// Datagrams that are to come back
    Udp(udp::Udp),
    /// Datagrams that are answered by name, round after round
    UdpRounds(udp_rounds::UdpRounds),
    /// Connects an address again and again, and logs who answers
    Probe(probe::Probe),
    /// Serves: forwards to another server, later than it could
    Delay(delay::Delay),
}

fn main() -> anyhow::Result<()> {
    let Arguments { command } = Arguments::parse();
    clock::wake_precisely();
    limits::raise_files();
    match command {
        Command::Http(http) => {
            if let Some(problem) = http.problem() {
                Arguments::command().error(ErrorKind::ValueValidation, problem).exit();
            }
            report(&http.run()?)
        }
        Command::Capture(capture) => report(&capture.run()?),
        Command::Connect(connect) => report(&connect.run()?),
        Command::Greet(greet) => greet.run(),
        Command::Echo(echo) => echo.run(),
        Command::Hello(hello) => hello.run(),
        Command::Requests(requests) => report(&requests.run()?),
        Command::Udp(udp) => report(&udp.run()?),
        Command::UdpRounds(rounds) => rounds.run(),
        Command::Probe(probe) => report(&probe.run(&mut io::stdout())?),
        Command::Delay(delay) => delay.run(),
    }
}

fn report(report: &Value) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout(), "{report}")?)
}

/// Prints the server's address for its parent. Standard output may be closed: it serves anyway.
fn print_address(address: SocketAddr) {
    let mut out = io::stdout();
    let _ = writeln!(out, "listening on {address}").and_then(|()| out.flush());
}
