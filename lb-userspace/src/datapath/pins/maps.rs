//! Maps that are pinned.

use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapData;

use super::error::{PinError, io_error};
use super::layouts::unpin;
use crate::datapath::map_specs::{MapShape, SK_STORAGE};

/// How a pinned map compares with its specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compat {
    /// There is no pin.
    Absent,
    /// It is the same.
    Same,
    /// The same kind of map with another number of entries; one that was added to the layout, also with values
    /// of another size or with other flags, as another version of it has it.
    OtherSize,
    /// A socket storage, or records, with values of another size: a later version's.
    OtherStorage,
}

fn pin(map: &MapData, path: &Path) -> Result<(), PinError> {
    map.pin(path).map_err(|error| io_error("pin", path)(io::Error::other(error)))
}

/// Maps that are pinned, kept so that they can be pinned again.
#[derive(Debug)]
pub struct PinnedMaps(pub Vec<(PathBuf, MapData)>);

impl PinnedMaps {
    /// The maps that are pinned at these paths.
    ///
    /// # Errors
    /// When one isn't there.
    pub fn open(paths: impl IntoIterator<Item = PathBuf>) -> Result<PinnedMaps, PinError> {
        let open = |path: PathBuf| match MapData::from_pin(&path) {
            Ok(map) => Ok((path, map)),
            Err(error) => Err(io_error("open", &path)(io::Error::other(error))),
        };
        paths.into_iter().map(open).collect::<Result<_, _>>().map(PinnedMaps)
    }

    /// Pins again what isn't pinned any more.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn fix(&self) -> Result<(), PinError> {
        let PinnedMaps(maps) = self;
        maps.iter().filter(|(path, _)| !path.exists()).try_for_each(|(path, map)| pin(map, path))
    }

    /// Pins these maps at another path, too, where nothing is.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn pin_at(&self, path: &Path) -> Result<(), PinError> {
        let PinnedMaps(maps) = self;
        maps.iter().try_for_each(|(_, map)| pin(map, path))
    }

    /// Pins these again, whatever has taken their names.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn put_back(&self) -> Result<(), PinError> {
        let PinnedMaps(maps) = self;
        maps.iter().try_for_each(|(path, _)| unpin(path))?;
        self.fix()
    }
}

/// Compares a pin with the map that has to be there.
///
/// # Errors
/// When the pin is something else.
pub fn compare(path: &Path, shape: &MapShape) -> Result<Compat, PinError> {
    if !path.try_exists().map_err(io_error("read", path))? {
        return Ok(Compat::Absent);
    }
    let expected = described(shape.map_type, shape.key_size, shape.value_size, shape.flags);
    let foreign =
        |found| PinError::Foreign { path: path.into(), found, expected: expected.clone() };
    let info = MapData::from_pin(path).and_then(|map| map.info());
    let info = info.map_err(|error| foreign(format!("no map ({error})")))?;
    let map_type = info.map_type().map_or(0, |map_type| map_type as u32);
    let found = described(map_type, info.key_size(), info.value_size(), info.map_flags());
    if found != expected {
        let is_same_kind = map_type == shape.map_type && info.key_size() == shape.key_size;
        let is_storage = shape.map_type == SK_STORAGE || shape.name == "CONNS";
        return match is_same_kind {
            true if is_storage => Ok(Compat::OtherStorage),
            true if shape.is_added => Ok(Compat::OtherSize),
            _ => Err(foreign(found)),
        };
    }
    let same = info.max_entries() == shape.max_entries;
    Ok(if same { Compat::Same } else { Compat::OtherSize })
}

fn described(map_type: u32, key_size: u32, value_size: u32, flags: u32) -> String {
    format!(
        "a map of type {map_type} with keys of {key_size} and values of {value_size} bytes and \
         flags {flags:#x}"
    )
}
