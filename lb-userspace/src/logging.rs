//! The log: lines go to stderr by a thread of their own, so that a pipe that isn't read, or a
//! journal that stalls, holds up no other thread. What doesn't fit into the queue is counted. The filter
//! can be changed while the daemon runs, and lines for the journal have their priorities.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use clap::ValueEnum;
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::capabilities;
use crate::counted::counted;
use crate::terminal;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// The most bytes that wait for stderr; what comes beyond them is dropped.
const MAX_QUEUED: usize = 1 << 20;

/// The longest line, in bytes; what is longer is cut off.
const MAX_LINE: usize = 16 << 10;

/// The replacement for a JSON event that is longer than that.
const TOO_LONG: &str = "a line too long was left out";

/// The target of lines that come from the log itself, and of the process's last error.
const TARGET: &str = "nohop";

/// The filter where RUST_LOG names none.
const DEFAULT_FILTER: &str = "info";

/// The crates whose events can be asked for by name alone.
const MODULES: [&str; 5] = ["aya", "hyper", "lb_userspace", "nohop", "rustls"];

/// How long the end of the process waits for the lines that are left.
const LAST_WAIT: Duration = Duration::from_millis(200);

/// The queue of the daemon, once it logs.
static QUEUE: OnceLock<Queue> = OnceLock::new();

/// The filter of the daemon, once it logs.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Lines on their way to stderr.
#[derive(Clone, Debug, Default)]
struct Queue(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    format: LogFormat,
    /// Whether the journal reads the lines.
    is_journal: bool,
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    lines: VecDeque<Vec<u8>>,
    n_bytes: usize,
    /// Lines that were dropped, since the start.
    n_dropped: u64,
    /// Those of them that the log hasn't reported yet.
    n_unreported: u64,
    is_writing: bool,
}

impl Queue {
    /// A queue and the thread that empties it into `out`.
    fn start(
        mut out: impl Write + Send + 'static,
        format: LogFormat,
        is_journal: bool,
    ) -> io::Result<Queue> {
        let queue = Queue(Arc::new(Shared { format, is_journal, ..Shared::default() }));
        let of_thread = queue.clone();
        std::thread::Builder::new().name("log".into()).spawn(move || {
            capabilities::none();
            loop {
                let line = of_thread.take();
                // An error can't be reported anywhere.
                let is_lost = out.write_all(&line).and_then(|()| out.flush()).is_err();
                of_thread.wrote(is_lost);
            }
        })?;
        Ok(queue)
    }

    /// Queues a line, or counts it where there is no room.
    fn push(&self, line: &[u8]) {
        let mut lines = self.lock();
        if lines.n_bytes + line.len() > MAX_QUEUED {
            lines.n_dropped += 1;
            lines.n_unreported += 1;
            return;
        }
        lines.n_bytes += line.len();
        lines.lines.push_back(line.to_vec());
        drop(lines);
        self.0.changed.notify_all();
    }

    fn take(&self) -> Vec<u8> {
        let waits = |lines: &mut Lines| lines.lines.is_empty();
        let waited = self.0.changed.wait_while(self.lock(), waits);
        let mut lines = waited.unwrap_or_else(PoisonError::into_inner);
        let mut line = lines.lines.pop_front().unwrap_or_default();
        lines.n_bytes -= line.len();
        lines.is_writing = true;
        let n_unreported = std::mem::take(&mut lines.n_unreported);
        if n_unreported > 0 {
            let n_lines = counted(n_unreported, "line");
            let message = format!("dropped {n_lines} of the log: stderr isn't read fast enough");
            line.extend(self.own_line(Level::WARN, &message).into_bytes());
        }
        line
    }

    /// A line that isn't an event's.
    fn own_line(&self, level: Level, message: &str) -> String {
        let line = match self.0.format {
            LogFormat::Text => terminal::escape(message),
            LogFormat::Json => own_event(level, message),
        };
        self.priority(level).to_owned() + &line + "\n"
    }

    /// The prefix with the priority of a line, where one is read (sd-daemon(3), syslog(3)).
    fn priority(&self, level: Level) -> &'static str {
        match level {
            _ if !self.0.is_journal => "",
            Level::ERROR => "<3>",
            Level::WARN => "<4>",
            Level::INFO => "<6>",
            Level::DEBUG | Level::TRACE => "<7>",
        }
    }

    fn wrote(&self, is_lost: bool) {
        let mut lines = self.lock();
        lines.is_writing = false;
        lines.n_dropped += u64::from(is_lost);
        drop(lines);
        self.0.changed.notify_all();
    }

    /// Waits until all is written, but no longer than `limit`.
    fn drain(&self, limit: Duration) {
        let waits = |lines: &mut Lines| !lines.lines.is_empty() || lines.is_writing;
        // Whether all was written or the time is over, the process ends.
        let _ = self.0.changed.wait_timeout_while(self.lock(), limit, waits);
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.0.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The format of lines, which decides what in them is the subscriber's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Plain,
    /// With a terminal's sequences; the subscriber escapes those in what it is given.
    Coloured,
    Json,
}

