//! The daemon under test, watched through its admin socket.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::process::Signal;
use serde_json::Value;

use crate::TIMEOUT;
use crate::bpffs::Bpffs;
use crate::cgroup::Cgroup;
use crate::cmd;
use crate::net::Host;
use crate::process::Process;
use crate::tempdir::TempDir;

/// How long one blocking request waits, in seconds.
const WAIT_S: u64 = 5;

/// A daemon on a host, that serves a cgroup.
pub struct Nohop {
    /// Its process.
    pub process: Process,
    /// The program and its first arguments.
    command: Vec<OsString>,
    /// The configuration of its own paths.
    own: String,
    host: Arc<Host>,
    // Unmounted after the daemon has ended: with the pins go the hooks.
    bpffs: Bpffs,
    tempdir: TempDir,
}

/// An answer of the admin interface.
struct Answer {
    generation: u64,
    body: Value,
}

impl Nohop {
    /// Starts the daemon and waits until it is ready.
    ///
    /// `config` is TOML with dotted keys, such as `vip.ports = [80]`. `{admin}` stands for its admin socket,
    /// where `admin.listen` has further addresses.
    ///
    /// # Errors
    /// When it isn't ready in time.
    pub fn start(host: &Arc<Host>, cgroup: &Cgroup, config: &str) -> Result<Nohop> {
        let nohop = Nohop::start_unready(host, cgroup, config)?;
        nohop.wait_until_ready()?;
        Ok(nohop)
    }

    /// Starts the daemon and waits until its admin interface answers.
    ///
    /// # Errors
    /// When it doesn't in time.
    pub fn start_unready(host: &Arc<Host>, cgroup: &Cgroup, config: &str) -> Result<Nohop> {
        Nohop::start_command(vec![cmd::built("nohop")?.into()], host, cgroup.path(), config)
    }

    /// Starts this executable, another release's perhaps, and waits until it is ready.
    ///
    /// # Errors
    /// When it isn't ready in time.
    pub fn start_binary(
        binary: &Path,
        host: &Arc<Host>,
        cgroup: &Cgroup,
        config: &str,
    ) -> Result<Nohop> {
        let nohop = Nohop::start_command(vec![binary.into()], host, cgroup.path(), config)?;
        nohop.wait_until_ready()?;
        Ok(nohop)
    }

    /// Starts the daemon by another program, such as `unshare`, whose last arguments are the daemon's
    /// command line and which becomes the daemon. Waits until its admin interface answers.
    ///
    /// # Errors
    /// When it doesn't in time.
    pub fn start_under(
        host: &Arc<Host>,
        under: &[&str],
        scope: &Path,
        config: &str,
    ) -> Result<Nohop> {
        let command = under.iter().map(OsString::from).chain([cmd::built("nohop")?.into()]);
        Nohop::start_command(command.collect(), host, scope, config)
    }

    fn start_command(
        command: Vec<OsString>,
        host: &Arc<Host>,
        scope: &Path,
        config: &str,
    ) -> Result<Nohop> {
        let tempdir = TempDir::new("nohop")?;
        let dir = tempdir.path();
        let config_file = dir.join("nohop.toml");
        let bpffs = Bpffs::new()?;
        // Keys that every release knows: `bench compare` starts older ones, too.
        let mut own = format!("cgroup = {:?}\nbpffs = {:?}\n", scope, bpffs.path().join("nohop"),);
        // Where a scenario doesn't choose them itself.
        if !config.contains("state_dir") {
            own += &format!("state_dir = {:?}\n", dir.join("state"));
        }
        if !config.contains("admin.listen") {
            own += &format!("admin.listen = [{:?}]\n", admin(dir));
        }
        write_config(&config_file, &own, config)?;
        let inotify = watch(dir)?;
        let process = spawn(&command, host, &config_file)?;
        let nohop = Nohop { process, command, own, host: Arc::clone(host), bpffs, tempdir };
        nohop.wait_until_listening(&inotify)?;
        Ok(nohop)
    }

    /// Starts the daemon again, once it has ended, and waits until it is ready.
    ///
    /// # Errors
    /// When it isn't ready in time.
    pub fn start_again(&mut self) -> Result<()> {
        self.start_again_unready()?;
        self.wait_until_ready()
    }

