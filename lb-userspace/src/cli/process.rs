//! Shared by the commands: exit codes, the environment, a runtime, and output.

use std::io::Write;
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::args::{ClientArguments, ConfigArguments};
use crate::config::{Config, ConfigErrors};
use crate::{logging, terminal};

/// A failure.
pub const FAILURE: u8 = 1;
/// The command line or the configuration is wrong; clap uses the same.
pub const USAGE: u8 = 2;

/// The longest that one request waits for a change.
pub const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// How long the daemon may take for an answer in addition to that.
pub const ANSWER: Duration = Duration::from_secs(5);

/// A variable of the environment; `None` where it is unset. What isn't UTF-8 in it is replaced, so that its reader
/// refuses the value instead of missing it.
pub fn environment(name: &str) -> Option<String> {
    Some(std::env::var_os(name)?.to_string_lossy().into_owned())
}

/// The configuration that these arguments and the environment give.
pub fn load(arguments: &ConfigArguments) -> Result<Config, ConfigErrors> {
    Config::load(arguments.config.as_deref(), &arguments.flags(), &environment)
}

/// A runtime for one request.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Prints a document for a person, or as JSON. A reader that has seen enough is no failure.
pub fn print<T: Serialize + DeserializeOwned>(
    client: &ClientArguments,
    document: &T,
    text: impl Fn(&T) -> String,
) -> anyhow::Result<()> {
    write(client.json, document, text)
}

/// The same, where there is no daemon to find.
pub fn write<T: Serialize + DeserializeOwned>(
    json: bool,
    document: &T,
    text: impl Fn(&T) -> String,
) -> anyhow::Result<()> {
    let text = match json {
        true => terminal::escape_json(&serde_json::to_string_pretty(document)?) + "\n",
        false => terminal::show(document, text)?,
    };
    write_text(&text)
}

/// Prints one line to stderr, or through the log if there is one.
pub fn print_error(message: &str) {
    logging::write_error(message);
}

/// Prints one of several documents, as text or as JSON in one line; false once stdout is closed.
pub fn show_line<T: Serialize + DeserializeOwned>(
    json: bool,
    document: &T,
    text: impl Fn(&T) -> String,
) -> anyhow::Result<bool> {
    let text = match json {
        true => terminal::escape_json(&serde_json::to_string(document)?) + "\n",
        false => terminal::show(document, text)?,
    };
    let mut stdout = std::io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("can't write to stdout"),
    }
}

/// Ends the process once nothing reads the pipe that is its stdout: a command that waits for what happens
/// next would notice that only when it writes it.
pub fn end_when_unread() {
    std::thread::spawn(|| {
        let stdout = std::io::stdout();
        // Without events that are asked for, the end of the pipe is the one that there is.
        let mut ends = [PollFd::new(&stdout, PollFlags::empty())];
        loop {
            match rustix::event::poll(&mut ends, None) {
                Ok(_) => std::process::exit(0),
                Err(Errno::INTR) => {}
                // Then the next line fails to be written.
                Err(_) => return,
            }
        }
    });
}

/// Writes text to stdout; a closed pipe is no failure.
pub fn write_text(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("can't write to stdout")
        }
        _ => Ok(()),
    }
}
