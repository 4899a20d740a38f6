//! Another process holds the DNS sockets, as systemd does. The daemon is killed, and what is asked
//! while there is none waits in them until the next one answers: not a lookup is lost. It listens
//! beside on what `dns.listen` has more.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use testbed::cmd;
use testbed::tempdir::TempDir;

use crate::cluster::{Catalog, Nodes};

/// Holds the sockets, starts the daemon on them, kills it, asks, and starts it again.
const HOLDER: &str = r#"
import fcntl, os, select, signal, socket, struct, sys

QUESTION = b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x0ahelloworld\x07service\x00\x00\x01\x00\x01"
ADDRESS = ("127.0.0.1", 5300)
held = []
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
    one = socket.socket(socket.AF_INET, kind)
    one.bind(ADDRESS)
    if kind == socket.SOCK_STREAM:
        one.listen(64)
    held.append(fcntl.fcntl(one.fileno(), fcntl.F_DUPFD, 10))

def start():
    pid = os.fork()
    if pid == 0:
        for place, fd in enumerate(held):
            os.dup2(fd, 3 + place)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(held)))
        os.execv(sys.argv[1], sys.argv[1:])
    return pid

def end(pid, how):
    os.kill(pid, how)
    os.waitpid(pid, 0)

def receive(stream, n):
    got = b""
    while len(got) < n:
        piece = stream.recv(n - len(got))
        if not piece:
            return got
        got += piece
    return got

asked = answered = 0
pid = start()
try:
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.settimeout(60)
        def ask(ids):
            for n in ids:
                udp.sendto(struct.pack(">H", n) + QUESTION, ADDRESS)
        def receive_datagrams(n):
            ids = set()
            for _ in range(n):
                answer = udp.recv(512)
                if answer[3] & 15 == 0 and answer[6:8] == b"\x00\x01":
                    ids.add(answer[:2])
            return len(ids)
        ask(range(10))
        answered += receive_datagrams(10)
        # An address of dns.listen that wasn't passed.
        beside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        beside.settimeout(60)
        beside.sendto(b"\0\1" + QUESTION, ("127.0.0.1", 53))
        answered += beside.recv(512)[3] & 15 == 0
        end(pid, how)
        ask(range(100, 200))
        stream = socket.create_connection(ADDRESS, 60)
        stream.sendall(struct.pack(">HH", 2 + len(QUESTION), 7) + QUESTION)
        pid = start()
        answered += receive_datagrams(100)
        length, = struct.unpack(">H", receive(stream, 2))
        answered += receive(stream, length)[3] & 15 == 0
        stream.close()
        asked += 112
finally:
    end(pid, signal.SIGTERM)
print(f"{answered} of {asked} answered")
"#;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    // Gives the daemon its places; the holder's are started on the same.
    let nohop = nodes.nohop(&catalog.config())?;
    ensure!(nohop.terminate()?.success());
    let config = nohop.state_dir().with_file_name("nohop.toml");

    let tempdir = TempDir::new("holder")?;
    let holder = tempdir.path().join("holder.py");
    std::fs::File::create(&holder)?.write_all(HOLDER.as_bytes()).context("write the holder")?;
    let mut command = nodes.client.outside().command("python3");
    command.arg(&holder).arg(cmd::built("nohop")?).args(["run", "--config"]).arg(config);
    let output = cmd::output(command)?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(stdout.contains("336 of 336 answered"), "{stdout}\n{stderr}");
    Ok(())
}
