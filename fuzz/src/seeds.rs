//! Small valid inputs, made when a target starts on an empty corpus folder. Nothing of them is kept in
//! the repository.

use crate::{Folder, join};
use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use pipe::digest::Digest;
use pipe::model::lora::{ADAPTER_CONFIG, TARGETS};
use pipe::safetensors::{ADAPTER_FILE, Element, MODEL_FILE};
use pipe::model::{Config, LoraSpec, Model, Parameter};
use pipe::store::{Artifact, Entry, Measured, Record, Used};
use pipe::tensor::Dtype;
use pipe::train::{Checkpoint, Kind, Optimizer, Options};
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::Arc;

/// Writes the seeds of `target` into the corpus folder of the command line, if that is empty.
pub fn plant(target: &str) {
    let corpus = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let Some(corpus) = corpus.filter(|folder| Path::new(folder).is_dir()) else { return };
    if std::fs::read_dir(&corpus).is_ok_and(|mut entries| entries.next().is_none()) {
        for (number, seed) in of(target).into_iter().enumerate() {
            std::fs::write(Path::new(&corpus).join(format!("seed-{number:02}")), seed).expect("the corpus is written");
        }
    }
}

fn of(target: &str) -> Vec<Vec<u8>> {
    match target {
        "manifest" => manifest(),
        "model" => model(),
        "adapter" => adapter(),
        "tokenizer" => tokenizer(),
        "chat" => chat(),
        "records" => records(),
        "parquet" => parquet(),
        "grade" => grade(),
        "store" => store(),
        "checkpoint" => checkpoint(),
        "hub" => hub(),
        "reply" => reply(),
        "journal" => journal(),
        "parse" => parse(),
        _ => Vec::new(),
    }
}

fn texts(all: &[&[&str]]) -> Vec<Vec<u8>> {
    all.iter().map(|parts| join(&parts.iter().map(|part| part.as_bytes()).collect::<Vec<_>>())).collect()
}

const STAGES: &str = r#"manifest = 1
title = "t"
include = ["n.toml"]

[stage.sft]
kind = "sft"
axes = { x = ["a", "b"], n = [1, 2.5, true] }
skip = [{ x = "b", n = 1 }]
model = "base"
data = "{x}"
epochs = 2
lora = { rank = 4, alpha = 8, targets = ["q_proj"] }

[stage.score]
kind = "eval"
model = "sft"
task = "a"

[stage.shown]
kind = "table"
from = ["score"]
rows = "x"
columns = "n"

[stage.claim]
kind = "check"
from = ["score"]
claims = ["accuracy[x=a] > accuracy[x=b] + 0.1"]

[profile.p]
title = "u"
[profile.p.stage.sft]
epochs = 1
axes = { x = ["a"] }
"#;

const INCLUDED: &str = r#"manifest = 1
[stage.base]
kind = "model"
source = "init:mini-3B"
[stage.a]
kind = "dataset"
source = "path:a.jsonl"
[stage.b]
kind = "dataset"
concat = ["a", "a"]
sample = { rows = 3, seed = 1 }
"#;

fn manifest() -> Vec<Vec<u8>> {
    let sets = "stage.sft.epochs=3\nstage.sft.axes.n=[1]\nstage.base.source=hf:o/n@r\ntitle=x";
    texts(&[
        &[STAGES, INCLUDED, "p", sets],
        &[STAGES, INCLUDED],
        &["manifest = 1\n[stage.a]\nkind = \"dataset\"\nconcat = \"{y}\"\naxes.y = [\"b\"]\n", INCLUDED],
        &[include_str!("../../pipelines/mini-base.toml")],
        &[include_str!("../../pipelines/sample.toml"), "", "", "stage.sft.epochs=1"],
        &[include_str!("../../pipelines/table1.toml"), "", "mini"],
    ])
}

/// A model small enough to be loaded thousands of times a minute.
pub const CONFIG: &str = r#"{"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 8, "num_hidden_layers": 1,
"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12, "vocab_size": 9, "rms_norm_eps": 1e-6,
"rope_theta": 10000.0, "tie_word_embeddings": true, "head_dim": 4, "eos_token_id": [1], "torch_dtype": "float32"}"#;

