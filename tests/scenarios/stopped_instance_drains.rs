//! An instance that Nomad stops is deregistered before its task gets a signal (`shutdown_delay`). It
//! gets no new connection from then on, and those that are open continue.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddrV4, TcpListener};

use anyhow::{Result, ensure};
use testbed::TIMEOUT;
use testbed::consul::instance;
use testbed::nohop::service;
use testbed::process::Process;

use crate::cluster::{BACKEND, Cluster};

/// Sends back what it receives.
const CLIENT: &str = "
import socket, sys
stream = socket.create_connection((sys.argv[1], 80), 300)
while data := stream.recv(64):
    stream.sendall(data)
";

pub fn run() -> Result<()> {
    let cluster = Cluster::new(0)?;
    let (nohop, nodes, server) = (&cluster.nohop, &cluster.nodes, &cluster.server);
    let stopping = nodes.backend.enter(|| Ok(TcpListener::bind(format!("{BACKEND}:0"))?))?;
    let address: SocketAddrV4 = stopping.local_addr()?.to_string().parse()?;
    server.register(&instance("web", "stopping", address))?;
    nohop.wait_for_backends("web", 1)?;
    let vip = cluster.vip("web")?;

    let mut command = nodes.inside().command("python3");
    command.args(["-c", CLIENT, &vip.ip().to_string()]);
    let _client = Process::spawn("client", command)?;
    let (mut open, _) = stopping.accept()?;
    open.set_read_timeout(Some(TIMEOUT))?;
    let mut answers = |text: &str| -> Result<bool> {
        open.write_all(text.as_bytes())?;
        let mut answer = vec![0; text.len()];
        open.read_exact(&mut answer)?;
        Ok(answer == text.as_bytes())
    };
    ensure!(answers("before")?);

    let other = nodes.helloworld("other")?;
    server.register(&instance("web", "other", other.address))?;
    nohop.wait_for_backends("web", 2)?;
    server.deregister("stopping")?;
    nohop.wait_until(|services| {
        let backends = service(services, "web").and_then(|web| web["backends"].as_array());
        backends.is_some_and(|all| all.len() == 1 && all[0]["instance"] == "other")
    })?;
    let connects = nodes.connect(vip, 100)?;
    ensure!(connects.all_answered(|answer| answer == "hello from other"), "{connects:?}");
    ensure!(answers("after")?);
    Ok(())
}
