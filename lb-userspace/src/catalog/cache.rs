//! The last good catalog in the state directory, for a daemon that starts while Consul is down.
//!
//! The file is one line of JSON about the rest, with its CRC-32, and then the rest, also JSON. Times are
//! milliseconds of CLOCK_BOOTTIME, which counts suspension and can't be set; a file of another boot is
//! ignored, because Nomad reuses ports.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::snapshot::{Agent, SavedCatalog, SavedService};
use crate::table::Instance;
use crate::{boot, durable, regular_file};

/// The file's name, within the state directory.
pub const FILE_NAME: &str = "catalog.json";

/// The version of the format; another one is set aside.
const VERSION: u32 = 1;

/// Why the file can't be written.
#[derive(Debug, thiserror::Error)]
#[error("can't write {path} ({source})")]
pub struct WriteError {
    path: PathBuf,
    source: io::Error,
}

/// What is wrong with a file that was read.
#[derive(Debug, thiserror::Error)]
enum Corruption {
    #[error("it has no first line")]
    NoHead,
    #[error("its first line isn't understood: {0}")]
    Head(serde_json::Error),
    #[error("it is of version {0}, this is {VERSION}")]
    Version(u32),
    #[error("its checksum is {found:08x} rather than {expected:08x}")]
    Checksum { expected: u32, found: u32 },
    #[error("it isn't understood: {0}")]
    Body(serde_json::Error),
}

#[derive(Serialize, Deserialize)]
struct Head {
    version: u32,
    boot: String,
    crc32: u32,
}

/// A moment of CLOCK_BOOTTIME, in milliseconds.
type Millis = u64;

#[derive(Serialize, Deserialize)]
struct Body {
    origin: String,
    #[serde(default)]
    agent: Option<Agent>,
    off: bool,
    names_at: Option<Millis>,
    #[serde(default)]
    names_filtered: bool,
    #[serde(default)]
    names_index: u64,
    #[serde(default)]
    lists_consul: bool,
    services: BTreeMap<Arc<str>, Line>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    answered: Option<Millis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    used: Option<Millis>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    filtered: bool,
    #[serde(default)]
    index: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    unlisted: bool,
    #[serde(default, skip_serializing_if = "<[_]>::is_empty")]
    instances: Arc<[Instance]>,
}

/// The same moment on both clocks.
#[derive(Clone, Copy)]
struct Now {
    instant: Instant,
    boottime: Duration,
}

impl Now {
    fn get() -> Now {
        Now { instant: Instant::now(), boottime: boot::time() }
    }

    fn millis(self, at: Instant) -> Millis {
        let age = self.instant.saturating_duration_since(at);
        u64::try_from(self.boottime.saturating_sub(age).as_millis()).unwrap_or(u64::MAX)
    }

    /// The moment, if it isn't in the future (another clock's) nor longer ago than `max_age`.
    fn instant(self, at: Millis, max_age: Duration) -> Option<Instant> {
        let age = self.boottime.checked_sub(Duration::from_millis(at))?;
        if age > max_age { None } else { self.instant.checked_sub(age) }
    }
}

/// Writes the file: whole, or not at all.
///
/// # Errors
/// When the directory can't be written to.
pub fn write(path: &Path, memory: &SavedCatalog) -> Result<(), WriteError> {
    let now = Now::get();
    let services = memory.services.iter().map(|(name, remembered)| {
        let line = Line {
            answered: remembered.answered_at.map(|at| now.millis(at)),
            used: remembered.used_at.map(|at| now.millis(at)),
            filtered: remembered.filtered,
            index: remembered.index,
            unlisted: remembered.unlisted,
            instances: remembered.instances.clone(),
        };
        (name.clone(), line)
    });
    let body = Body {
        origin: memory.origin.clone(),
        agent: memory.agent.clone(),
        off: memory.off,
        names_at: memory.names_at.map(|at| now.millis(at)),
        names_filtered: memory.names_filtered,
        names_index: memory.names_index,
        lists_consul: memory.lists_consul,
        services: services.collect(),
    };
    let write = || -> io::Result<()> {
        let body = serde_json::to_vec(&body)?;
        let head = Head { version: VERSION, boot: boot::id()?, crc32: crc32fast::hash(&body) };
        let mut contents = serde_json::to_vec(&head)?;
        contents.push(b'\n');
        contents.extend(body);
        durable::replace(path, &[&contents])
    };
    write().map_err(|source| WriteError { path: path.into(), source })
}

