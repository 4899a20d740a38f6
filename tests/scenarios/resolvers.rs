//! Names through real resolvers: those of C libraries, those that stand in front of nohop, and the
//! tools that people ask with.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use testbed::cmd;
use testbed::consul;
use testbed::helloworld::Helloworld;
use testbed::nohop::Nohop;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::cluster::{Catalog, Nodes, vip};

/// A client node with the service helloworld.
struct Fixture {
    nohop: Nohop,
    vip: String,
    nodes: Nodes,
    _catalog: Catalog,
    _helloworld: Helloworld,
}

impl Fixture {
    fn new(config: &str) -> Result<Fixture> {
        let nodes = Nodes::new()?;
        let helloworld = nodes.helloworld("helloworld")?;
        let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
        let nohop = nodes.nohop(&(catalog.config() + config))?;
        let vip = vip(&nohop, "helloworld")?.ip().to_string();
        Ok(Fixture { nohop, vip, nodes, _catalog: catalog, _helloworld: helloworld })
    }

    /// Each of these, a program and its words, prints the VIP and nothing else.
    fn each_finds_the_vip(&self, program: &str, rows: &[&str]) -> Result<()> {
        // Those that report how often they have to ask ask once, however long it takes.
        let patience = match program {
            "dig" => "+time=60 +tries=1",
            "kdig" => "+timeout=60 +retry=0",
            _ => "",
        };
        for words in rows {
            let found = self.nodes.inside().run(program, &format!("{patience} {words}"))?;
            ensure!(found.trim() == self.vip, "{program} {words}: {found:?}, not {}", self.vip);
        }
        Ok(())
    }

    /// curl and getent, whose resolver is glibc's, find the service.
    fn glibc_finds_it(&self) -> Result<()> {
        let found = self.nodes.inside().run("getent", "ahostsv4 helloworld.service")?;
        ensure!(found.starts_with(&format!("{} ", self.vip)), "{found}");
        let answer = self.nodes.curl("helloworld")?;
        ensure!(answer.contains("hello from helloworld"), "{answer}");
        Ok(())
    }

    fn dnsmasq(&self, words: &str) -> Result<Process> {
        dnsmasq_on(&self.nodes, words)
    }
}

/// Starts a dnsmasq on the client node.
pub fn dnsmasq_on(nodes: &Nodes, words: &str) -> Result<Process> {
    dnsmasq_by(nodes.inside().command("dnsmasq"), words)
}

/// Starts a dnsmasq by this command of it.
pub fn dnsmasq_by(mut command: Command, words: &str) -> Result<Process> {
    let common = "--keep-in-foreground --log-facility=- --conf-file=/dev/null --pid-file= \
                  --user=root --no-resolv --no-hosts --bind-interfaces";
    command.args(common.split_whitespace()).args(words.split_whitespace());
    let dnsmasq = Process::spawn("dnsmasq", command)?;
    dnsmasq.wait_for_line(&["started, version"])?;
    Ok(dnsmasq)
}

/// A program of musl's that prints the addresses of a name.
pub fn build_musl(directory: &TempDir) -> Result<PathBuf> {
    let program = directory.path().join("lookup");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/lookup.c");
    cmd::words("musl-gcc", &format!("-static -O1 -o {} {source}", program.display()))?;
    Ok(program)
}

