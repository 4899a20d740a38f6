//! Instances without checks are registered before they listen, as Nomad does, while another one serves:
//! no connection fails, and each gets connections once it listens. After a restart of the daemon they
//! are still proven, whether they listen or not.

use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;

use anyhow::{Result, ensure};
use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};
use serde_json::{Value, json};
use testbed::nohop::{n_healthy, service};

use crate::cluster::{BACKEND, Cluster};
use crate::load::under_load;
use crate::server::Server;

const LATE: [&str; 3] = ["late-1", "late-2", "late-3"];

pub fn run() -> Result<()> {
    let mut cluster = Cluster::new(0)?;
    let first = cluster.nodes.helloworld("first")?;
    register(&cluster, "first", first.address)?;
    cluster.nohop.wait_for_backends("web", 1)?;
    let vip = cluster.vip("web")?;

    let mut servers = Vec::new();
    under_load(&cluster.nodes, vip, 200, |_| {
        // To a port that is bound and not listened on, the kernel answers with a reset.
        let bound: Vec<_> = LATE.iter().map(|_| bound(&cluster)).collect::<Result<_>>()?;
        for (id, (_, address)) in LATE.iter().zip(&bound) {
            register(&cluster, id, *address)?;
        }
        let seen = cluster.nohop.wait_until(|services| n_unproven(services) == LATE.len())?;
        for reason in reasons(&seen) {
            ensure!(reason.starts_with("no connection to it has succeeded yet"), "{seen:#}");
        }
        for (id, (socket, _)) in LATE.into_iter().zip(bound) {
            listen(&socket, 128)?;
            servers.push(Server::start(id, socket.into())?);
        }
        cluster.nohop.wait_until(|services| n_healthy(services, "web") == 4).map(drop)
    })?;

    // One of them fails, and no check reports it: nohop knew it before.
    let [_, _, dead] = &LATE;
    drop(servers.pop());
    cluster.nohop.kill()?;
    cluster.nohop.start_again()?;
    let services = cluster.nohop.services()?;
    let web = service(&services, "web").into_iter().flat_map(|web| web["backends"].as_array());
    let states: Vec<_> = web.flatten().map(|it| (&it["instance"], &it["state"])).collect();
    ensure!(states.iter().any(|(id, _)| *id == dead), "{services:#}");
    ensure!(states.iter().all(|(_, state)| *state != "unproven"), "{services:#}");
    Ok(())
}

fn register(cluster: &Cluster, id: &str, address: SocketAddrV4) -> Result<()> {
    cluster.server.register(&json!({
        "Name": "web",
        "ID": id,
        "Address": address.ip(),
        "Port": address.port(),
        "Tags": ["routed"],
    }))
}

/// A socket of the backend node with a port of its own.
fn bound(cluster: &Cluster) -> Result<(OwnedFd, SocketAddrV4)> {
    cluster.nodes.backend.enter(|| {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        bind(&socket, &SocketAddrV4::new(BACKEND.parse()?, 0))?;
        let address = SocketAddrV4::try_from(getsockname(&socket)?)?;
        Ok((socket, address))
    })
}

fn unproven(services: &Value) -> impl Iterator<Item = &Value> {
    let backends = service(services, "web").and_then(|web| web["backends"].as_array());
    backends.into_iter().flatten().filter(|backend| backend["state"] == "unproven")
}

fn n_unproven(services: &Value) -> usize {
    unproven(services).count()
}

fn reasons(services: &Value) -> impl Iterator<Item = &str> {
    unproven(services).map(|backend| backend["reason"].as_str().unwrap_or_default())
}
