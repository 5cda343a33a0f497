//! `pipe serve M STAGE`: a model of a manifest behind HTTP, for any client that speaks OpenAI's protocol.

use super::export::chain;
use super::global::{Done, Global, OfManifest, Stop, print, say};
use super::live;
use super::open::with_engine;
use super::sources::Network;
use crate::report;
use pipe::data::Tokenizer;
use pipe::exec::{Engine, Status};
use pipe::files::Files;
use pipe::manifest::spec::ArtifactType;
use pipe::model::{LoadOptions, Model, Placed};
use pipe::plan::CellId;
use pipe::problem::{Exit, Problem};
use pipe::serve::{Entry, Service, serve};
use pipe::store::damaged;
use pipe::tensor::Dtype;
use serde_json::json;
use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Serve a model or a trained adapter over HTTP, as OpenAI's clients ask for it
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    pipe serve pipelines/table1.toml 'sft[size=3B,data=mixed]' --profile mini\n  \
    pipe serve pipelines/table1.toml 'base[size=7B]' --device cuda --dtype bf16 --port 9000\n  \
    pipe serve study.toml dpo --host 0.0.0.0 --api-key-env SERVE_KEY --model-name mine\n\n  \
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
    -d '{\"model\": \"sft[size=3B,data=mixed]\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'\n\n\
    /v1/chat/completions and /v1/completions take n, temperature, top_p, top_k, repetition_penalty,\n\
    stop, seed, max_tokens, logprobs and stream; what they do not take is refused. /v1/models,\n\
    /health and /metrics tell the rest. A request without `seed` gets another one each time.\n\
    Ctrl-C lets what is at work end, for 20 seconds at most.")]
pub struct Arguments {
    #[command(flatten)]
    of: OfManifest,
    /// A model, sft or dpo stage of one cell, `sft[size=3B]`; it has to be there already
    #[arg(value_name = "STAGE")]
    stage: String,
    /// Where to listen; anything but this machine alone should have a key
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// 0: any that is free; it is told
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    port: u16,
    /// What clients call the model [default: the cell]
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// The variable with the key that requests have to bear
    #[arg(long, value_name = "VARIABLE")]
    api_key_env: Option<String>,
    /// Requests at work or waiting; more are answered 429
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    max_concurrency: u16,
    /// The longest answer in tokens [default: what the prompt leaves of the context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// How weights are held
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    dtype: Held,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Held {
    F32,
    Bf16,
}

/// Ctrl-C, SIGTERM: the first ends the serving, the second the process.
static STOP: AtomicBool = AtomicBool::new(false);

fn catch_interrupts() {
    // Refused only if somebody else caught them before: then there is nothing to add.
    let _ = ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(Exit::Interrupted as i32);
        }
        live::above(|stderr| {
            let _ = writeln!(stderr, "stopping: requests at work may end (again to end at once)");
        });
    });
}

pub fn run(global: &Global, arguments: &Arguments) -> Done {
    with_engine(global, &arguments.of.manifest, Network::Never, |engine, _| {
        let id = one_model(engine, &arguments.stage)?;
        let cell = engine.plan.cells[id].to_string();
        let key = arguments.api_key_env.as_deref().map(key).transpose()?;
        let (chain, fingerprint) = fresh(engine, id, arguments)?;
        // Taken before the model is loaded, which may take long: a port in use is told at once.
        let listener = listen(&arguments.host, arguments.port)?;
        let address = listener.local_addr().map_err(|error| no_port(&arguments.host, arguments.port, &error))?;
        if key.is_none() && !address.ip().is_loopback() {
            live::above(|stderr| {
                let _ = writeln!(
                    stderr,
                    "warning: anyone who reaches {address} may ask this model: `--api-key-env` asks them for a key"
                );
            });
        }
        catch_interrupts();
        let parts: Vec<&Files> = chain.iter().collect();
        let tokenizer = Tokenizer::load(parts[0])?;
        let dtype = match arguments.dtype {
            Held::F32 => Dtype::F32,
            Held::Bf16 => Dtype::Bf16,
        };
        // As the stages load it: in f32 a folded adapter is the same function and decodes faster.
        let fold_last = matches!(dtype, Dtype::F32);
        let model = Placed::new(Model::load(&parts, &LoadOptions { dtype, fold_last })?, &global.open_device()?)?;
        let name = arguments.model_name.as_deref().unwrap_or(&cell);
        let mut service = Service::new(name, &fingerprint, tokenizer, model.config())?;
        service.key = key;
        service.max_tokens = arguments.max_tokens.map(|most| most as usize);
        service.bounds.requests = usize::from(arguments.max_concurrency);
        service.bounds.connections = service.bounds.requests + 256;
        service.seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        let url = url(&arguments.host, address);
        let ready = || {
            say(global, &format!("serving {cell} at {url} as `{name}` (Ctrl-C ends it)"));
            if global.json {
                let mut object = json!({ "event": "serving", "cell": cell, "model": name, "url": url });
                object["fingerprint"] = fingerprint.as_str().into();
                // Who does not read it can still ask.
                let _ = print(&format!("{object}\n"));
            }
        };
        let log = |entry: &Entry| {
            if global.verbose > 0 {
                live::above(|stderr| {
                    let _ = writeln!(stderr, "{}", words(entry));
                });
            }
        };
        serve(&listener, &model, &service, &STOP, ready, &log)?;
        Err(Stop::Code(Exit::Interrupted))
    })
}

