//! `nohop version`: what exactly runs here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::datapath::{LAYOUT, fingerprints};

/// The result of `nohop version`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Version {
    /// The version of the program.
    version: String,
    /// The commit that a release was built from; `null` for other builds.
    commit: Option<String>,
    /// The version of the maps' layout: daemons with the same one take each other's maps over.
    layout: u16,
    /// The CRC-32 of each unit's object for the kernel: the same where the programs are the same.
    objects: BTreeMap<String, String>,
}

/// Of this program.
pub fn version() -> Version {
    let objects = fingerprints();
    Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: option_env!("NOHOP_COMMIT").map(str::to_owned),
        layout: LAYOUT,
        objects: objects.map(|(unit, crc32)| (unit.to_owned(), format!("{crc32:08x}"))).into(),
    }
}

/// The lines of it.
pub fn text(version: &Version) -> String {
    let Version { version, commit, layout, objects } = version;
    let commit = commit.as_deref().unwrap_or("unknown: not a build of `cargo xtask dist`");
    let objects: Vec<_> = objects.iter().map(|(unit, crc32)| format!("{unit} {crc32}")).collect();
    format!(
        "nohop {version}\ncommit   {commit}\nlayout   {layout}\nobjects  {}\n",
        objects.join(", ")
    )
}
