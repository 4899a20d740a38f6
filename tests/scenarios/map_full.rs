//! A catalog with more services than the maps have room for: the services that fit work, the others are
//! refused and reported, and applied as soon as there is room.

use anyhow::{Result, ensure};

use crate::cluster::{Catalog, Nodes, vip};

const N_FIT: usize = 4;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let backends = [helloworld.address];
    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];
    let services = names.map(|name| (name, &backends[..]));
    let catalog = Catalog::new(&services[..N_FIT])?;
    let config = format!("{}dns.forward = []\ndatapath.max_services = {N_FIT}\n", catalog.config());
    let nohop = nodes.nohop(&config)?;

    catalog.set(&services)?;
    let n_refused = names.len() - N_FIT;
    let status =
        nohop.wait_for_status(|status| status["datapath"]["refused_services"] == n_refused)?;
    ensure!(status["ready"] == true, "what fits is served: {status:#}");
    let text = String::from_utf8(nohop.cli("status")?.stdout)?;
    for part in ["5 services aren't in the kernel", "(e, f, g, …)", "raise datapath.max_services"]
    {
        ensure!(text.contains(part), "no {part:?} in:\n{text}");
    }
    for name in &names[..N_FIT] {
        ensure!(nodes.curl(name)? == "hello from helloworld\n");
    }
    for name in &names[N_FIT..] {
        let connects = nodes.connect(vip(&nohop, name)?, 5)?;
        ensure!(connects.all_failed_with("ConnectionRefused"), "{name}: {connects:?}");
    }
    let explained = String::from_utf8(nohop.cli("explain i")?.stdout)?;
    ensure!(explained.contains("is refused with ECONNREFUSED: SERVICES is full"), "{explained}");

    catalog.set(&services[n_refused..])?;
    nohop.wait_for_status(|status| {
        status["datapath"]["refused_services"] == 0 && status["problems"] == serde_json::json!([])
    })?;
    for name in &names[n_refused..] {
        ensure!(nodes.curl(name)? == "hello from helloworld\n", "{name}");
    }
    Ok(())
}
