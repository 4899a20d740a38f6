//! `probe`: who answers an address, connect by connect, and from when on and until when.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::clock::{MILLISECOND_NS, SECOND_NS, now_ns};
use crate::epoll::timespec;
use crate::errors::{self, Failures, Name};
use crate::limits::seconds;
use crate::stream;

/// How long a connection may take, from connect to the end of the answer.
const PATIENCE_NS: u64 = SECOND_NS;

/// A name that hasn't answered for so long is silent.
const SILENT_NS: u64 = 300 * MILLISECOND_NS;

/// How long a line may be in memory only. Half of the promised time, since a wait may be late.
const FLUSH_NS: u64 = 25 * MILLISECOND_NS;

/// The longest wait between two looks at what else is due.
const SLICE_NS: u64 = 10 * MILLISECOND_NS;

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: nohop\r\nConnection: close\r\n\r\n";

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Probe {
    /// Where to connect to
    #[arg(value_name = "ADDR:PORT")]
    pub address: SocketAddr,
    /// Where a line for each connection goes: when it began and ended in nanoseconds of CLOCK_MONOTONIC,
    /// and the name that answered, or `!` and what went wrong
    #[arg(long, value_name = "FILE")]
    pub log: PathBuf,
    /// Microseconds from one connection to the next
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=60_000_000))]
    pub interval_us: u64,
    /// Ends after so many seconds
    #[arg(long, default_value = "600", value_parser = seconds)]
    pub seconds: f64,
}

impl Probe {
    /// Connects until its time is over, and reports.
    ///
    /// # Errors
    /// When the log, or `out`, can't be written.
    pub fn run(&self, out: &mut impl Write) -> anyhow::Result<Value> {
        let failed = || format!("cannot write {}; name another --log", self.log.display());
        let log = BufWriter::new(File::create(&self.log).with_context(failed)?);
        writeln!(out, "probing")?;
        out.flush()?;
        let start_ns = now_ns();
        let end_ns = start_ns + (self.seconds * SECOND_NS as f64) as u64;
        let (names, failures) = (Names::default(), Failures::of_streams());
        let mut prober = Prober { log, out, names, failures, flushed_ns: start_ns };
        let mut n_connects = 0;
        let mut due_ns = start_ns;
        while due_ns < end_ns {
            prober.sleep_until(due_ns)?;
            prober.connect(self.address)?;
            n_connects += 1;
            // Connections that were due during a slow one are skipped.
            due_ns = now_ns().max(due_ns + self.interval_us * 1000);
        }
        prober.log.flush()?;
        let names = prober.names.0.iter().map(|(name, seen)| (name.clone(), seen.n.into()));
        Ok(json!({
            "connects": n_connects,
            "failed": prober.failures.to_json(),
            "servers": names.collect::<serde_json::Map<_, _>>(),
        }))
    }
}

struct Prober<'a, W> {
    log: BufWriter<File>,
    out: &'a mut W,
    names: Names,
    failures: Failures,
    flushed_ns: u64,
}

/// What ends a connection without a name.
enum Problem {
    Connect(Name),
    /// The log or the output can't be written: that ends the probe.
    Own(io::Error),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Problem {
        Problem::Own(error)
    }
}

impl From<Errno> for Problem {
    fn from(errno: Errno) -> Problem {
        Problem::Connect(errors::of_errno(errno))
    }
}