/// `nohop dns query` and `nohop check` see the same as everybody.
pub fn dig() -> Result<()> {
    let fixture = Fixture::new("")?;
    fixture.glibc_finds_it()?;
    fixture.each_finds_the_vip(
        "dig",
        &[
            "+short helloworld.service",
            "+short +tcp helloworld.service",
            "+short +bufsize=512 helloworld.service",
            "+short +noedns helloworld.service",
            "+short +dnssec helloworld.service",
            "+short HelloWorld.SERVICE",
            "+short +norecurse helloworld.service",
        ],
    )?;
    let queried = fixture.nohop.cli("dns query helloworld.service --json")?;
    let document: serde_json::Value = serde_json::from_slice(&queried.stdout)?;
    // While the service isn't live, or the unit isn't attached, the daemon's.
    let is_ours = document["origin"] == "kernel" || document["origin"] == "table";
    ensure!(is_ours && document["code"] == "NOERROR", "{document:#}");
    ensure!(document["answers"][0].to_string().contains(&fixture.vip), "{document:#}");
    let queried = fixture.nohop.cli("dns query outside.example")?;
    let text = String::from_utf8_lossy(&queried.stdout).into_owned();
    ensure!(text.contains("from        nowhere: there is no resolver to ask"), "{text}");
    let checked = fixture.nohop.cli("check")?;
    let text = String::from_utf8_lossy(&checked.stdout).into_owned();
    ensure!(text.contains("ok    lookups of this machine: helloworld.service is"), "{text}");
    Ok(())
}

pub fn kdig() -> Result<()> {
    let rows = ["+short helloworld.service", "+short +tcp helloworld.service"];
    Fixture::new("")?.each_finds_the_vip("kdig", &rows)
}

pub fn drill() -> Result<()> {
    let rows = ["-Q helloworld.service A", "-Q -t helloworld.service A"];
    Fixture::new("")?.each_finds_the_vip("drill", &rows)
}

/// musl's resolver queries A and AAAA at once, and trusts an NXDOMAIN of either.
pub fn musl() -> Result<()> {
    let tempdir = TempDir::new("musl")?;
    let program = build_musl(&tempdir)?;
    let fixture = Fixture::new("")?;
    fixture.each_finds_the_vip(&program.display().to_string(), &["helloworld.service"])?;
    let absent = fixture.nodes.inside().run(&program, "absent.service");
    ensure!(absent.is_err(), "absent.service has an address: {absent:?}");
    Ok(())
}

/// dnsmasq is the machine's resolver, and gives nohop the zone. It strips loopback addresses where
/// it watches for rebinding, except for the configured domains.
pub fn dnsmasq() -> Result<()> {
    let fixture = Fixture::new("dns.listen = [\"127.0.0.1:5354\"]\n")?;
    let delegation = "--listen-address=127.0.0.1 --server=/service/127.0.0.1#5354 \
                      --stop-dns-rebind";
    let dnsmasq = fixture.dnsmasq(delegation)?;
    let stripped = fixture.nodes.dig("+short helloworld.service")?;
    ensure!(stripped.trim().is_empty(), "without rebind-domain-ok: {stripped}");
    dnsmasq.stop()?;

    let whole = "--rebind-domain-ok=/service/ --rev-server=127.128.0.0/9,127.0.0.1#5354";
    let _dnsmasq = fixture.dnsmasq(&format!("{delegation} {whole} --cache-size=0"))?;
    fixture.each_finds_the_vip("dig", &["+short helloworld.service"])?;
    let name = fixture.nodes.dig(&format!("+short -x {}", fixture.vip))?;
    ensure!(name.trim() == "helloworld.service.", "{} is {name:?}", fixture.vip);
    fixture.glibc_finds_it()?;
    fixture.nohop.kill()?;
    fixture.glibc_finds_it()
}

/// dnsmasq sends nohop everything, and nohop's resolv.conf names that dnsmasq: names outside of the
/// zone fail, at once and without a storm, and `status` has the reason.
pub fn circle() -> Result<()> {
    let fixture = Fixture::new("dns.forward = [\"127.0.0.2:53\"]\n")?;
    let dnsmasq = fixture.dnsmasq("--listen-address=127.0.0.2 --server=127.0.0.1 --log-queries")?;
    for name in ["outside.example", "elsewhere.example"] {
        let answer = fixture.nodes.inside().run("dig", &format!("+time=60 +tries=1 {name}"))?;
        ensure!(answer.contains("status: SERVFAIL"), "{answer}");
    }
    let problem = "127.0.0.2:53 sends names outside the zone back to this server";
    fixture.nohop.wait_for_status(|status| status["problems"].to_string().contains(problem))?;
    let answer = fixture.nodes.dig("third.example")?;
    ensure!(answer.contains("status: SERVFAIL"), "{answer}");
    let asked = dnsmasq.tail();
    ensure!(!asked.contains("third.example"), "it was queried all the same:\n{asked}");
    fixture.each_finds_the_vip("dig", &["+short helloworld.service"])?;
    fixture.each_finds_the_vip("dig", &["+short @127.0.0.2 helloworld.service"])
}

