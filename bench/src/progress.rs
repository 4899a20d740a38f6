//! A run's progress.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// How often a line is written where there is no terminal to write over the last one.
const PAUSE: Duration = Duration::from_secs(10);

/// Counts a suite's steps, and prints how many are left and for about how long.
pub struct Progress {
    suite: String,
    n_steps: usize,
    n_done: usize,
    start: Instant,
    reported: Option<Instant>,
}

impl Progress {
    /// Of a suite with that many steps, alike in length; 0 if the number is unknown.
    pub fn new(suite: &str, n_steps: usize) -> Progress {
        Progress { suite: suite.into(), n_steps, n_done: 0, start: Instant::now(), reported: None }
    }

    /// Prints the next step, before it begins.
    pub fn step(&mut self, what: &str) {
        let line = self.line(what, self.start.elapsed());
        self.n_done += 1;
        if stderr().is_terminal() {
            eprint!("\r\x1b[K{line:.100}");
            let _ = stderr().flush();
        } else if self.reported.is_none_or(|reported| reported.elapsed() >= PAUSE) {
            eprintln!("{line}");
            self.reported = Some(Instant::now());
        }
    }

    /// Prints that something is being prepared, which isn't a step.
    pub fn preparing(&self, what: &str) {
        if stderr().is_terminal() {
            eprint!("\r\x1b[K{}: preparing: {what}", self.suite);
            let _ = stderr().flush();
        } else {
            eprintln!("{}: preparing: {what}", self.suite);
        }
    }

    fn line(&self, what: &str, elapsed: Duration) -> String {
        if self.n_steps == 0 {
            return format!("{} {}: {what}", self.suite, self.n_done + 1);
        }
        let left = match self.n_done {
            0 => String::new(),
            n_done => {
                let n_left = self.n_steps.saturating_sub(n_done);
                let left_s = elapsed.as_secs_f64() / n_done as f64 * n_left as f64;
                format!(", {} left", duration(left_s))
            }
        };
        format!("{} {}/{}{left}: {what}", self.suite, self.n_done + 1, self.n_steps)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
    }
}

/// Seconds as text for people.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    if seconds < 200 { format!("{seconds} s") } else { format!("{} min", seconds.div_ceil(60)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_time_left() {
        let mut progress = Progress::new("http", 10);
        assert_eq!(progress.line("direct", Duration::ZERO), "http 1/10: direct");
        progress.n_done = 4;
        let line = progress.line("nohop", Duration::from_secs(8));
        assert_eq!(line, "http 5/10, 12 s left: nohop");
        let line = progress.line("nohop", Duration::from_secs(800));
        assert_eq!(line, "http 5/10, 20 min left: nohop");
        let line = Progress::new("compare", 0).line("warm-up", Duration::from_secs(8));
        assert_eq!(line, "compare 1: warm-up");
    }
}
