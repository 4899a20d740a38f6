//! Where a run took place, for whoever reads its figures elsewhere.

use serde::Serialize;

/// The machine, as far as it matters to figures.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Machine {
    /// The processor's model.
    pub cpu: String,
    /// The processors that this run may use.
    pub n_cpus: usize,
    /// The memory, in MiB.
    pub memory_mib: u64,
    /// The kernel's release and version.
    pub kernel: String,
    /// The distribution.
    pub system: String,
    /// What virtualises it, as far as that can be told; empty where nothing seems to.
    pub hypervisor: String,
    /// Mitigations in force, by vulnerability, those that are in force only.
    pub mitigations: Vec<String>,
    /// The load average over a minute before the run began.
    pub load_before: f64,
    /// The commit of this repository that was measured, `-dirty` where there are changes; empty
    /// outside of a checkout.
    pub commit: String,
}
