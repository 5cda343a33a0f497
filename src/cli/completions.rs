//! `pipe completions SHELL`

use super::global::{Done, print};
use clap_complete::Shell;

/// Write a completion script for a shell
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe completions bash > ~/.local/share/bash-completion/completions/pipe\n  \
    pipe completions zsh > \"${fpath[1]}/_pipe\"")]
pub struct Arguments {
    shell: Shell,
}

/// Writes the script of `line`, the whole command line.
pub fn run(arguments: &Arguments, line: &mut clap::Command) -> Done {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, line, "pipe", &mut script);
    print(&String::from_utf8_lossy(&script))
}
