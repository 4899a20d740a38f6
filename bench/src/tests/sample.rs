//! Made-up reports for the tests of what renders them.

use crate::machine::Machine;
use crate::report::{Better, Contender, Figure, Goal, Outcome, Point, Report};

/// One name, two conditions, three contenders.
pub fn small() -> Report {
    let mut report = report("http", &["direct", "nohop", "HAProxy tcp"]);
    let condition = "one host, kept alive, 32 connections";
    let mut figure = figure("keep-alive", condition, "requests/s", Better::Higher);
    for (contender, rounds) in [
        ("direct", [120_000.0, 122_000.0, 125_000.0]),
        ("nohop", [118_800.0, 123_220.0, 123_750.0]),
        ("HAProxy tcp", [60_000.0, 64_000.0, 65_000.0]),
    ] {
        for (round, value) in rounds.into_iter().enumerate() {
            figure.add(contender, round, Some(value));
        }
    }
    figure.finish();
    let mut second = figure.clone();
    second.condition = "a new connection for each request".to_owned();
    second.rows.retain(|row| row.contender != "HAProxy tcp");
    report.figures = vec![figure, second];
    report.goals = vec![
        goal(
            "keep-alive, nohop over direct",
            "at least 0.99",
            "0.99 (0.99 to 1.01)",
            Outcome::Reached,
        ),
        goal("a new connection, nohop over direct", "at least 0.995", "0.99", Outcome::Missed),
        goal("streams, nohop over direct", "at least 0.99", "", Outcome::NotMeasured),
    ];
    report.contenders[2].version = "HAProxy 3.0.2".to_owned();
    report.contenders[2].config = "bench/peers/haproxy-tcp.cfg".to_owned();
    let absent = Some("envoy is not installed: see docs/bench.md".to_owned());
    report.contenders.push(Contender { absent, ..contender("Envoy") });
    report.notes = vec!["The load generator reached 99% of its rate.".to_owned()];
    report
}

/// Eight contenders, twelve conditions, long names, and curves that lie close together.
pub fn large() -> Report {
    let names = [
        "direct",
        "nohop",
        "HAProxy tcp",
        "HAProxy http",
        "Envoy tcp",
        "nginx stream",
        "IPVS",
        "kube-proxy with iptables, 10k services",
    ];
    let factors = [1.0, 0.99, 0.62, 0.44, 0.38, 0.58, 0.91, 0.82];
    let mut report = report("http", &names);
    report.machine.mitigations = vec!["spectre_v2: Retpolines".to_owned()];
    let mut noise = 7_u64;
    let mut noisy = |value: f64, part: f64| {
        noise =
            noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        value * (1.0 + part * ((noise >> 33) as f64 / f64::from(1_u32 << 31) - 0.5))
    };
    for n in 0..12 {
        let condition = match n {
            0 => "one host, kept alive, 32 connections".to_owned(),
            1 => {
                "a response of 64 KiB, of which the client reads a part only and then waits until \
                  the others are done, from each of 32 backends in turn, over IPv6 and with TLS"
                    .to_owned()
            }
            n => format!("{} connections, a new one for each request", 1 << n),
        };
        let mut requests = figure("Requests a second", &condition, "requests/s", Better::Higher);
        let mut latency = figure("99th percentile of latency", &condition, "us", Better::Lower);
        for (name, factor) in names.iter().zip(factors) {
            for round in 0..7 {
                let value = noisy(factor * 40_000.0 * f64::from(n + 2).sqrt(), 0.12);
                requests.add(name, round, Some(value));
                let value = noisy(80.0 * 2_f64.powi(n) / factor / factor, 0.4);
                latency.add(name, round, (*name != "IPVS" || n != 3).then_some(value));
            }
        }
        report.figures.extend([requests, latency]);
    }
    for services in [1.0, 100.0, 1000.0, 10_000.0] {
        let mut connect = figure("Time to connect, by number of services", "", "us", Better::Lower);
        let mut table = figure("Time to update all services", "", "ms", Better::Lower);
        for n in 0..4 {
            for round in 0..7 {
                let value = noisy(48.0 + 1.5 * f64::from(n) + services / 4000.0, 0.08);
                connect.add(names[n as usize], round, Some(value));
            }
        }
        for (name, factor) in names.iter().zip(factors) {
            for round in 0..7 {
                table.add(name, round, Some(noisy(services / factor.powi(3), 0.5)));
            }
        }
        for figure in [&mut connect, &mut table] {
            figure.point = Some(Point { axis: "services".to_owned(), value: services });
        }
        report.figures.extend([connect, table]);
    }
    report.figures.sort_by_key(|figure| figure.point.is_some());
    report.figures.iter_mut().for_each(Figure::finish);
    report
}

