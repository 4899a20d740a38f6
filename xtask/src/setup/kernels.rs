//! The kernels of NOHOP_KERNELS: setup only says which ones are there.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

pub fn look(folder: &Path) -> Result<String> {
    let mend = "set NOHOP_KERNELS to a folder of VERSION/vmlinuz and VERSION/modules/, or unset it";
    let entries =
        fs::read_dir(folder).with_context(|| format!("can't read {}: {mend}", folder.display()))?;
    let mut versions: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|kernel| kernel.join("vmlinuz").is_file() && kernel.join("modules").is_dir())
        .filter_map(|kernel| Some(kernel.file_name()?.to_string_lossy().into_owned()))
        .collect();
    if versions.is_empty() {
        bail!("no VERSION/vmlinuz with VERSION/modules/ in {}: {mend}", folder.display());
    }
    versions.sort_unstable();
    Ok(versions.join(", "))
}
