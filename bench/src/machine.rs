//! The machine of a run, for readers of its figures.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

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
    /// The hypervisor, as far as it can be detected; empty if there seems to be none.
    pub hypervisor: String,
    /// Mitigations in force, by vulnerability, those that are in force only.
    pub mitigations: Vec<String>,
    /// The load average over a minute before the run began.
    pub load_before: f64,
    /// The commit of this repository that was measured, `-dirty` where there are changes; empty
    /// outside of a checkout.
    pub commit: String,
}

impl Machine {
    /// Reads this machine's properties. Unreadable ones are left empty.
    pub fn read() -> Machine {
        let cpuinfo = read("/proc/cpuinfo");
        let uname = rustix::system::uname();
        let kernel = [uname.release(), uname.version()].map(|part| part.to_string_lossy());
        Machine {
            cpu: cpu_model(&cpuinfo),
            n_cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory_mib(&read("/proc/meminfo")),
            kernel: kernel.join(" "),
            system: pretty_name(&read("/etc/os-release")),
            hypervisor: hypervisor(
                &cpuinfo,
                &read("/sys/class/dmi/id/sys_vendor"),
                &read("/sys/class/dmi/id/product_name"),
            ),
            mitigations: mitigations(),
            load_before: load(&read("/proc/loadavg")),
            commit: commit(),
        }
    }

    /// On one line, for below a picture.
    pub fn caption(&self) -> String {
        let mut parts = vec![self.cpu.clone()];
        parts.extend((self.n_cpus > 0).then(|| cpus(self.n_cpus)));
        parts.extend((self.memory_mib > 0).then(|| self.memory()));
        parts.extend(self.kernel.split(' ').next().map(|release| labelled("Linux", release)));
        parts.push(self.system.clone());
        parts.push(labelled("virtual machine:", &self.hypervisor));
        parts.push(labelled("commit", &self.commit));
        parts.retain(|part| !part.is_empty());
        parts.join(", ")
    }

    /// As a Markdown list, one item a line.
    pub fn markdown(&self) -> String {
        let mut cpu = vec![self.cpu.clone()];
        cpu.extend((self.n_cpus > 0).then(|| cpus(self.n_cpus)));
        cpu.extend((self.memory_mib > 0).then(|| self.memory()));
        cpu.retain(|part| !part.is_empty());
        let lines = [
            labelled("Machine:", &cpu.join(", ")),
            labelled("Virtualised by:", &self.hypervisor),
            labelled("Kernel:", &self.kernel),
            labelled("Mitigations:", &self.mitigations.join("; ")),
            labelled("System:", &self.system),
            format!("Load before the run: {:.2}", self.load_before),
            labelled("Commit:", &self.commit),
        ];
        let lines = lines.iter().filter(|line| !line.is_empty());
        lines.map(|line| format!("- {line}\n")).collect()
    }

    fn memory(&self) -> String {
        format!("{:.1} GiB", self.memory_mib as f64 / 1024.0)
    }
}

fn cpus(n_cpus: usize) -> String {
    format!("{n_cpus} CPU{}", if n_cpus == 1 { "" } else { "s" })
}

/// The value behind its label; nothing where there is no value.
fn labelled(label: &str, value: &str) -> String {
    if value.is_empty() { String::new() } else { format!("{label} {value}") }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The first value of a key in lines of `key : value`.
fn value<'a>(lines: &'a str, wanted: &str) -> Option<&'a str> {
    let mut pairs = lines.lines().filter_map(|line| line.split_once(':'));
    pairs.find(|(key, _)| key.trim() == wanted).map(|(_, value)| value.trim())
}