/// All that may be wrong or rare.
pub fn odd() -> Report {
    let mut report = report("odd", &["direct", "nohop"]);
    let mut figures: Vec<Figure> = vec![];
    let mut add = |name: &str, unit: &str, rows: &[(&str, &[Option<f64>])]| {
        let mut figure = figure(name, "a | b <c>", unit, Better::Lower);
        for (contender, rounds) in rows {
            for (round, value) in rounds.iter().enumerate() {
                figure.add(contender, round, *value);
            }
        }
        figure.finish();
        figures.push(figure);
    };
    let one = Some(1.0);
    add("a <b> & \"c\"", "us", &[("direct", &[one]), ("a \"peer\" & <another>", &[Some(2.0)])]);
    add("A b, c", "us", &[("nohop", &[one])]);
    add("empty", "us", &[]);
    add("all failed", "us", &[("direct", &[None, None]), ("nohop", &[None])]);
    let nan = Some(f64::NAN);
    add("some failed", "us", &[("direct", &[None]), ("nohop", &[nan]), ("IPVS", &[nan, one])]);
    add("alone", "requests/s", &[("nohop", &[Some(5.0), Some(6.0)])]);
    add("endless", "", &[("nohop", &[Some(f64::INFINITY)]), ("direct", &[one])]);
    add("below zero", "%", &[("direct", &[Some(-4.0), Some(2.0)]), ("nohop", &[Some(3.0)])]);
    let wild = [Some(10.0), Some(11.0), Some(900.0)];
    add("wild", "ms", &[("direct", &wild), ("nohop", &[Some(9.0), Some(9.5)])]);
    let name = "curve with holes";
    for direct in [Some(5.0), None, Some(7.0)] {
        add(name, "ms", &[("direct", &[direct]), ("nohop", &[one]), ("IPVS", &[None])]);
    }
    let holes = figures.iter_mut().filter(|figure| figure.name == name);
    for (figure, value) in holes.zip([0.0, 1.0, 64.0]) {
        figure.point = Some(Point { axis: "clients & more".to_owned(), value });
    }
    report.figures = figures;
    report
}

fn report(suite: &str, names: &[&str]) -> Report {
    Report {
        suite: suite.to_owned(),
        title: "What an HTTP request costs".to_owned(),
        date: "2026-11-25".to_owned(),
        is_quick: false,
        n_rounds: 3,
        seed: 7,
        took_s: 93.0,
        machine: Machine {
            cpu: "AMD EPYC".to_owned(),
            n_cpus: 2,
            memory_mib: 24105,
            kernel: "6.12.9 #1 SMP".to_owned(),
            system: "Debian GNU/Linux 12 (bookworm)".to_owned(),
            load_before: 0.2,
            commit: "23dc178".to_owned(),
            ..Machine::default()
        },
        contenders: names.iter().map(|name| contender(name)).collect(),
        figures: vec![],
        goals: vec![],
        notes: vec![],
    }
}

fn contender(name: &str) -> Contender {
    Contender::new(name, Ok(String::new()), "")
}

fn figure(name: &str, condition: &str, unit: &str, better: Better) -> Figure {
    Figure {
        name: name.to_owned(),
        condition: condition.to_owned(),
        point: None,
        unit: unit.to_owned(),
        better,
        base: "direct".to_owned(),
        rows: vec![],
    }
}

fn goal(what: &str, goal: &str, is: &str, outcome: Outcome) -> Goal {
    Goal { what: what.to_owned(), goal: goal.to_owned(), is: is.to_owned(), outcome }
}