/// The cell that `name` stands for.
fn one_model(engine: &Engine, name: &str) -> Result<CellId, Problem> {
    let cells = engine.plan.find(name)?;
    let label = |id: &CellId| engine.plan.cells[*id].to_string();
    let usage = |message: String| Problem::new("cli::one_model", message).exit(Exit::Usage);
    let [id] = cells[..] else {
        let named: Vec<String> = cells.iter().take(20).map(|id| format!("'{}'", label(id))).collect();
        let problem = usage(format!("`{name}` is {}, and one is served", report::count(cells.len(), "cell")));
        return Err(problem.help(format!("name one of {}", named.join(", "))));
    };
    match engine.plan.cells[id].kind.yields == ArtifactType::Model {
        true => Ok(id),
        false => Err(usage(format!("`{}` is no model", label(&id))).help("name a model, sft or dpo stage")),
    }
}

/// The folders of a model, base first, and which one it is.
fn fresh(engine: &Engine, id: CellId, arguments: &Arguments) -> Result<(Vec<Files>, String), Problem> {
    let survey = engine.status(&[id], &BTreeSet::new(), &BTreeSet::new());
    let (mut folders, mut fingerprint) = (Vec::new(), String::new());
    for part in chain(engine.plan, id) {
        let cell = engine.plan.cells[part].to_string();
        let Some(Status::Fresh { artifact, .. }) = &survey.statuses[part] else {
            return Err(Problem::new("cli::not_fresh", format!("`{cell}` is not there as the manifest has it now"))
                .help(format!("pipe run {} '{}'", arguments.of.manifest.display(), engine.plan.cells[id]))
                .exit(Exit::Missing));
        };
        folders.push(engine.store.verify(artifact).map_err(|damage| damaged(&cell, &damage))?);
        fingerprint = format!("fp_{}", artifact.digest.short());
    }
    Ok((folders, fingerprint))
}

/// The value of the variable with the key. Never shown.
fn key(variable: &str) -> Result<String, Problem> {
    let missing = |what: &str| {
        Problem::new("cli::no_key", format!("the variable `{variable}` {what}"))
            .help(format!("export {variable}=..."))
            .exit(Exit::Missing)
    };
    let value = std::env::var(variable).map_err(|error| match error {
        std::env::VarError::NotPresent => missing("with the key is not set"),
        std::env::VarError::NotUnicode(_) => missing("is not UTF-8"),
    })?;
    let value = value.trim();
    match value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Err(missing("holds no key: visible ASCII characters without blanks")),
        false => Ok(value.to_string()),
    }
}

fn listen(host: &str, port: u16) -> Result<TcpListener, Problem> {
    TcpListener::bind((host.trim_matches(['[', ']']), port)).map_err(|error| no_port(host, port, &error))
}

fn no_port(host: &str, port: u16, error: &std::io::Error) -> Problem {
    let problem = Problem::new("cli::port", format!("cannot listen at {host}, port {port}: {error}"));
    let problem = match error.kind() {
        std::io::ErrorKind::AddrInUse => problem.help("`--port 0` takes any that is free"),
        std::io::ErrorKind::PermissionDenied => problem.help("ports below 1024 are the system's: `--port 8000`"),
        _ => problem.help("`--host` is a name or an address of this machine: 127.0.0.1, ::1, 0.0.0.0"),
    };
    problem.exit(Exit::Missing)
}

/// Where clients reach it: an address that stands for all of them is none that can be asked.
fn url(host: &str, address: SocketAddr) -> String {
    match address.ip().is_unspecified() {
        true => format!("http://{}:{}/v1", if address.is_ipv6() { "[::1]" } else { "127.0.0.1" }, address.port()),
        false if host == "localhost" => format!("http://localhost:{}/v1", address.port()),
        false => format!("http://{address}/v1"),
    }
}

/// `POST /v1/chat/completions 200, 31 + 64 tokens, streamed, 412 ms`
fn words(entry: &Entry) -> String {
    let mut parts = vec![match entry.cancelled {
        true => format!("{} cancelled by the client", entry.what),
        false => format!("{} {}", entry.what, entry.status),
    }];
    if entry.prompt_tokens > 0 {
        parts.push(format!("{} + {} tokens", entry.prompt_tokens, entry.completion_tokens));
    }
    if entry.streamed {
        parts.push("streamed".into());
    }
    parts.extend(entry.problem.clone());
    parts.push(report::duration(entry.seconds));
    parts.join(", ")
}
