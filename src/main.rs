//! The `pipe` command: arguments to commands, their ends to exit codes. All words are in `report`.

mod cli;
mod report;

fn main() -> std::process::ExitCode {
    cli::main()
}