fn model() -> Vec<Vec<u8>> {
    let untied = CONFIG.replace("true", "false").replace("\"num_hidden_layers\": 1", "\"num_hidden_layers\": 2");
    let mut seeds = Vec::new();
    for (text, element) in [(CONFIG, Element::F32), (CONFIG, Element::Bf16), (&untied, Element::F16)] {
        let folder = Folder::new();
        let config = Config::parse(text).expect("the small configuration is one");
        Model::random(config, 1, Dtype::F32).save(folder.path(), element).expect("a model is saved");
        let file = folder.read(MODEL_FILE);
        let written = header_line(&file);
        seeds.push(join(&[text.as_bytes(), b"", &file]));
        seeds.push(join(&[text.as_bytes(), b"", &written]));
        seeds.push(join(&[text.as_bytes(), &shard_index(&file), &written]));
    }
    seeds
}

fn length_and_header(file: &[u8]) -> &[u8] {
    let (length, rest) = file.split_first_chunk::<8>().expect("a header has a length");
    rest[..u64::from_le_bytes(*length) as usize].trim_ascii_end()
}

/// The header on a line, for the form in which the length is made, and data to repeat.
fn header_line(file: &[u8]) -> Vec<u8> {
    [length_and_header(file), b"\n<<<="].concat()
}

fn shard_index(file: &[u8]) -> Vec<u8> {
    let header: Map<String, Value> = serde_json::from_slice(length_and_header(file)).expect("a header is JSON");
    let names = header.keys().filter(|name| *name != "__metadata__");
    let map: Map<String, Value> = names.map(|name| (name.clone(), "model-1.safetensors".into())).collect();
    json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string().into_bytes()
}

fn adapter() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for targets in [&TARGETS[..], &TARGETS[..1], &TARGETS[7..]] {
        let folder = Folder::new();
        let mut model = Model::random(Config::parse(CONFIG).expect("a configuration"), 1, Dtype::F32);
        let targets = targets.iter().map(|target| target.to_string()).collect();
        model.add_lora(&LoraSpec { rank: 2, alpha: 4.0, targets }, 1).expect("an adapter is added");
        model.save_adapter(folder.path(), "base").expect("an adapter is saved");
        let (config, file) = (folder.read(ADAPTER_CONFIG), folder.read(ADAPTER_FILE));
        seeds.push(join(&[&config, b"", &file]));
        seeds.push(join(&[&config, b"", &header_line(&file)]));
        seeds.push(join(&[&config, CONFIG.as_bytes(), &header_line(&file)]));
    }
    seeds
}

/// A tokenizer of a few words, for targets that are about something else.
pub const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [
{"id": 0, "content": "<|im_start|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
"special": true}, {"id": 1, "content": "<|im_end|>", "single_word": false, "lstrip": false, "rstrip": false,
"normalized": false, "special": true}], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
"post_processor": null, "decoder": null, "model": {"type": "WordLevel", "vocab": {"<|im_start|>": 0,
"<|im_end|>": 1, "a": 2, "b": 3, "[UNK]": 4}, "unk_token": "[UNK]"}}"#;

pub const TOKENIZER_CONFIG: &str = r#"{"bos_token": null, "eos_token": "<|im_end|>", "pad_token": {"content": "a"},
"chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]}"#;

fn tokenizer() -> Vec<Vec<u8>> {
    let with = |normalizer: &str, before: &str, decoder: &str, model: &str| {
        let json = format!(
            r#"{{"version": "1.0", "added_tokens": [{{"id": 9, "content": "<|im_end|>", "single_word": false,
"lstrip": true, "rstrip": false, "normalized": true, "special": true}}], "normalizer": {normalizer},
"pre_tokenizer": {before}, "post_processor": null, "decoder": {decoder}, "model": {model}}}"#
        );
        join(&[json.as_bytes(), TOKENIZER_CONFIG.as_bytes(), "ab <|im_end|> Abc 12\n".as_bytes()])
    };
    let bpe = r#"{"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
