//! A VM from its start to its end.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::setup::kernels::{Kernel, Version};

/// How long a VM may take, in seconds.
pub const LIMIT_SECONDS: u32 = 1200;

/// What `timeout` exits with when the time was up.
const TIMED_OUT: i32 = 124;

/// An init script's text before the exit status of the tests.
pub const END_MARK: &str = "nohop-vm: the tests exited with ";

/// How a kernel is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As distributions start it.
    Plain,
    /// With `lockdown=confidentiality`, so that nothing reads the kernel's memory; there, only the
    /// trials of that.
    LockedDown,
}

impl Mode {
    /// An addition to the kernel's command line.
    fn parameters(self) -> &'static str {
        match self {
            Mode::Plain => "",
            Mode::LockedDown => "lockdown=confidentiality",
        }
    }

    /// An addition to its name.
    pub fn suffix(self) -> &'static str {
        match self {
            Mode::Plain => "",
            Mode::LockedDown => ", locked down",
        }
    }
}

/// Boots `kernel` on `initrd`, shows what it writes and gives each line to `on_line`. Returns
/// whether the tests succeeded.
///
/// # Errors
/// When the VM can't be started, ends without the tests' exit status, or not in time.
pub fn boot(kernel: &Kernel, mode: Mode, initrd: &Path, on_line: impl FnMut(&str)) -> Result<bool> {
    let command = qemu(kernel, initrd, LIMIT_SECONDS, "1G", mode.parameters());
    run(command, &format!("{}{}", kernel.version, mode.suffix()), on_line)
}

/// The same with a VM that was set up already, by the name that its lines are shown with; within LIMIT_SECONDS.
///
/// # Errors
/// As `boot`.
pub fn run(mut command: Command, name: &str, mut on_line: impl FnMut(&str)) -> Result<bool> {
    command.args(["-serial", "stdio"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());

    let mut vm = command.spawn().context("can't run `timeout` with QEMU")?;
    let console = vm.stdout.take().context("the VM has no console")?;
    let mut exit_status = None;
    for line in BufReader::new(console).split(b'\n') {
        let line = line.context("can't read the VM's console")?;
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches('\r');
        println!("{name} | {line}");
        on_line(line);
        if let Some((_, status)) = line.split_once(END_MARK) {
            exit_status = Some(status.trim() == "0");
        }
    }
    let ended = vm.wait().context("can't wait for the VM")?;
    match exit_status {
        Some(success) => Ok(success),
        None if ended.code() == Some(TIMED_OUT) => {
            bail!("the VM took more than {LIMIT_SECONDS} s and was ended; what it wrote is above")
        }
        None => bail!("the VM ended before the tests did ({ended}); what it wrote is above"),
    }
}

/// A VM with a console on its first serial line and without a network card, that ends in this time. `parameters` are
/// further ones of the kernel's.
pub fn qemu(
    kernel: &Kernel,
    initrd: &Path,
    limit_seconds: u32,
    memory: &str,
    parameters: &str,
) -> Command {
    let parameters = format!("console=ttyS0 no_timer_check {parameters}");
    let program = "qemu-system-x86_64";
    let mut command = emulator(program, kernel, initrd, limit_seconds, memory, &parameters);
    command.args(["-cpu", processor(kernel.version)]);
    command
}

/// The same by `program`, which emulates another architecture, without its processor and console.
pub fn emulator(
    program: &str,
    kernel: &Kernel,
    initrd: &Path,
    limit_seconds: u32,
    memory: &str,
    parameters: &str,
) -> Command {
    // `timeout` ends the VM in time even when this program is gone.
    let mut command = Command::new("timeout");
    command.args(["--foreground", "--kill-after=5", &limit_seconds.to_string()]);
    command.args([program, "-nodefaults", "-no-user-config", "-no-reboot"]);
    // A stock kernel doesn't boot under every machine's /dev/kvm, so always by emulation.
    command.args(["-accel", "tcg", "-smp", "1", "-m", memory, "-display", "none"]);
    command.arg("-kernel").arg(&kernel.vmlinuz).arg("-initrd").arg(initrd);
    command.args(["-append", &format!("quiet panic=-1 random.trust_cpu=on {parameters}")]);
    command
}

/// QEMU 7.2 was seen to leave garbage in the flags after `cmpxchg16b`, of which Linux 6.12 died in
/// `kmalloc`; without that instruction those kernels do otherwise. Linux 7 needs it for socket
/// storage (`kmalloc_nolock`), and seldom uses it elsewhere.
///
/// Without the flags for fast string instructions the kernel copies by words instead of by bytes, which
/// takes a third off the time of a trial.
fn processor(kernel: Version) -> &'static str {
    if kernel < (Version { major: 7, minor: 0 }) {
        "max,-erms,-fsrm,-cx16"
    } else {
        "max,-erms,-fsrm"
    }
}

/// The kernel's init: prepares the requirements of the tests, runs them and ends the VM.
/// `variables` are those of the tests, as `NAME=VALUE` each.
pub fn init_script(variables: &[String], filter: Option<&str>) -> String {
    let filter = filter.map(quoted).unwrap_or_default();
    let variables = variables.iter().map(|variable| format!("export {variable}\n"));
    let variables: String = variables.collect();
    format!(
        "#!/bin/busybox sh
export PATH=/usr/bin:/bin
export NOHOP_EMULATED=1
{variables}/bin/busybox mkdir -p /dev /proc /run /sys /tmp
/bin/busybox --install -s /bin
mount -t devtmpfs devtmpfs /dev
exec >/dev/console 2>&1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf -o mode=0700 bpf /sys/fs/bpf
mount -t securityfs securityfs /sys/kernel/security
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
ip link set lo up
# A gigabyte gets 4,096. Beyond them a server's socket is gone once its FIN was acknowledged: a FIN that a loss
# probe repeats is then answered by a reset, and a client that hasn't read yet gets EPIPE.
echo 65536 > /proc/sys/net/ipv4/tcp_max_tw_buckets
for module in /modules/*; do insmod $module; done
kernel-tests {filter}
echo \"{END_MARK}$?\"
poweroff -f
"
    )
}

/// `word` as the shell takes it for one word.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_are_quoted() {
        for (word, expected) in [("a b", "'a b'"), ("it's", r"'it'\''s'"), ("", "''")] {
            assert_eq!(quoted(word), expected);
        }
    }
}