/// Reads what an earlier daemon wrote during this boot, as far as it isn't older than `max_age`. A file
/// that can't be parsed is set aside as `catalog.corrupt`; no error is fatal.
pub fn read(path: &Path, max_age: Duration) -> Option<SavedCatalog> {
    let bytes = match regular_file::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!("can't read {} ({error}): starting without it", path.display());
            return None;
        }
    };
    match parse(&bytes) {
        Ok((head, body)) => {
            let is_of_this_boot = boot::id().is_ok_and(|boot| boot == head.boot);
            is_of_this_boot.then(|| remember(body, Now::get(), max_age))
        }
        Err(corruption) => {
            let aside = path.with_extension("corrupt");
            let what = match std::fs::rename(path, &aside) {
                Ok(()) => format!("set aside as {}", aside.display()),
                Err(error) => format!("it can't be set aside either ({error})"),
            };
            tracing::warn!("{} can't be used ({corruption}): {what}", path.display());
            None
        }
    }
}

fn parse(bytes: &[u8]) -> Result<(Head, Body), Corruption> {
    let end = bytes.iter().position(|&byte| byte == b'\n').ok_or(Corruption::NoHead)?;
    let (head, body) = (&bytes[..end], &bytes[end + 1..]);
    let head: Head = serde_json::from_slice(head).map_err(Corruption::Head)?;
    if head.version != VERSION {
        return Err(Corruption::Version(head.version));
    }
    let found = crc32fast::hash(body);
    if found != head.crc32 {
        return Err(Corruption::Checksum { expected: head.crc32, found });
    }
    let body = serde_json::from_slice(body).map_err(Corruption::Body)?;
    Ok((head, body))
}

/// A file's text, and the same as the body of a file whose checksum is right: fuzzers don't find one.
#[cfg(any(fuzzing, test))]
pub fn fuzz(bytes: &[u8]) {
    let max_age = Duration::from_secs(60 * 60);
    let parsed = parse(bytes).map(|(_, body)| body);
    let unchecked = serde_json::from_slice::<Body>(bytes);
    for body in parsed.into_iter().chain(unchecked) {
        let n_services = body.services.len();
        assert!(remember(body, Now::get(), max_age).services.len() <= n_services);
    }
}

