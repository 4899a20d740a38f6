//! `nohop completion SHELL`: what a shell reads to complete the command line.

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use super::args::{Arguments, CompletionShell};

/// The script for this shell. It has each command but the hidden ones, which aren't for people.
pub fn script(shell: CompletionShell) -> String {
    let shell = match shell {
        CompletionShell::Bash => Shell::Bash,
        CompletionShell::Zsh => Shell::Zsh,
        CompletionShell::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible(), "nohop", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// The command line as people see it.
pub fn visible() -> Command {
    let all = Arguments::command();
    let visible = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let about = all.get_about().cloned().unwrap_or_default();
    Command::new("nohop").version(env!("CARGO_PKG_VERSION")).about(about).subcommands(visible)
}
