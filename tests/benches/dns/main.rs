//! Queries a second, and how long the slowest hundredth waits: nohop's DNS server beside dnsmasq,
//! each alone on one core and asked by dnsperf from another, in interleaved rounds.

mod served;

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use served::{Dnsmasq, Nohop, Served};

/// The numbers of names that are asked for.
const N_NAMES: [u32; 2] = [1, 10_000];

/// The number of names that are forwarded.
const N_FORWARDED: u32 = 50_000;

/// The rate, in queries a second, at which waiting is measured: one that both can keep up with.
const EASY_RATE: &str = "20000";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, verb, n_names, upstream @ ..] = &arguments[..]
        && verb == served::SERVE
    {
        let upstream = upstream.first().map(|port| port.parse().expect("a port"));
        served::serve(n_names.parse().expect("the number of names"), upstream);
        return ExitCode::SUCCESS;
    }
    for program in ["dnsperf", "dnsmasq", "taskset"] {
        if Command::new(program).arg("--version").output().is_err() {
            eprintln!("can't run: {program} isn't installed; `cargo xtask setup` installs it");
            return ExitCode::FAILURE;
        }
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let (n_rounds, seconds) = if quick { (3, "1") } else { (9, "3") };
    println!("{n_rounds} interleaved rounds of {seconds} s each; medians (least to most)");
    for n_names in N_NAMES {
        compare(n_names, n_rounds, seconds);
    }
    compare_forwarding(n_rounds);
    ExitCode::SUCCESS
}

fn compare(n_names: u32, n_rounds: u32, seconds: &str) {
    let scratch = served::Scratch::new(n_names);
    let servers: [Box<dyn Served>; 2] =
        [Box::new(Nohop::start(n_names, None)), Box::new(Dnsmasq::start(&scratch))];
    let mut rates = [Vec::new(), Vec::new()];
    let mut waits = [Vec::new(), Vec::new()];
    for _ in 0..n_rounds {
        for (idx, server) in servers.iter().enumerate() {
            rates[idx].push(rate(
                server.port(),
                &scratch.questions,
                &["-l", seconds, "-c", "4", "-q", "100"],
            ));
            waits[idx].push(wait_p99_us(server.port(), &scratch.questions, seconds));
        }
    }
    println!("\n{n_names} names");
    tell(&[("queries/s", &rates), ("p99, us", &waits)]);
}

/// Names that another resolver answers, each asked once: none may be lost.
fn compare_forwarding(n_rounds: u32) {
    let scratch = served::Scratch::of_others(N_FORWARDED);
    let upstream = Dnsmasq::upstream();
    let servers: [Box<dyn Served>; 2] = [
        Box::new(Nohop::start(0, Some(upstream.port()))),
        Box::new(Dnsmasq::forwarding(upstream.port())),
    ];
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..n_rounds {
        for (idx, server) in servers.iter().enumerate() {
            let each = ["-n", "1", "-c", "4", "-q", "100", "-t", "10"];
            rates[idx].push(rate(server.port(), &scratch.questions, &each));
        }
    }
    println!("\n{N_FORWARDED} names, forwarded");
    tell(&[("queries/s", &rates)]);
}

/// Prints what was measured of both, in each round, and how they compare.
fn tell(measured: &[(&str, &[Vec<f64>; 2])]) {
    let mut compared = String::new();
    for (what, [ours, theirs]) in measured {
        let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        let [_, ratio, _] = spread(ratios);
        for (server, figures) in [("nohop", ours), ("dnsmasq", theirs)] {
            let [least, median, most] = spread(figures.clone());
            println!("  {what:<10} {server:<8} {median:>9.0} ({least:.0} to {most:.0})");
        }
        let _ =
            writeln!(compared, "  {what:<10} nohop to dnsmasq, median of the rounds: {ratio:.2}");
    }
    print!("{compared}");
}

/// The queries that are answered in a second, as many as can be; none may be lost.
fn rate(port: u16, questions: &Path, arguments: &[&str]) -> f64 {
    let told = dnsperf(port, questions, arguments);
    let lost = after(&told, "Queries lost:");
    assert!(lost.starts_with('0'), "queries were lost: {lost}");
    after(&told, "Queries per second:").parse().expect("dnsperf's rate")
}

/// How long the slowest hundredth of queries waits at least, in microseconds, at an easy rate.
fn wait_p99_us(port: u16, questions: &Path, seconds: &str) -> f64 {
    let arguments = ["-v", "-l", seconds, "-c", "4", "-q", "100", "-Q", EASY_RATE];
    let told = dnsperf(port, questions, &arguments);
    let wait = |line: &str| line.strip_prefix("> NOERROR ")?.rsplit(' ').next()?.parse().ok();
    let mut waits: Vec<f64> = told.lines().filter_map(wait).collect();
    assert!(!waits.is_empty(), "no query was answered:\n{told}");
    waits.sort_by(f64::total_cmp);
    waits[waits.len() * 99 / 100] * 1e6
}

fn dnsperf(port: u16, questions: &Path, arguments: &[&str]) -> String {
    let mut dnsperf = Command::new("taskset");
    dnsperf.args(["-c", "1", "dnsperf", "-s", "127.0.0.1", "-p", &port.to_string(), "-d"]);
    let output = dnsperf.arg(questions).args(arguments).output().expect("dnsperf runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn after<'a>(told: &'a str, what: &str) -> &'a str {
    let line = told.lines().find_map(|line| line.trim_start().strip_prefix(what));
    line.unwrap_or_else(|| panic!("dnsperf tells no `{what}`:\n{told}")).trim()
}

/// The least, the median and the most.
fn spread(mut figures: Vec<f64>) -> [f64; 3] {
    figures.sort_by(f64::total_cmp);
    [figures[0], figures[figures.len() / 2], figures[figures.len() - 1]]
}
