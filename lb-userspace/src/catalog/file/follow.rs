//! When a file changes: also by a rename, or by a change of a link on the way to it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::unix::AsyncFd;

/// As many links as the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// An entry of a directory that the way to the file leads through.
type Step = (PathBuf, OsString);

/// Watches directories rather than the file, because editors replace files.
pub struct FileWatcher {
    path: PathBuf,
    inotify: AsyncFd<Inotify>,
    watched: HashMap<WatchDescriptor, Place>,
}

#[derive(Default)]
struct Place {
    dir: PathBuf,
    names: HashSet<OsString>,
}

impl FileWatcher {
    /// Changes from now on count.
    ///
    /// # Errors
    /// The system has no inotify instance or watch left, or a directory can't be read.
    pub fn new(path: &Path) -> io::Result<Self> {
        #[expect(
            deprecated,
            reason = "deprecated for owners that may change their descriptor, which Inotify \
                      doesn't; what replaces it is unsafe"
        )]
        let inotify = AsyncFd::new(Inotify::init()?)?;
        let path = std::path::absolute(path)?;
        let mut follower = FileWatcher { path, inotify, watched: HashMap::new() };
        follower.watch()?;
        Ok(follower)
    }

    /// Waits until the file may have changed.
    ///
    /// # Errors
    /// As for [`FileWatcher::new`].
    pub async fn changed(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            let mut ready = self.inotify.readable_mut().await?;
            let events = ready.try_io(|inotify| {
                let events = inotify.get_mut().read_events(&mut buffer)?;
                Ok(events.map(|event| event.to_owned()).collect::<Vec<_>>())
            });
            let Ok(events) = events else { continue };
            let is_change = events?.iter().any(|event| {
                event.mask.contains(EventMask::Q_OVERFLOW)
                    || self
                        .watched
                        .get(&event.wd)
                        .is_some_and(|place| place.concerns(event.mask, event.name.as_deref()))
            });
            if is_change {
                return self.watch();
            }
        }
    }

    /// Watches what the path leads through now.
    fn watch(&mut self) -> io::Result<()> {
        let mut steps = steps(&self.path);
        loop {
            let mut watched: HashMap<WatchDescriptor, Place> = HashMap::new();
            for (dir, name) in &steps {
                let mask = WatchMask::CLOSE_WRITE
                    | WatchMask::CREATE
                    | WatchMask::MOVED_TO
                    | WatchMask::MOVED_FROM
                    | WatchMask::DELETE
                    | WatchMask::DELETE_SELF
                    | WatchMask::MOVE_SELF
                    | WatchMask::ONLYDIR;
                match self.inotify.get_ref().watches().add(dir, mask) {
                    Ok(descriptor) => {
                        let place = watched.entry(descriptor).or_default();
                        place.dir.clone_from(dir);
                        place.names.insert(name.clone());
                    }
                    // It went meanwhile, which the second look below sees.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
            for descriptor in self.watched.keys().filter(|old| !watched.contains_key(old)) {
                // Fails where the kernel has removed it already, with its directory.
                let _ = self.inotify.get_ref().watches().remove(descriptor.clone());
            }
            self.watched = watched;
            // What changed before the watches were there would go unseen.
            let now = self::steps(&self.path);
            if now == steps {
                return Ok(());
            }
            steps = now;
        }
    }
}

impl Place {
    fn concerns(&self, mask: EventMask, name: Option<&OsStr>) -> bool {
        let Some(name) = name else {
            return mask.intersects(EventMask::DELETE_SELF | EventMask::MOVE_SELF);
        };
        // A file that was just made is empty or half written: its closing tells when it's whole.
        let is_unwritten = mask.contains(EventMask::CREATE)
            && fs::symlink_metadata(self.dir.join(name)).is_ok_and(|entry| entry.is_file());
        self.names.contains(name) && !is_unwritten
    }
}

/// The entries to watch: the file's, those of links on the way from its directory, and, where its
/// directory is missing, that of the topmost missing one.
fn steps(path: &Path) -> Vec<Step> {
    let mut steps = Vec::new();
    let (Some(mut at), Some(name)) = (path.parent().map(Path::to_owned), path.file_name()) else {
        return steps;
    };
    while !at.is_dir()
        && let (Some(above), Some(name)) = (at.parent(), at.file_name())
    {
        steps = vec![(above.to_owned(), name.to_owned())];
        at = above.to_owned();
    }
    if !steps.is_empty() {
        return steps;
    }
    let mut rest = VecDeque::from([name.to_owned()]);
    let mut n_links = 0;
    while let Some(name) = rest.pop_front() {
        let entry = at.join(&name);
        steps.push((at.clone(), name));
        match fs::read_link(&entry) {
            Ok(target) if n_links < MAX_LINKS => {
                n_links += 1;
                for component in target.components().rev() {
                    match component {
                        Component::Normal(name) => rest.push_front(name.to_owned()),
                        // `components` drops the others from the middle, so these come first.
                        Component::ParentDir => rest.push_front("..".into()),
                        Component::RootDir => at = PathBuf::from("/"),
                        Component::CurDir | Component::Prefix(_) => {}
                    }
                }
            }
            _ => at = entry,
        }
        while rest.front().is_some_and(|name| name == "..") {
            rest.pop_front();
            at.pop();
        }
        if !at.is_dir() {
            break;
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_way_leads_through_links_and_stops_at_what_is_missing() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("etc/v1")).unwrap();
        fs::write(root.join("etc/v1/f"), "").unwrap();
        symlink("v1", root.join("etc/data")).unwrap();
        symlink("../etc/data/f", root.join("etc/f")).unwrap();
        symlink("loop", root.join("etc/loop")).unwrap();
        // path, and the entries on the way
        let table: &[(&str, &[&str])] = &[
            ("etc/v1/f", &["etc/v1/f"]),
            ("etc/new", &["etc/new"]),
            ("etc/f", &["etc/f", "etc", "etc/data", "etc/v1", "etc/v1/f"]),
            ("none/below/f", &["none"]),
        ];
        for (path, expected) in table {
            let got: Vec<_> =
                steps(&root.join(path)).into_iter().map(|(dir, name)| dir.join(name)).collect();
            let expected: Vec<_> = expected.iter().map(|entry| root.join(entry)).collect();
            assert_eq!(got, expected, "{path}");
        }
        assert_eq!(steps(&root.join("etc/loop")).len(), MAX_LINKS + 1);
    }
}
