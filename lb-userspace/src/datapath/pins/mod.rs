//! The pins: where the maps and links live in the BPF file system, so that they outlive the daemon.
//!
//! `DIR/vN/maps` and `DIR/vN/links` belong to layout N; `DIR/sockets` has the socket storages and the
//! records of connections, whose format never changes. A lock on DIR keeps a second daemon away. A pin
//! is compared with what it has to be before it is used.

mod bpffs;
mod directory;
mod error;
mod layouts;
mod lock;
mod maps;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData};
use lb_common::Control;
use rustix::fs::{FlockOperation, flock};

use super::map_specs::{MapShape, socket_shapes};
use directory::make_private;
use layouts::{MARK, collect_all_links, is_free, is_ours, layouts, remove_tree};
use lock::lock;
use maps::{Compat, compare};

pub use bpffs::{ensure_bpffs, is_bpffs, nearest};
pub use directory::{Safety, look};
pub use error::PinError;
pub use layouts::{Collected, PinnedLink, links_in, unpin};
pub use lock::monotonic_ns;
pub use maps::PinnedMaps;

/// The index of the word of `CONTROL` that has `is_shadow`.
const SHADOW_WORD: usize = std::mem::offset_of!(Control, is_shadow) / 8;

/// It is among the storages, which outlive layouts.
fn charged(dir: &Path) -> PathBuf {
    dir.join("sockets/charged")
}

/// Whether maps pinned in `dir` are charged to the memory cgroup of a daemon that created them.
pub fn are_charged(dir: &Path) -> bool {
    charged(dir).is_dir()
}

/// The pins in one directory, locked for as long as this lives.
#[derive(Debug)]
pub struct Pins {
    dir: PathBuf,
    layout: u16,
    lock: File,
}

impl Pins {
    /// Opens `dir`, for a daemon whose maps have this layout. Makes the directory if need be, and
    /// mounts a BPF file system in its conventional place.
    ///
    /// # Errors
    /// When there is no BPF file system, or another daemon has the directory.
    pub fn open(dir: &Path, layout: u16) -> Result<Pins, PinError> {
        ensure_bpffs(dir)?;
        Ok(Pins { dir: dir.into(), layout, lock: lock(dir)? })
    }

    /// As [`Pins::open`], for removing pins; `None` where there is no directory.
    ///
    /// # Errors
    /// When another daemon has the directory.
    pub fn open_existing(dir: &Path) -> Result<Option<Pins>, PinError> {
        if !dir.is_dir() || !is_bpffs(dir) {
            return Ok(None);
        }
        Pins::open(dir, 0).map(Some)
    }