"end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
"vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ċ": 4}, "merges": [["a", "b"]]}"#;
    let word_piece = r###"{"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
"max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "##b": 2}}"###;
    let unigram = r#"{"type": "Unigram", "unk_id": 0, "byte_fallback": true,
"vocab": [["<unk>", 0.0], ["a", -1.5], ["b", -2.0], ["ab", -2.5], ["<0x20>", -3.0]]}"#;
    let split = r#"{"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex":
"(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
"behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
"use_regex": false}]}"#;
    let byte_level = r#"{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}"#;
    let replace = r#"{"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}, {"type": "Replace",
"pattern": {"String": " "}, "content": "_"}, {"type": "Prepend", "prepend": "_"}]}"#;
    let joined = r#"{"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "_"}, "content": " "},
{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"#;
    let cleaned = r#"{"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
"lowercase": true}"#;
    let space = r#"{"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": true}"#;
    let pieces = r###"{"type": "WordPiece", "prefix": "##", "cleanup": true}"###;
    vec![
        join(&[TOKENIZER.as_bytes(), TOKENIZER_CONFIG.as_bytes(), b"a b c"]),
        with(r#"{"type": "NFC"}"#, split, byte_level, bpe),
        with("null", byte_level, byte_level, bpe),
        with(cleaned, r#"{"type": "BertPreTokenizer"}"#, pieces, word_piece),
        with(replace, "null", joined, unigram),
        with("null", space, space, unigram),
        with("null", r#"{"type": "Digits", "individual_digits": true}"#, "null", bpe),
    ]
}

const TEMPLATE: &str = r#"{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson }}
{%- endfor %}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>' + '\n' }}
    {%- elif loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
        {{- message.tool_calls | tojson(indent=2, ensure_ascii=true, sort_keys=true) }}
    {%- else %}{{ raise_exception('no ' ~ message['role']) }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"#;

fn chat() -> Vec<Vec<u8>> {
    let messages = r#"[{"role": "user", "content": " a\u00fc "}, {"role": "tool", "content": "1", "tool_calls":
[{"name": "f", "x": 1.5e-7, "y": [1e20, null, true]}]}, {"role": "assistant", "content": "b"}]"#;
    let tools = r#"[{"type": "function", "function": {"name": "f", "parameters": {"a": {}}}}]"#;
    let macros = r#"{% set ns = namespace(n=0) %}{% macro m(x, y='') %}{{ x.split('|')[0].strip() ~ y }}{% endmacro %}
{% for m in messages[::-1] if m.content is string %}{%- generation -%}{% set ns.n = ns.n + loop.length %}
{{ m.content.replace('a', 'b') | upper | default('x', true) }}{{ m.items() | list | length }}
{%- endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.n // 2 % 3 }}{{ bos_token }}{{ None }}"#;
    texts(&[
        &[TEMPLATE, messages, tools],
        &[TEMPLATE, messages],
        &[macros, messages],
        &[
            "{{ messages[0].content[1:] }}{{ '%s' | format(1) }}{{ {'a': 1} | tojson }}{{ range(3) | join(',') }}",
            messages,
        ],
        &[
            "{% for k, v in messages[0] | items %}{{ k }}{{ v | int(0) }}{% else %}{{ eos_token * 2 }}{% endfor %}",
            messages,
        ],
    ])
}

fn records() -> Vec<Vec<u8>> {
    let lines = r#"{"id":"a","prompt":"What is 1+1?","completion":"2","n":-0.0,"big":12345678901234567890}
{"id":2,"prompt":[{"role":"user","content":"x"}],"thinking":"t","answer":"y<|im_end|>"}

{"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"},{"role":"assistant","content":"v"}]}"#;
    let whole = r#"{"text":"<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"}
{"prompt":"p","completion":"<|im_start|>think\nt\n<|im_start|>answer\na"}"#;
    let pairs = r#"[{"prompt":"p","chosen":{"thinking":"t","answer":"c"},"rejected":{"thinking":null,"answer":"r"}},
{"chosen":[{"role":"user","content":"u"},{"role":"assistant","content":"c"}],"rejected":"d","prompt":"u"}]"#;
    let ids = r#"{"input_ids":[1,2,3],"labels":[-100,2,3]}
{"prompt_input_ids":[1],"chosen_input_ids":[2,487],"rejected_input_ids":[3]}"#;
    texts(&[
        &["00000", lines],
        &["11000", lines],
        &["02002", lines],
        &["20213", whole],
        &["22217", whole],
        &["10000", pairs],
        &["00100", pairs],
        &["00050", ids],
        &["20000", "\u{feff}{\"text\":\"a b c\",\"\":1e308}\r\n"],
    ])
}

