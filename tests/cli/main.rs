//! The program as its users meet it: exit codes, what is printed where, the words of messages.

mod counts;
mod grade;
mod messages;
mod needs;
mod run;
mod tasks;
mod transcripts;
mod views;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder with manifests and a cache of its own.
struct Project(tempfile::TempDir);

impl Project {
    fn new() -> Project {
        Project(tempfile::tempdir().expect("a folder"))
    }

    /// With one manifest, `m.toml`.
    fn with(manifest: &str) -> Project {
        let project = Project::new();
        project.write("m.toml", manifest);
        project
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).expect("a folder");
        std::fs::write(path, text).expect("written");
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipe"));
        command.args(arguments).current_dir(self.0.path()).env_remove("RUST_LOG").env("COLUMNS", "100");
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the program starts")
    }

    fn code(&self, arguments: &[&str]) -> Option<i32> {
        self.output(arguments).status.code()
    }

    fn stdout(&self, arguments: &[&str]) -> String {
        String::from_utf8(self.output(arguments).stdout).expect("UTF-8")
    }

    fn stderr(&self, arguments: &[&str]) -> String {
        String::from_utf8(self.output(arguments).stderr).expect("UTF-8")
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.stdout(arguments)).expect("JSON")
    }

    /// The command, its exit code and all it printed, as one text.
    fn transcript(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let mut text = format!("$ pipe {}\nexit {}\n", arguments.join(" "), output.status.code().unwrap_or(-1));
        for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
            if !bytes.is_empty() {
                text.push_str(&format!("--- {name}\n{}", String::from_utf8_lossy(bytes)));
            }
        }
        text
    }
}

/// Compares a transcript with its snapshot, without what differs from run to run.
macro_rules! assert_transcript {
    ($project:expr, $arguments:expr) => {
        insta::with_settings!({ filters => vec![
            (r"blobs/[0-9a-f]{2}/[0-9a-f]{64}", "blobs/[DIGEST]"),
            (r"\b[0-9a-f]{12}\b", "[SHORT]"),
            // With the blanks before it: a column of times is as wide as they are.
            (r" +\d+(\.\d+)?(ms|s)\b", " [TIME]"),
            (r"peak [0-9.]+ [KMG]iB", "peak [MEMORY]"),
            (r"they take heads of .*", "they take heads of [SIZES]"),
            (r"[0-9.]+ [KMGT]iB (here|free there|free now|in all)", "[MEMORY] $1"),
            (r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "[WHEN]"),
        ]}, {
            insta::assert_snapshot!($project.transcript(&$arguments));
        });
    };
}
use assert_transcript;