    /// Lets another daemon have the directory. This process may not be able to end yet: a thread that
    /// writes to a file system that doesn't answer keeps all descriptors open.
    pub fn unlock(&self) {
        if let Err(error) = flock(&self.lock, FlockOperation::Unlock) {
            tracing::warn!("can't unlock {} ({error})", self.dir.display());
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the socket storages are pinned.
    pub fn sockets(&self) -> PathBuf {
        self.dir.join("sockets")
    }

    /// Where this layout's maps are pinned.
    pub fn maps(&self) -> PathBuf {
        self.dir.join(format!("v{}/maps", self.layout))
    }

    fn own_layout(&self) -> PathBuf {
        self.dir.join(format!("v{}", self.layout))
    }

    fn links(&self) -> PathBuf {
        self.own_layout().join("links")
    }

    /// Where a link of this layout is pinned.
    pub fn link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    /// The directory that exists while maps are charged to a daemon's memory cgroup.
    pub fn charged(&self) -> PathBuf {
        charged(&self.dir)
    }

    /// Makes the directories.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn make_directories(&self) -> Result<(), PinError> {
        for dir in [self.sockets(), self.own_layout()] {
            if !is_ours(&dir) && !is_free(&dir) {
                return Err(PinError::ForeignDirectory { dir });
            }
            make_private(&dir.join(MARK))?;
        }
        [self.maps(), self.links()].iter().try_for_each(|dir| make_private(dir))
    }

    /// Pins the socket storages by both their present names and those up to layout 2, where only one
    /// of both is pinned: for this version, and for one that is rolled back to.
    ///
    /// # Errors
    /// When something else has a present name, or the file system refuses.
    pub fn pin_by_both_names(&self) -> Result<(), PinError> {
        let former = [("SK_REVNAT", "PEERS"), ("SK_REVNAT_PREV", "FORMER_PEERS")];
        for shape in socket_shapes() {
            let Some((_, former)) = former.iter().find(|(name, _)| *name == shape.name) else {
                continue;
            };
            let (path, former) = (self.sockets().join(shape.name), self.sockets().join(former));
            for (from, to) in [(&former, &path), (&path, &former)] {
                if !to.exists() && compare(from, &shape)? == Compat::Same {
                    PinnedMaps::open([from.clone()])?.pin_at(to)?;
                }
            }
        }
        Ok(())
    }

    /// Whether a daemon's programs, of whichever layout, only count connections, as far as that can be
    /// read. `DAEMON` of layout 2 is the first half of `CONTROL`.
    pub fn are_in_shadow(&self) -> bool {
        let is_shadow = |layout: PathBuf| {
            let open = |name| MapData::from_pin(layout.join("maps").join(name));
            let map = open("CONTROL").or_else(|_| open("DAEMON")).ok().map(Map::Array)?;
            // The size of a value has to be known to read it.
            match Array::<_, [u64; size_of::<Control>() / 8]>::try_from(&map) {
                Ok(control) => control.get(&0, 0).ok().map(|words| words[SHADOW_WORD]),
                Err(_) => {
                    let daemon = Array::<_, [u64; 8]>::try_from(&map).ok()?;
                    daemon.get(&0, 0).ok().map(|words| words[SHADOW_WORD])
                }
            }
        };
        let layouts = self.layouts().unwrap_or_default();
        layouts.into_iter().filter_map(is_shadow).any(|is_shadow| is_shadow != 0)
    }

    /// Removes the pins of socket storages and records that have another version's format, and returns
    /// these: they serve the programs that use them, but not ours.
    ///
    /// # Errors
    /// When something else has one of the names, or the file system refuses.
    pub fn take_other_storages(&self) -> Result<PinnedMaps, PinError> {
        self.pin_by_both_names()?;
        let mut others = Vec::new();
        for shape in socket_shapes() {
            let path = self.sockets().join(shape.name);
            if matches!(compare(&path, &shape)?, Compat::OtherStorage | Compat::OtherSize) {
                others.push(path);
            }
        }
        let storages = PinnedMaps::open(others)?;
        for (path, _) in &storages.0 {
            tracing::warn!(
                "{} has another version's format: sockets that it knows show their backend",
                path.display()
            );
            unpin(path)?;
        }
        Ok(storages)
    }

    /// Creates directories that are missing, and locks the one that has this path now.
    ///
    /// # Errors
    /// When the file system refuses, or another daemon has a directory that took the place of ours.
    pub fn fix(&mut self) -> Result<(), PinError> {
        let number = |metadata: io::Result<fs::Metadata>| metadata.map(|found| found.ino()).ok();
        if number(fs::metadata(&self.dir)) != number(self.lock.metadata()) {
            self.lock = lock(&self.dir)?;
        }
        self.make_directories()
    }

    /// Whether there are pins of ours.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn is_empty(&self) -> Result<bool, PinError> {
        let has_sockets = self.sockets().exists() && is_ours(&self.sockets());
        Ok(self.layouts()?.is_empty() && !has_sockets)
    }

    /// Whether each of these maps is pinned in `dir` and as it has to be. Some may be missing, or
    /// have another size: then they have to be created again. Of maps that were added to the layout
    /// those alone are: a pin of another size or format is removed.
    ///
    /// # Errors
    /// When something else has one of the names.
    pub fn exist(&self, dir: &Path, shapes: &[MapShape]) -> Result<bool, PinError> {
        shapes.iter().try_fold(true, |all, shape| {
            let path = dir.join(shape.name);
            match compare(&path, shape)? {
                Compat::Same => Ok(all),
                Compat::OtherSize if shape.is_added => unpin(&path).map(|()| all),
                Compat::Absent if shape.is_added => Ok(all),
                _ => Ok(false),
            }
        })
    }

    /// Removes the pins of this layout's maps. Programs that use them keep them.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn remove_maps(&self) -> Result<(), PinError> {
        remove_tree(&self.maps())?;
        make_private(&self.maps())
    }

    /// Every link that is pinned under any layout: this one's first. Another version may have links
    /// of other kinds, in directories that this one doesn't know.
    ///
    /// # Errors
    /// When something that isn't a link lies where links are.
    pub fn all_links(&self) -> Result<Vec<PinnedLink>, PinError> {
        let own = self.own_layout();
        let mut layouts = self.layouts()?;
        layouts.sort_by_key(|dir| *dir != own);
        collect_all_links(&layouts)
    }

    /// Every link that is pinned under any layout, as far as they can be read.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn readable_links(&self) -> Result<Collected, PinError> {
        Ok(Collected::of(&self.layouts()?))
    }

    fn layouts(&self) -> Result<Vec<PathBuf>, PinError> {
        layouts(&self.dir)
    }

    /// Removes the pins of other layouts.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn remove_other_layouts(&self) -> Result<(), PinError> {
        let own = self.own_layout();
        self.layouts()?.iter().filter(|layout| **layout != own).try_for_each(|dir| remove_tree(dir))
    }

    /// Removes everything of ours, and the directory if nothing else is in it.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn remove_all(&self) -> Result<(), PinError> {
        let sockets = Some(self.sockets()).filter(|sockets| is_ours(sockets));
        let removed = self.layouts()?.into_iter().chain(sockets).map(|dir| remove_tree(&dir));
        // One that stays doesn't keep the others.
        let removed: Vec<_> = removed.collect();
        removed.into_iter().collect::<Result<(), _>>()?;
        // Something else in it is not ours to judge.
        let _ = fs::remove_dir(&self.dir);
        Ok(())
    }
}
