//! The settings of systemd-resolved from all its files, in the order of resolved.conf(5).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// The folders of its files, below the root. Of files with the same name the first one applies.
const DIRS: [&str; 4] = ["etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd"];

/// The files that it reads, in its order: the main one, then the drop-ins by name. `ours`, a drop-in
/// of the first folder, is among them, be it there or not.
pub(super) fn files(root: &Path, ours: &Path) -> Vec<PathBuf> {
    let mut main = DIRS.iter().map(|dir| root.join(dir).join("resolved.conf"));
    let main = main.find(|path| path.exists());
    let mut drop_ins: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for dir in DIRS.iter().rev() {
        let entries = fs::read_dir(root.join(dir).join("resolved.conf.d"));
        for entry in entries.into_iter().flatten().flatten() {
            let is_read = entry.path().extension().is_some_and(|extension| extension == "conf");
            if is_read {
                drop_ins.insert(entry.file_name(), entry.path());
            }
        }
    }
    if let Some(name) = ours.file_name() {
        drop_ins.insert(name.to_owned(), ours.to_owned());
    }
    main.into_iter().chain(drop_ins.into_values()).collect()
}

/// A value of a setting, and its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ResolvedSetting {
    pub(super) word: String,
    pub(super) path: PathBuf,
}

/// A list, which each file extends and may reset.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SettingList {
    pub(super) values: Vec<ResolvedSetting>,
    /// The file that reset it last.
    pub(super) emptied: Option<PathBuf>,
}

impl SettingList {
    fn add(&mut self, words: &str, path: &Path) {
        if words.is_empty() {
            self.values.clear();
            self.emptied = Some(path.to_owned());
        }
        let setting = |word: &str| ResolvedSetting { word: word.to_owned(), path: path.to_owned() };
        self.values.extend(words.split_whitespace().map(setting));
    }
}

/// The relevant settings.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ResolvedSettings {
    pub(super) dns: SettingList,
    pub(super) domains: SettingList,
    /// The servers that are used while there is no other one.
    pub(super) fallback: SettingList,
    pub(super) dns_over_tls: Option<ResolvedSetting>,
}

impl ResolvedSettings {
    /// The settings of files with this content, in this order.
    pub(super) fn of(files: &[(PathBuf, String)]) -> ResolvedSettings {
        let mut settings = ResolvedSettings::default();
        for (path, content) in files {
            // The main file has the built-in servers as a comment.
            for words in content.lines().filter_map(|line| line.strip_prefix("#FallbackDNS=")) {
                settings.fallback.add(words, path);
            }
        }
        for (path, content) in files {
            for (key, value) in assignments(content) {
                match key.as_str() {
                    "DNS" => settings.dns.add(&value, path),
                    "Domains" => settings.domains.add(&value, path),
                    "FallbackDNS" => settings.fallback.add(&value, path),
                    "DNSOverTLS" => {
                        settings.dns_over_tls =
                            Some(ResolvedSetting { word: value, path: path.clone() });
                    }
                    _ => {}
                }
            }
        }
        settings
    }

    /// The file that sets DNSOverTLS=yes: then systemd-resolved queries by TLS only, on port 853.
    pub(super) fn tls_only(&self) -> Option<&Path> {
        let is_yes = |word: &str| matches!(word, "yes" | "true" | "on" | "1" | "y" | "t");
        let setting = self.dns_over_tls.as_ref()?;
        is_yes(&setting.word.to_ascii_lowercase()).then_some(&setting.path)
    }
}

