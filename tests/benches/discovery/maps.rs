//! The daemon's pinned maps, as a connection finds them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aya::maps::{Array, Map, MapData};
use lb_common::{Group, ServiceEntry};
use testbed::nohop::Nohop;

/// How often the maps are looked at: what a measured time may be too long by.
const LOOK: Duration = Duration::from_micros(200);

type Entry = [u8; size_of::<ServiceEntry>()];

/// Some of the services in the maps.
pub struct Maps {
    services: Array<MapData, Entry>,
    /// The names, each with its index.
    indices: HashMap<String, u32>,
}

impl Maps {
    /// Opens the daemon's.
    pub fn open(nohop: &Nohop) -> Result<Maps> {
        let (services, names) = (pinned(nohop, "SERVICES")?, pinned(nohop, "SERVICE_NAMES")?);
        let names: Array<MapData, [u8; 64]> = Map::Array(names).try_into()?;
        let services = Map::Array(services).try_into()?;
        let mut indices = HashMap::new();
        for service_idx in 0..names.len() {
            let octets = names.get(&service_idx, 0)?;
            let name = octets.split(|&octet| octet == 0).next().unwrap_or_default();
            if !name.is_empty() {
                indices.insert(String::from_utf8(name.to_vec())?, service_idx);
            }
        }
        Ok(Maps { services, indices })
    }

    /// The words of a service's entry, which every change of its backends replaces.
    fn group(&self, name: &str) -> Result<Group> {
        let service_idx =
            self.indices.get(name).with_context(|| format!("no {name} in SERVICE_NAMES"))?;
        let entry: ServiceEntry = zerocopy::transmute!(self.services.get(service_idx, 0)?);
        Ok(entry.group)
    }
}

/// Watches services in the maps for as long as it lives.
pub struct Watcher {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<(String, Instant)>>>,
}

impl Watcher {
    /// Watches these services from now on.
    pub fn start(maps: Maps, names: Vec<String>) -> Result<Watcher> {
        let mut last = Vec::new();
        for name in names {
            last.push((maps.group(&name)?, name));
        }
        let is_over = Arc::new(AtomicBool::new(false));
        let stop = is_over.clone();
        let thread = thread::spawn(move || {
            let mut seen = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                for (last, name) in &mut last {
                    let group = maps.group(name)?;
                    if std::mem::replace(last, group) != group {
                        seen.push((name.clone(), Instant::now()));
                    }
                }
                thread::sleep(LOOK);
            }
            Ok(seen)
        });
        Ok(Watcher { is_over, thread })
    }

    /// Ends it, and returns which services changed when.
    pub fn stop(self) -> Result<Vec<(String, Instant)>> {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the watcher panicked")?
    }
}

/// The map of this name, wherever its layout's directory is.
fn pinned(nohop: &Nohop, name: &str) -> Result<MapData> {
    let found = find(&nohop.pins(), name).with_context(|| format!("no pin {name}"))?;
    MapData::from_pin(&found).with_context(|| format!("open {}", found.display()))
}

fn find(dir: &Path, name: &str) -> Option<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    let (dirs, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let found = files.into_iter().find(|path| path.ends_with(name));
    found.or_else(|| dirs.iter().find_map(|dir| find(dir, name)))
}