fn cpu_model(cpuinfo: &str) -> String {
    // `model name` on x86, `Model` on some arm64 boards; most arm64 servers name none.
    let model = value(cpuinfo, "model name").or_else(|| value(cpuinfo, "Model"));
    model.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn memory_mib(meminfo: &str) -> u64 {
    let kib = value(meminfo, "MemTotal").and_then(|total| total.split(' ').next()?.parse().ok());
    kib.unwrap_or(0_u64) / 1024
}

fn pretty_name(os_release: &str) -> String {
    let mut lines = os_release.lines();
    let name = lines.find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
}

/// The firmware's name, if the processor reports that it is virtual.
fn hypervisor(cpuinfo: &str, vendor: &str, product: &str) -> String {
    let mut flags = value(cpuinfo, "flags").unwrap_or_default().split(' ');
    if !flags.any(|flag| flag == "hypervisor") {
        return String::new();
    }
    let (vendor, product) = (vendor.trim(), product.trim());
    match (vendor.is_empty(), product.starts_with(vendor)) {
        (true, _) if product.is_empty() => "a hypervisor that gives no name".to_owned(),
        (true, _) | (_, true) => product.to_owned(),
        _ if product.is_empty() => vendor.to_owned(),
        _ => format!("{vendor} {product}"),
    }
}

fn mitigations() -> Vec<String> {
    let dir = fs::read_dir("/sys/devices/system/cpu/vulnerabilities").into_iter().flatten();
    // By name, as a directory has no order.
    let by_name: BTreeMap<String, String> = dir
        .flatten()
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, fs::read_to_string(entry.path()).unwrap_or_default())
        })
        .collect();
    by_name.iter().filter_map(|(name, status)| mitigation(name, status)).collect()
}

/// The first clause of a mitigation in force.
fn mitigation(vulnerability: &str, status: &str) -> Option<String> {
    let clauses = status.trim().strip_prefix("Mitigation:")?;
    let first = clauses.split([';', ',']).next()?.trim();
    Some(format!("{vulnerability}: {first}"))
}

fn load(loadavg: &str) -> f64 {
    loadavg.split(' ').next().and_then(|minute| minute.parse().ok()).unwrap_or(0.0)
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        // The checkout is often its user's, and a benchmark root's.
        let mut git = Command::new("git");
        git.args(["-c", "safe.directory=*", "-C", env!("CARGO_MANIFEST_DIR")]).args(arguments);
        let output = git.output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else { return String::new() };
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if !changes.is_empty() => format!("{commit}-dirty"),
        _ => commit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_read() {
        let cpuinfo = "processor\t: 0\nmodel name\t: AMD  EPYC\nflags\t\t: fpu hypervisor sse\n";
        assert_eq!(cpu_model(cpuinfo), "AMD EPYC");
        assert_eq!(memory_mib("MemTotal:       24684092 kB\nMemFree: 1 kB\n"), 24105);
        assert_eq!(memory_mib("MemTotal: much"), 0);
        let os_release = "NAME=Debian\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n";
        assert_eq!(pretty_name(os_release), "Debian GNU/Linux 12 (bookworm)");
        assert_eq!(load("0.20 0.51 0.55 3/86 12647\n"), 0.2);
        assert_eq!(load(""), 0.0);
        for (cpuinfo, vendor, product, expected) in [
            ("", "Dell Inc.", "PowerEdge", ""),
            (cpuinfo, "", "", "a hypervisor that gives no name"),
            (cpuinfo, "", "KVM\n", "KVM"),
            (cpuinfo, "QEMU\n", "", "QEMU"),
            (cpuinfo, "QEMU\n", "Standard PC\n", "QEMU Standard PC"),
            (cpuinfo, "Google\n", "Google Compute Engine\n", "Google Compute Engine"),
        ] {
            assert_eq!(hypervisor(cpuinfo, vendor, product), expected, "{vendor}, {product}");
        }
    }

    #[test]
    fn mitigations_by_their_first_clause() {
        for (status, expected) in [
            ("Mitigation: Retpolines; STIBP: disabled\n", Some("spectre_v2: Retpolines")),
            ("Not affected\n", None),
            ("Vulnerable: Safe RET, no microcode\n", None),
            ("", None),
        ] {
            assert_eq!(mitigation("spectre_v2", status).as_deref(), expected, "{status}");
        }
    }

    #[test]
    fn a_machine_in_words() {
        let machine = Machine {
            cpu: "AMD EPYC".to_owned(),
            n_cpus: 2,
            memory_mib: 24105,
            kernel: "6.12.9 #1 SMP".to_owned(),
            load_before: 0.2,
            ..Machine::default()
        };
        assert_eq!(machine.caption(), "AMD EPYC, 2 CPUs, 23.5 GiB, Linux 6.12.9");
        let expected = "- Machine: AMD EPYC, 2 CPUs, 23.5 GiB\n- Kernel: 6.12.9 #1 SMP\n\
            - Load before the run: 0.20\n";
        assert_eq!(machine.markdown(), expected);
        assert_eq!(Machine::default().caption(), "");
    }

    #[test]
    fn this_machine() {
        let machine = Machine::read();
        assert!(machine.n_cpus > 0 && machine.memory_mib > 0, "{machine:?}");
        assert!(!machine.kernel.is_empty(), "{machine:?}");
    }
}
