//! The first minutes with nohop at a terminal, typed into tmux as a person would, with the pictures of
//! commands that docs/terminal has. `NOHOP_PICTURES=docs/terminal` writes them there again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testbed::cleanup::Cleanup;
use testbed::cmd;
use testbed::consul::program;
use testbed::picture::svg;
use testbed::tempdir::TempDir;
use testbed::terminal::Terminal;

use crate::cluster::Cluster;

/// What is typed, and what is shown then.
const TYPED: [(&str, &str); 10] = [
    ("# Is it ready, and what does it follow?", ""),
    ("nohop status", "ready  nohop"),
    ("nohop services", "helloworld-2"),
    ("# Any program, the plain name, port 80:", ""),
    ("for i in 1 2 3; do curl http://helloworld.service/; done", "hello from helloworld-"),
    ("nohop dns query helloworld.service", "127."),
    ("# One instance is to be restarted: no new connections from here.", ""),
    ("nohop drain helloworld-0", "is drained"),
    ("nohop explain helloworld", "draining"),
    ("nohop undrain helloworld-0", "isn't drained any more"),
];

/// The columns of the pictures.
const COLUMNS: u16 = 148;

/// Where the pictures go; a directory of this machine's is none of the reader's.
struct Album {
    dir: PathBuf,
    cgroup: String,
}

impl Album {
    fn add(&self, name: &str, title: &str, output: &[u8]) -> Result<String> {
        let text = String::from_utf8_lossy(output).replace(&self.cgroup, "/sys/fs/cgroup");
        let parser = Terminal::of_output(text.as_bytes(), COLUMNS)?;
        fs::write(self.dir.join(format!("{name}.svg")), svg(parser.screen(), title))?;
        Ok(parser.screen().contents())
    }
}

pub fn run() -> Result<()> {
    let cluster = Cluster::new(3)?;
    let (nohop, tempdir) = (&cluster.nohop, TempDir::new("first")?);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("a root")?;
    let dir = match std::env::var_os("NOHOP_PICTURES") {
        Some(dir) => root.join(dir),
        None => tempdir.path().join("pictures"),
    };
    fs::create_dir_all(&dir)?;
    let album = Album { dir, cgroup: cluster.nodes.cgroup.path().display().to_string() };

    let recorded = record(&cluster, tempdir.path())?;
    let text = album.add("first-minutes", "The first minutes with nohop", recorded.as_bytes())?;
    for (typed, shown) in TYPED {
        ensure!(text.contains(&format!("$ {typed}")) && text.contains(shown), "{typed}:\n{text}");
    }
    let text = text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n") + "\n";
    fs::write(album.dir.join("first-minutes.txt"), text)?;

    // One that is out, for the reasons.
    let maint = "maint -enable -service=helloworld-1 -reason=upgrade";
    cluster.nodes.backend.outside().run(program()?, maint)?;
    nohop.wait_for_backends("helloworld", 2)?;
    for (name, arguments, title, shown) in [
        ("status", "status", "nohop status", "ready  nohop"),
        ("services", "services", "nohop services", "helloworld-2"),
        ("explain", "explain helloworld", "nohop explain helloworld", "maintenance"),
    ] {
        let output = nohop.cli(&format!("{arguments} --color always"))?;
        let text = album.add(name, title, &output.stdout)?;
        ensure!(text.contains(shown), "{arguments}:\n{text}");
    }

    let mut terminal = Terminal::spawn(&nohop.command("top")?)?;
    let vip = cluster.vip("helloworld")?;
    let rate = |text: &str| -> Option<String> {
        let row = text.lines().find(|line| line.starts_with("helloworld "))?;
        Some(row.split_whitespace().nth(2)?.to_owned())
    };
    let mut text = terminal.wait_for(|screen| rate(&screen.contents()).is_some())?;
    while rate(&text).is_none_or(|rate| rate == "-" || rate == "0") {
        cluster.nodes.connect(vip, 20)?;
        let before = text.clone();
        text = terminal.wait_for(|screen| screen.contents() != before)?;
    }
    fs::write(album.dir.join("top.svg"), svg(terminal.screen(), "nohop top"))?;
    terminal.press("q")?;
    terminal.wait_for_exit()?;
    Ok(())
}

/// Types it all into a shell in tmux, and returns what the terminal shows, with its colours.
fn record(cluster: &Cluster, dir: &Path) -> Result<String> {
    let (socket, profile) = (dir.join("tmux"), dir.join("profile"));
    let tmux = |arguments: &[&str]| -> Result<String> {
        let mut tmux = Command::new("timeout");
        tmux.args(["60", "tmux", "-f", "/dev/null", "-S"]).arg(&socket).args(arguments);
        cmd::stdout(tmux)
    };
    let nohop = cmd::built("nohop")?;
    let programs = nohop.parent().context("a directory")?.display();
    fs::write(
        &profile,
        format!(
            "PS1='$ '\nPATH=$PATH:{programs}\nexport NOHOP_ADMIN={}\nunset HISTFILE\n\
             PROMPT_COMMAND='tmux -S {} wait-for -S ready'\n",
            cluster.nohop.admin(),
            socket.display()
        ),
    )?;
    let prefix = cluster.nodes.inside().shell_prefix();
    let shell = format!("{prefix} bash --noprofile --rcfile {} -i", profile.display());
    let (columns, rows) = (COLUMNS.to_string(), "200");
    let _cleanup = Cleanup::new({
        let socket = socket.clone();
        move || {
            // It may not have been started.
            let _ = Command::new("tmux").arg("-S").arg(&socket).arg("kill-server").output();
        }
    });
    tmux(&["new-session", "-d", "-x", &columns, "-y", rows, &shell])?;
    tmux(&["wait-for", "ready"])?;
    for (typed, _) in TYPED {
        tmux(&["send-keys", "-l", "--", typed])?;
        tmux(&["send-keys", "Enter"])?;
        tmux(&["wait-for", "ready"])?;
    }
    let shown = tmux(&["capture-pane", "-e", "-p"])?;
    // The last prompt waits for more.
    Ok(shown.trim_end().trim_end_matches('$').to_owned())
}
