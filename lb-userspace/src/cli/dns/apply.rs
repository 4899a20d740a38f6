//! Writes systemd-resolved's files, all or none, and restores the former ones.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::NamedTempFile;

use super::instructions::{ANCHOR, DROP_IN, MARK, negative_trust_anchor, resolved_drop_in};
use super::resolved::{self, ResolvedSettings};
use super::target::ZoneServer;
use super::upstream;
use crate::config::DnsConfig;

/// Why the host isn't set up; then its files are unchanged.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResolvedSetupError {
    #[error("can't {action} {}: {source}{}", path.display(), fix(source))]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} isn't nohop's, and there is no backup of it: it stays as it is", .0.display())]
    NotOurs(PathBuf),
    #[error(
        "{} was changed since nohop wrote it: it stays as it is; take out what is yours and remove \
         it (what was there before nohop, if anything, is in {}), and do this again",
        .0.display(), backup(.0).display()
    )]
    Edited(PathBuf),
    #[error(
        "{} has DNS=, and systemd-resolved would ask those servers for the zone, too: give them to a \
         link, or to nohop as dns.forward, and take them out there",
        .0.display()
    )]
    OtherServers(PathBuf),
    #[error(
        "{} empties DNS= or Domains= after {DROP_IN}, whose settings would have no effect: remove \
         that line there",
        .0.display()
    )]
    Emptied(PathBuf),
    #[error(
        "{} has DNSOverTLS=yes, so systemd-resolved would query nohop by TLS, too: set it on the \
         links whose servers have TLS, or set it to opportunistic",
        .0.display()
    )]
    TlsOnly(PathBuf),
    #[error(
        "systemd-resolved would ask nohop for all names, and nohop has no upstream but \
         systemd-resolved: name the machine's resolver in dns.forward, such as [\"ADDRESS:53\"], \
         start nohop with it, and do this again"
    )]
    NoUpstream,
    #[error("{0}; the files are as they were: see journalctl -u systemd-resolved")]
    Restart(String),
}

