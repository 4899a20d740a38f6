//! A reason that keeps nohop from running is reported with the fix, and changes nothing: the daemon that runs
//! already serves on.

use anyhow::{Result, ensure};
use testbed::bpffs::Bpffs;
use testbed::cmd;

use crate::cluster::{Catalog, Nodes, attached};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let nohop = nodes.nohop(&catalog.config())?;
    let serving = attached(&nodes.cgroup)?;

    let directory = catalog.directory();
    let bpffs = Bpffs::new()?;
    let own_dns = "--dns-listen 127.0.0.1:5353";
    let own_pins = format!("--bpffs {}/nohop", bpffs.path().display());
    let pid = nohop.process.pid().as_raw_nonzero().to_string();
    let own_admin = format!("--admin-listen unix:{}/other.sock", directory.display());
    let cgroup = format!("--cgroup {}", nodes.cgroup.path().display());
    let no_capabilities = "setpriv --bounding-set=-all --inh-caps=-all";
    // The program that runs it, its flags, and words of its output.
    let cases = [
        ("env", format!("{cgroup} {own_admin}"), ["127.0.0.1:53", "dns.listen"]),
        (
            "env",
            format!("{cgroup} {own_dns} --admin-listen {}", nohop.admin()),
            ["admin.sock", "another"],
        ),
        (
            "env",
            format!("{cgroup} {own_dns} {own_admin} --bpffs {}", nohop.pins().display()),
            ["another nohop", &pid],
        ),
        (
            "env",
            format!("{cgroup} {own_dns} {own_admin} --bpffs {}", directory.display()),
            ["isn't on a BPF file system", "mount -t bpf"],
        ),
        ("env", format!("--cgroup /tmp {own_dns} {own_admin} {own_pins}"), ["/tmp", "cgroup v2"]),
        ("env", format!("--cgroup /none {own_dns} {own_admin} {own_pins}"), ["/none", "--cgroup"]),
        (
            no_capabilities,
            format!("{cgroup} {own_dns} {own_admin} {own_pins}"),
            ["as root", "CAP_NET_ADMIN"],
        ),
    ];
    for (under, flags, words) in cases {
        let mut command = nodes.client.outside().command("timeout");
        command.arg("120").args(under.split(' ')).arg(cmd::built("nohop")?).arg("run");
        command.arg("--catalog").arg(catalog.path()).arg("--state-dir").arg(&directory);
        command.args(flags.split(' '));
        let output = cmd::output(command)?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{under} {flags}: {}\n{text}", output.status);
        ensure!(words.iter().all(|word| text.contains(word)), "{under} {flags}: {text}");
        ensure!(attached(&nodes.cgroup)? == serving, "{under} {flags} changed what is attached");
    }
    ensure!(nodes.curl("helloworld")? == "hello from helloworld\n");
    Ok(())
}
