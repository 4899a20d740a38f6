//! TLS with certificates on both sides. The authority changes, and with it every certificate, while
//! connections are opened: nohop takes the new files without a restart, and loses nothing.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};
use testbed::tempdir::TempDir;

use crate::ha_cluster::{HaCluster, Setup, is_failing, is_live};

pub fn run() -> Result<()> {
    let tempdir = TempDir::new("tls")?;
    let at = |name: &str| tempdir.path().join(name);
    issue(tempdir.path())?;
    let setup = Setup {
        consul: Value::Null,
        agent: json!({
            "ports": { "https": 8501, "dns": -1 },
            "ca_file": at("ca.pem"),
            "cert_file": at("agent.pem"),
            "key_file": at("agent.key"),
            "verify_incoming_https": true,
        }),
        token: None,
        nohop: format!(
            "consul.address = \"https://127.0.0.1:8501\"\nconsul.ca_file = {:?}\n\
             consul.cert_file = {:?}\nconsul.key_file = {:?}\n\
             consul.tls_server_name = \"client.dc1.consul\"\n",
            at("ca.pem"),
            at("nohop.pem"),
            at("nohop.key"),
        ),
    };
    let mut cluster = HaCluster::with(&setup, |_| Ok(()))?;
    cluster.assert_no_failures(|cluster, load| {
        load.wait_until_second(1)?;
        issue(tempdir.path())?;
        // So that each side needs the new certificates.
        cluster.agent.kill();
        cluster.nohop.wait_for_status(is_failing)?;
        cluster.agent.restart()?;
        cluster.nohop.wait_for_status(is_live)?;
        cluster.expect_update("newcomer-1")?;

        // An agent with another authority's certificate isn't trusted.
        let other = TempDir::new("other-tls")?;
        issue(other.path())?;
        for name in ["agent.pem", "agent.key"] {
            fs::copy(other.path().join(name), at(name)).context("replace the certificate")?;
        }
        cluster.agent.restart()?;
        // While it is restarted it fails in other ways.
        let is_refused = |status: &Value| {
            is_failing(status) && status["problems"].to_string().contains("certificate")
        };
        let status = cluster.nohop.wait_for_status(is_refused)?;
        ensure!(status["ready"] == true, "{status:#}");
        Ok(())
    })
}

/// Makes an authority, and certificates of it for the agent and for nohop.
fn issue(dir: &Path) -> Result<()> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    write(dir, "ca.pem", &authority.pem())?;
    for (name, host) in [("agent", "client.dc1.consul"), ("nohop", "nohop.dc1.consul")] {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new([host.to_owned()])?.signed_by(&key, &authority)?;
        write(dir, &format!("{name}.pem"), &certificate.pem())?;
        write(dir, &format!("{name}.key"), &key.serialize_pem())?;
    }
    Ok(())
}

/// Replaces a file in one step, as tools that rotate certificates do.
fn write(dir: &Path, name: &str, text: &str) -> Result<()> {
    let fresh = dir.join(format!("{name}.new"));
    fs::write(&fresh, text).with_context(|| format!("write {name}"))?;
    fs::rename(&fresh, dir.join(name)).with_context(|| format!("replace {name}"))
}