/// Who isn't in `dns.allow` is refused everything, and over TCP the connection; and the host itself never is. And a resolv.conf
/// that names nohop alone leaves no upstream, which is reported at once.
pub fn strangers() -> Result<()> {
    let fixture = Fixture::new("dns.allow = [\"192.0.2.0/24\"]\n")?;
    for name in ["helloworld.service", "outside.example"] {
        let words = format!("-b 10.99.0.1 @127.0.0.1 {name}");
        let answer = fixture.nodes.inside().run("dig", &words)?;
        ensure!(answer.contains("status: REFUSED"), "{words}: {answer}");
        // Over TCP before a question is read, so that strangers hold no connections.
        let answer = fixture.nodes.inside().run("dig", &format!("+tcp +tries=1 {words}"));
        let output = answer.unwrap_or_else(|error| format!("{error:#}"));
        ensure!(output.contains("communications error"), "{words} over TCP: {output}");
    }
    fixture.each_finds_the_vip("dig", &["+short @127.0.0.1 helloworld.service"])?;
    fixture.nodes.client.set_resolv_conf("nameserver 127.0.0.1\n")?;
    let answer = fixture.nodes.inside().run("dig", "+time=60 +tries=1 outside.example")?;
    ensure!(answer.contains("status: SERVFAIL"), "{answer}");
    Ok(())
}

/// 5,000 names are forwarded as fast as the other side answers, and each gets its answer. (`cargo
/// xtask bench dns` has 50,000 forwarded, by a build that is as fast as a user's.)
pub fn forwarded() -> Result<()> {
    let fixture = Fixture::new("dns.forward = [\"127.0.0.2:53\"]\n")?;
    let _dnsmasq = fixture.dnsmasq("--listen-address=127.0.0.2 --address=/example/192.0.2.7")?;
    let names = TempDir::new("names")?;
    let file = names.path().join("names");
    let text: String = (0..5_000).map(|idx| format!("n{idx}.example A\n")).collect();
    std::fs::write(&file, text)?;
    let words = format!("-s 127.0.0.1 -d {} -n 1 -c 4 -q 100 -t 60", file.display());
    let report = fixture.nodes.inside().run("dnsperf", &words)?;
    println!("{report}");
    let has = |text: &str| report.lines().any(|line| line.split_whitespace().eq(text.split(' ')));
    ensure!(has("Queries completed: 5000 (100.00%)"), "{report}");
    ensure!(has("Response codes: NOERROR 5000 (100.00%)"), "{report}");
    Ok(())
}

/// How often an agent with a DNS server is started at most.
const MAX_STARTS: u32 = 20;

