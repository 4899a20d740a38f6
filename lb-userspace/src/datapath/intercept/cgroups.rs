//! The cgroups whose processes' queries are intercepted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::super::bypass::locate;
use crate::config::Intercepted;
use crate::config::cgroup::{Mount, mounts};

/// Where Nomad's tasks and Docker's containers are: Docker's by its driver cgroupfs or systemd. Its
/// daemon is among them because its DNS server (127.0.0.11) asks for the containers of networks that
/// have one.
const TASKS: [&str; 4] =
    ["nomad.slice", "docker", "system.slice/docker-*.scope", "system.slice/docker.service"];

/// The most cgroups that the programs are attached to; those below one of them don't count. Each takes
/// a file descriptor a program.
const MAX_CGROUPS: usize = 1_024;

/// The cgroups that are there.
#[derive(Debug, Default)]
pub struct FoundCgroups {
    /// Each by its id. None is below another.
    pub cgroups: BTreeMap<u64, PathBuf>,
    /// What isn't there, and what can't be had.
    pub notes: Vec<String>,
}

impl FoundCgroups {
    /// Looks for them. Those that aren't below `scope` have no VIPs.
    pub fn of(wanted: &Intercepted, scope: &Path) -> FoundCgroups {
        FoundCgroups::among(&mounts(), wanted, scope)
    }

    fn among(mounts: &[Mount], wanted: &Intercepted, scope: &Path) -> FoundCgroups {
        let mut notes = Vec::new();
        let mut all = Vec::new();
        let mut add = |pattern: &Path, is_expected: bool| match locate(mounts, pattern) {
            Ok(located) => {
                if located.cgroups.is_empty() && is_expected {
                    notes.push(format!(
                        "dns.intercept: no cgroup matches '{}' now",
                        pattern.display()
                    ));
                }
                all.extend(located.cgroups);
            }
            Err(what) => {
                notes.push(format!("dns.intercept: '{}' has no process: {what}", pattern.display()))
            }
        };
        match wanted {
            Intercepted::Tasks(_) => TASKS.iter().for_each(|path| add(Path::new(path), false)),
            Intercepted::Cgroups(patterns) => patterns.iter().for_each(|path| add(path, true)),
        }
        if all.is_empty() && notes.is_empty() {
            notes.push(format!("none of these cgroups is there now: {}", TASKS.join(", ")));
        }
        all.sort();
        let mut found = FoundCgroups { cgroups: BTreeMap::new(), notes };
        let mut last: Option<PathBuf> = None;
        for (path, cgroup_id) in all {
            if last.as_ref().is_some_and(|last| path.starts_with(last)) {
                continue;
            }
            if !path.starts_with(scope) {
                found.notes.push(format!(
                    "dns.intercept: {} isn't below {}, which alone is served",
                    path.display(),
                    scope.display()
                ));
                continue;
            }
            if found.cgroups.len() == MAX_CGROUPS {
                found.notes.push(format!(
                    "dns.intercept matches more than {MAX_CGROUPS} cgroups; name one that they are below"
                ));
                break;
            }
            last = Some(path.clone());
            found.cgroups.insert(cgroup_id, path);
        }
        found
    }
}
