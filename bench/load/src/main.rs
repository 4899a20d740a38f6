//! Load for the benchmarks where no existing tool fits, and the servers for it. Who measures prints
//! one JSON document as the last line; who serves prints `listening on ADDR:PORT` and goes on for
//! ever. Times come from CLOCK_MONOTONIC.
#![forbid(unsafe_code)]

mod answer;
mod banner_server;
mod clock;
mod connect;
mod delay;
mod echo;
mod epoll;
mod errors;
mod http;
mod latency;
mod limits;
mod pacer;
mod probe;
mod stream;
mod udp;

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
    /// HTTP requests at a fixed rate, whatever became of those before
    Http(http::Http),
    /// Connects one after another, and what each step of them takes
    Connect(connect::Connect),
    /// Serves: writes a byte to whoever connects, and hangs up
    Greet(banner_server::Greet),
    /// Serves: sends each datagram back
    Echo(echo::Echo),
    /// Datagrams that are to come back
    Udp(udp::Udp),
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
        Command::Connect(connect) => report(&connect.run()?),
        Command::Greet(greet) => greet.run(),
        Command::Echo(echo) => echo.run(),
        Command::Udp(udp) => report(&udp.run()?),
        Command::Probe(probe) => report(&probe.run(&mut io::stdout())?),
        Command::Delay(delay) => delay.run(),
    }
}

fn report(report: &Value) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout(), "{report}")?)
}

/// Tells whoever started this server where it is. Standard output may be closed: it serves anyway.
fn say_listening(address: SocketAddr) {
    let mut out = io::stdout();
    let _ = writeln!(out, "listening on {address}").and_then(|()| out.flush());
}