fn parquet() -> Vec<Vec<u8>> {
    let flat = "message m { required int64 id; optional binary text (UTF8); required double x; required boolean y; }";
    let zstd = Compression::ZSTD(ZstdLevel::default());
    [Compression::UNCOMPRESSED, Compression::SNAPPY, zstd]
        .into_iter()
        .flat_map(|compression| [true, false].map(|dictionary| flat_file(flat, compression, dictionary)))
        .chain([list_file()])
        .collect()
}

fn properties(compression: Compression, dictionary: bool) -> Arc<WriterProperties> {
    let properties = WriterProperties::builder().set_compression(compression).set_dictionary_enabled(dictionary);
    Arc::new(properties.set_created_by("pipe".into()).build())
}

fn flat_file(schema: &str, compression: Compression, dictionary: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let schema = Arc::new(parse_message_type(schema).expect("a schema"));
    let mut file = SerializedFileWriter::new(&mut bytes, schema, properties(compression, dictionary)).expect("a file");
    let mut group = file.next_row_group().expect("a row group");
    let texts: Vec<ByteArray> = ["one", "two"].map(ByteArray::from).into();
    for at in 0..4 {
        let mut column = group.next_column().expect("a column").expect("four columns");
        let written = match at {
            0 => column.typed::<Int64Type>().write_batch(&[1, -2, 1 << 40], None, None),
            1 => column.typed::<ByteArrayType>().write_batch(&texts, Some(&[1, 0, 1]), None),
            2 => column.typed::<DoubleType>().write_batch(&[0.5, -0.0, 1e300], None, None),
            _ => column.typed::<BoolType>().write_batch(&[true, false, true], None, None),
        };
        written.expect("values are written");
        column.close().expect("a column ends");
    }
    group.close().expect("a row group ends");
    file.close().expect("a file ends");
    bytes
}

fn list_file() -> Vec<u8> {
    let schema = "message m { optional group messages (LIST) { repeated group list { optional group element {
        optional binary role (UTF8); } } } required group when { required int64 at (TIMESTAMP(MILLIS,true)); } }";
    let mut bytes = Vec::new();
    let schema = Arc::new(parse_message_type(schema).expect("a schema"));
    let properties = properties(Compression::UNCOMPRESSED, false);
    let mut file = SerializedFileWriter::new(&mut bytes, schema, properties).expect("a file");
    let mut group = file.next_row_group().expect("a row group");
    let roles: Vec<ByteArray> = ["user", "assistant"].map(ByteArray::from).into();
    let mut column = group.next_column().expect("a column").expect("two columns");
    let written = column.typed::<ByteArrayType>().write_batch(&roles, Some(&[4, 4, 0]), Some(&[0, 1, 0]));
    written.expect("values are written");
    column.close().expect("a column ends");
    let mut column = group.next_column().expect("a column").expect("two columns");
    column.typed::<Int64Type>().write_batch(&[0, 1_700_000_000_000], None, None).expect("values are written");
    column.close().expect("a column ends");
    group.close().expect("a row group ends");
    file.close().expect("a file ends");
    bytes
}

