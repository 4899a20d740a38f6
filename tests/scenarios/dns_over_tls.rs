//! DNS over TLS, queried with kdig: the same answers as over UDP, a certificate that changes while the
//! daemon runs, and ones that can't be used.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use testbed::cmd;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::cluster::{BACKEND, Catalog, Nodes, vip};

const NAME: &str = "dns.node.example";
/// The id of a user that isn't the daemon's.
const ANOTHER_USER: u32 = 65_534;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let mut dnsmasq = nodes.backend.outside().command("dnsmasq");
    dnsmasq
        .args("--keep-in-foreground --log-facility=- --conf-file=/dev/null --pid-file=".split(' '));
    dnsmasq
        .args("--user=root --no-resolv --no-hosts --bind-interfaces --interface=eth0".split(' '));
    dnsmasq.args(["--address=/outside.example/192.0.2.7", "--dns-rr=raw.example,65280,0102ff"]);
    let dnsmasq = Process::spawn("dnsmasq", dnsmasq)?;
    dnsmasq.wait_for_line(&["started, version"])?;

    let (tempdir, other) = (TempDir::new("dns-tls")?, TempDir::new("dns-tls-other")?);
    issue(tempdir.path())?;
    issue(other.path())?;
    let ca = |of: &TempDir| of.path().join("ca.pem").display().to_string();
    let kdig = |ca: &str, words: &str| {
        let words = format!(
            "@127.0.0.1 -p 853 +timeout=60 +tls-ca={ca} +tls-hostname={NAME} +short {words}"
        );
        nodes.inside().run("kdig", &words)
    };

    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let config = format!(
        "dns.forward = [\"{BACKEND}:53\"]\ndns.listen_tls = [\"127.0.0.1:853\"]\n\
         dns.tls_cert_file = {:?}\ndns.tls_key_file = {:?}\n",
        tempdir.path().join("dns.pem"),
        tempdir.path().join("dns.key"),
    );
    let nohop = nodes.nohop(&(catalog.config() + &config))?;

    let vip = vip(&nohop, "helloworld")?.ip().to_string();
    let both = "helloworld.service outside.example";
    let rows = [
        ("helloworld.service", vip.as_str()),
        ("HelloWorld.SERVICE", vip.as_str()),
        ("outside.example", "192.0.2.7"),
        // Records of a type that this program has no name for pass as they are.
        ("raw.example TYPE65280", "\\# 3 0102FF"),
        ("absent.service", ""),
        (both, &format!("{vip}\n192.0.2.7")),
    ];
    for (words, expected) in rows {
        let answer = kdig(&ca(&tempdir), words)?;
        ensure!(answer.trim() == expected, "{words}: {answer:?}, not {expected:?}");
    }

    // A certificate of another authority is shown from the next handshake on.
    ensure!(kdig(&ca(&other), "helloworld.service").is_err(), "kdig takes any certificate");
    replace(&other, &tempdir)?;
    let answer = kdig(&ca(&other), "helloworld.service")?;
    ensure!(answer.trim() == vip, "{answer:?}");
    // One that can't be read isn't: the former stays.
    fs::write(tempdir.path().join("dns.pem"), "no certificate")?;
    let answer = kdig(&ca(&other), "helloworld.service")?;
    ensure!(answer.trim() == vip, "{answer:?}");
    nohop.process.wait_for_line(&["holds no certificate"])?;

    // At the start it is an error, with the file and the fix.
    let bad = tempdir.path().join("bad.toml");
    fs::write(&bad, config.replace(":853", ":8853"))?;
    let flags = format!(
        "300 {} run --config {} --catalog {} --cgroup {} --dns-listen 127.0.0.1:5353 \
         --state-dir {dir} --admin-listen unix:{dir}/bad.sock",
        cmd::built("nohop")?.display(),
        bad.display(),
        catalog.path().display(),
        nodes.cgroup.path().display(),
        dir = tempdir.path().display(),
    );
    let mut command = nodes.client.outside().command("timeout");
    command.args(flags.split_whitespace());
    let output = cmd::output(command)?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{}\n{text}", output.status);
    ensure!(text.contains("dns.tls_cert_file") && text.contains("in PEM; write one"), "{text}");
    Ok(())
}

/// Takes the certificate and the key of one folder into another.
fn replace(from: &TempDir, to: &TempDir) -> Result<()> {
    for name in ["dns.key", "dns.pem"] {
        // As an ACME client leaves it: readable by its own user alone.
        let fresh = to.path().join(format!("{name}.new"));
        fs::copy(from.path().join(name), &fresh).with_context(|| format!("copy {name}"))?;
        fs::set_permissions(&fresh, Permissions::from_mode(0o600))?;
        chown(&fresh, Some(ANOTHER_USER), None)?;
        fs::rename(&fresh, to.path().join(name)).with_context(|| format!("replace {name}"))?;
    }
    Ok(())
}

/// Makes an authority, and a certificate of it.
fn issue(dir: &Path) -> Result<()> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    fs::write(dir.join("ca.pem"), authority.pem())?;
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new([NAME.to_owned()])?.signed_by(&key, &authority)?;
    fs::write(dir.join("dns.pem"), certificate.pem())?;
    fs::write(dir.join("dns.key"), key.serialize_pem())?;
    Ok(())
}