/// A Consul agent is the machine's resolver, and nohop one of its recursors.
pub fn consul() -> Result<()> {
    let fixture = Fixture::new("")?;
    let start = || {
        let mut command = fixture.nodes.inside().command(consul::program()?);
        let words = "agent -dev -log-level=info -bind=10.99.0.1 -recursor=127.0.0.1:53";
        command.args(words.split_whitespace());
        Process::spawn("consul", command)
    };
    let (mut agent, mut n_starts) = (start()?, 1);
    while let Err(error) = agent.wait_for_line(&["Consul agent running!"]) {
        // It gives its DNS server a second to start, and a busy machine may take longer.
        let is_late = agent.n_lines_with("timeout starting DNS servers") > 0;
        ensure!(is_late && n_starts < MAX_STARTS, error);
        (agent, n_starts) = (start()?, n_starts + 1);
    }
    let rows = [
        "+short @127.0.0.1 -p 8600 helloworld.service",
        "+short +tcp @127.0.0.1 -p 8600 helloworld.service",
    ];
    fixture.each_finds_the_vip("dig", &rows)?;
    fixture.nohop.kill()?;
    // It asks by TCP what it is asked by TCP, which takes a daemon.
    fixture.each_finds_the_vip("dig", &rows[..1])
}

/// How systemd-resolved runs by itself: with a configuration of its own, a folder to run in and a
/// user to become, none of which touch the machine's.
const RESOLVED: &str = r#"
mount -t tmpfs none /run && mkdir /run/systemd &&
cat /etc/passwd > /run/passwd && cat /etc/group > /run/group || exit
grep -q ^systemd-resolve: /run/passwd || {
    echo 'systemd-resolve:x:994:994::/:/usr/sbin/nologin' >> /run/passwd
    echo 'systemd-resolve:x:994:' >> /run/group
    mount --bind /run/passwd /etc/passwd && mount --bind /run/group /etc/group || exit
}
mount --bind "$1" /etc/systemd && exec "$2"
"#;

/// systemd-resolved with what `nohop dns setup --systemd-resolved --apply` writes.
pub fn systemd_resolved() -> Result<()> {
    let fixture = Fixture::new("dns.listen = [\"127.0.0.1:5354\"]\n")?;
    let root = TempDir::new("resolved")?;
    // Another upstream, without which it isn't applied.
    std::fs::create_dir_all(root.path().join("etc"))?;
    std::fs::write(root.path().join("etc/resolv.conf"), "nameserver 192.0.2.1\n")?;
    let applied = fixture.nohop.cli(&format!(
        "dns setup --systemd-resolved --apply --dns-listen 127.0.0.1:5354 --root {}",
        root.path().display()
    ))?;
    ensure!(applied.status.success(), "{applied:?}");
    // Answers are to come from nohop.
    let drop_in = root.path().join("etc/systemd/resolved.conf.d/cache.conf");
    std::fs::write(drop_in, "[Resolve]\nCache=no\n")?;
    let resolved = resolved(&fixture, &root.path().join("etc/systemd"))?;
    fixture.nodes.client.set_resolv_conf("nameserver 127.0.0.53\n")?;
    fixture.each_finds_the_vip(
        "dig",
        &["+short helloworld.service", "+short +tcp helloworld.service"],
    )?;
    fixture.glibc_finds_it()?;
    // It doesn't ask which host has the address, as `nohop dns setup` notes.
    let name = fixture.nodes.dig(&format!("+short -x {}", fixture.vip))?;
    ensure!(name.trim() == "localhost.", "{} is {name:?}", fixture.vip);
    // It asks nohop for all names, and nohop, whose resolv.conf names it now, would ask it again.
    let problem = "127.0.0.53:53 sends names outside the zone back to this server";
    fixture.nohop.wait_for_status(|status| status["problems"].to_string().contains(problem))?;
    fixture.nohop.kill()?;
    fixture.glibc_finds_it()?;
    resolved.stop().map(drop)
}

fn resolved(fixture: &Fixture, etc: &Path) -> Result<Process> {
    let mut command = fixture.nodes.client.outside().command("sh");
    command.args(["-c", RESOLVED, "sh"]).arg(etc).arg(cmd::installed("systemd-resolved")?);
    command.env("SYSTEMD_LOG_LEVEL", "debug").env("SYSTEMD_LOG_TARGET", "console");
    let resolved = Process::spawn("systemd-resolved", command)?;
    resolved.wait_for_line(&["Creating stub listener"])?;
    Ok(resolved)
}