    /// Starts the daemon again, once it has ended, and waits until its admin interface answers.
    ///
    /// # Errors
    /// When it doesn't in time.
    pub fn start_again_unready(&mut self) -> Result<()> {
        // A killed daemon's socket file would pass for a new one's.
        let _ = fs::remove_file(self.socket());
        let inotify = watch(self.tempdir.path())?;
        self.process = spawn(&self.command, &self.host, &self.tempdir.path().join("nohop.toml"))?;
        self.wait_until_listening(&inotify)
    }

    /// Starts the daemon again, once it has ended, and doesn't wait for anything.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start_again_unwatched(&mut self) -> Result<()> {
        let _ = fs::remove_file(self.socket());
        self.process = spawn(&self.command, &self.host, &self.tempdir.path().join("nohop.toml"))?;
        Ok(())
    }

    /// Starts the daemon again, once it has ended, with stderr in a file or a FIFO, and waits until it
    /// is ready.
    ///
    /// # Errors
    /// When it isn't ready in time.
    pub fn start_again_with_stderr(&mut self, stderr: &Path) -> Result<()> {
        let inotify = watch(self.tempdir.path())?;
        let config_file = self.tempdir.path().join("nohop.toml");
        let mut command = self.host.outside().command("sh");
        command.args([OsStr::new("-c"), OsStr::new(r#"exec "$1" run --config "$2" 2>"$3""#)]);
        command.arg("sh").arg(cmd::built("nohop")?).arg(config_file).arg(stderr);
        command.env("RUST_LOG", "debug");
        self.process = Process::spawn("nohop", command)?;
        self.wait_until_listening(&inotify)?;
        self.wait_until_ready()
    }

    /// Replaces the configuration that [`Nohop::start`] was given, for the next start.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn configure(&self, config: &str) -> Result<()> {
        write_config(&self.tempdir.path().join("nohop.toml"), &self.own, config)
    }

    /// Where the daemon keeps its state.
    pub fn state_dir(&self) -> PathBuf {
        self.tempdir.path().join("state")
    }

    /// Waits until a file of the state directory, such as `catalog.json`, contains this text.
    ///
    /// # Errors
    /// When it doesn't within [`TIMEOUT`].
    pub fn wait_for_state(&self, name: &str, text: &str) -> Result<()> {
        let dir = self.state_dir();
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // The daemon renames a file that is complete into its place.
        inotify::add_watch(&inotify, &dir, WatchFlags::MOVED_TO)?;
        let deadline = Instant::now() + TIMEOUT;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        while !fs::read_to_string(dir.join(name)).is_ok_and(|found| found.contains(text)) {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no {text:?} in {name} after {TIMEOUT:?}");
            poll(&mut [PollFd::new(&inotify, PollFlags::IN)], Some(&Timespec::try_from(left)?))?;
            let _ = inotify::Reader::new(&inotify, &mut buffer).next();
        }
        Ok(())
    }

    /// Ends the daemon by SIGKILL, as a crash would, and waits until it has ended.
    ///
    /// # Errors
    /// When it doesn't end.
    pub fn kill(&self) -> Result<()> {
        self.stop_with(Signal::KILL).map(drop)
    }

    /// Ends the daemon by SIGTERM, and waits until it has ended.
    ///
    /// # Errors
    /// When it doesn't end within [`TIMEOUT`].
    pub fn terminate(&self) -> Result<ExitStatus> {
        self.stop_with(Signal::TERM)
    }

    /// Where the daemon pins maps and links.
    pub fn pins(&self) -> PathBuf {
        self.bpffs.path().join("nohop")
    }

    /// A pin of the maps' layout in force, such as `maps/SERVICES` or `links/nohop_connect4`.
    ///
    /// # Errors
    /// When there is none.
    pub fn pin(&self, name: &str) -> Result<PathBuf> {
        let pins = self.pins();
        let layouts = fs::read_dir(&pins).with_context(|| format!("list {}", pins.display()))?;
        let mut found = layouts.filter_map(|entry| Some(entry.ok()?.path().join(name)));
        found.find(|pin| pin.exists()).with_context(|| format!("no {name} in {}", pins.display()))
    }

    fn wait_until_listening(&self, inotify: &OwnedFd) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        loop {
            match UnixStream::connect(self.socket()) {
                Ok(_) => return Ok(()),
                // Between bind() and listen(), a moment for which there is no event.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => thread::yield_now(),
                Err(_) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let pidfd = self.process.pidfd();
                    let mut fds =
                        [PollFd::new(inotify, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
                    poll(&mut fds, Some(&Timespec::try_from(left)?))?;
                    ensure!(fds[1].revents().is_empty(), "it ended\n{}", self.process.tail());
                    let _ = inotify::Reader::new(inotify, &mut buffer).next();
                }
            }
            if Instant::now() > deadline {
                bail!("it doesn't listen after {TIMEOUT:?}\n{}", self.process.tail());
            }
        }
    }

    /// Waits until the daemon reports that it is ready.
    ///
    /// # Errors
    /// When it doesn't in time.
    pub fn wait_until_ready(&self) -> Result<()> {
        self.wait("/v1/status", TIMEOUT, |status| status["ready"] == true).map(drop)
    }

    /// The document of `GET /v1/status`.
    ///
    /// # Errors
    /// When the daemon doesn't answer.
    pub fn status(&self) -> Result<Value> {
        Ok(self.get("/v1/status")?.body)
    }

    /// The document of a GET request for this path, with its query.
    ///
    /// # Errors
    /// When the daemon doesn't answer.
    pub fn document(&self, path: &str) -> Result<Value> {
        Ok(self.get(path)?.body)
    }

    /// The document of `GET /v1/services`.
    ///
    /// # Errors
    /// When the daemon doesn't answer.
    pub fn services(&self) -> Result<Value> {
        Ok(self.get("/v1/services")?.body)
    }

    /// The document of `GET /v1/services/NAME`: everything that is known of a name.
    ///
    /// # Errors
    /// When the daemon doesn't answer.
    pub fn explain(&self, name: &str) -> Result<Value> {
        Ok(self.get(&format!("/v1/services/{name}"))?.body)
    }

    /// Waits until `predicate` holds of everything that is known of a name.
    ///
    /// # Errors
    /// When it doesn't within [`TIMEOUT`].
    pub fn wait_until_explained(
        &self,
        name: &str,
        predicate: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        self.wait(&format!("/v1/services/{name}"), TIMEOUT, predicate)
    }

    /// Waits until `predicate` holds of the list of services.
    ///
    /// # Errors
    /// When it doesn't within [`TIMEOUT`].
    pub fn wait_until(&self, predicate: impl Fn(&Value) -> bool) -> Result<Value> {
        self.wait("/v1/services", TIMEOUT, predicate)
    }

    /// Waits until the service has this many healthy backends; none, too, when it doesn't exist.
    ///
    /// # Errors
    /// When it hasn't within [`TIMEOUT`].
    pub fn wait_for_backends(&self, service: &str, n: usize) -> Result<Value> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            // A DNS query makes a new name known at once, as any client's does.
            self.ask_for(service)?;
            let left = deadline.saturating_duration_since(Instant::now());
            let has_them = |services: &Value| n_healthy(services, service) == n;
            let waited = self.wait("/v1/services", left.min(Duration::from_secs(2)), has_them);
            if waited.is_ok() || Instant::now() >= deadline {
                return waited;
            }
        }
    }

    /// Queries DNS for a service, and ignores the answer.
    fn ask_for(&self, service: &str) -> Result<()> {
        let mut command = self.host.outside().command("dig");
        command.args(["+time=1", "+tries=1", "@127.0.0.1", &format!("{service}.service")]);
        cmd::output(command).map(drop)
    }

    /// Waits until `predicate` holds of the status.
    ///
    /// # Errors
    /// When it doesn't within [`TIMEOUT`].
    pub fn wait_for_status(&self, predicate: impl Fn(&Value) -> bool) -> Result<Value> {
        self.wait("/v1/status", TIMEOUT, predicate)
    }

    /// Runs a command of `nohop`, such as `services --json`, against this daemon.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn cli(&self, arguments: &str) -> Result<Output> {
        cmd::output(self.command(arguments)?)
    }

    /// The same, to be run in another way.
    ///
    /// # Errors
    /// None but defects of the testbed.
    pub fn command(&self, arguments: &str) -> Result<Command> {
        // The executable itself, whatever it was started by.
        let binary = self.command.last().context("a program")?;
        let mut command = self.host.outside().command(binary);
        command.env("NOHOP_ADMIN", admin(self.tempdir.path())).args(arguments.split_whitespace());
        Ok(command)
    }

    /// The address of its admin interface, in the form that the clients of `nohop` take.
    pub fn admin(&self) -> String {
        admin(self.tempdir.path())
    }

    /// Stops the daemon with this signal.
    ///
    /// # Errors
    /// When it doesn't end within [`TIMEOUT`].
    pub fn stop_with(&self, signal: Signal) -> Result<ExitStatus> {
        self.process.signal(signal)?;
        self.process.wait_for_exit()
    }

    fn socket(&self) -> PathBuf {
        self.tempdir.path().join("admin.sock")
    }

    /// Requests repeatedly, each time for what is newer than the answer before.
    ///
    /// Not every change of a status has a generation of its own; a request's own limit sees to it
    /// that such a change is noticed, too.
    fn wait(
        &self,
        path: &str,
        limit: Duration,
        predicate: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + limit;
        let mut answer = self.get(path)?;
        while !predicate(&answer.body) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let (body, tail) = (answer.body, self.process.tail());
                bail!("{path} isn't as expected after {limit:?}: {body:#}\n{tail}");
            }
            let wait_s = if path == "/v1/status" { 1 } else { left.as_secs().clamp(1, WAIT_S) };
            let generation = answer.generation;
            answer = self.get(&format!("{path}?after={generation}&wait={wait_s}"))?;
        }
        Ok(answer.body)
    }

    /// One request; HTTP/1.0, so that the answer is simply what comes until the end.
    fn get(&self, path: &str) -> Result<Answer> {
        let ask = || -> Result<String> {
            let mut stream = UnixStream::connect(self.socket())?;
            stream.set_read_timeout(Some(Duration::from_secs(WAIT_S) + TIMEOUT))?;
            write!(stream, "GET {path} HTTP/1.0\r\nHost: nohop\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = ask().with_context(|| format!("GET {path}\n{}", self.process.tail()))?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a head")?;
        let mut headers = head.lines().filter_map(|line| line.split_once(": "));
        let generation = headers.find(|(name, _)| name.eq_ignore_ascii_case("X-Nohop-Generation"));
        Ok(Answer {
            generation: generation.and_then(|(_, value)| value.parse().ok()).unwrap_or(0),
            body: serde_json::from_str(body).with_context(|| format!("{path}: {answer}"))?,
        })
    }
}

