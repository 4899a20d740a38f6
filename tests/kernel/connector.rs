//! A process that connects to one address all the time, from several threads: an application, as this
//! process is none while it is a daemon.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::fixture::connect;

const FLAG: &str = "--connect";
const N_THREADS: usize = 2;
/// How long the connections that are waited for may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// The letter of a failed connection.
const FAILED: char = '!';

/// The letters of the servers that answered, and how often each did.
type Answers = BTreeMap<char, u64>;

/// The process, until it is dropped.
///
/// A byte to its stdin begins a new epoch. For each connection it writes the server's letter, and the
/// epoch in which the connection began.
pub struct Connector {
    child: Child,
    stdin: Option<ChildStdin>,
    epoch: Cell<u8>,
    answers: Arc<(Mutex<BTreeMap<u8, Answers>>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

impl Connector {
    pub fn start(address: impl Into<SocketAddr>) -> Connector {
        let mut child = Command::new("/proc/self/exe")
            .args([FLAG, &address.into().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, mut stdout) = (child.stdin.take(), child.stdout.take().unwrap());
        let answers = Arc::<(Mutex<BTreeMap<u8, Answers>>, Condvar)>::default();
        let shared = answers.clone();
        let reader = std::thread::spawn(move || {
            let mut answer = [0; 2];
            while stdout.read_exact(&mut answer).is_ok() {
                let [letter, epoch] = answer;
                let mut answers = shared.0.lock().unwrap();
                *answers.entry(epoch).or_default().entry(letter.into()).or_default() += 1;
                shared.1.notify_all();
            }
        });
        let connector =
            Connector { child, stdin, epoch: Cell::new(0), answers, reader: Some(reader) };
        // Until the child runs its own program it holds our descriptors, and with them our locks.
        connector.more(1);
        connector
    }

    /// Waits for `n` connections that begin after the call, and returns the letters of who answered.
    pub fn more(&self, n: u64) -> String {
        self.epoch.set(self.epoch.get() + 1);
        self.stdin.as_ref().unwrap().write_all(&[0]).unwrap();
        let (answers, changed) = &*self.answers;
        let is_short = |answers: &Answers| answers.values().sum::<u64>() < n;
        let (answers, waited) = changed
            .wait_timeout_while(answers.lock().unwrap(), PATIENCE, |answers| {
                is_short(answers.entry(self.epoch.get()).or_default())
            })
            .unwrap();
        assert!(!waited.timed_out(), "no {n} connections in {PATIENCE:?}: {answers:?}");
        answers[&self.epoch.get()].keys().collect()
    }

    /// Ends it; no connection may have failed. Returns the letters of who answered.
    pub fn stop(mut self) -> String {
        self.end();
        let answers = self.answers.0.lock().unwrap();
        let letters: BTreeSet<char> = answers.values().flat_map(Answers::keys).copied().collect();
        assert!(!letters.contains(&FAILED), "connections failed: {answers:?}");
        letters.into_iter().collect()
    }

    fn end(&mut self) {
        self.stdin = None;
        let _ = self.reader.take().map(JoinHandle::join);
        let _ = self.child.wait();
    }
}

impl Drop for Connector {
    fn drop(&mut self) {
        self.end();
    }
}

/// The address to connect to, if this process was started as one that connects to.
pub fn hidden_command() -> Option<SocketAddr> {
    let mut arguments = std::env::args().skip(1);
    (arguments.next()? == FLAG).then(|| arguments.next()?.parse().ok()).flatten()
}

/// Connects until stdin ends.
pub fn run(address: SocketAddr) -> ExitCode {
    let epoch = Arc::new(AtomicU8::new(0));
    for _ in 0..N_THREADS {
        let epoch = epoch.clone();
        std::thread::spawn(move || {
            loop {
                let epoch = epoch.load(Ordering::SeqCst);
                let letter = connect(address).unwrap_or_else(|error| {
                    eprintln!("a connection failed: {error}");
                    FAILED
                });
                let mut stdout = std::io::stdout().lock();
                let written = stdout.write_all(&[letter as u8, epoch]);
                if written.and_then(|()| stdout.flush()).is_err() {
                    return;
                }
            }
        });
    }
    while let Ok(1) = std::io::stdin().read(&mut [0]) {
        epoch.fetch_add(1, Ordering::SeqCst);
    }
    ExitCode::SUCCESS
}
