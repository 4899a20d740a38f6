//! `nohop top`: a live screen of services by their connections.

mod figures;
mod screen;

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use crossterm::event::{Event, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use futures_util::StreamExt as _;
use ratatui::DefaultTerminal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::args::ClientArguments;
use super::process::{environment, runtime, write};
use crate::admin::client::{self, ClientError};
use crate::config::AdminAddress;
use crate::terminal;
use figures::{Figures, Sample};
use screen::{KeyPress, Known, Next, Screen};

/// Between two samples.
const INTERVAL: Duration = Duration::from_secs(1);

/// The rows of a page up or down.
const PAGE: isize = 15;

/// Runs the command.
pub fn run(client: &ClientArguments) -> anyhow::Result<()> {
    let address = client::find(client.admin.as_deref(), &environment)?;
    if client.json {
        let figures = runtime()?.block_on(one_interval(&address))?;
        return write(true, &figures, |_| String::new());
    }
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        bail!(
            "nohop top needs a terminal: without one use `nohop top --json`, or `nohop services` for totals"
        );
    }
    if environment("TERM").as_deref() == Some("dumb") {
        bail!(
            "nohop top needs a terminal that can move its cursor, and TERM is `dumb`: use `nohop top --json`, or \
             `nohop services` for totals"
        );
    }
    runtime()?.block_on(live(address))
}

async fn one_interval(address: &AdminAddress) -> Result<Figures, ClientError> {
    let before = sample(address).await?;
    tokio::time::sleep(INTERVAL).await;
    Ok(Figures::new(Some(&before), &sample(address).await?))
}

async fn sample(address: &AdminAddress) -> Result<Sample, ClientError> {
    let status = client::get(address, "/v1/status").await?;
    let services = client::get(address, "/v1/services").await?;
    Ok(Sample { at: Instant::now(), status, services })
}

/// The terminal while it shows the screen. Its modes are restored on drop, and by the panic hook that
/// ratatui installs, so that the message of a panic can be read.
struct Tty(DefaultTerminal);

impl Tty {
    fn open() -> anyhow::Result<Tty> {
        // What was set before a failure is undone as well.
        ratatui::try_init()
            .map(Tty)
            .inspect_err(|_| ratatui::restore())
            .context("set up the terminal")
    }
}

impl Drop for Tty {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

async fn live(address: AdminAddress) -> anyhow::Result<()> {
    let has_colour = environment("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut screen = Screen::new(has_colour);
    let mut interrupts = signal(SignalKind::interrupt())?;
    let mut terminations = signal(SignalKind::terminate())?;
    let mut hangups = signal(SignalKind::hangup())?;
    let mut tty = Tty::open()?;
    let mut events = EventStream::new();
    let mut samples = samples(address);
    let (mut before, mut figures, mut lost) = (None::<Sample>, None, None);
    loop {
        let lost_now = lost.as_deref().map(|error| {
            (error, before.as_ref().map(|before| before.at.elapsed()).unwrap_or_default())
        });
        let known = Known { figures: figures.as_ref(), lost: lost_now };
        tty.0.draw(|frame| screen.draw(frame, known)).context("draw the screen")?;
        tokio::select! {
            _ = interrupts.recv() => return Ok(()),
            _ = terminations.recv() => return Ok(()),
            _ = hangups.recv() => return Ok(()),
            taken = samples.recv() => match taken.context("no samples are taken any more")? {
                Ok(sample) => {
                    // A daemon that came back may have begun its counters again.
                    let earlier = before.take().filter(|_| lost.is_none());
                    let now = Figures::new(earlier.as_ref(), &sample);
                    figures = Some(terminal::escape_document(&now)?);
                    (before, lost) = (Some(sample), None);
                }
                Err(error) if !error.is_transient() => return Err(error.into()),
                Err(error) => lost = Some(terminal::escape(&error.to_string())),
            },
            event = events.next() => {
                let event = event.context("the terminal is gone")?.context("read the terminal")?;
                let next = key(event).map(|key| screen.press(key, figures.as_ref()));
                if next == Some(Next::Quit) {
                    return Ok(());
                }
            }
        }
    }
}

/// A sample each second, or why there is none.
fn samples(address: AdminAddress) -> mpsc::Receiver<Result<Sample, ClientError>> {
    let (sender, samples) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if sender.send(sample(&address).await).await.is_err() {
                return;
            }
        }
    });
    samples
}

/// The key of an event; `None` of one that changes nothing but the screen's size.
fn key(event: Event) -> Option<KeyPress> {
    let Event::Key(KeyEvent { code, modifiers, kind, .. }) = event else { return None };
    if kind == KeyEventKind::Release {
        return None;
    }
    Some(match code {
        // In the terminal's raw mode it sends no signal.
        KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => KeyPress::Quit,
        KeyCode::Char(_) if modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT) => {
            return None;
        }
        KeyCode::Char(character) => KeyPress::Char(character),
        KeyCode::Backspace => KeyPress::Backspace,
        KeyCode::Enter => KeyPress::Enter,
        KeyCode::Esc => KeyPress::Escape,
        KeyCode::Up => KeyPress::Move(-1),
        KeyCode::Down => KeyPress::Move(1),
        KeyCode::PageUp => KeyPress::Move(-PAGE),
        KeyCode::PageDown => KeyPress::Move(PAGE),
        KeyCode::Home => KeyPress::Move(isize::MIN),
        KeyCode::End => KeyPress::Move(isize::MAX),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use testbed::terminal::Terminal;

    use super::*;

    /// The program of this test, too, by this variable.
    const PANICS: &str = "NOHOP_TEST_PANICS";

    #[test]
    fn a_panic_restores_the_terminal() {
        if std::env::var_os(PANICS).is_some() {
            let _tty = Tty::open().unwrap();
            panic!("on purpose");
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        let name = "cli::top::tests::a_panic_restores_the_terminal";
        command.args(["--exact", name, "--nocapture"]);
        command.env(PANICS, "1").env("RUST_BACKTRACE", "0");
        let mut terminal = Terminal::spawn(&command).unwrap();
        let (status, screen) = terminal.wait_for_exit().unwrap();
        let shown = screen.contents();
        assert!(!status.success() && shown.contains("on purpose"), "{status}\n{shown}");
        assert!(!screen.alternate_screen() && !screen.hide_cursor(), "{shown}");
        assert!(terminal.has_initial_modes().unwrap());
    }
}
