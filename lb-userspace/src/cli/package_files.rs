//! What packages contain in addition to the binary, made from the definitions of the command line and of the
//! configuration.

use std::fmt::Write as _;
use std::path::Path;
use std::{fs, io};

use anyhow::Context as _;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::args::CompletionShell;
use super::completion;
use crate::config::Config;
use crate::config::keys::{KEYS, toml, values};
use crate::config::template::template;

/// Writes them to a directory:
///
/// - `nohop.toml`, the configuration file;
/// - `man/nohop.1`, one more for each command, such as `man/nohop-dns-setup.1`, and `man/nohop.toml.5`;
/// - `completions/nohop.bash`, `completions/_nohop` for zsh and `completions/nohop.fish`.
///
/// # Errors
/// When a file can't be written.
pub fn write(dir: &Path) -> anyhow::Result<()> {
    let write = |name: &str, contents: &[u8]| {
        let file = dir.join(name);
        let parent = file.parent().unwrap_or(dir);
        fs::create_dir_all(parent)
            .and_then(|()| fs::write(&file, contents))
            .with_context(|| format!("can't write {}", file.display()))
    };
    write("nohop.toml", template().as_bytes())?;
    for (shell, name) in [
        (CompletionShell::Bash, "nohop.bash"),
        (CompletionShell::Zsh, "_nohop"),
        (CompletionShell::Fish, "nohop.fish"),
    ] {
        write(&format!("completions/{name}"), completion::script(shell).as_bytes())?;
    }
    write("man/nohop.toml.5", &configuration()?)?;
    let mut nohop = completion::visible().disable_help_subcommand(true);
    nohop.build();
    write_manual(&nohop, &dir.join("man"))
        .with_context(|| format!("can't write the manual pages to {}", dir.display()))
}

/// What the pages' footers have.
const VERSION: &str = concat!("nohop ", env!("CARGO_PKG_VERSION"));

/// In place of a page's date. An empty one is left out of the title line, and the version takes its place.
const NO_DATE: &str = " ";

/// The pages of a command and of those below it.
fn write_manual(command: &clap::Command, dir: &Path) -> io::Result<()> {
    for below in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        write_manual(below, dir)?;
    }
    let page = Man::new(command.clone()).date(NO_DATE).source(VERSION).manual("nohop");
    page.generate_to(dir).map(drop)
}

/// nohop.toml(5).
fn configuration() -> anyhow::Result<Vec<u8>> {
    let mut page = Roff::new();
    page.control("TH", ["nohop.toml", "5", NO_DATE, VERSION, "nohop"]);
    page.control("SH", ["NAME"]);
    page.text([roman("nohop.toml - the configuration of nohop")]);
    page.control("SH", ["DESCRIPTION"]);
    page.text([
        italic("/etc/nohop/nohop.toml"),
        roman(" is TOML. Each key has a default, and an unknown key is an error. Flags of "),
        bold("nohop run"),
        roman(" override environment variables, which override the file. "),
        bold("nohop config check"),
        roman(" reports mistakes, "),
        bold("nohop config show"),
        roman(" prints the values in use, and "),
        bold("nohop reload"),
        roman(" applies a change of a key that needs no restart."),
    ]);
    let values = values(&Config::default());
    let mut section = Some("");
    for (key, value) in KEYS.iter().zip(values.iter().map(|(_, value)| value)) {
        if key.section() != section {
            section = key.section();
            let title = section.map_or("KEYS WITHOUT A SECTION".into(), |name| format!("[{name}]"));
            page.control("SH", [title.as_str()]);
        }
        let name = key.name.split_once('.').map_or(key.name, |(_, name)| name);
        let mut text = format!("{}.", capital(key.text));
        if let Some(why) = key.restart {
            let _ = write!(text, " A new value needs a restart: {why}.");
        }
        page.control("TP", []);
        page.text([bold(name), roman(format!(" = {}", toml(value)))]);
        page.text([roman(text)]);
    }
    page.control("SH", ["SEE ALSO"]);
    page.text([bold("nohop"), roman("(1)")]);
    let mut written = Vec::new();
    page.to_writer(&mut written)?;
    Ok(written)
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().into_iter().flat_map(char::to_uppercase).chain(chars).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_visible_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        super::write(dir.path()).unwrap();
        let names: Vec<String> = fs::read_dir(dir.path().join("man"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        for name in ["nohop.1", "nohop-run.1", "nohop-dns-setup.1", "nohop-config-migrate.1"] {
            assert!(names.iter().any(|it| it == name), "{name} isn't among {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains("probe") || name.contains("package")));
        for name in names {
            let page = fs::read_to_string(dir.path().join("man").join(&name)).unwrap();
            let title = page.lines().find(|line| line.starts_with(".TH ")).unwrap();
            let expected = concat!(" \" \" \"nohop ", env!("CARGO_PKG_VERSION"), "\" nohop");
            assert!(title.ends_with(expected), "{name}: {title}");
        }
    }

    #[test]
    fn every_key_is_in_the_manual() {
        let page = String::from_utf8(configuration().unwrap()).unwrap();
        for key in KEYS {
            let name = key.name.rsplit('.').next().unwrap_or_default();
            assert!(page.contains(&format!("\\fB{name}\\fR")), "{name} isn't in\n{page}");
        }
    }
}