/// The assignments of a file in its section `[Resolve]`.
fn assignments(content: &str) -> Vec<(String, String)> {
    let content = content.replace("\\\n", " ");
    let mut is_ours = false;
    let mut found = Vec::new();
    for line in content.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if line.starts_with('[') {
            is_ours = line == "[Resolve]";
        } else if let (true, Some((key, value))) = (is_ours, line.split_once('=')) {
            found.push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    found
}

/// The address of a server as systemd writes it: `ADDRESS[:PORT][%LINK][#NAME]`.
pub(super) fn server_ip(word: &str) -> Option<IpAddr> {
    let address = word.split(['#', '%']).next()?;
    let with_port = || address.parse().map(|address: SocketAddr| address.ip());
    address.parse().or_else(|_| with_port()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &SettingList) -> String {
        list.values.iter().map(|setting| setting.word.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_files_say_together() {
        let table = [
            (&["[Resolve]\nDNS=1.1.1.1\n"][..], "1.1.1.1"),
            (&["[Resolve]\n DNS = 1.1.1.1  9.9.9.9\nDNS=::1\n"], "1.1.1.1 9.9.9.9 ::1"),
            (&["[Resolve]\n#DNS=1.1.1.1\n; DNS=1.1.1.1\n"], ""),
            (&["[Other]\nDNS=1.1.1.1\n"], ""),
            (&["[Resolve]\nDNS=1.1.1.1\\\n  9.9.9.9\n"], "1.1.1.1 9.9.9.9"),
            (&["[Resolve]\nDNS=1.1.1.1\n", "[Resolve]\nDNS=9.9.9.9\n"], "1.1.1.1 9.9.9.9"),
            (&["[Resolve]\nDNS=1.1.1.1\n", "[Resolve]\nDNS=\n"], ""),
            (&["[Resolve]\nDNS=1.1.1.1\n", "[Resolve]\nDNS=\nDNS=9.9.9.9"], "9.9.9.9"),
        ];
        for (files, expected) in table {
            let named = |(idx, text): (usize, &&str)| (idx.to_string().into(), text.to_string());
            let files: Vec<_> = files.iter().enumerate().map(named).collect();
            assert_eq!(words(&ResolvedSettings::of(&files).dns), expected, "{files:?}");
        }
    }

    #[test]
    fn fallbacks_and_tls() {
        let of = |text: &str| ResolvedSettings::of(&[("file".into(), text.to_owned())]);
        let built_in = "[Resolve]\n#FallbackDNS=1.1.1.1#one 8.8.8.8\n";
        assert_eq!(words(&of(built_in).fallback), "1.1.1.1#one 8.8.8.8");
        assert_eq!(words(&of(&format!("{built_in}FallbackDNS=\n")).fallback), "");
        for (value, expected) in [("yes", true), ("TRUE", true), ("opportunistic", false)] {
            let settings = of(&format!("[Resolve]\nDNSOverTLS={value}\n"));
            assert_eq!(settings.tls_only().is_some(), expected, "{value}");
        }
        assert_eq!(of("[Resolve]\nDNSOverTLS=yes\nDNSOverTLS=no\n").tls_only(), None);
    }

    #[test]
    fn the_order_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for file in [
            "usr/lib/systemd/resolved.conf",
            "etc/systemd/resolved.conf",
            "usr/lib/systemd/resolved.conf.d/10-a.conf",
            "run/systemd/resolved.conf.d/20-b.conf",
            "etc/systemd/resolved.conf.d/10-a.conf",
            "usr/local/lib/systemd/resolved.conf.d/30-c.conf",
            "etc/systemd/resolved.conf.d/readme",
        ] {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let ours = "etc/systemd/resolved.conf.d/25-ours.conf";
        let expected = [
            "etc/systemd/resolved.conf",
            "etc/systemd/resolved.conf.d/10-a.conf",
            "run/systemd/resolved.conf.d/20-b.conf",
            ours,
            "usr/local/lib/systemd/resolved.conf.d/30-c.conf",
        ];
        assert_eq!(files(root, &root.join(ours)), expected.map(|file| root.join(file)));
    }

    #[test]
    fn servers() {
        let table = [
            ("1.1.1.1", "1.1.1.1"),
            ("1.1.1.1:53#name", "1.1.1.1"),
            ("[::1]:53", "::1"),
            ("fe80::1%eth0", "fe80::1"),
        ];
        for (word, expected) in table {
            assert_eq!(server_ip(word).unwrap().to_string(), expected);
        }
        assert_eq!(server_ip("name"), None);
    }
}
