//! Traced connections: who connects where, by which service, and what becomes of it; filters, lost
//! events, a switch that ends with its clients and with a daemon that dies, and the key that forbids it.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddrV4;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::TIMEOUT;
use testbed::cmd;
use testbed::consul::instance;
use testbed::nohop::Nohop;
use testbed::process::Process;

use crate::cluster::{BACKEND, Cluster};

/// A client of `GET /v1/trace`.
struct Trace(BufReader<UnixStream>);

impl Trace {
    /// Connections are traced once this returns.
    fn open(nohop: &Nohop, query: &str) -> Result<Trace> {
        let mut stream = UnixStream::connect(nohop.admin().replace("unix:", ""))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        write!(stream, "GET /v1/trace{query} HTTP/1.0\r\n\r\n")?;
        let mut trace = Trace(BufReader::new(stream));
        let status = trace.line()?.context("a status")?;
        ensure!(status.contains(" 200 "), "{status}");
        while trace.line()?.is_some_and(|line| !line.is_empty()) {}
        Ok(trace)
    }

    fn line(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        let n = self.0.read_line(&mut line)?;
        Ok((n > 0).then(|| line.trim_end().to_owned()))
    }

    fn next(&mut self) -> Result<Value> {
        let line = self.line()?.context("the stream has ended")?;
        serde_json::from_str(&line).with_context(|| line.clone())
    }
}

pub fn run() -> Result<()> {
    let mut cluster = Cluster::new(1)?;
    let vip = cluster.vip("helloworld")?;
    let address = cluster.helloworlds[0].address.to_string();
    // No server listens there.
    let dead: SocketAddrV4 = format!("{BACKEND}:9").parse()?;
    cluster.server.register(&instance("dead", "dead-0", dead))?;
    cluster.nohop.wait_for_backends("dead", 1)?;
    let dead_vip = cluster.vip("dead")?;
    let (nohop, nodes) = (&cluster.nohop, &cluster.nodes);

    let mut all = Trace::open(nohop, "")?;
    let mut failed = Trace::open(nohop, "?outcome=failed")?;
    let mut others = Trace::open(nohop, "?not=helloworld&not=dead")?;
    nodes.connect(vip, 1)?;
    let line = all.next()?;
    ensure!(line["service"] == "helloworld" && line["outcome"] == "established", "{line:#}");
    ensure!(line["instance"] == "helloworld-0", "{line:#}");
    ensure!(line["frontend"] == vip.to_string() && line["backend"] == address, "{line:#}");
    ensure!(line["comm"] == "nohop-load" && line["pid"].as_u64() > Some(1), "{line:#}");
    ensure!(line["connect_us"].as_u64() > Some(0) && line["protocol"] == "tcp", "{line:#}");
    let cgroup = nodes.cgroup.path().display().to_string();
    ensure!(line["cgroup"].as_str().is_some_and(|path| path.starts_with(&cgroup)), "{line:#}");

    nodes.connect(dead_vip, 1)?;
    for line in [all.next()?, failed.next()?] {
        ensure!(line["service"] == "dead" && line["outcome"] == "failed", "{line:#}");
        ensure!(line["error"] == "ECONNREFUSED" && line["backend"] == dead.to_string(), "{line:#}");
    }
    nodes.connect(SocketAddrV4::new(*vip.ip(), 81), 1)?;
    for line in [all.next()?, others.next()?] {
        ensure!(line["outcome"] == "refused" && line["backend"].is_null(), "{line:#}");
        ensure!(line["service"].is_null(), "{line:#}");
    }

    // For people, by the command.
    let trace = Process::spawn("nohop trace", nohop.command("trace helloworld")?)?;
    let deadline = Instant::now() + TIMEOUT;
    let line = loop {
        nodes.connect(vip, 1)?;
        match trace.wait_for_line_within(Duration::from_millis(100), &["helloworld"]) {
            Ok(line) => break line,
            Err(error) => ensure!(Instant::now() < deadline, "{error}"),
        }
    };
    ensure!(
        line.contains("nohop-load[") && line.contains(&format!("{vip} -> {address}")),
        "{line}"
    );
    drop((trace, all, failed, others));
    wait_until_off(nohop)?;

    // The daemon notices that a client is killed, also where it has nothing to write.
    let quiet = Process::spawn("nohop trace", nohop.command("trace --outcome failed nothing")?)?;
    wait_until(nohop, |until_ns| until_ns > 0)?;
    quiet.kill();
    wait_until_off(nohop)?;

    of_an_allocation(&cluster, vip)?;
    a_sample(&cluster, vip, dead_vip)?;
    wait_until_off(&cluster.nohop)?;

    loses_what_is_not_read(&cluster, vip)?;
    wait_until_off(&cluster.nohop)?;

    // A daemon that dies leaves an end, and the next one none.
    let _open = Trace::open(&cluster.nohop, "")?;
    ensure!(until_ns(&cluster.nohop)? > 0, "not traced");
    cluster.nohop.kill()?;
    ensure!(until_ns(&cluster.nohop)? > 0, "no end");
    cluster.nohop.start_again()?;
    ensure!(until_ns(&cluster.nohop)? == 0, "traced from the start");

    let mut open = Trace::open(&cluster.nohop, "")?;
    cluster.nohop.configure("admin.trace = false")?;
    ensure!(cluster.nohop.cli("reload")?.status.success(), "reload");
    ensure!(open.line()?.is_none(), "the stream continues");
    ensure!(until_ns(&cluster.nohop)? == 0, "still traced");
    let output = cluster.nohop.cli("trace")?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && error.contains("admin.trace"), "{output:?}");
    Ok(())
}

