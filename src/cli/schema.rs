//! `pipe schema`: the manifest language as JSON Schema, for editors.

use super::global::{Done, print};
use pipe::plan;
use pipe::stage;

/// Write the JSON Schema of manifests, for editors
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe schema > pipe.schema.json\n  \
    # then, as the first line of a manifest, for editors that know taplo:\n  \
    #:schema ./pipe.schema.json")]
pub struct Arguments {}

pub fn run(_: &Arguments) -> Done {
    print(&format!("{:#}\n", plan::schema(stage::KINDS)))
}
