//! The services of a file: an edit is applied, a broken edit changes nothing and is reported, also
//! where the daemon starts again while it is there.

use anyhow::{Result, ensure};

use crate::cluster::{Catalog, Nodes, vip};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let (one, two) = (nodes.helloworld("one")?, nodes.helloworld("two")?);
    let catalog = Catalog::new(&[("helloworld", &[one.address])])?;
    let mut nohop = nodes.nohop(&(catalog.config() + "dns.forward = []\n"))?;
    ensure!(nodes.curl("helloworld")? == "hello from one\n");
    let first_vip = vip(&nohop, "helloworld")?;

    catalog.set(&[("helloworld", &[one.address, two.address]), ("second", &[two.address])])?;
    nohop.wait_for_backends("helloworld", 2)?;
    ensure!(nodes.connect(first_vip, 100)?.answers.len() == 2);
    ensure!(nodes.curl("second")? == "hello from two\n");

    catalog.write("[[service]\nname = 7")?;
    let has_problem = |status: &serde_json::Value| {
        status["problems"].as_array().is_some_and(|problems| !problems.is_empty())
    };
    let status = nohop.wait_for_status(has_problem)?;
    ensure!(status["problems"].to_string().contains("catalog.toml"), "{status:#}");
    ensure!(status["ready"] == true && status["sources"][0]["state"] == "failing", "{status:#}");
    let connects = nodes.connect(first_vip, 100)?;
    ensure!(connects.errors.is_empty() && connects.answers.len() == 2, "{connects:?}");

    ensure!(nohop.terminate()?.success());
    nohop.start_again()?;
    let status = nohop.status()?;
    ensure!(status["problems"].to_string().contains("catalog.toml:1"), "{status:#}");
    ensure!(nodes.curl("second")? == "hello from two\n");
    let connects = nodes.connect(first_vip, 100)?;
    ensure!(connects.errors.is_empty() && connects.answers.len() == 2, "{connects:?}");

    // As templates write it.
    catalog.write(&format!(
        "\u{feff}[[service]]\r\nname = \"helloworld\"\r\nbackend = [{{ address = \"{0}\" }}]\r\n  \
         [[service]]\r\n  name = \"second\"\r\n  backend = [{{ address = \"{0}\" }}]\r\n[[ service ]]\r\n\
         name = \"third\"\r\nbackend = [{{ address = \"{0}\" }}]\r\n",
        one.address
    ))?;
    nohop.wait_for_backends("third", 1)?;
    for name in ["helloworld", "second", "third"] {
        ensure!(nodes.curl(name)? == "hello from one\n", "{name}");
    }

    catalog.set(&[("helloworld", &[two.address])])?;
    nohop.wait_for_backends("helloworld", 1)?;
    nohop.wait_for_status(|status| status["sources"][0]["state"] == "live")?;
    ensure!(vip(&nohop, "helloworld")? == first_vip);
    ensure!(nodes.curl("helloworld")? == "hello from two\n");
    Ok(())
}
