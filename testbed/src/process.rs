//! Programs that run in the background.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, PipeReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::TIMEOUT;
use crate::cleanup::Cleanup;

/// The lines of output that are kept.
const MAX_LINES: usize = 10_000;

/// The lines that [`failure_output`] quotes of each process.
const N_TAIL_LINES: usize = 15;

/// A child process that lives as long as this does.
///
/// It leads a process group of its own, so that Ctrl-C at the terminal reaches only the run, which
/// stops it in its turn.
pub struct Process {
    name: String,
    child: Arc<Mutex<Child>>,
    pid: Pid,
    pidfd: OwnedFd,
    output: Arc<Output>,
    _cleanup: Cleanup,
}

/// A process's output so far, to stdout and stderr.
#[derive(Default)]
struct Output {
    written: Mutex<Written>,
    changed: Condvar,
}

#[derive(Default)]
struct Written {
    lines: VecDeque<String>,
    at_end: bool,
}

impl Process {
    /// Starts a command; `name` is for messages.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(name: &str, mut command: Command) -> Result<Process> {
        let (reader, writer) = io::pipe().context("make a pipe")?;
        let stderr = writer.try_clone().context("make a pipe")?;
        command.process_group(0).stdin(Stdio::null()).stdout(writer).stderr(stderr);
        let child = command.spawn().with_context(|| format!("start {name}: {command:?}"))?;
        drop(command); // and with it our ends of the pipe, so that it ends with the child
        let pid = Pid::from_child(&child);
        let child = Arc::new(Mutex::new(child));
        let cleanup = Cleanup::new({
            let child = Arc::clone(&child);
            move || kill(&child)
        });
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("open a pidfd")?;
        let output = Arc::new(Output::default());
        thread::spawn({
            let output = Arc::clone(&output);
            move || output.read(reader)
        });
        Ok(Process { name: name.into(), child, pid, pidfd, output, _cleanup: cleanup })
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// A descriptor that is readable once the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits for a line of output that contains one of `texts`, and returns it. Lines from before
    /// the call count.
    ///
    /// # Errors
    /// When the process ends its output, or [`TIMEOUT`] passes, without such a line.
    pub fn wait_for_line(&self, texts: &[&str]) -> Result<String> {
        self.wait_for_line_within(TIMEOUT, texts)
    }

    /// The same with a limit of its own.
    ///
    /// # Errors
    /// When the process ends its output, or `limit` passes, without such a line.
    pub fn wait_for_line_within(&self, limit: Duration, texts: &[&str]) -> Result<String> {
        let deadline = Instant::now() + limit;
        let mut written = self.output.lock();
        loop {
            let has_text = |line: &&String| texts.iter().any(|text| line.contains(text));
            if let Some(line) = written.lines.iter().find(has_text) {
                return Ok(line.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if written.at_end || left.is_zero() {
                let what =
                    if written.at_end { "it ended".into() } else { format!("{limit:?} passed") };
                bail!("{} wrote none of {texts:?} before {what}\n{}", self.name, written.tail());
            }
            let waited = self.output.changed.wait_timeout(written, left);
            written = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The last line of output so far.
    pub fn last_line(&self) -> Option<String> {
        self.output.lock().lines.back().cloned()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// When [`TIMEOUT`] passes before.
    pub fn wait_for_exit(&self) -> Result<ExitStatus> {
        if !self.ends_within(TIMEOUT)? {
            bail!("{} still runs after {TIMEOUT:?}\n{}", self.name, self.tail());
        }
        lock(&self.child).wait().with_context(|| format!("wait for {}", self.name))
    }

    /// Waits for the end of the process, `limit` at most: whether it came.
    ///
    /// # Errors
    /// When it can't be waited for.
    pub fn ends_within(&self, limit: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let n_ready = poll(&mut fds, Some(&Timespec::try_from(limit)?)).context("poll a pidfd")?;
        Ok(n_ready > 0)
    }

    /// Asks the process to end with SIGTERM, and waits.
    ///
    /// # Errors
    /// When it doesn't within [`TIMEOUT`]; then it is killed.
    pub fn stop(self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait_for_exit()
    }

    /// How many lines of its output so far contain this text.
    pub fn n_lines_with(&self, text: &str) -> usize {
        self.lines_with(text).len()
    }

    /// The lines of its output so far that contain this text.
    pub fn lines_with(&self, text: &str) -> Vec<String> {
        self.output.lock().lines.iter().filter(|line| line.contains(text)).cloned().collect()
    }

    /// Ends the process at once, as a crash would.
    pub fn kill(self) {
        kill(&self.child);
    }

    /// The last lines of its output.
    pub fn tail(&self) -> String {
        format!("--- {}\n{}", self.name, self.output.lock().tail())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        FAILURE_OUTPUT.with_borrow_mut(|words| words.push(self.tail()));
    }
}

thread_local! {
    static FAILURE_OUTPUT: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// The last output of each process that this thread has dropped since it asked before: what to
/// show when a scenario failed.
pub fn failure_output() -> String {
    FAILURE_OUTPUT.take().concat()
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Written> {
        lock(&self.written)
    }

    fn read(&self, reader: PipeReader) {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let mut written = self.lock();
            if written.lines.len() == MAX_LINES {
                written.lines.pop_front();
            }
            written.lines.push_back(String::from_utf8_lossy(&line).into_owned());
            self.changed.notify_all();
        }
        self.lock().at_end = true;
        self.changed.notify_all();
    }
}

impl Written {
    fn tail(&self) -> String {
        let n_skipped = self.lines.len().saturating_sub(N_TAIL_LINES);
        self.lines.iter().skip(n_skipped).map(|line| format!("    {line}\n")).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn kill(child: &Mutex<Child>) {
    let mut child = lock(child);
    let _ = child.kill();
    let _ = child.wait();
}