/// What helps against an error of a file.
fn fix(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied if rustix::process::geteuid().is_root() => {
            "; lsattr shows whether it is immutable"
        }
        io::ErrorKind::PermissionDenied => "; run it as root",
        io::ErrorKind::ReadOnlyFilesystem => {
            "; make the file system writable, or add the files to the image that it comes from"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free space there",
        io::ErrorKind::InvalidData => "; it isn't text: correct or remove it",
        _ => "",
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ResolvedSetupError {
    move |source| ResolvedSetupError::Io { action, path: path.to_owned(), source }
}

/// One change of a file.
#[derive(Debug)]
enum FileChange {
    /// Write this content.
    Write(PathBuf, String),
    /// Remove it.
    Remove(PathBuf),
}

impl FileChange {
    fn path(&self) -> &Path {
        let (FileChange::Write(path, _) | FileChange::Remove(path)) = self;
        path
    }
}

/// Writes the files, with a backup of what others wrote there, and restarts systemd-resolved.
/// Idempotent.
pub(super) fn apply(
    root: &Path,
    target: &ZoneServer,
    config: &DnsConfig,
) -> Result<String, ResolvedSetupError> {
    preflight(root, target, config)?;
    let mut steps = Vec::new();
    for (file, content) in files(target) {
        let path = root.join(file);
        match read(&path)? {
            Some(present) if present == content => continue,
            // What nohop wrote itself needs no backup.
            Some(present) if is_as_written(&present) => {}
            Some(present) if is_marked(&present) => return Err(ResolvedSetupError::Edited(path)),
            Some(theirs) => match read(&backup(&path))? {
                Some(before) if before != theirs => return Err(ResolvedSetupError::Edited(path)),
                Some(_) => {}
                None => steps.push(FileChange::Write(backup(&path), theirs)),
            },
            None => {}
        }
        steps.push(FileChange::Write(path, content));
    }
    if steps.is_empty() {
        return Ok("systemd-resolved is set up already: nothing was changed\n".to_owned());
    }
    commit(root, &steps)
}

/// Restores the former files, and restarts systemd-resolved. Idempotent.
pub(super) fn undo(root: &Path, target: &ZoneServer) -> Result<String, ResolvedSetupError> {
    let mut steps = Vec::new();
    for (file, _) in files(target) {
        let path = root.join(file);
        let (present, before) = (read(&path)?, read(&backup(&path))?);
        match (present, before) {
            (None, None) => {}
            (Some(present), Some(before)) if present == before => {
                steps.push(FileChange::Remove(backup(&path)));
            }
            (Some(present), _) if is_marked(&present) && !is_as_written(&present) => {
                return Err(ResolvedSetupError::Edited(path));
            }
            (Some(present), Some(_)) if !is_marked(&present) => {
                return Err(ResolvedSetupError::Edited(path));
            }
            (_, Some(before)) => {
                steps.push(FileChange::Write(path.clone(), before));
                steps.push(FileChange::Remove(backup(&path)));
            }
            (Some(present), None) if is_marked(&present) => steps.push(FileChange::Remove(path)),
            (Some(_), None) => return Err(ResolvedSetupError::NotOurs(path)),
        }
    }
    if steps.is_empty() {
        return Ok("systemd-resolved isn't set up by nohop: nothing was changed\n".to_owned());
    }
    commit(root, &steps)
}

fn files(target: &ZoneServer) -> [(&'static str, String); 2] {
    [(DROP_IN, resolved_drop_in(target)), (ANCHOR, negative_trust_anchor(target))]
}

/// Refuses if the files would have no effect, or would leave the host without name resolution.
fn preflight(
    root: &Path,
    target: &ZoneServer,
    config: &DnsConfig,
) -> Result<(), ResolvedSetupError> {
    let ours = root.join(DROP_IN);
    let mut files = Vec::new();
    for path in resolved::files(root, &ours) {
        let content = match path == ours {
            true => resolved_drop_in(target),
            false => read(&path)?.unwrap_or_default(),
        };
        files.push((path, content));
    }
    let settings = ResolvedSettings::of(&files);
    // systemd-resolved merges the servers of all its files, and asks one of them at a time.
    if let Some(other) = settings.dns.values.iter().find(|setting| setting.path != ours) {
        return Err(ResolvedSetupError::OtherServers(other.path.clone()));
    }
    for list in [&settings.dns, &settings.domains] {
        if !list.values.iter().any(|setting| setting.path == ours) {
            return Err(ResolvedSetupError::Emptied(list.emptied.clone().unwrap_or(ours)));
        }
    }
    if let Some(path) = settings.tls_only() {
        return Err(ResolvedSetupError::TlsOnly(path.to_owned()));
    }
    match upstream::is_there(root, config, &settings.fallback) {
        true => Ok(()),
        false => Err(ResolvedSetupError::NoUpstream),
    }
}

fn is_marked(content: &str) -> bool {
    content.trim_start_matches(['#', ';', ' ']).starts_with(&MARK[2..])
}

/// Whether a file is as [`files`] generates it for some target, without changes by others.
fn is_as_written(content: &str) -> bool {
    let mut lines = content.lines();
    let is_word = |word: &str| !word.is_empty() && !word.contains(char::is_whitespace);
    let is_value = |line: &str, key: &str| line.strip_prefix(key).is_some_and(is_word);
    is_marked(lines.next().unwrap_or_default())
        && match lines.collect::<Vec<_>>()[..] {
            ["[Resolve]", server, domains] => {
                is_value(server, "DNS=") && is_value(domains, "Domains=~")
            }
            [zone] => is_word(zone),
            _ => false,
        }
}

/// The backup of a file, under a name that systemd-resolved ignores.
fn backup(path: &Path) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(".before-nohop");
    name.into()
}

fn read(path: &Path) -> Result<Option<String>, ResolvedSetupError> {
    match fs::read_to_string(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// Applies the steps and restarts systemd-resolved; if one fails, rolls all back.
fn commit(root: &Path, steps: &[FileChange]) -> Result<String, ResolvedSetupError> {
    // What can fail for lack of space or permissions comes before the first file changes.
    let staged = steps.iter().map(stage).collect::<Result<Vec<_>, _>>()?;
    let befores = steps.iter().map(|step| read(step.path())).collect::<Result<Vec<_>, _>>()?;
    let mut done: Vec<(&Path, Option<String>)> = Vec::new();
    let mut text = String::new();
    for ((step, staged), before) in steps.iter().zip(staged).zip(befores) {
        let path = step.path();
        let taken = match staged {
            Some(draft) => draft.persist(path).map(drop).map_err(|error| error.error),
            None => fs::remove_file(path),
        };
        if let Err(error) = taken {
            roll_back(&done);
            return Err(failed("change", path)(error));
        }
        text += &match step {
            FileChange::Write(..) => format!("wrote {}\n", path.display()),
            FileChange::Remove(..) => format!("removed {}\n", path.display()),
        };
        done.push((path, before));
    }
    match restart(root) {
        Ok(outcome) => Ok(text + &outcome),
        Err(what) => {
            roll_back(&done);
            // It started with its old files before, so it will again.
            let _ = restart(root);
            Err(ResolvedSetupError::Restart(what))
        }
    }
}

/// Writes the new content to a temporary file next to the one that it will replace.
fn stage(step: &FileChange) -> Result<Option<NamedTempFile>, ResolvedSetupError> {
    let FileChange::Write(path, content) = step else { return Ok(None) };
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir).map_err(failed("make", dir))?;
    let draft = || {
        let mut draft = NamedTempFile::new_in(dir)?;
        draft.write_all(content.as_bytes())?;
        // systemd-resolved reads it as an unprivileged user.
        draft.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        draft.as_file().sync_all()?;
        Ok(draft)
    };
    draft().map(Some).map_err(failed("write", path))
}

/// Restores files, as far as possible.
fn roll_back(done: &[(&Path, Option<String>)]) {
    for (path, before) in done.iter().rev() {
        let taken =
            match before {
                Some(before) => stage(&FileChange::Write(path.to_path_buf(), before.clone()))
                    .and_then(|draft| match draft {
                        Some(draft) => draft
                            .persist(path)
                            .map(drop)
                            .map_err(|e| failed("restore", path)(e.error)),
                        None => Ok(()),
                    }),
                None => fs::remove_file(path).map_err(failed("remove", path)),
            };
        if let Err(error) = taken {
            eprintln!("{error}");
        }
    }
}

/// Restarts systemd-resolved, which can't reload before version 255; it keeps no state but its
/// cache.
fn restart(root: &Path) -> Result<String, String> {
    const COMMAND: &str = "systemctl try-restart systemd-resolved";
    if root != Path::new("/") || !root.join("run/systemd/system").is_dir() {
        return Ok(format!("systemd doesn't run here; where it does: {COMMAND}\n"));
    }
    let run = |command: &str| {
        let mut words = command.split(' ');
        Command::new(words.next().unwrap_or_default()).args(words).output()
    };
    let running = run("systemctl is-active --quiet systemd-resolved");
    if running.is_ok_and(|output| !output.status.success()) {
        let start = "systemctl enable --now systemd-resolved";
        return Ok(format!("systemd-resolved doesn't run; to start it: {start}\n"));
    }
    match run(COMMAND) {
        Ok(output) if output.status.success() => {
            Ok("restarted systemd-resolved; to verify lookups: nohop check\n".to_owned())
        }
        Ok(output) => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            Err(format!("`{COMMAND}` failed: {}", stderr.trim()))
        }
        Err(error) => Err(format!("can't run `{COMMAND}`: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Forward};

    fn target(port: u16) -> ZoneServer {
        let mut config = Config::default();
        config.dns.listen = vec![([127, 0, 0, 1], port).into()];
        ZoneServer::of(&config, Path::new("/"))
    }

    /// With a resolver that isn't the machine's.
    fn apply(root: &Path, target: &ZoneServer) -> Result<String, ResolvedSetupError> {
        let forward = Forward::Servers(vec![([192, 0, 2, 1], 53).into()]);
        super::apply(root, target, &DnsConfig { forward, ..Config::default().dns })
    }

    /// Every file below a folder, with its content.
    fn tree(root: &Path) -> Vec<(String, String)> {
        let mut files = Vec::new();
        let mut dirs = vec![root.to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => dirs.push(path),
                    false => {
                        let name = path.strip_prefix(root).unwrap().display().to_string();
                        files.push((name, fs::read_to_string(&path).unwrap()));
                    }
                }
            }
        }
        files.sort();
        files
    }

    #[test]
    fn applied_twice_and_undone_twice() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert!(undo(root, &target(53)).unwrap().contains("nothing was changed"));
        let text = apply(root, &target(53)).unwrap();
        assert!(text.contains("wrote") && text.contains("systemd doesn't run here"), "{text}");
        let applied = tree(root);
        let names: Vec<_> = applied.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [ANCHOR, DROP_IN]);
        assert!(apply(root, &target(53)).unwrap().contains("nothing was changed"));
        assert_eq!(tree(root), applied);

        apply(root, &target(5354)).unwrap();
        let names = tree(root).len();
        assert_eq!(names, 2, "our own file of before needs no backup");
        undo(root, &target(53)).unwrap();
        assert_eq!(tree(root), []);
        assert!(undo(root, &target(53)).unwrap().contains("nothing was changed"));
    }

    #[test]
    fn former_files_are_restored() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let theirs = "[Resolve]\nDNS=192.0.2.1\n";
        fs::create_dir_all(root.join(DROP_IN).parent().unwrap()).unwrap();
        fs::write(root.join(DROP_IN), theirs).unwrap();
        let before = tree(root);
        assert!(matches!(undo(root, &target(53)), Err(ResolvedSetupError::NotOurs(_))));
        assert_eq!(tree(root), before);
        apply(root, &target(53)).unwrap();
        apply(root, &target(5354)).unwrap();
        let backed_up = (format!("{DROP_IN}.before-nohop"), theirs.to_owned());
        assert!(tree(root).contains(&backed_up), "{:?}", tree(root));
        undo(root, &target(5354)).unwrap();
        assert_eq!(tree(root), before);
    }

    #[test]
    fn other_servers_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let main = root.join("etc/systemd/resolved.conf");
        fs::create_dir_all(main.with_extension("conf.d")).unwrap();
        for (content, is_fine) in [
            ("[Resolve]\n#DNS=192.0.2.1\nDNS=\nFallbackDNS=192.0.2.2\n", true),
            ("[Resolve]\nDNS=192.0.2.1\n", false),
        ] {
            for file in [main.clone(), main.with_extension("conf.d").join("first.conf")] {
                fs::write(&file, content).unwrap();
                let before = tree(root);
                let applied = apply(root, &target(53));
                assert_eq!(applied.is_ok(), is_fine, "{applied:?}");
                if is_fine {
                    undo(root, &target(53)).unwrap();
                }
                assert_eq!(tree(root), before);
                fs::remove_file(&file).unwrap();
            }
        }
    }

    #[test]
    fn settings_that_override_are_refused() {
        let table = [
            ("etc/systemd/resolved.conf", "DNS = 192.0.2.1", "has DNS=,"),
            ("run/systemd/resolved.conf.d/a.conf", "DNS=192.0.2.1", "has DNS=,"),
            ("usr/lib/systemd/resolved.conf.d/a.conf", "DNS=192.0.2.1", "has DNS=,"),
            ("etc/systemd/resolved.conf.d/zz.conf", "DNS=", "empties DNS= or Domains="),
            ("etc/systemd/resolved.conf.d/zz.conf", "Domains=", "empties DNS= or Domains="),
            ("etc/systemd/resolved.conf", "DNSOverTLS=yes", "has DNSOverTLS=yes,"),
        ];
        for (file, line, expected) in table {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, format!("[Resolve]\n{line}\n")).unwrap();
            let before = tree(dir.path());
            let error = apply(dir.path(), &target(53)).unwrap_err().to_string();
            assert!(error.contains(&format!("{file} {expected}")), "{file} {line}: {error}");
            assert_eq!(tree(dir.path()), before);
        }
    }

    #[test]
    fn a_host_without_another_upstream_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = super::apply(dir.path(), &target(53), &Config::default().dns).unwrap_err();
        assert!(matches!(error, ResolvedSetupError::NoUpstream), "{error}");
        assert_eq!(tree(dir.path()), []);
    }

    #[test]
    fn edited_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        apply(root, &target(53)).unwrap();
        let ours = fs::read_to_string(root.join(DROP_IN)).unwrap();
        for content in [format!("{ours}Cache=no\n"), "[Resolve]\nCache=no\n".to_owned()] {
            fs::write(root.join(DROP_IN), &content).unwrap();
            let before = tree(root);
            undo(root, &target(53)).unwrap_err();
            assert_eq!(tree(root), before);
        }
        // With a backup of what was there, which must not be lost either.
        fs::write(root.join(DROP_IN), "[Resolve]\nCache=yes\n").unwrap();
        apply(root, &target(53)).unwrap();
        fs::write(root.join(DROP_IN), "[Resolve]\nLLMNR=no\n").unwrap();
        let before = tree(root);
        for result in [apply(root, &target(53)), undo(root, &target(53))] {
            assert!(matches!(result, Err(ResolvedSetupError::Edited(_))), "{result:?}");
        }
        assert_eq!(tree(root), before);
    }

    #[test]
    fn each_failure_names_its_own_fix() {
        let denied = match rustix::process::geteuid().is_root() {
            true => "lsattr",
            false => "run it as root",
        };
        let rows = [
            (rustix::io::Errno::ACCESS, denied),
            (rustix::io::Errno::PERM, denied),
            (rustix::io::Errno::ROFS, "writable"),
            (rustix::io::Errno::NOSPC, "free space"),
            (rustix::io::Errno::DQUOT, "free space"),
        ];
        for (errno, expected) in rows {
            let text = failed("write", Path::new("/etc/file"))(errno.into()).to_string();
            let others = ["lsattr", "run it as root", "writable", "free space"];
            let named: Vec<_> = others.into_iter().filter(|fix| text.contains(fix)).collect();
            assert_eq!(named, [expected], "{text}");
        }
        // Another's drop-in isn't text.
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join(DROP_IN).with_file_name("zz.conf");
        fs::create_dir_all(other.parent().unwrap()).unwrap();
        fs::write(&other, b"\xff").unwrap();
        let error = apply(dir.path(), &target(53)).unwrap_err().to_string();
        assert!(
            error.contains("zz.conf") && error.ends_with("it isn't text: correct or remove it")
        );
    }

    #[test]
    fn nothing_is_half_applied() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        // The second file can't be written: its folder is a file.
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/dnssec-trust-anchors.d"), "").unwrap();
        let before = tree(root);
        let error = apply(root, &target(53)).unwrap_err().to_string();
        assert!(error.contains("dnssec-trust-anchors.d"), "{error}");
        assert_eq!(tree(root), before);

        // It can be staged and not renamed: a folder has its name.
        fs::remove_file(root.join("etc/dnssec-trust-anchors.d")).unwrap();
        let steps = [
            FileChange::Write(root.join(DROP_IN), "new".to_owned()),
            FileChange::Remove(root.join("etc/absent")),
        ];
        commit(root, &steps).unwrap_err();
        assert_eq!(tree(root), []);

        // What is there can't be read: it is a folder.
        fs::create_dir_all(root.join("etc/dir")).unwrap();
        let steps = [
            FileChange::Write(root.join(DROP_IN), "new".to_owned()),
            FileChange::Write(root.join("etc/dir"), "new".to_owned()),
        ];
        commit(root, &steps).unwrap_err();
        assert_eq!(tree(root), []);
    }
}
