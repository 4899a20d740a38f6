//! A database by its name and its usual port, wherever it listens: `psql -h pg.service -p 5432`.

use std::fs;
use std::os::unix::fs::chown;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::cmd;
use testbed::consul::instance;
use testbed::net::ExecContext;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::cluster::{BACKEND, Cluster};

/// Where the server listens.
const PORT: u16 = 23456;

/// Debian's user and group `nobody`: PostgreSQL doesn't run as root.
const NOBODY: u32 = 65534;

pub fn run() -> Result<()> {
    let cluster = Cluster::new(0)?;
    let tempdir = TempDir::new("postgres")?;
    let _server = serve(cluster.nodes.backend.outside(), &tempdir)?;
    let address = format!("{BACKEND}:{PORT}").parse::<std::net::SocketAddr>()?;
    let mut pg = instance("pg", "pg-1", address);
    pg["Meta"] = json!({ "nohop-ports": "5432" });
    cluster.server.register(&pg)?;
    cluster.nohop.wait_for_backends("pg", 1)?;

    let ask = |query: &str| {
        let mut psql = cluster.nodes.inside().command(cmd::installed("psql")?);
        psql.args(["-h", "pg.service", "-p", "5432", "-U", "postgres", "-At", "-c", query]);
        psql.env("PGCONNECT_TIMEOUT", "60");
        cmd::stdout(psql)
    };
    ensure!(ask("select 1")? == "1\n");
    let place = ask("select inet_server_addr(), inet_server_port()")?;
    ensure!(place == format!("{BACKEND}|{PORT}\n"), "psql was led to {place}");
    Ok(())
}

/// Makes a database in `tempdir`, and starts its server.
fn serve(place: ExecContext<'_>, tempdir: &TempDir) -> Result<Process> {
    chown(tempdir.path(), Some(NOBODY), Some(NOBODY)).context("give away a directory")?;
    let data = tempdir.path().join("data");
    let mut initdb = as_nobody(place, "initdb")?;
    initdb.args(["-U", "postgres", "--auth=trust", "--no-sync", "-D"]).arg(&data);
    cmd::stdout(initdb)?;
    fs::write(data.join("pg_hba.conf"), "host all all 10.99.0.0/24 trust\n")
        .context("let the client node in")?;
    let mut postgres = as_nobody(place, "postgres")?;
    postgres.arg("-D").arg(&data).arg("-k").arg(tempdir.path());
    postgres.args(["-h", BACKEND, "-p", &PORT.to_string(), "-F"]);
    let server = Process::spawn("postgres", postgres)?;
    server.wait_for_line(&["ready to accept connections"])?;
    Ok(server)
}

fn as_nobody(place: ExecContext<'_>, program: &str) -> Result<Command> {
    let mut command = place.command("setpriv");
    let id = NOBODY.to_string();
    command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
    command.arg(cmd::installed(program)?);
    // Its messages are English, and it needs no home directory.
    command.env("LC_ALL", "C").env("HOME", "/").current_dir("/");
    Ok(command)
}
