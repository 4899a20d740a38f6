//! UDP by name while backends come and go: answers come from the queried address, unconnected sockets
//! continue with another backend, and connected ones get an error when theirs is removed.

use anyhow::{Result, ensure};
use testbed::udp::{Echo, UdpClients};

use crate::cluster::{BACKEND, Catalog, Nodes, vip};

/// So many that each backend has some of them, whatever chance does: all but 1 in 100,000 times.
const N_SOCKETS: u64 = 32;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let echo = |name| Echo::start(nodes.backend.outside(), name, &format!("{BACKEND}:0"));
    let (a, b, c, d) = (echo("a")?, echo("b")?, echo("c")?, echo("d")?);
    let catalog = Catalog::new(&[])?;
    let serve = |backends: &[&Echo]| {
        let mut text = "[[service]]\nname = \"echo\"\nprotocol = \"both\"\n".to_owned();
        for backend in backends {
            text += &format!("[[service.backend]]\naddress = \"{}\"\n", backend.address);
        }
        catalog.write(&text)
    };
    serve(&[&a, &b, &c])?;
    let nohop = nodes.nohop(&catalog.config())?;
    let vip = vip(&nohop, "echo")?;
    let ask = |are_connected| UdpClients::start(nodes.inside(), vip, are_connected, N_SOCKETS);
    let (connected, unconnected) = (ask(true)?, ask(false)?);
    for clients in [&connected, &unconnected] {
        clients.wait_until_answered_by(&["a", "b", "c"])?;
    }

    // One departs; the next time all that there were, for a new one.
    let departures: [(&[&Echo], &[&str]); 2] = [(&[&b, &c], &["b", "c"]), (&[&d], &["d"])];
    for (n_departures, (present, names)) in (1..).zip(departures) {
        serve(present)?;
        nohop.wait_for_backends("echo", present.len())?;
        let round = unconnected.wait_until_answered_by(names)?;
        ensure!(round.n_lost == 0 && round.errors.is_empty(), "{round:?}");
        ensure!(round.n_aborted == 0 && round.n_wrong_source == 0, "{round:?}");
        let round = connected.wait_until_answered_by(names)?;
        ensure!(round.n_lost == 0 && round.errors.is_empty(), "{round:?}");
        ensure!((1..=n_departures).contains(&round.n_most_aborted), "{round:?}");
        ensure!(round.n_wrong_source == 0, "{round:?}");
    }

    // Unused backends may end, and no request fails.
    for departed in [a, b, c] {
        departed.process.kill();
    }
    for clients in [connected, unconnected] {
        let round = clients.wait_for_rounds(20)?;
        ensure!(
            round.n_lost == 0 && round.errors.is_empty() && round.n_wrong_source == 0,
            "{round:?}"
        );
    }

    // Without a backend there is nowhere to send to; and then there is again.
    let clients = ask(false)?;
    let round = clients.wait_until_answered_by(&["d"])?;
    serve(&[])?;
    nohop.wait_for_backends("echo", 0)?;
    clients.wait_until_answered_by(&[])?;
    drop(clients);
    serve(&[&d])?;
    nohop.wait_for_backends("echo", 1)?;
    ensure!(round.n_lost == 0);
    ask(true)?.wait_until_answered_by(&["d"])?;
    Ok(())
}