/// Writes one event.
struct Event<'a> {
    queue: &'a Queue,
    style: Style,
    level: Level,
}

impl Write for Event<'_> {
    /// The subscriber writes each event by one call.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = self.queue.priority(self.level).to_owned() + &line(event, self.style);
        self.queue.push(line.as_bytes());
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An event as one line: a line break from elsewhere would forge another.
fn line(event: &[u8], style: Style) -> String {
    let event = event.strip_suffix(b"\n").unwrap_or(event);
    let is_cut = event.len() > MAX_LINE;
    let text = String::from_utf8_lossy(&event[..event.len().min(MAX_LINE)]);
    let mut line = match style {
        Style::Plain => terminal::escape(&text),
        Style::Coloured => terminal::escape_but_sequences(&text),
        // A part of a document is none.
        Style::Json if is_cut => own_event(Level::WARN, TOO_LONG),
        Style::Json => terminal::escape_json(&text),
    };
    line.push('\n');
    line
}

/// A JSON event, by the keys that the subscriber's have.
fn own_event(level: Level, message: &str) -> String {
    let mut timestamp = String::new();
    // Writing to a string can't fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut timestamp));
    let event = serde_json::json!({
        "timestamp": timestamp,
        "level": level.as_str(),
        "fields": { "message": message },
        "target": TARGET,
    });
    terminal::escape_json(&event.to_string())
}

struct Events {
    queue: Queue,
    style: Style,
}

impl<'a> MakeWriter<'a> for Events {
    type Writer = Event<'a>;

