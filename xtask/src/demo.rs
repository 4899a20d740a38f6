//! The demo: the main job, for real, in a network namespace and a cgroup of its own.

use std::io::{IsTerminal, stdout};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::cgroup::Cgroup;
use testbed::consul::{self, Consul, instance};
use testbed::helloworld::Helloworld;
use testbed::net::Host;
use testbed::nohop::{Nohop, service};
use testbed::{cleanup, cmd};

/// What a person needs to enter the demo and look around.
struct Demo {
    nohop: Nohop,
    backends: Vec<Helloworld>,
    _consul: Consul,
    cgroup: Cgroup,
    host: Arc<Host>,
}

/// Plays the demo; with `keep` it runs on afterwards, until Ctrl-C. Makes itself root by sudo.
///
/// # Errors
/// When something it needs is missing, or doesn't do what it should.
pub fn demo(keep: bool) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        println!("Network namespaces, cgroups and eBPF need root: going on with sudo.");
        let mut sudo = Command::new("sudo");
        sudo.arg(std::env::current_exe()?).args(["demo", "--built"]).args(keep.then_some("--keep"));
        return Err(sudo.exec()).context("start sudo; as root the demo runs without");
    }
    cleanup::on_signals()?;
    let mut demo = Demo::start()?;
    demo.play()?;
    if keep {
        let inside = demo.host.inside(&demo.cgroup);
        heading("It runs on, until Ctrl-C. To enter it, as root:");
        println!("{} bash", inside.shell_prefix());
        println!("\nThere: `curl http://helloworld.service/`, and `nohop services` after");
        println!("export NOHOP_ADMIN={}", demo.nohop.admin());
        println!("export PATH=$PATH:{}", directory(&cmd::built("nohop")?));
        loop {
            thread::park(); // the signal's handler cleans up and ends the process
        }
    }
    Ok(())
}

impl Demo {
    fn start() -> Result<Demo> {
        heading("A node: a network namespace, a cgroup, and a Consul agent");
        let host = Host::new("demo")?;
        let cgroup = Cgroup::new()?;
        let consul = Consul::dev(&host)?;
        println!("{}", consul::version()?);

        heading("Three backends on random ports, registered with the tag `routed`");
        let mut backends = Vec::new();
        for name in ["alice", "bob", "carol"] {
            let backend = Helloworld::start(host.outside(), name, "127.0.0.1:0")?;
            let mut registration = instance("helloworld", name, backend.address);
            let url = format!("http://{}/", backend.address);
            registration["Check"] =
                json!({ "HTTP": url, "Interval": "1s", "Timeout": "1s", "Status": "passing" });
            consul.register(&registration)?;
            println!("{name} at {}", backend.address);
            backends.push(backend);
        }

        heading("nohop, which attaches to the cgroup and answers DNS at 127.0.0.1");
        let nohop = Nohop::start(&host, &cgroup, "dns.forward = []\n")?;
        nohop.wait_for_backends("helloworld", backends.len())?;
        println!("ready, pid {}", nohop.process.pid().as_raw_nonzero());
        Ok(Demo { nohop, backends, _consul: consul, cgroup, host })
    }

    fn play(&mut self) -> Result<()> {
        heading("An unmodified curl, the plain name, port 80");
        for _ in 0..6 {
            self.curl_hello()?;
        }

        heading("What nohop follows, and what is in the kernel's maps");
        let services = self.nohop.cli("services")?;
        println!("{}", prompt("nohop services"));
        println!("{}", String::from_utf8_lossy(&services.stdout).trim_end());
        self.show_map("FRONTENDS")?;

        heading("A backend dies; Consul's check notices, nohop drops it");
        let victim = self.backends.remove(0);
        let n_left = self.backends.len();
        println!("{}", prompt(&format!("kill -9 {}   # alice", victim.process.pid())));
        victim.process.kill();
        self.nohop.wait_for_backends("helloworld", n_left)?;
        for _ in 0..4 {
            let answer = self.curl_hello()?;
            ensure!(!answer.contains("alice"), "a dead backend answered");
        }

        heading("nohop is killed: the kernel keeps working, and the next daemon takes over");
        println!("{}", prompt(&format!("kill -9 {}   # nohop", self.nohop.process.pid())));
        let vip = self.vip()?;
        self.nohop.kill()?;
        for _ in 0..2 {
            let answer = self.show("curl", &format!("-sS http://{vip}/"))?;
            ensure!(answer.starts_with("hello from "), "no backend answered");
        }
        println!("{}", prompt("nohop run &"));
        self.nohop.start_again()?;
        self.curl_hello()?;

        heading("A misspelt name is no service");
        let answer = self.show("curl", "-sS http://heloworld.service/")?;
        ensure!(answer.contains("Could not resolve"), "the misspelt name was resolved");
        println!("{}", prompt("dig heloworld.service"));
        let answer = self.host.inside(&self.cgroup).run("dig", "heloworld.service")?;
        let status = answer.lines().find(|line| line.contains("status:")).unwrap_or(&answer);
        println!("{status}");
        ensure!(status.contains("NXDOMAIN"), "the misspelt name isn't NXDOMAIN");
        Ok(())
    }

    fn vip(&self) -> Result<String> {
        let services = self.nohop.services()?;
        let vip = service(&services, "helloworld").and_then(|service| service["vip"].as_str());
        Ok(vip.context("helloworld has no VIP")?.to_owned())
    }

    fn curl_hello(&self) -> Result<String> {
        let answer = self.show("curl", "-sS http://helloworld.service/")?;
        ensure!(answer.starts_with("hello from "), "no backend answered");
        Ok(answer)
    }

    /// Runs a command in the demo's node, and shows it with all that it writes.
    fn show(&self, program: &str, arguments: &str) -> Result<String> {
        println!("{}", prompt(&format!("{program} {arguments}")));
        let mut command = self.host.inside(&self.cgroup).command(program);
        command.args(arguments.split(' '));
        let output = cmd::output(command)?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        println!("{}", text.trim_end());
        Ok(text)
    }

    /// Shows a pinned map as bpftool prints it, but on one line.
    fn show_map(&self, name: &str) -> Result<()> {
        let pin = self.nohop.pin(&format!("maps/{name}"))?;
        let dump = format!("map dump pinned {}", pin.display());
        println!("{}", prompt(&format!("bpftool {dump}")));
        let dump = cmd::words("bpftool", &dump)?;
        println!("{}", dump.split_whitespace().collect::<Vec<_>>().join(" "));
        Ok(())
    }
}

fn directory(path: &Path) -> String {
    path.parent().unwrap_or(path).display().to_string()
}

fn heading(text: &str) {
    println!("\n{}", styled("1", text));
}

fn prompt(command: &str) -> String {
    styled("36", &format!("$ {command}"))
}

/// Text in a terminal's colour or weight, where there is a terminal.
fn styled(code: &str, text: &str) -> String {
    if stdout().is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
}
