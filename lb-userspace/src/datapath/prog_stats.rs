//! The programs' run time, as the kernel measures it.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use aya::programs::ProgramInfo;

use super::control::Datapath;
use super::error::DatapathError;
use super::map_specs::Sizes;
use super::object::processed_instructions;
use super::options::Options;

/// While this lives, the kernel measures the run time of every BPF program.
#[derive(Debug)]
pub struct Measuring(#[expect(dead_code, reason = "closing it ends the counting")] OwnedFd);

impl Measuring {
    /// Minimum kernel: 5.8.
    ///
    /// # Errors
    /// When the kernel refuses; it needs CAP_SYS_ADMIN.
    pub fn start() -> io::Result<Measuring> {
        let fd = aya::sys::enable_stats(aya::sys::Stats::RunTime);
        Ok(Measuring(fd.map_err(|error| error.io_error)?))
    }
}

/// A program's run time since it was loaded, while the kernel measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// How often it ran.
    pub n_runs: u64,
    /// How long all runs took together, the kernel's own reading of the clock included.
    pub run_time: Duration,
}

impl Cost {
    /// The mean time of the runs since `earlier`, in nanoseconds; NaN if there was none.
    pub fn mean_ns_since(self, earlier: Cost) -> f64 {
        let run_time = self.run_time.saturating_sub(earlier.run_time);
        run_time.as_nanos() as f64 / (self.n_runs - earlier.n_runs) as f64
    }
}

impl Datapath {
    /// The programs, each with how many instructions the verifier processed, on every path; from 5.16 on
    /// as the kernel reports it for the units that run, else by the verifier's log. `None` where there is
    /// neither.
    ///
    /// # Errors
    /// When the kernel refuses a program.
    pub fn verified_instructions(
        &mut self,
        options: &Options,
    ) -> Result<Vec<(&'static str, Option<u32>)>, DatapathError> {
        let verified = |program| Ok((program, self.info(program)?.verified_instruction_count()));
        let reported =
            self.units.programs().map(verified).collect::<Result<Vec<_>, DatapathError>>()?;
        let sizes = Sizes::of(&options.datapath, &options.vip);
        let mut all = if reported.iter().all(|(_, count)| count.is_some()) {
            reported
        } else {
            processed_instructions(options, &sizes, &self.pins, &mut self.features)?
        };
        all.extend(self.intercept.processed_instructions(&self.pins)?);
        all.extend(self.edge.processed_instructions(&self.pins)?);
        all.push(self.names.processed_instructions(&sizes, &self.pins)?);
        Ok(all)
    }

    /// A program's run time so far.
    ///
    /// # Errors
    /// When there is no such program, or the kernel doesn't report it.
    pub fn cost(&self, program: &'static str) -> Result<Cost, DatapathError> {
        let info = self.info(program)?;
        Ok(Cost { n_runs: info.run_count(), run_time: info.run_time() })
    }

    fn info(&self, program: &'static str) -> Result<ProgramInfo, DatapathError> {
        let loaded = self.units.loaded().find_map(|ebpf| ebpf.program(program));
        let loaded = loaded.or_else(|| self.names.program(program));
        let loaded = loaded.ok_or(DatapathError::Object { missing: program })?;
        loaded.info().map_err(|source| DatapathError::Program { program, source })
    }
}