/// Reports when something is created in a directory.
fn watch(dir: &Path) -> Result<OwnedFd> {
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    inotify::add_watch(&inotify, dir, WatchFlags::CREATE)?;
    Ok(inotify)
}

fn write_config(file: &Path, own: &str, config: &str) -> Result<()> {
    let config = config.replace("{admin}", &admin(file.parent().context("a directory")?));
    fs::write(file, format!("{own}{config}")).context("write the daemon's configuration")
}

fn spawn(command: &[OsString], host: &Host, config_file: &Path) -> Result<Process> {
    let (program, arguments) = command.split_first().context("a program")?;
    let mut command = host.outside().command(program);
    command.args(arguments);
    command.args([OsStr::new("run"), OsStr::new("--config"), config_file.as_os_str()]);
    command.env("RUST_LOG", "info");
    Process::spawn("nohop", command)
}

/// The address of the admin interface of a daemon with this directory.
fn admin(dir: &Path) -> String {
    format!("unix:{}", dir.join("admin.sock").display())
}

/// The service of this name in a list of services.
pub fn service<'a>(services: &'a Value, name: &str) -> Option<&'a Value> {
    services.as_array()?.iter().find(|service| service["name"] == name)
}

/// The number of healthy backends of a service in a list of services.
pub fn n_healthy(services: &Value, name: &str) -> usize {
    healthy(services, name).count()
}

/// Whether the instance with this id is a healthy backend of a service in a list of services.
pub fn is_healthy(services: &Value, name: &str, id: &str) -> bool {
    healthy(services, name).any(|backend| backend["instance"] == id)
}

fn healthy<'a>(services: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    let backends = service(services, name).and_then(|service| service["backends"].as_array());
    backends.into_iter().flatten().filter(|backend| backend["state"] == "healthy")
}