    fn make_writer(&'a self) -> Event<'a> {
        Event { queue: &self.queue, style: self.style, level: Level::INFO }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Event<'a> {
        Event { level: *event.level(), ..self.make_writer() }
    }
}

/// The filter in RUST_LOG, or the default and the variable's problem. A bare word that is no
/// level is read as a module by the library, and would silence everything else: `RUST_LOG=wran`.
fn filter(variable: Option<&OsStr>) -> (EnvFilter, Option<String>) {
    let default = || EnvFilter::new(DEFAULT_FILTER);
    let Some(variable) = variable.filter(|value| !value.is_empty()) else {
        return (default(), None);
    };
    let parsed = match variable.to_str() {
        Some(text) => parse(text),
        None => Err(format!("'{}' is ignored (it isn't UTF-8): {FIX}", variable.display())),
    };
    match parsed {
        Ok(filter) => (filter, None),
        Err(why) => (default(), Some(format!("RUST_LOG: {why}; logging at {DEFAULT_FILTER}"))),
    }
}

/// How a filter is written.
const FIX: &str = "write a level (error, warn, info, debug, trace, off) or MODULE=LEVEL, separated by \
                   commas";

/// The filter that a text names. A bare word that is no level is read as a module by the library, and
/// would silence everything else: `wran`.
fn parse(text: &str) -> Result<EnvFilter, String> {
    let wrong = |what: String| Err(format!("'{text}' is ignored ({what}): {FIX}"));
    let is_level = |word: &str| word.parse::<LevelFilter>().is_ok();
    let mut words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    let stray = words.find(|word| {
        let is_module = word.contains("::") || MODULES.contains(word);
        !word.contains(['=', '[']) && !is_level(word) && !is_module
    });
    if let Some(stray) = stray {
        return wrong(format!("{stray} is no level"));
    }
    if text.trim().is_empty() {
        return wrong("it is empty".to_owned());
    }
    EnvFilter::try_new(text).or_else(|error| wrong(error.to_string()))
}

/// The filter in use; empty before the daemon logs.
pub fn current_filter() -> String {
    let filter = FILTER.get().and_then(|handle| handle.with_current(ToString::to_string).ok());
    filter.unwrap_or_default()
}

/// Changes the filter, until the daemon ends.
///
/// # Errors
/// Why the text is none, with the fix; then nothing changes.
pub fn set_filter(text: &str) -> Result<(), String> {
    let filter = parse(text)?;
    let handle = FILTER.get().ok_or("this process doesn't log")?;
    handle.reload(filter).map_err(|error| error.to_string())
}

/// Whether the journal reads stderr: JOURNAL_STREAM has its device and inode (systemd.exec(5)).
fn is_journal(variable: Option<&OsStr>) -> bool {
    let Some((device, inode)) = variable.and_then(OsStr::to_str).and_then(|it| it.split_once(':'))
    else {
        return false;
    };
    rustix::fs::fstat(io::stderr())
        .is_ok_and(|stat| (device.parse(), inode.parse()) == (Ok(stat.st_dev), Ok(stat.st_ino)))
}

/// What formats events: without the time, which the journal has itself. For programs they have their
/// targets, by which those of the query log and the access log are known.
fn subscriber(
    filter: reload::Layer<EnvFilter, Registry>,
    format: LogFormat,
    events: Events,
) -> Box<dyn Subscriber + Send + Sync> {
    let is_journal = events.queue.0.is_journal;
    let has_colour = events.style == Style::Coloured;
    let lines = tracing_subscriber::fmt::layer()
        .with_target(format == LogFormat::Json)
        .with_ansi(has_colour)
        .with_writer(events);
    let registry = tracing_subscriber::registry().with(filter);
    match (format, is_journal) {
        (LogFormat::Text, false) => Box::new(registry.with(lines)),
        (LogFormat::Text, true) => Box::new(registry.with(lines.without_time().with_level(false))),
        (LogFormat::Json, _) => Box::new(registry.with(lines.json())),
    }
}

/// Starts to log to stderr, by the filter in RUST_LOG. If that is invalid, a warning is
/// logged and the default applies.
///
/// # Errors
/// When no thread can be started.
pub fn start(format: LogFormat) -> io::Result<()> {
    let (filter, complaint) = filter(std::env::var_os("RUST_LOG").as_deref());
    let (filter, handle) = reload::Layer::new(filter);
    let is_journal = is_journal(std::env::var_os("JOURNAL_STREAM").as_deref());
    let queue = Queue::start(io::stderr(), format, is_journal)?;
    // A process logs once.
    let _ = QUEUE.set(queue.clone());
    let _ = FILTER.set(handle);
    let is_terminal = io::stderr().is_terminal();
    let style = match (format, is_terminal) {
        (LogFormat::Json, _) => Style::Json,
        (LogFormat::Text, true) => Style::Coloured,
        (LogFormat::Text, false) => Style::Plain,
    };
    subscriber(filter, format, Events { queue, style }).init();
    // The default hook writes to stderr itself, and would block.
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    if let Some(complaint) = complaint {
        tracing::warn!("{complaint}");
    }
    Ok(())
}

/// Prints an error of the process itself as a line: by the queue once it logs, else directly.
pub fn write_error(message: &str) {
    match QUEUE.get() {
        Some(queue) => queue.push(queue.own_line(Level::ERROR, message).as_bytes()),
        None => eprintln!("{}", terminal::escape(message)),
    }
}

/// The lines of the log that were dropped, since the start.
pub fn n_dropped() -> u64 {
    QUEUE.get().map_or(0, |queue| queue.lock().n_dropped)
}

/// Waits a moment for the lines that are left.
pub fn drain() {
    if let Some(queue) = QUEUE.get() {
        queue.drain(LAST_WAIT);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A stderr that takes one line at each call.
    struct Stalled {
        turns: mpsc::Receiver<()>,
        out: mpsc::Sender<String>,
    }

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.turns.recv().map_err(io::Error::other)?;
            self.out.send(String::from_utf8_lossy(bytes).into_owned()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stderr_that_is_not_read_holds_nobody_up_and_what_is_lost_is_counted() {
        let ((turn, turns), (out, written)) = (mpsc::channel(), mpsc::channel());
        let queue = Queue::start(Stalled { turns, out }, LogFormat::Json, false).unwrap();
        let long = vec![b'x'; MAX_QUEUED / 8];
        for _ in 0..20 {
            queue.push(&long); // returns at once
        }
        // The thread may have taken one of them already.
        let n_dropped = queue.lock().n_dropped;
        assert!((11..=12).contains(&n_dropped), "{n_dropped}");
        for _ in 0..2 {
            turn.send(()).unwrap();
        }
        let lines: Vec<String> = written.iter().take(2).collect();
        // One of them follows a long line.
        let report = lines.iter().find_map(|line| Some(&line[line.find('{')?..]));
        let report = &events(report.expect("the log reports it"))[0];
        let message = report["fields"]["message"].as_str().unwrap();
        assert!(message.contains(" of the log: stderr isn't read"), "{message}");
        drop(turn);
        queue.drain(Duration::from_secs(60));
        assert!(queue.lock().lines.is_empty());
    }

    #[test]
    fn an_event_is_one_line() {
        let forged = "INFO web: \u{202e}a\n2026-01-01 ERROR b\u{1b}[2J\n".as_bytes();
        let plain = line(forged, Style::Plain);
        assert_eq!(plain, "INFO web: \\u{202e}a\\n2026-01-01 ERROR b\\u{1b}[2J\n");
        let coloured = line("\u{1b}[32mINFO\u{1b}[0m a\nb\n".as_bytes(), Style::Coloured);
        assert_eq!(coloured, "\u{1b}[32mINFO\u{1b}[0m a\\nb\n");
        assert_eq!(line(b"{\"a\":\"b\\n\"}\n", Style::Json), "{\"a\":\"b\\n\"}\n");
        let long = vec![b'x'; 2 * MAX_LINE];
        assert_eq!(line(&long, Style::Plain).len(), MAX_LINE + 1);
        assert_eq!(events(&line(&long, Style::Json))[0]["fields"]["message"], TOO_LONG);
    }

    /// What a program that reads JSON makes of lines: each is an object with the keys that
    /// docs/operations.md has.
    fn events(lines: &str) -> Vec<serde_json::Value> {
        let events: Vec<serde_json::Value> =
            lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for event in &events {
            assert_eq!(keys(event), "fields level target timestamp");
            let timestamp = event["timestamp"].as_str().unwrap();
            assert!(timestamp.len() == 27 && timestamp.ends_with('Z'), "{timestamp}");
        }
        events
    }

    fn keys(value: &serde_json::Value) -> String {
        value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ")
    }

    /// What a subscriber writes for a warning and an event of debugging that is let through later.
    fn written(format: LogFormat, is_journal: bool) -> String {
        let (out, written) = mpsc::channel();
        struct Out(mpsc::Sender<Vec<u8>>);
        impl Write for Out {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
                Ok(bytes.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let queue = Queue::start(Out(out), format, is_journal).unwrap();
        let style = if format == LogFormat::Json { Style::Json } else { Style::Plain };
        let (filter, handle) = reload::Layer::new(EnvFilter::new("info"));
        let events = Events { queue: queue.clone(), style };
        tracing::subscriber::with_default(subscriber(filter, format, events), || {
            tracing::warn!(service = "web", "a warning");
            tracing::debug!("not logged");
            handle.reload(parse("debug").unwrap()).unwrap();
            tracing::debug!(target: "nohop::access", "logged");
            queue.push(queue.own_line(Level::ERROR, "the \u{1b}end").as_bytes());
        });
        queue.drain(Duration::from_secs(60));
        String::from_utf8(written.try_iter().flatten().collect()).unwrap()
    }

    #[test]
    fn lines_for_the_journal_have_priorities() {
        let lines = written(LogFormat::Text, true);
        assert_eq!(lines, "<4>a warning service=\"web\"\n<7>logged\n<3>the \\u{1b}end\n");
        let lines = written(LogFormat::Text, false);
        assert!(lines.contains("Z  WARN a warning service") && !lines.contains('<'), "{lines}");
    }

    #[test]
    fn json_lines_have_stable_keys() {
        let events = events(&written(LogFormat::Json, false));
        assert_eq!(keys(&events[0]["fields"]), "message service");
        assert_eq!(events[1]["target"], "nohop::access");
        assert_eq!(events[2]["fields"]["message"], "the \u{1b}end");
        let levels: Vec<_> = events.iter().map(|event| event["level"].as_str().unwrap()).collect();
        assert_eq!(levels, ["WARN", "DEBUG", "ERROR"]);
        assert!(written(LogFormat::Json, true).starts_with("<4>{"));
    }

    #[test]
    fn a_filter_that_cannot_be_used_is_named() {
        let good = [
            "info",
            "DEBUG",
            "warn,lb_userspace::dns=trace",
            "off",
            "nohop",
            "hyper=info",
            "0",
            "",
        ];
        for text in good {
            assert_eq!(filter(Some(OsStr::new(text))).1, None, "{text}");
        }
        assert_eq!(filter(None).1, None);
        assert!(parse(" ").is_err());
        for text in ["wran", "info,debgu", "lb_userspace=loud", "[", "info;debug"] {
            let (filter, complaint) = filter(Some(OsStr::new(text)));
            let complaint = complaint.unwrap_or_else(|| panic!("{text} is taken"));
            assert!(
                complaint.starts_with(&format!("RUST_LOG: '{text}' is ignored")),
                "{complaint}"
            );
            assert_eq!(filter.to_string(), DEFAULT_FILTER);
        }
    }
}