fn remember(body: Body, now: Now, max_age: Duration) -> SavedCatalog {
    let services = body.services.into_iter().map(|(name, line)| {
        let answered_at = line.answered.and_then(|at| now.instant(at, max_age));
        let remembered = SavedService {
            instances: if answered_at.is_some() { line.instances } else { Arc::default() },
            answered_at,
            filtered: line.filtered,
            index: line.index,
            unlisted: line.unlisted,
            used_at: line.used.and_then(|at| now.instant(at, Duration::MAX)),
        };
        (name, remembered)
    });
    SavedCatalog {
        origin: body.origin,
        agent: body.agent,
        off: body.off,
        names_at: body.names_at.and_then(|at| now.instant(at, max_age)),
        names_filtered: body.names_filtered,
        names_index: body.names_index,
        lists_consul: body.lists_consul,
        services: services.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{HealthStatus, NodeIdentity, ServiceMeta};

    const HOUR: Duration = Duration::from_secs(3600);

    fn memory(now: Instant) -> SavedCatalog {
        let instance = Instance {
            node: "n1".into(),
            id: "1".into(),
            address: "10.0.0.1".into(),
            port: 80,
            weight: 1,
            local: true,
            node_identity: NodeIdentity::new("9d75", "dc1", ""),
            node_address: Some([10, 0, 0, 1].into()),
            is_checked: true,
            is_critical: false,
            created: 0,
            may_be_local: false,
            health: HealthStatus::Out("check `c` is critical".into()),
            meta: ServiceMeta { ports: Some("80".into()), ..ServiceMeta::default() },
        };
        let web = SavedService {
            instances: [instance].into(),
            answered_at: Some(now),
            used_at: Some(now),
            filtered: true,
            index: 7,
            unlisted: true,
        };
        SavedCatalog {
            origin: "here".into(),
            agent: Some("n1".into()),
            off: true,
            names_at: Some(now),
            names_filtered: true,
            names_index: 9,
            lists_consul: true,
            services: [("web".into(), web), ("cold".into(), SavedService::default())].into(),
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state").join(FILE_NAME);
        assert_eq!(read(&path, HOUR), None);
        let start = Instant::now();
        let written = memory(start);
        write(&path, &written).unwrap();
        let mut got = read(&path, HOUR).unwrap();
        let same = |at: &mut Option<Instant>| {
            let at = at.as_mut().unwrap();
            assert!(at.max(&mut start.clone()).duration_since(start) < Duration::from_millis(100));
            *at = start;
        };
        let web = got.services.get_mut("web").unwrap();
        same(&mut web.answered_at);
        same(&mut web.used_at);
        same(&mut got.names_at);
        assert_eq!(got, written);
    }

    #[test]
    fn what_is_too_old_or_from_the_future_is_forgotten() {
        let now = Now { instant: Instant::now(), boottime: Duration::from_secs(100) };
        let table =
            [(100_000, 0, true), (90_000, 10, true), (89_999, 10, false), (100_001, 10, false)];
        for (at, max_age, is_there) in table {
            let got = now.instant(at, Duration::from_secs(max_age));
            assert_eq!(got.is_some(), is_there, "{at} {max_age}");
        }
    }

    /// The sample was written by the version before the types got their present names.
    #[test]
    fn a_file_of_an_earlier_version_is_read() {
        let (_, body) = parse(include_bytes!("samples/catalog.json")).unwrap();
        let now = Now { instant: Instant::now(), boottime: Duration::from_secs(16_880) };
        let saved = remember(body, now, HOUR);
        let agent = saved.agent.unwrap();
        let web = &saved.services["web"];
        let instance = &web.instances[0];
        assert!(agent.has(instance) && instance.local && web.answered_at.is_some());
        assert_eq!((&*instance.address, instance.port), ("10.0.0.7", 8080));
        assert_eq!(instance.health, HealthStatus::Serving);
        let meta = ServiceMeta { ports: Some("80,443".into()), ..ServiceMeta::default() };
        assert_eq!(instance.meta, meta);
        let db = &saved.services["db"].instances[0];
        let why = "check `Service 'db' check` is critical";
        assert_eq!(db.health, HealthStatus::Out(why.into()));
        assert_eq!(saved.services["gone"].instances.len(), 0);
    }

    #[test]
    fn what_cannot_be_understood_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        write(&path, &memory(Instant::now())).unwrap();
        let good = std::fs::read(&path).unwrap();
        let half = good.len() / 2;
        let mut flipped = good.clone();
        flipped[half] ^= 1;
        let other =
            String::from_utf8(good.clone()).unwrap().replace("\"version\":1", "\"version\":9");
        let bad =
            [&b""[..], b"\n", b"{}\n{}", &good[..half], &flipped, other.as_bytes(), b"\xff\xfe"];
        for bytes in bad {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path, HOUR), None);
            assert!(!path.exists());
            assert_eq!(std::fs::read(path.with_extension("corrupt")).unwrap(), bytes);
        }
    }

    #[test]
    fn another_boot_has_left_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        write(&path, &memory(Instant::now())).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace(&boot::id().unwrap(), "another")).unwrap();
        assert_eq!(read(&path, HOUR), None);
        assert!(path.exists(), "it isn't corrupt");
    }
}
