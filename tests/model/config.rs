//! `config.json`: what is read, what is refused, and what is named.

use pipe::model::Config;
use pipe::problem::{Exit, Problem};
use serde_json::{Value, json};

fn published() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "vocab_size": 151936,
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": true,
        "max_position_embeddings": 32768, "max_window_layers": 21, "sliding_window": 32768,
        "use_sliding_window": false, "initializer_range": 0.02, "eos_token_id": 151645, "torch_dtype": "bfloat16"
    })
}

fn with(key: &str, value: Value) -> Result<Config, Problem> {
    let mut map = published();
    map[key] = value;
    Config::parse(&map.to_string())
}

#[test]
fn the_published_half_billion_has_its_published_size() {
    let config = Config::parse(&published().to_string()).unwrap();
    assert_eq!(config.head_dim, 64);
    assert_eq!(config.parameters(), 494_032_768);
    assert_eq!(config.eos_token_ids, [151_645]);
}

#[test]
fn both_spellings_mean_the_same() {
    let old = Config::parse(&published().to_string()).unwrap();
    let mut map = published();
    let fields = map.as_object_mut().unwrap();
    fields.remove("torch_dtype");
    fields.remove("rope_theta");
    fields.insert("dtype".into(), "bfloat16".into());
    fields.insert("rope_scaling".into(), Value::Null);
    fields.insert("sliding_window".into(), Value::Null);
    fields.insert("rope_parameters".into(), json!({"rope_theta": 1000000.0, "rope_type": "default"}));
    fields.insert("layer_types".into(), json!(vec!["full_attention"; 24]));
    fields.insert("eos_token_id".into(), json!([151_645]));
    let new = Config::parse(&map.to_string()).unwrap();
    let read = |config: Config| {
        (
            config.rope_theta,
            config.eos_token_ids.clone(),
            config.heads(),
            config.parameters(),
            config.max_position_embeddings,
        )
    };
    assert_eq!(read(new), read(old));
}

#[test]
fn what_is_not_understood_survives_saving() {
    let config = with("some_new_field", json!({"a": [1, 2]})).unwrap();
    let back: Value = serde_json::from_str(&config.to_json("float32")).unwrap();
    assert_eq!(back["some_new_field"], json!({"a": [1, 2]}));
    assert_eq!(back["torch_dtype"], "float32");
    assert_eq!(Config::parse(&config.to_json("float32")).unwrap().hidden_size, 896);
}

#[test]
fn what_would_change_the_numbers_is_refused() {
    for (key, value, words) in [
        ("model_type", json!("llama"), "`llama`"),
        ("hidden_act", json!("gelu"), "`gelu`"),
        ("rope_scaling", json!({"type": "yarn", "factor": 4.0}), "`yarn`"),
        ("rope_scaling", json!({"factor": 4.0}), "RoPE scaling"),
        ("layer_types", json!(vec!["linear_attention"; 24]), "linear_attention"),
    ] {
        let problem = with(key, value).unwrap_err();
        assert!(problem.message.contains(words) && problem.exit == Exit::Missing, "{problem}");
    }
    let mut map = published();
    map["use_sliding_window"] = true.into();
    assert!(Config::parse(&map.to_string()).is_ok(), "the window is as long as the context");
    map["sliding_window"] = 4096.into();
    assert!(Config::parse(&map.to_string()).unwrap_err().message.contains("4096 tokens"));
    map["max_window_layers"] = 24.into();
    assert!(Config::parse(&map.to_string()).is_ok(), "no layer is past max_window_layers");
}

#[test]
fn a_wrong_field_is_named() {
    for (key, value) in [
        ("hidden_size", json!("896")),
        ("hidden_size", json!(0)),
        // No multiple of the heads, which no `head_dim` mends.
        ("hidden_size", json!(897)),
        ("num_hidden_layers", json!(1u64 << 20)),
        ("num_attention_heads", json!(0)),
        ("intermediate_size", json!(-4864)),
        ("vocab_size", json!(1u64 << 40)),
        ("num_hidden_layers", json!(-1)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(7)),
        ("rope_theta", json!("big")),
        ("tie_word_embeddings", json!(1)),
        ("eos_token_id", json!([1.5])),
        ("layer_types", json!(["full_attention"])),
    ] {
        let problem = with(key, value).unwrap_err();
        assert!(problem.code == "model::config" && problem.message.contains(&format!("`{key}`")), "{problem}");
    }
    assert!(Config::parse("[]").unwrap_err().message.contains("not a JSON object"));
}
