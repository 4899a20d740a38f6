//! Detects what resolves names on this host, and recommends a setup.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::target::{ResolverKind, Setup};
use crate::dns;

/// The resolvers of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HostResolver {
    /// The target of /etc/resolv.conf if it is a symbolic link.
    link: Option<PathBuf>,
    /// Its nameservers.
    nameservers: Vec<SocketAddr>,
    /// Those of [`PROGRAMS`] that run.
    programs: BTreeSet<&'static str>,
    /// Whether it is Nomad's, running or not.
    is_nomads: bool,
}

/// The relevant programs by the kernel's name of them, which has at most 15 characters.
const PROGRAMS: [&str; 4] = ["systemd-resolve", "dnsmasq", "dockerd", "nomad"];

/// Detects the resolvers of the host whose files are below `root`. What can't be read counts as
/// absent.
pub(super) fn detect(root: &Path) -> HostResolver {
    let resolv_conf = root.join("etc/resolv.conf");
    HostResolver {
        link: fs::read_link(&resolv_conf).ok(),
        nameservers: nameservers(&resolv_conf),
        programs: programs(root).collect(),
        is_nomads: is_nomads(root),
    }
}

/// Whether the host whose files are below `root` is Nomad's: it runs, its bridge is there, or its packages'
/// configuration. nohop may be set up before Nomad is started.
pub fn is_nomads(root: &Path) -> bool {
    programs(root).any(|program| program == "nomad")
        || root.join("sys/class/net/nomad/bridge").is_dir()
        || root.join("etc/nomad.d").is_dir()
}

/// Those of [`PROGRAMS`] that run.
fn programs(root: &Path) -> impl Iterator<Item = &'static str> {
    let processes = fs::read_dir(root.join("proc")).into_iter().flatten().flatten();
    let names = processes.filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok());
    names.filter_map(|name| PROGRAMS.into_iter().find(|each| *each == name.trim()))
}

/// Whether the running kernel has the driver of dummy interfaces, built in or as a module that
/// depmod(8) lists. Kernels without modules list none.
pub(super) fn has_dummy(root: &Path) -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let modules = root.join("lib/modules").join(release);
    let is_listed = ["modules.builtin", "modules.dep"].into_iter().any(|list| {
        let list = fs::read_to_string(modules.join(list)).unwrap_or_default();
        list.contains("/dummy.ko")
    });
    is_listed || root.join("sys/module/dummy").exists()
}

/// The nameservers of a file in the format of resolv.conf; none if it can't be read.
pub(super) fn nameservers(path: &Path) -> Vec<SocketAddr> {
    dns::nameservers(&fs::read(path).unwrap_or_default()).collect()
}

/// The setups for the host, each with its reason: on a Nomad client first the one that serves all
/// its tasks, then that of the host itself.
pub(super) fn recommend(host: &HostResolver) -> Vec<Setup> {
    let runs = |program| host.programs.contains(program);
    let is_local = |server: &SocketAddr| server.ip().is_loopback();
    let link = host.link.as_ref().map(|link| link.display().to_string()).unwrap_or_default();

    let mut setups = Vec::new();
    if host.is_nomads {
        let reason = "for Nomad: one address that the host and all containers reach serves every \
                      driver, without a dns block in any job";
        setups.push((ResolverKind::Nomad, reason.to_owned()));
    }
    setups.push(if host.nameservers.iter().any(dns::is_stub) {
        (
            ResolverKind::SystemdResolved,
            "/etc/resolv.conf names systemd-resolved (127.0.0.53)".to_owned(),
        )
    } else if link.contains("systemd/resolve") {
        (ResolverKind::SystemdResolved, format!("/etc/resolv.conf is a link to {link}"))
    } else if runs("dnsmasq") && host.nameservers.iter().any(is_local) {
        let reason = "dnsmasq runs, and /etc/resolv.conf names a resolver on this machine";
        (ResolverKind::Dnsmasq, reason.to_owned())
    } else {
        let named = match host.nameservers.is_empty() {
            true => "no nameserver".to_owned(),
            false => {
                let ips = host.nameservers.iter().map(|server| server.ip().to_string());
                ips.collect::<Vec<_>>().join(", ")
            }
        };
        let besides = match runs("systemd-resolve") {
            true => "; systemd-resolved runs, but programs that read that file bypass it",
            false => ", and no resolver that could send nohop a zone runs here",
        };
        (ResolverKind::ResolvConf, format!("/etc/resolv.conf names {named}{besides}"))
    });
    if host.is_nomads {
        // Instead of that.
        setups[1].1.insert_str(0, "or, for programs of the host's network alone: ");
    } else if runs("dockerd") {
        setups.push((
            ResolverKind::Docker,
            "Docker runs: its containers have networks of their own".into(),
        ));
    }
    let setup = |(kind, reason): (ResolverKind, String)| {
        let (option, lines) = (kind.option().to_owned(), Vec::new());
        Setup { option, reason: Some(reason), lines }
    };
    setups.into_iter().map(setup).collect()
}

