//! A kernel that is locked down: programs can't read its memory, and nohop does without.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::fixture::{Place, Server, VIP, ask, client, connect, connect_udp, service, table, ways};
use lb_userspace::table::Protocols;

/// Whether the running kernel is locked down as far as it goes.
pub fn is_locked_down() -> bool {
    let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    lockdown.contains("[confidentiality]")
}

/// The programs load and translate, for every kind of socket, and missing features are reported.
pub fn it_serves() {
    let (server, place) = (Server::start(b'a'), Place::new());
    let echo = crate::fixture::Echo::on(b'a', server.address);
    let mut datapath = place.start();
    let mut web = service("web", VIP, &[(server.address, 1)]);
    web.protocols = Protocols::Both;
    datapath.apply(&table(vec![web])).unwrap();
    for way in ways(VIP, 80) {
        assert_eq!(connect(way).unwrap(), 'a', "{way}");
        assert_eq!(connect_udp(way).unwrap(), 'a', "{way}");
        assert_eq!(ask(&client(way), way).unwrap(), ('a', way));
    }
    let limits: Vec<String> = datapath.limits().iter().map(ToString::to_string).collect();
    assert_eq!(limits.len(), 1, "{limits:?}");
    assert!(limits[0].contains("lockdown=confidentiality"), "{limits:?}");
    datapath.detach();
    drop(echo);
}

/// So an operator reads in `check` and in `status`.
pub fn it_is_reported() {
    const LOCKED: &str = "the kernel is locked down (lockdown=confidentiality)";
    let place = Place::new();
    let dir = std::path::Path::new("/run/lockdown");
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("catalog.toml"), "service = []\n").unwrap();
    let socket = format!("unix:{}/admin.sock", dir.display());
    let config = format!(
        "cgroup = {:?}\nbpffs = {:?}\nstate_dir = {:?}\nadmin.listen = [{socket:?}]\n\
         dns.listen = [\"127.0.0.1:5353\"]\n[catalog]\nsources = [\"file\"]\nfile = {:?}\n",
        place.cgroup.path,
        place.options.bpffs,
        dir,
        dir.join("catalog.toml"),
    );
    let path = dir.join("nohop.toml");
    fs::write(&path, config).unwrap();
    let nohop = |words: &[&str]| {
        let output =
            Command::new("nohop").args(words).env("NOHOP_ADMIN", &socket).output().unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let check = nohop(&["check", "--config", path.to_str().unwrap()]);
    let line = format!("note  reading the kernel's memory: {LOCKED}");
    assert!(check.contains(&line) && check.contains("ok    eBPF programs"), "{check}");

    let mut daemon = Command::new("nohop")
        .args(["run", "--on-exit", "detach", "--config", path.to_str().unwrap()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(daemon.stderr.take().unwrap()).lines();
    let mut seen = Vec::new();
    let started = lines.by_ref().map_while(Result::ok).any(|line| {
        let is_last = line.contains("answering *.");
        seen.push(line);
        is_last
    });
    let status = nohop(&["status"]);
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&daemon),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    seen.extend(lines.map_while(Result::ok));
    daemon.wait().unwrap();
    assert!(started && status.contains(LOCKED), "{status}\n{seen:?}");
}
