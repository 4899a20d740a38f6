//! Packages to unpack and never install, from the archives that apt knows.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::common::{Draft, cache_dir};
use crate::process;

/// An apt, and a folder to download to, removed on drop.
pub struct Apt {
    draft: Draft,
    options: Vec<String>,
}

impl Apt {
    /// The system's own.
    pub fn of_system() -> Result<Self> {
        let draft = Draft::beside(&cache_dir()?.join("apt"))?;
        Ok(Self { draft, options: Vec::new() })
    }

    /// Another release of Debian's, where this machine's packages come from a Debian mirror: asks
    /// that mirror, through an apt of its own, so that signatures are checked and the system's
    /// lists stay as they are. `architecture` is Debian's name of one that
    /// isn't this machine's.
    pub fn of_debian(release: &str, architecture: Option<&str>) -> Result<Self> {
        let sources = debian_sources(&apt_sources(), release);
        if sources.is_empty() {
            bail!("no Debian mirror among the apt sources");
        }
        let mut apt = Self::of_system()?;
        let dir = apt.draft.path().display();
        apt.options = vec![
            format!("Dir::Etc::sourcelist={dir}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::Cache={dir}/cache"),
            "Acquire::Languages=none".to_owned(),
            // The signatures of an archived release have expired.
            "Acquire::Check-Valid-Until=false".to_owned(),
            // These folders belong to the user who runs setup, not to apt's.
            "APT::Sandbox::User=root".to_owned(),
        ];
        if let Some(other) = architecture {
            apt.options.push(format!("APT::Architecture={other}"));
            apt.options.push(format!("APT::Architectures={other}"));
        }
        let mut tried = Vec::new();
        for source in sources {
            match apt.update(&source) {
                Ok(()) => return Ok(apt),
                Err(error) => tried.push(format!("{error:#}")),
            }
        }
        bail!("{}", tried.join("; "));
    }

    fn update(&self, source: &str) -> Result<()> {
        let dir = &self.draft.path();
        fs::write(dir.join("sources.list"), format!("{source}\n"))?;
        fs::create_dir_all(dir.join("lists/partial"))?;
        fs::create_dir_all(dir.join("cache/archives/partial"))?;
        let mut apt_get = self.command("apt-get");
        process::output(apt_get.args(["-qq", "--error-on=any", "update"])).map(drop)
    }

    /// The names of the packages that begin with `prefix`.
    pub fn packages(&self, prefix: &str) -> Result<Vec<String>> {
        let names = process::output(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// The libraries that a package needs, directly or not, and that aren't installed.
    pub fn absent_libraries(&self, package: &str) -> Result<Vec<String>> {
        let mut apt_get = self.command("apt-get");
        apt_get.args(["-qq", "--simulate", "--no-install-recommends", "install", package]);
        let plan = process::output(&mut apt_get)?;
        // Such as `Inst libnl-3-200 (3.7.0 Debian:12 [amd64])`.
        let installed = plan.lines().filter_map(|line| line.strip_prefix("Inst "));
        let names = installed.filter_map(|rest| rest.split_whitespace().next());
        Ok(names.filter(|name| name.starts_with("lib")).map(str::to_owned).collect())
    }

    /// Downloads a package; the file goes when this does.
    pub fn download(&self, package: &str) -> Result<PathBuf> {
        let dir = &self.draft.path();
        let mut apt_get = self.command("apt-get");
        process::output(apt_get.args(["-qq", "download", package]).current_dir(dir))?;
        let begin = format!("{package}_");
        let files = fs::read_dir(dir).with_context(|| format!("can't read {}", dir.display()))?;
        files
            .filter_map(|file| Some(file.ok()?.path()))
            .find(|file| file.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&begin)))
            .with_context(|| format!("apt-get downloaded no {begin}*.deb"))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(self.options.iter().flat_map(|option| ["-o", option]));
        command
    }
}

/// The text of all of apt's source lists.
fn apt_sources() -> String {
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten();
    let files = parts.filter_map(|entry| Some(entry.ok()?.path()));
    std::iter::once(PathBuf::from("/etc/apt/sources.list"))
        .chain(files)
        .filter_map(|file| fs::read_to_string(file).ok())
        .collect::<Vec<_>>()
        .join("\n\n")
}

/// One line a Debian mirror of `sources` (of either format), asking it for `release`.
fn debian_sources(sources: &str, release: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for stanza in sources.split("\n\n") {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name));
        let of_field = field("URIs:").unwrap_or_default().split_whitespace();
        let key = field("Signed-By:").map(str::trim);
        let of_lines = stanza
            .lines()
            .filter(|line| line.starts_with("deb "))
            .filter_map(|line| line.split_whitespace().find(|word| word.contains(":/")));
        for uri in of_field.chain(of_lines) {
            let archive = uri.trim_end_matches('/').rsplit('/').next();
            if !matches!(archive, Some("debian" | "debian.list")) {
                continue;
            }
            let key = key.filter(|key| key.starts_with('/'));
            let options = key.map(|key| format!("[signed-by={key}] ")).unwrap_or_default();
            let line = format!("deb {options}{uri} {release} main");
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::debian_sources;

    #[test]
    fn mirrors_of_debian_are_found_in_both_formats() {
        let sources = "\
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb
URIs: http://mirror.example/debian-security

deb [arch=amd64] https://other.example/pub/debian/ bookworm main
deb-src https://other.example/src/debian bookworm main
deb https://packages.example/apt stable main
# deb https://commented.example/debian bookworm main
";
        let expected = [
            "deb [signed-by=/usr/share/keyrings/debian.gpg] http://mirror.example/debian bullseye main",
            "deb https://other.example/pub/debian/ bullseye main",
        ];
        assert_eq!(debian_sources(sources, "bullseye"), expected);
    }
}
