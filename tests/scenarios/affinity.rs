//! `maglev` by the client's cgroup: each cgroup stays at a backend of its own. A backend that joins takes
//! a part of them, and the part of one that leaves goes to the others; the other cgroups stay, but for the
//! few that Maglev moves as well.

use anyhow::{Context, Result, ensure};
use testbed::cgroup::Cgroup;
use testbed::helloworld::connect;

use crate::cluster::{Catalog, Nodes, vip};

/// How many cgroups, and how many of them may move without need: at the 1.4% of docs/choice.md, which is
/// for any number of backends, more of them do so in one of 10,000 changes.
const N_CGROUPS: usize = 16;
const MAX_MOVED: usize = 3;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let names = ["a", "b", "c", "new"];
    let servers =
        names.map(|name| nodes.helloworld(name)).into_iter().collect::<Result<Vec<_>>>()?;
    let mut addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    let catalog = Catalog::new(&[("helloworld", &addresses[..3])])?;
    let config = catalog.config() + "balance = { algorithm = \"maglev\", key = \"cgroup\" }\n";
    let nohop = nodes.nohop(&config)?;
    nohop.wait_for_backends("helloworld", 3)?;
    let vip = vip(&nohop, "helloworld")?;
    let cgroups = (0..N_CGROUPS).map(|n| nodes.cgroup.child(&n.to_string()));
    let cgroups: Vec<Cgroup> = cgroups.collect::<Result<_>>()?;
    // The index of each cgroup's backend.
    let backends = || -> Result<Vec<usize>> {
        let backend = |cgroup: &Cgroup| {
            let connects = connect(nodes.client.inside(cgroup), vip, 8)?;
            let answers: Vec<_> = connects.answers.keys().collect();
            ensure!(connects.errors.is_empty() && answers.len() == 1, "{connects:?}");
            let name = answers[0].trim_start_matches("hello from ");
            names.iter().position(|it| *it == name).with_context(|| format!("{connects:?}"))
        };
        cgroups.iter().map(backend).collect()
    };

    let with_three = backends()?;
    let again = backends()?;
    ensure!(with_three == again, "{with_three:?}, then {again:?}");

    catalog.set(&[("helloworld", &addresses)])?;
    nohop.wait_for_backends("helloworld", 4)?;
    let with_four = backends()?;
    let moves = || with_three.iter().zip(&with_four).filter(|(from, to)| from != to);
    eprintln!("{} of {N_CGROUPS} moved", moves().count());
    ensure!(
        moves().filter(|(_, to)| **to != 3).count() <= MAX_MOVED,
        "{with_three:?}, {with_four:?}"
    );

    // The backend of the first cgroup leaves.
    let leaving = with_four[0];
    addresses.remove(leaving);
    catalog.set(&[("helloworld", &addresses)])?;
    nohop.wait_for_backends("helloworld", 3)?;
    let without = backends()?;
    let moves_too = |(from, to): &(&usize, &usize)| **from != leaving && from != to;
    let moved = with_four.iter().zip(&without).filter(moves_too).count();
    ensure!(moved <= MAX_MOVED && !without.contains(&leaving), "{with_four:?}, then {without:?}");
    Ok(())
}