impl<W: Write> Prober<'_, W> {
    fn connect(&mut self, address: SocketAddr) -> io::Result<()> {
        let start_ns = now_ns();
        let answered = self.ask(address, start_ns + PATIENCE_NS);
        let end_ns = now_ns();
        match answered {
            Ok(name) => {
                writeln!(self.log, "{start_ns} {end_ns} {name}")?;
                if self.names.answered(&name, end_ns) {
                    self.announce("first", &name)?;
                }
            }
            Err(Problem::Connect(failure)) => {
                writeln!(self.log, "{start_ns} {end_ns} !{failure}")?;
                self.failures.add(failure);
            }
            Err(Problem::Own(error)) => return Err(error),
        }
        self.tick(end_ns)
    }

    /// Connects, and returns the name of who answers.
    fn ask(&mut self, address: SocketAddr, deadline_ns: u64) -> Result<String, Problem> {
        let socket = stream::connect(address)?;
        loop {
            match send(&socket, REQUEST, SendFlags::NOSIGNAL) {
                Ok(_) => break,
                Err(Errno::AGAIN) => self.wait(&socket, PollFlags::OUT, deadline_ns)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        let mut answer = Answer::default();
        let mut buffer = [0; 4096];
        let mut whole = None;
        loop {
            let n_received = match recv(&socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((n_received, _)) => n_received,
                Err(Errno::AGAIN) => {
                    self.wait(&socket, PollFlags::IN, deadline_ns)?;
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            let is_end = n_received == 0;
            if is_end && whole.is_none() {
                whole = answer.end().map(|complete| (complete.status, lossy(complete.name)));
            } else if whole.is_none() {
                let fed = answer.feed(&buffer[..n_received]);
                let complete = fed.map_err(|_| Problem::Connect(errors::MALFORMED))?;
                whole = complete.map(|complete| (complete.status, lossy(complete.name)));
            }
            if is_end {
                return match whole {
                    None => Err(Problem::Connect(errors::CLOSED)),
                    Some((200, name)) if name.is_empty() => {
                        Err(Problem::Connect(errors::MALFORMED))
                    }
                    Some((200, name)) => Ok(name),
                    Some((status, _)) => Err(Problem::Connect(errors::of_status(status))),
                };
            }
        }
    }

    /// Waits for the socket, and does meanwhile what else is due.
    fn wait(
        &mut self,
        socket: &OwnedFd,
        flags: PollFlags,
        deadline_ns: u64,
    ) -> Result<(), Problem> {
        loop {
            let now_ns = now_ns();
            let left_ns = deadline_ns.saturating_sub(now_ns);
            if left_ns == 0 {
                return Err(Problem::Connect(errors::TIMEOUT));
            }
            let timeout = timespec(left_ns.min(SLICE_NS));
            match poll(&mut [PollFd::new(socket, flags)], Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => self.tick(now_ns)?,
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn sleep_until(&mut self, due_ns: u64) -> io::Result<()> {
        loop {
            let now_ns = now_ns();
            let left_ns = due_ns.saturating_sub(now_ns);
            if left_ns == 0 {
                return Ok(());
            }
            self.tick(now_ns)?;
            thread::sleep(Duration::from_nanos(left_ns.min(SLICE_NS)));
        }
    }

    /// Writes lines that were kept for long enough, and names servers that fell silent.
    fn tick(&mut self, now_ns: u64) -> io::Result<()> {
        if now_ns.saturating_sub(self.flushed_ns) >= FLUSH_NS {
            self.log.flush()?;
            self.flushed_ns = now_ns;
        }
        for name in self.names.take_silent(now_ns) {
            self.announce("silent", &name)?;
        }
        Ok(())
    }

    fn announce(&mut self, what: &str, name: &str) -> io::Result<()> {
        writeln!(self.out, "{what} {name}")?;
        self.out.flush()
    }
}

fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// Who has answered.
#[derive(Default)]
struct Names(BTreeMap<String, Seen>);

struct Seen {
    n: u64,
    last_ns: u64,
    is_silent: bool,
}

impl Names {
    /// Notes an answer, and returns whether it is the first of this name.
    fn answered(&mut self, name: &str, now_ns: u64) -> bool {
        if let Some(seen) = self.0.get_mut(name) {
            *seen = Seen { n: seen.n + 1, last_ns: now_ns, is_silent: false };
            return false;
        }
        self.0.insert(name.to_owned(), Seen { n: 1, last_ns: now_ns, is_silent: false });
        true
    }

    /// Those that have just been silent for long enough.
    fn take_silent(&mut self, now_ns: u64) -> Vec<String> {
        let mut silent = Vec::new();
        for (name, seen) in &mut self.0 {
            if !seen.is_silent && now_ns.saturating_sub(seen.last_ns) >= SILENT_NS {
                seen.is_silent = true;
                silent.push(name.clone());
            }
        }
        silent
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_name_is_first_once_and_silent_once_each_time() {
        let mut names = Names::default();
        assert!(names.answered("b1", 0));
        assert!(names.answered("b2", 0));
        assert!(!names.answered("b1", SILENT_NS - 1));
        assert!(names.take_silent(SILENT_NS - 1).is_empty());
        assert_eq!(names.take_silent(SILENT_NS), ["b2"]);
        assert!(names.take_silent(SILENT_NS + 1).is_empty());
        assert!(!names.answered("b2", SILENT_NS + 2));
        assert_eq!(names.take_silent(3 * SILENT_NS), ["b1", "b2"]);
    }

    #[test]
    fn a_probe_says_who_answers_first_and_who_falls_silent() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let answers = [
                "HTTP/1.0 200 OK\r\n\r\nb1\n",
                "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nb2\n",
                "HTTP/1.0 503 Unavailable\r\n\r\n",
                "",
            ];
            // After these it listens no more.
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                stream.read_exact(&mut [0; REQUEST.len()]).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let log = std::env::temp_dir().join(format!("nohop-load-probe-{}", std::process::id()));
        let probe = Probe { address, log: log.clone(), interval_us: 5000, seconds: 0.5 };
        let mut out = Vec::new();
        let report = probe.run(&mut out).unwrap();
        let lines = fs::read_to_string(&log).unwrap();
        fs::remove_file(&log).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text, "probing\nfirst b1\nfirst b2\nsilent b1\nsilent b2\n");
        assert_eq!(report["servers"], json!({ "b1": 1, "b2": 1 }));
        let lines: Vec<Vec<&str>> = lines.lines().map(|line| line.split(' ').collect()).collect();
        let names: Vec<&str> = lines.iter().map(|line| line[2]).collect();
        assert_eq!(names[..4], ["b1", "b2", "!status_503", "!closed"]);
        assert_eq!(report["connects"], names.len());
        let mut before_ns = 0;
        for line in &lines {
            let [start_ns, end_ns] = [0, 1].map(|idx| line[idx].parse::<u64>().unwrap());
            assert!(before_ns <= start_ns && start_ns < end_ns, "{line:?}");
            before_ns = end_ns;
        }
    }
}
