//! Reload: the configuration is read again, and all of it is applied, or nothing.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::oneshot;

use crate::admin::api;
use crate::config::keys::{KeyChange, changes};
use crate::config::{Config, ConfigErrors};

/// Reads file, environment and flags again, as at the start.
pub type Read = Arc<dyn Fn() -> Result<Config, ConfigErrors> + Send + Sync>;

/// The daemon sends the result of a reload here.
pub type Request = oneshot::Sender<api::Reload>;

/// How reloads ended.
#[derive(Debug, Default)]
pub struct ReloadCounts {
    applied: AtomicU64,
    refused: AtomicU64,
    is_last_refused: AtomicBool,
}

/// What metrics show of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReloadReadings {
    /// Reloads that were applied.
    pub applied: u64,
    /// Reloads that changed nothing, because of a mistake or of a key that needs a restart.
    pub refused: u64,
    /// Whether the last one was refused: then the daemon runs by another configuration than the file's.
    pub is_last_refused: bool,
}

impl ReloadCounts {
    /// Counts one.
    pub fn count(&self, ok: bool) {
        let counter = if ok { &self.applied } else { &self.refused };
        counter.fetch_add(1, Ordering::Relaxed);
        self.is_last_refused.store(!ok, Ordering::Relaxed);
    }

    /// The counts so far.
    pub fn read(&self) -> ReloadReadings {
        ReloadReadings {
            applied: self.applied.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            is_last_refused: self.is_last_refused.load(Ordering::Relaxed),
        }
    }
}

/// The changes of a configuration, or why it can't be applied.
///
/// # Errors
/// The mistakes, or the keys that need a restart, as the answer to the client.
pub fn plan(
    running: &Config,
    wanted: Result<Config, ConfigErrors>,
) -> Result<(Config, api::Reload), api::Reload> {
    let wanted = wanted.map_err(|errors| refuse(errors.0))?;
    let changes = changes(running, &wanted);
    let ok = changes.iter().all(|change| change.restart.is_none());
    let changes = changes.into_iter().map(shown).collect();
    let reload = api::Reload { ok, problems: Vec::new(), changes };
    if ok { Ok((wanted, reload)) } else { Err(reload) }
}

/// The answer where the configuration, or what it names, has mistakes.
pub fn refuse(problems: impl IntoIterator<Item = impl Display>) -> api::Reload {
    let problems = problems.into_iter().map(|problem| problem.to_string()).collect();
    api::Reload { ok: false, problems, changes: Vec::new() }
}

fn shown(KeyChange { key, from, to, restart }: KeyChange) -> api::ChangedKey {
    api::ChangedKey { key: key.to_owned(), from, to, restart: restart.map(str::to_owned) }
}

/// Logs the result of a reload.
pub fn log(reload: &api::Reload) {
    for line in lines(reload) {
        match reload.ok {
            true => tracing::info!("reload: {line}"),
            false => tracing::error!("reload: {line}"),
        }
    }
}

/// The result of a reload, as text.
pub fn lines(reload: &api::Reload) -> Vec<String> {
    let mut lines = reload.problems.clone();
    for api::ChangedKey { key, from, to, restart } in &reload.changes {
        lines.push(match restart {
            None => format!("{key}: {from} -> {to}"),
            Some(reason) => format!("{key}: {from} -> {to} needs a restart: {reason}"),
        });
    }
    match reload.ok {
        true if reload.changes.is_empty() => lines.push("nothing differs".into()),
        true => {}
        false => lines.push("nothing was changed".into()),
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Problem;

    fn config(change: impl Fn(&mut Config)) -> Result<Config, ConfigErrors> {
        let mut config = Config::default();
        change(&mut config);
        Ok(config)
    }

    #[test]
    fn all_comes_into_force_or_nothing() {
        let running = Config::default();
        let (wanted, reload) = plan(&running, config(|config| config.dns.ttl = 5)).unwrap();
        assert_eq!(wanted.dns.ttl, 5);
        assert_eq!(lines(&reload), ["dns.ttl: 30 -> 5"]);

        let refused = plan(
            &running,
            config(|config| {
                config.dns.ttl = 5;
                config.datapath.max_services = 7;
            }),
        );
        let expected = [
            "dns.ttl: 30 -> 5",
            "datapath.max_services: 16384 -> 7 needs a restart: maps are created at the start",
            "nothing was changed",
        ];
        assert_eq!(lines(&refused.unwrap_err()), expected);

        let (_, reload) = plan(&running, config(|_| {})).unwrap();
        assert_eq!(lines(&reload), ["nothing differs"]);
    }

    #[test]
    fn a_faulty_configuration_is_told_in_full() {
        let problem = |what: &str| Problem { location: None, key: None, what: what.into() };
        let faulty = Err(ConfigErrors(vec![problem("one"), problem("two")]));
        let reload = plan(&Config::default(), faulty).unwrap_err();
        assert_eq!(lines(&reload), ["one", "two", "nothing was changed"]);
        assert!(!reload.ok && reload.problems.len() == 2);
    }
}