#[cfg(test)]
mod tests {
    use super::super::target::{SetupReport, setup_text};
    use super::*;

    /// A machine below a folder: its resolv.conf, as a file or a link, and what runs.
    fn machine(resolv_conf: &str, link: Option<&str>, programs: &[&str]) -> HostResolver {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("etc")).unwrap();
        let path = root.join("etc/resolv.conf");
        match link {
            Some(link) => {
                let target = root.join("etc").join(link);
                fs::create_dir_all(target.parent().unwrap()).unwrap();
                fs::write(&target, resolv_conf).unwrap();
                std::os::unix::fs::symlink(link, path).unwrap();
            }
            None => fs::write(path, resolv_conf).unwrap(),
        }
        for (pid, program) in programs.iter().enumerate() {
            let process = root.join("proc").join(pid.to_string());
            fs::create_dir_all(&process).unwrap();
            fs::write(process.join("comm"), format!("{program}\n")).unwrap();
        }
        detect(root)
    }

    #[test]
    fn the_dummy_driver_is_detected() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert!(!has_dummy(root), "no lists, as on a kernel without modules");
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let modules = root.join("lib/modules").join(release);
        fs::create_dir_all(&modules).unwrap();
        fs::write(modules.join("modules.dep"), "kernel/drivers/net/veth.ko:\n").unwrap();
        assert!(!has_dummy(root));
        fs::write(modules.join("modules.builtin"), "kernel/drivers/net/dummy.ko\n").unwrap();
        assert!(has_dummy(root));
        fs::write(modules.join("modules.builtin"), "").unwrap();
        fs::write(modules.join("modules.dep"), "kernel/drivers/net/dummy.ko.xz:\n").unwrap();
        assert!(has_dummy(root));
    }

    #[test]
    fn recommended_setups() {
        let stub = "# made\nnameserver 127.0.0.53\noptions edns0\n";
        let local = "nameserver 127.0.0.1\n";
        let far = "nameserver 192.0.2.1\nnameserver 192.0.2.2\n";
        let to_stub = Some("../run/systemd/resolve/stub-resolv.conf");
        let to_uplinks = Some("../run/systemd/resolve/resolv.conf");
        let rows = [
            (stub, to_stub, &["systemd-resolve"][..], "--systemd-resolved"),
            (stub, None, &[], "--systemd-resolved"),
            (far, to_uplinks, &["systemd-resolve"], "--systemd-resolved"),
            (local, None, &["dnsmasq", "bash"], "--dnsmasq"),
            (far, None, &["dnsmasq"], "--resolv-conf"),
            (local, None, &[], "--resolv-conf"),
            (far, None, &["systemd-resolve"], "--resolv-conf"),
            ("", None, &[], "--resolv-conf"),
            (stub, to_stub, &["nomad", "dockerd"], "--nomad --systemd-resolved"),
            (local, None, &["dnsmasq", "nomad"], "--nomad --dnsmasq"),
            (stub, to_stub, &["dockerd"], "--systemd-resolved --docker"),
        ];
        for (resolv_conf, link, programs, expected) in rows {
            let host = machine(resolv_conf, link, programs);
            let options: Vec<_> = recommend(&host).into_iter().map(|setup| setup.option).collect();
            assert_eq!(options.join(" "), expected, "{host:?}");
        }
        for sign in ["sys/class/net/nomad/bridge", "etc/nomad.d"] {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join(sign)).unwrap();
            let setups = recommend(&detect(dir.path()));
            assert_eq!(setups[0].option, "--nomad", "not running yet: {sign}");
        }
        let advice = |host: &HostResolver| setup_text(&SetupReport { setups: recommend(host) });
        let text = advice(&machine(stub, to_stub, &["nomad"]));
        let (first, second) = text.split_once("\n    nohop dns setup --nomad\n").unwrap();
        assert!(
            first.starts_with("for Nomad: one address") && second.starts_with("or, for programs"),
            "{text}"
        );
        let text = advice(&HostResolver::default());
        assert!(text.contains("names no nameserver, and no resolver"), "{text}");
        assert!(text.ends_with(":\n    nohop dns setup --resolv-conf\n"), "{text}");
    }
}