fn grade() -> Vec<Vec<u8>> {
    texts(&[
        &["\\frac{1}{2}", "So the answer is \\boxed{0.5}."],
        &["42", "<|im_start|>answer\nThe final answer is **$42$**"],
        &["B", "Answer: (B)"],
        &["(1,2]\\cup\\{3\\}", "\\boxed{(1, 2] \\cup \\{3\\}}"],
        &["x=5, y=-3", "\\[\\boxed{x = 5,\\; y = -3}\\]"],
        &["\\text{Monday}", "\\boxed{\\text{monday}}"],
        &["3\\sqrt{2}+\\pi", "\\boxed{\\pi + \\sqrt{18}}"],
        &["\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{bmatrix} 1 \\\\ 2 \\end{bmatrix}}"],
        &["1,234.5\\%", "\\boxed{12.345}"],
        &["2^{10} \\pmod 7", "\\boxed{\\binom{5}{2} \\bmod 7}"],
        &["9x^2-6x+1", "\\boxed{", "(3x-1)^2+", "0}"],
        &["17", "\\boxed{", "\\frac{1}{", "2}"],
        &["10:30", "", "answer is ", "= 20! / 19!"],
    ])
}

fn reply() -> Vec<Vec<u8>> {
    texts(&[
        &[
            r#"{"model":"m","choices":[{"message":{"content":"4"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":5,"completion_tokens_details":{"reasoning_tokens":2}}}"#,
            "2",
            "Sun, 06 Nov 1994 08:49:37 GMT",
        ],
        &[
            r#"{"choices":[{"message":{"content":"<think>\nso\n</think>\n4","refusal":null},"finish_reason":"length"}]}"#,
            "0.5",
        ],
        &[
            r#"{"choices":[{"message":{"content":[{"type":"text","text":"4"}],"reasoning_content":"so"},"finish_reason":null}]}"#,
        ],
        &[r#"{"choices":[{"message":{"content":null,"refusal":"no"},"finish_reason":"content_filter"}]}"#],
        &[r#"{"choices":[{"message":{"reasoning":"so","content":"4"},"finish_reason":"error"}]}"#],
        &[r#"{"error":{"message":"over\nloaded","code":503,"status":"X"}}"#, "Sun, 06 Nov 1994 08:49:40 GMT"],
        &[r#"{"error":"no","choices":[]}"#, "Mon, 06 Nov 2094 08:49:05 GMT", "Mon, 06 Nov 2000 08:49:00 GMT"],
        &["<html><body>Bad gateway</body></html>", "soon", "now"],
    ])
}

fn journal() -> Vec<Vec<u8>> {
    let line = |key: &str, max_tokens: u64, body: Value| {
        let body = body.to_string();
        json!({"key": key, "host": "127.0.0.1:9", "max_tokens": max_tokens, "prompt_bound": 99, "body": body})
            .to_string()
    };
    let body = |text: &str, finish: &str| {
        json!({"choices": [{"message": {"content": text}, "finish_reason": finish}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5}})
    };
    let (cut, whole) = (line("KEY", 5, body("a", "length")), line("KEY", 3, body("b", "stop")));
    let other = line("other", 9, json!({"choices": [{"message": {"content": "c"}}]}));
    vec![
        format!("{cut}\n{whole}\n").into(),
        format!("{cut}\n{}", &whole[..whole.len() / 2]).into(),
        format!("{whole}\n{whole}\n\n{other}\n").into(),
        format!("not JSON\n{}\n{other}\n", &cut[..40]).into(),
        Vec::new(),
    ]
}

fn parse() -> Vec<Vec<u8>> {
    texts(&[
        &["", "**New Question:** How many?\nSay it.\n**Réponse**: Six."],
        &["", "<|im_start|>think\ntwo and two\n<|im_start|>answer\nQ: a\nA: \\boxed{4}"],
        &["", "<think>\nNew Question\n</think>\n1. new question: x\nRÉPONSE: y"],
        &[r#"{"kind":"sections","fields":{"a":"Answer","all":"text"}}"#, "# Answer\n\n4"],
        &[r#"{"kind":"regex","pattern":"(\\d+)\\D+(?<b>\\d+)?","fields":{"a":"1","b":"b"}}"#, "12 and 13"],
        &[r#"{"kind":"boxed","fields":{"x":"boxed"}}"#, "\\boxed{\\frac{1}{2}}"],
    ])
}

fn store() -> Vec<Vec<u8>> {
    let blob = b"a file";
    let entry = |name: &str| Entry { name: name.into(), size: blob.len() as u64, digest: Digest::of(blob) };
    let (made, used) = (Digest::of(b"f"), Digest::of(b"u"));
    let record = Record {
        fingerprint: made,
        cell: "a[x=1]".into(),
        kind: "dataset".into(),
        parts: [("kind".to_string(), "dataset".to_string())].into(),
        params: json!({"rows": 1, "x": 0.1}).as_object().cloned().unwrap_or_default(),
        inputs: [("data".to_string(), vec![Used { cell: "b".into(), fingerprint: used, artifact: used }])].into(),
        sources: [("source".to_string(), "path".to_string())].into(),
        artifact: Artifact::new(vec![entry("data.jsonl"), entry("sub/x")]),
        tool: "pipe 0".into(),
        machine: [("host".to_string(), "h".to_string())].into(),
        run: "r".into(),
        measured: Measured { started: "2026-01-01T00:00:00Z".into(), wall_s: 0.3, ..Measured::default() },
        warnings: vec!["w".into()],
    };
    let body = Value::Object(record.body()).to_string();
    let digest = Digest::of(blob);
    let files = json!([["data.jsonl", blob.len(), digest.to_string()]]);
    let index = format!(
        "pipe index 1\n{}\n{}",
        json!({"f": made.to_string(), "c": "a[x=1]", "k": "dataset", "a": files}),
        json!({"f": used.to_string(), "c": "b", "k": "model"}),
    );
    let stat = format!("1 2 {} 5 6 {digest}", blob.len());
    let blob = "a file";
    texts(&[
        &["", &index, &stat, &body, blob],
        &["1", "", "", &body, blob],
        &["", "pipe index 1", &stat, &body, "another file"],
        &["", &index, "!1 2 3", "!{}", blob],
        &["2", &index, &stat, &body, blob],
    ])
}

/// Names and shapes of the tensors a checkpoint is restored into: one below the size from which 8-bit states
/// are kept, one above.
pub fn trained() -> [(&'static str, Vec<usize>); 2] {
    [("small", vec![3, 5]), ("large", vec![64, 66])]
}

fn checkpoint() -> Vec<Vec<u8>> {
    let mut seeds = vec![b"!pipe checkpoint 1\n".to_vec()];
    for kind in [Kind::AdamW, Kind::AdamW8bit] {
        let folder = Folder::new();
        let one = |(name, shape): (&str, Vec<usize>)| {
            let value = vec![1.0; shape.iter().product()];
            Parameter { name: name.into(), shape, value }
        };
        let params: Vec<Parameter> = trained().map(one).into();
        let optimizer = Optimizer::new(kind, Options::default(), &params);
        let checkpoints = Checkpoint::in_folder(folder.path()).expect("a folder");
        checkpoints.save(7, &params, &optimizer, json!({"loss": [0.1, null]})).expect("a checkpoint is saved");
        let file = folder.read("step-00000007.checkpoint");
        let after = &file[b"pipe checkpoint 1\n".len()..];
        seeds.push([length_and_header(after), b"\n<<<="].concat());
    }
    seeds
}

fn hub() -> Vec<Vec<u8>> {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let index = r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#;
    texts(&[
        &["o/n", commit, "config.json\ntokenizer.json\na.safetensors\n", index],
        &["o/n@v1.0/sub/folder", commit, "", index],
        &["datasets/o/n/data", commit, "data/a.parquet\n../x.jsonl\n", ""],
        &["models/o/n@main#a.safetensors", commit, "", r#"{"weight_map": {"x": "a.safetensors"}}"#],
        &["o/n#data/a.parquet", commit, "data/a.parquet"],
    ])
}