/// A process in a cgroup that is named as Nomad's raw_exec, exec and java drivers name a task's.
fn of_an_allocation(cluster: &Cluster, vip: SocketAddrV4) -> Result<()> {
    const ALLOCATION: &str = "39e25890-23fb-7513-b98f-97a5310046ad";
    let (nohop, nodes) = (&cluster.nohop, &cluster.nodes);
    let mut lines = Trace::open(nohop, "?service=helloworld")?;
    let scope = nodes.cgroup.path().join(format!("nomad.slice/share.slice/{ALLOCATION}.web.scope"));
    std::fs::create_dir_all(&scope)?;
    let in_scope = |script: &str| -> Result<()> {
        let mut command = nodes.inside().command("sh");
        let script = format!("echo $$ > \"$0/cgroup.procs\" && {script}");
        command.args(["-c", &script]).arg(&scope).arg(format!("http://{vip}/"));
        ensure!(command.status()?.success(), "{script}");
        Ok(())
    };
    in_scope("exec curl -sS -o /dev/null \"$1\"")?;
    let line = lines.next()?;
    ensure!(line["comm"] == "curl" && line["outcome"] == "established", "{line:#}");
    ensure!(line["cgroup"] == scope.display().to_string(), "{line:#}");
    ensure!(line["allocation"] == ALLOCATION && line["task"] == "web", "{line:#}");
    let text = Process::spawn("nohop trace", nohop.command("trace --sample 1")?)?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        in_scope("exec curl -sS -o /dev/null \"$1\"")?;
        match text.wait_for_line_within(Duration::from_millis(100), &["alloc 39e25890 web"]) {
            Ok(_) => return Ok(()),
            Err(error) => ensure!(Instant::now() < deadline, "{error}"),
        }
    }
}

/// One of ten connections, each whole. Those to `dead` end it: that none of 300 is among them has a
/// probability of 2e-14, and that more than 160 of 400 are far less.
fn a_sample(cluster: &Cluster, vip: SocketAddrV4, dead: SocketAddrV4) -> Result<()> {
    let mut sample = Trace::open(&cluster.nohop, "?sample=10")?;
    cluster.nodes.connect(vip, 400)?;
    cluster.nodes.connect(dead, 300)?;
    let mut n_lines = 0;
    loop {
        let line = sample.next()?;
        if line["service"] == "dead" {
            break;
        }
        ensure!(line["outcome"] == "established", "{line:#}");
        n_lines += 1;
    }
    ensure!((1..=160).contains(&n_lines), "{n_lines} of 400");
    Ok(())
}

/// A client that doesn't read for a while gets the number of what it has lost. One that reads nothing
/// for ten seconds is dropped: on a busy machine the next one has to show it.
fn loses_what_is_not_read(cluster: &Cluster, vip: SocketAddrV4) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let mut stalled = Trace::open(&cluster.nohop, "")?;
        cluster.nodes.connect(vip, 4_000)?;
        while let Some(line) = stalled.line()? {
            let line: Value = serde_json::from_str(&line).context(line)?;
            if line["lost"].as_u64() > Some(0) {
                return Ok(());
            }
        }
        ensure!(Instant::now() < deadline, "no loss is reported");
    }
}

/// The end of tracing in the kernel's map; 0 while nothing is traced.
fn until_ns(nohop: &Nohop) -> Result<u64> {
    let map = nohop.pin("maps/CONTROL")?;
    let dump = cmd::words("bpftool", &format!("-j map dump pinned {}", map.display()))?;
    let dump: Value = serde_json::from_str(&dump)?;
    let until_ns = dump[0]["formatted"]["value"]["trace"]["until_ns"].as_u64();
    until_ns.with_context(|| format!("{dump:#}"))
}

fn wait_until_off(nohop: &Nohop) -> Result<()> {
    wait_until(nohop, |until_ns| until_ns == 0)
}

fn wait_until(nohop: &Nohop, is_so: impl Fn(u64) -> bool) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let until_ns = until_ns(nohop)?;
        if is_so(until_ns) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the end of tracing is {until_ns}");
    }
}
