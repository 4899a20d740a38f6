//! The command line as the harness uses it.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test that can't continue fails")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

fn load() -> Command {
    Command::new(env!("CARGO_BIN_EXE_nohop-load"))
}

fn run(arguments: &str) -> Output {
    load().args(arguments.split_whitespace()).output().unwrap()
}

/// A server that ends with its guard.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(arguments: &str) -> Server {
        let arguments = arguments.split_whitespace();
        let mut child = load().args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("listening on ").unwrap().to_owned();
        Server { child, address }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn bad_arguments_exit_with_2_and_name_the_input() {
    let table = [
        ("", "Usage"),
        ("http nowhere --rate 1 --seconds 1 --connections 1", "nowhere"),
        ("http 127.0.0.1:1 --rate 0 --seconds 1 --connections 1", "'0' for '--rate <RATE>'"),
        ("http 127.0.0.1:1 --rate 1 --seconds -1 --connections 1", "-1"),
        ("http 127.0.0.1:1 --rate 1 --seconds x --connections 1", "give seconds, from 0.001"),
        ("http 127.0.0.1:1 --rate 1 --seconds 1 --connections 0", "--connections"),
        ("http 127.0.0.1:1 --rate 1 --seconds 1", "--connections"),
        ("http 127.0.0.1:1 --rate 1 --seconds 1 --connections 1 --path x", "begins with '/'"),
        ("http 127.0.0.1:1 --rate 1 --seconds 1 --connections 1 --warmup-ms 1000", "--warmup-ms"),
        ("connect 127.0.0.1 --times 1", "give ADDR:PORT, or @FILE"),
        ("connect @/nonexistent --times 1", "@/nonexistent"),
        ("connect 127.0.0.1:1 --times 0", "--times"),
        ("greet 127.0.0.1", "127.0.0.1"),
        ("echo x", "'x'"),
        ("udp 127.0.0.1:1 --seconds 1 --sockets 1", "--window"),
        ("udp 127.0.0.1:1 --seconds 1 --sockets 1 --window 1 --rate 1", "--rate"),
        ("udp 127.0.0.1:1 --seconds 1 --sockets 1 --window 1 --size 7", "--size"),
        ("requests 127.0.0.1:1 --times 1 --name a..b", "a label has 1 to 63 bytes"),
        ("probe 127.0.0.1:1", "--log"),
        ("delay 127.0.0.1:0 127.0.0.1:1", "--delay-us"),
    ];
    for (arguments, named) in table {
        let output = run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {stderr}");
        assert!(stderr.contains(named), "{arguments}: {stderr}");
        assert!(output.stdout.is_empty(), "{arguments}");
    }
}

#[test]
fn servers_say_where_they_listen_and_clients_report_in_one_line() {
    let greeter = Server::start("greet 127.0.0.1:0 --threads 2");
    let proxy = Server::start(&format!("delay 127.0.0.1:0 {} --delay-us 1000", greeter.address));
    let echoer = Server::start("echo 127.0.0.1:0");
    let table = [
        (format!("connect {} --times 10", greeter.address), "times", 10),
        (format!("connect {} --times 10", proxy.address), "times", 10),
        (
            format!("udp {} --seconds 0.1 --sockets 1 --rate 100 --size 9", echoer.address),
            "answered",
            10,
        ),
    ];
    for (arguments, key, expected) in table {
        let output = run(&arguments);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report[key], expected, "{arguments}: {report}");
    }
}
