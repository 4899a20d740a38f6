//! The kernels of NOHOP_KERNELS: setup only says which ones are there.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::with_mend;

const MEND: &str =
    "set NOHOP_KERNELS to a folder of VERSION/vmlinuz and VERSION/modules/, or unset it";

pub fn look(folder: &Path) -> Result<String> {
    let stopped = format!("NOHOP_KERNELS={} doesn't serve", folder.display());
    with_mend(versions(folder), &stopped, MEND).map(|versions| versions.join(", "))
}

fn versions(folder: &Path) -> Result<Vec<String>> {
    let mut versions: Vec<_> = fs::read_dir(folder)
        .context("can't read it")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|kernel| kernel.join("vmlinuz").is_file() && kernel.join("modules").is_dir())
        .filter_map(|kernel| Some(kernel.file_name()?.to_string_lossy().into_owned()))
        .collect();
    if versions.is_empty() {
        bail!("it holds no VERSION/vmlinuz with VERSION/modules/");
    }
    versions.sort_unstable();
    Ok(versions)
}
