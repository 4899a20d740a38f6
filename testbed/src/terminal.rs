//! A program at a terminal: a pseudo-terminal, and what the program shows there.

use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::{read, write};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use crate::TIMEOUT;
use crate::cleanup::Cleanup;
use crate::process::kill;

/// The rows of a terminal, as most begin.
const ROWS: u16 = 24;
/// Its columns.
const COLUMNS: u16 = 80;

/// A terminal of 80 by 24 characters, and a program that it is the controlling terminal of. The program is killed on drop.
pub struct Terminal {
    pid: Pid,
    pidfd: OwnedFd,
    child: Arc<Mutex<Child>>,
    controller: OwnedFd,
    /// The program's end, so that its modes can be read after the program has ended.
    user: OwnedFd,
    /// The modes that the program found.
    modes: String,
    parser: vt100::Parser,
    _cleanup: Cleanup,
}

impl Terminal {
    /// Starts a command at a new terminal.
    ///
    /// # Errors
    /// When there is no terminal to have, or the command can't be started.
    pub fn spawn(command: &Command) -> Result<Terminal> {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&controller)?;
        unlockpt(&controller)?;
        let path = ptsname(&controller, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let user = rustix::fs::open(path.as_c_str(), flags, Mode::empty())?;
        let size = Winsize { ws_row: ROWS, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&user, size)?;
        let modes = modes(&user)?;
        // setsid becomes the program; --ctty makes stdin its controlling terminal.
        let mut setsid = Command::new("setsid");
        setsid.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => setsid.env(name, value),
                None => setsid.env_remove(name),
            };
        }
        setsid.env("TERM", "xterm-256color");
        setsid.stdin(user.try_clone()?).stdout(user.try_clone()?).stderr(user.try_clone()?);
        let child = setsid.spawn().with_context(|| format!("start {setsid:?}"))?;
        let pid = Pid::from_child(&child);
        let child = Arc::new(Mutex::new(child));
        let cleanup = Cleanup::new({
            let child = Arc::clone(&child);
            move || kill(&child)
        });
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("open a pidfd")?;
        let size = |n| NonZero::new(n).context("a size");
        let parser = vt100::Parser::new(size(ROWS)?, size(COLUMNS)?, 0);
        Ok(Terminal { pid, pidfd, child, controller, user, modes, parser, _cleanup: cleanup })
    }

    /// Types this text.
    ///
    /// # Errors
    /// When the terminal doesn't take it.
    pub fn press(&self, keys: &str) -> Result<()> {
        let n = write(&self.controller, keys.as_bytes())?;
        ensure!(n == keys.len(), "the terminal took {n} octets of {keys:?}");
        Ok(())
    }

    /// Sends the program a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid, signal)?)
    }

    /// Waits until what the terminal shows is as expected, and returns its text.
    ///
    /// # Errors
    /// When it isn't within [`TIMEOUT`], or the program ends before.
    pub fn wait_for(&mut self, is_expected: impl Fn(&vt100::Screen) -> bool) -> Result<String> {
        let deadline = Instant::now() + TIMEOUT;
        while !is_expected(self.parser.screen()) {
            let is_alive = self.read_until(deadline)?;
            let shown = self.parser.screen().contents();
            ensure!(is_alive, "the program has ended, and the terminal shows:\n{shown}");
            ensure!(Instant::now() < deadline, "after {TIMEOUT:?} the terminal shows:\n{shown}");
        }
        Ok(self.parser.screen().contents())
    }

    /// Waits until the program has ended, and returns what the terminal shows then.
    ///
    /// # Errors
    /// When it hasn't within [`TIMEOUT`].
    pub fn wait_for_exit(&mut self) -> Result<(ExitStatus, &vt100::Screen)> {
        let deadline = Instant::now() + TIMEOUT;
        while self.read_until(deadline)? {
            ensure!(Instant::now() < deadline, "it hasn't ended after {TIMEOUT:?}");
        }
        let status = self.child.lock().unwrap_or_else(PoisonError::into_inner).wait()?;
        Ok((status, self.parser.screen()))
    }

    /// What the terminal shows.
    pub fn screen(&self) -> &vt100::Screen {
        self.parser.screen()
    }

    /// A screen of so many columns that shows what a program wrote into a pipe.
    ///
    /// # Errors
    /// When there are too many lines or columns for a terminal.
    pub fn of_output(output: &[u8], n_columns: u16) -> Result<vt100::Parser> {
        let n_lines = output.iter().filter(|octet| **octet == b'\n').count() + 1;
        let size = |n: usize| u16::try_from(n).ok().and_then(NonZero::new).context("a size");
        let mut parser = vt100::Parser::new(size(n_lines)?, size(n_columns.into())?, 0);
        let text = String::from_utf8_lossy(output).trim_end().replace('\n', "\r\n");
        parser.process(text.as_bytes());
        Ok(parser)
    }

    /// Whether the terminal shows something in a colour.
    pub fn has_colour(&self) -> bool {
        let screen = self.parser.screen();
        let mut cells =
            (0..ROWS).flat_map(|row| (0..COLUMNS).map(move |column| screen.cell(row, column)));
        cells.any(|cell| cell.is_some_and(|cell| cell.fgcolor() != vt100::Color::Default))
    }

    /// Whether the terminal has the modes that the program found.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn has_initial_modes(&self) -> Result<bool> {
        Ok(modes(&self.user)? == self.modes)
    }

    /// Reads what the program has written once there is some; false once it has ended and all is read.
    fn read_until(&mut self, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds =
            [PollFd::new(&self.controller, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::try_from(left)?))?;
        let (is_readable, has_ended) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if is_readable {
            let mut buffer = [0; 4096];
            let n = read(&self.controller, &mut buffer)?;
            self.parser.process(&buffer[..n]);
        }
        Ok(is_readable || !has_ended)
    }
}

fn modes(terminal: &OwnedFd) -> Result<String> {
    Ok(format!("{:?}", tcgetattr(terminal)?))
}
