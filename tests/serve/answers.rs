//! What is answered: the model's own tokens, in OpenAI's shapes, whole and streamed.

use crate::{MODEL, Reply, Server, chat, mini, text, with};
use pipe::data::{self, Format, Record};
use pipe::generation::{Limits, Prompt, Sampling, generate};
use pipe::model::{Device, Placed};
use serde_json::{Value, json};

const QUESTION: &str = "Tom has 12 pens. He finds 30 pens. How many pens does Tom have?";

/// Text and log-probs that the model gives without any server.
fn alone(prompt: &[u32], max_tokens: usize, temperature: f64, seed: u64, stream: u64) -> (String, Vec<u32>, Vec<f32>) {
    let (model, tokenizer) = mini("mini-3B");
    let mut stop_ids: Vec<u32> = tokenizer.end().into_iter().chain(tokenizer.eos()).collect();
    stop_ids.extend(tokenizer.id("<|endoftext|>"));
    stop_ids.sort_unstable();
    stop_ids.dedup();
    let id_limit = tokenizer.id_limit();
    let sampling = Sampling { max_tokens, temperature, seed, stop_ids, id_limit, ..Sampling::default() };
    let placed = Placed::new(model, &Device::Cpu).unwrap();
    let prompts = [Prompt { ids: prompt.to_vec(), stream }];
    let decode = |ids: &[u32]| tokenizer.decode(ids, false);
    let mut made = generate(&placed, &prompts, &sampling, &decode, &mut |_| Ok(()), &Limits::default()).unwrap();
    let made = made.remove(0);
    (made.text, made.ids, made.logprobs)
}

fn chat_prompt(text: &str) -> Vec<u32> {
    let record: Record = json!({"messages": [{"role": "user", "content": text}]}).as_object().unwrap().clone();
    data::prompt(&record, &mini("mini-3B").1, Format::Chat).unwrap()
}

fn content(reply: &Value) -> &str {
    reply["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("no content: {reply}"))
}

/// What a client puts together of a stream: text, tokens, end, of each choice.
fn gathered(reply: &Reply, choices: usize) -> Vec<(String, Vec<Value>, Value)> {
    let mut all = vec![(String::new(), Vec::new(), Value::Null); choices];
    for event in reply.events() {
        for choice in event["choices"].as_array().unwrap() {
            let one = &mut all[choice["index"].as_u64().unwrap() as usize];
            assert!(one.2.is_null(), "something after the end: {event}");
            let text = choice.get("delta").map_or(&choice["text"], |delta| &delta["content"]);
            one.0 += text.as_str().unwrap_or_default();
            one.1.extend(choice["logprobs"]["content"].as_array().into_iter().flatten().cloned());
            one.2 = choice["finish_reason"].clone();
        }
    }
    all
}

#[test]
fn a_greedy_chat_is_what_the_model_says_by_itself() {
    let server = Server::start(|_| {});
    let prompt = chat_prompt(QUESTION);
    let (expected, ids, logprobs) = alone(&prompt, 40, 0.0, 0, 0);
    let more = json!({"temperature": 0, "max_tokens": 40, "logprobs": true, "top_logprobs": 3});
    let reply = server.chat(QUESTION, more).ok();
    assert_eq!(content(&reply), expected);
    assert!(!expected.is_empty());
    assert_eq!(
        reply["usage"],
        json!({"prompt_tokens": prompt.len(), "completion_tokens": ids.len(), "total_tokens": prompt.len() + ids.len()})
    );
    assert_eq!((&reply["object"], &reply["model"]), (&json!("chat.completion"), &json!(MODEL)));
    assert_eq!(reply["system_fingerprint"], "fp_test");
    assert_eq!(reply["choices"][0]["message"]["role"], "assistant");
    let tokens = reply["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<u8> =
        tokens.iter().flat_map(|t| t["bytes"].as_array().unwrap()).map(|b| b.as_u64().unwrap() as u8).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), expected, "the bytes of the tokens are the text");
    for (token, logprob) in tokens.iter().zip(&logprobs) {
        assert_eq!(token["logprob"].as_f64().unwrap() as f32, *logprob);
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(
            (top.len(), &top[0]["token"], &top[0]["logprob"]),
            (3, &token["token"], &token["logprob"]),
            "greedy"
        );
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    }
}

#[test]
fn the_parts_of_a_stream_are_the_whole_answer() {
    let server = Server::start(|_| {});
    for more in [
        json!({"temperature": 0, "max_tokens": 60}),
        json!({"temperature": 2.5, "max_tokens": 120, "seed": 3, "n": 3, "logprobs": true, "top_logprobs": 2}),
        json!({"temperature": 2.5, "max_tokens": 120, "seed": 4, "stop": ["e", "ten", "\n"], "logprobs": true}),
        json!({"temperature": 2.5, "max_tokens": 120, "seed": 5, "ignore_eos": true, "stop": "<|im_end|>", "n": 2}),
    ] {
        let whole = server.chat(QUESTION, more.clone()).ok();
        let choices = whole["choices"].as_array().unwrap();
        let streamed = server.chat(QUESTION, with(more.clone(), json!({"stream": true})));
        assert_eq!(streamed.header("content-type"), Some("text/event-stream; charset=utf-8"));
        for (choice, (text, tokens, finish)) in choices.iter().zip(gathered(&streamed, choices.len())) {
            assert_eq!(choice["message"]["content"], text.as_str());
            assert_eq!(choice["finish_reason"], finish);
            let told = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
            assert_eq!(told, tokens);
            assert_eq!(told.is_empty(), more.get("logprobs").is_none() || text.is_empty());
        }
    }
}

#[test]
fn a_stream_says_who_speaks_first_and_what_was_used_last() {
    let server = Server::start(|_| {});
    let more = json!({"temperature": 0, "max_tokens": 5, "stream": true, "stream_options": {"include_usage": true}});
    let events = server.chat(QUESTION, more.clone()).events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event["id"] == events[0]["id"]));
    let (last, before) = events.split_last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(5)));
    assert!(before.iter().all(|event| event.as_object().unwrap()["usage"].is_null()));
    assert_eq!(before.last().unwrap()["choices"][0]["finish_reason"], "length");
    let events = server.chat(QUESTION, with(more, json!({"stream_options": null}))).events();
    assert!(events.iter().all(|event| event.get("usage").is_none()));
}

#[test]
fn n_choices_are_drawn_each_from_numbers_of_its_own() {
    let server = Server::start(|_| {});
    let prompt = chat_prompt(QUESTION);
    let reply = server.chat(QUESTION, json!({"temperature": 1.5, "max_tokens": 30, "seed": 11, "n": 4})).ok();
    let choices = reply["choices"].as_array().unwrap();
    let mut made = 0;
    for (i, choice) in choices.iter().enumerate() {
        let (expected, ids, _) = alone(&prompt, 30, 1.5, 11, i as u64);
        assert_eq!((&choice["index"], &choice["message"]["content"]), (&json!(i), &json!(expected)));
        made += ids.len();
    }
    assert!(choices[0]["message"] != choices[1]["message"], "they differ");
    assert_eq!(reply["usage"]["completion_tokens"], made);
    assert_eq!(reply["usage"]["prompt_tokens"], prompt.len(), "the prompt counts once");
}

#[test]
fn a_seed_gives_the_same_tokens_whatever_else_is_served() {
    let server = Server::start(|_| {});
    let ask = |i: usize| {
        let more = json!({"temperature": 1.5, "max_tokens": 20 + i, "seed": i, "top_k": 40 * (i % 2), "stop": "ten"});
        content(&server.chat(&QUESTION[..20 + 2 * i], more).ok()).to_string()
    };
    let single: Vec<String> = (0..16).map(ask).collect();
    let together: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|i| scope.spawn(move || ask(i))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(single, together);
    let unseeded = |_| content(&server.chat(QUESTION, json!({"temperature": 2, "max_tokens": 30})).ok()).to_string();
    let several: Vec<String> = (0..3).map(unseeded).collect();
    assert!(several[0] != several[1] || several[1] != several[2], "without a seed they differ: {several:?}");
}

#[test]
fn prompts_come_as_texts_or_ids_one_or_many() {
    let server = Server::start(|_| {});
    let (_, tokenizer) = mini("mini-3B");
    let (a, b) = ("Tom has 12 pens.", "Ann has 7 boxes. Each box holds");
    let more = json!({"temperature": 0, "max_tokens": 12});
    let complete = |prompt: Value| server.post("/v1/completions", &text(prompt, more.clone())).ok();
    let single = [complete(json!(a)), complete(json!(b))];
    let texts: Vec<&Value> = single.iter().map(|reply| &reply["choices"][0]["text"]).collect();
    assert_eq!(texts[0], &json!(alone(&tokenizer.encode(a), 12, 0.0, 0, 0).0));
    assert_eq!(single[0]["object"], "text_completion");
    assert_eq!(complete(json!(tokenizer.encode(a)))["choices"][0]["text"], *texts[0]);
    for many in [json!([a, b]), json!([tokenizer.encode(a), tokenizer.encode(b)])] {
        let reply = complete(many);
        let found: Vec<&Value> = reply["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
        assert_eq!(found, texts);
        let used = |key: &str| single.iter().map(|reply| reply["usage"][key].as_u64().unwrap()).sum::<u64>();
        assert_eq!(reply["usage"]["prompt_tokens"], used("prompt_tokens"));
        assert_eq!(reply["usage"]["completion_tokens"], used("completion_tokens"));
    }
    let reply = server.post("/v1/completions", &text(json!([a, b]), json!({"n": 2, "seed": 1, "max_tokens": 5}))).ok();
    assert_eq!(reply["choices"].as_array().unwrap().len(), 4);
}

#[test]
fn completions_tell_tokens_with_their_places_in_the_text() {
    let server = Server::start(|_| {});
    let more = json!({"temperature": 2, "seed": 2, "max_tokens": 40, "logprobs": 2, "ignore_eos": true});
    let reply = server.post("/v1/completions", &text(json!("Zoë's 🐈 has"), more.clone())).ok();
    let (choice, shown) = (&reply["choices"][0], reply["choices"][0]["text"].as_str().unwrap());
    let list = |name: &str| choice["logprobs"][name].as_array().unwrap().clone();
    let (tokens, offsets) = (list("tokens"), list("text_offset"));
    assert_eq!((tokens.len(), offsets.len()), (list("token_logprobs").len(), list("top_logprobs").len()));
    assert!(tokens.len() > 20, "{choice}");
    for (token, offset) in tokens.iter().zip(&offsets) {
        let rest: String = shown.chars().skip(offset.as_u64().unwrap() as usize).collect();
        let token = token.as_str().unwrap();
        assert!(token.starts_with("bytes:\\x") || rest.starts_with(token), "{token:?} at {offset}: {rest:?}");
    }
    for (token, top) in tokens.iter().zip(list("top_logprobs")) {
        let top = top.as_object().unwrap();
        assert!(top.contains_key(token.as_str().unwrap()) && (2..=3).contains(&top.len()), "{top:?}");
    }
    let streamed = server.post("/v1/completions", &text(json!("Zoë's 🐈 has"), with(more, json!({"stream": true}))));
    let mut told = Vec::new();
    for event in streamed.events() {
        assert_eq!(event["object"], "text_completion");
        told.extend(event["choices"][0]["logprobs"]["tokens"].as_array().into_iter().flatten().cloned());
    }
    assert_eq!(told, tokens);
}

#[test]
fn a_stop_text_ends_it_and_is_never_shown() {
    let server = Server::start(|_| {});
    let free = server.chat(QUESTION, json!({"temperature": 0, "max_tokens": 60})).ok();
    let said = content(&free).to_string();
    let at = said.char_indices().map(|(at, _)| at).nth(said.chars().count() / 2).unwrap();
    let stop: String = said[at..].chars().take(5).collect();
    let cut = said.find(&stop).unwrap();
    for stops in [json!(stop), json!(["never said", stop])] {
        let more = json!({"temperature": 0, "max_tokens": 60, "stop": stops});
        let reply = server.chat(QUESTION, more.clone()).ok();
        assert_eq!((content(&reply), &reply["choices"][0]["finish_reason"]), (&said[..cut], &json!("stop")));
        let streamed = server.chat(QUESTION, with(more, json!({"stream": true})));
        assert_eq!(gathered(&streamed, 1)[0].0, said[..cut]);
    }
}

#[test]
fn the_length_is_bounded_by_what_the_prompt_leaves() {
    let server = Server::start(|_| {});
    let prompt = chat_prompt(QUESTION).len();
    let all = server.chat(QUESTION, json!({"temperature": 2.5, "seed": 1, "ignore_eos": true})).ok();
    assert_eq!(all["usage"]["total_tokens"], 512, "by default as long as the context");
    assert_eq!(all["choices"][0]["finish_reason"], "length");
    let most = 512 - prompt;
    server.chat(QUESTION, json!({"max_tokens": most, "temperature": 0})).ok();
    let error = server.chat(QUESTION, json!({"max_tokens": most + 1})).error(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("max_tokens")));
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("513") && message.contains("512") && message.contains(&prompt.to_string()), "{message}");
    let error = server.chat(QUESTION, json!({"max_completion_tokens": 100_000_000_000_000_000_u64})).error(400);
    assert_eq!(error["param"], "max_completion_tokens");
    let error = server.chat(&"pens ".repeat(600), json!({})).error(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("messages")));
    // Megabytes that cannot fit are not taken apart first.
    let begun = std::time::Instant::now();
    let error = server.post("/v1/completions", &text(json!("7".repeat(4_000_000)), json!({}))).error(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("prompt")));
    assert!(begun.elapsed() < std::time::Duration::from_secs(5), "{:?}", begun.elapsed());

    let server = Server::start(|service| service.max_tokens = Some(7));
    let reply = server.chat(QUESTION, json!({"temperature": 2.5, "seed": 1, "ignore_eos": true})).ok();
    assert_eq!(reply["usage"]["completion_tokens"], 7);
    let error = server.chat(QUESTION, json!({"max_tokens": 8})).error(400);
    assert!(error["message"].as_str().unwrap().contains("gives 7 at most"), "{error}");
}

#[test]
fn messages_go_through_the_models_own_template() {
    let server = Server::start(|_| {});
    let (_, tokenizer) = mini("mini-3B");
    let prompt = |messages: Value, more: Value| {
        let body = with(json!({"model": MODEL, "messages": messages, "max_tokens": 1, "temperature": 0}), more);
        server.post("/v1/chat/completions", &body).ok()["usage"]["prompt_tokens"].as_u64().unwrap() as usize
    };
    let rendered = |messages: Value| tokenizer.encode(&tokenizer.chat(&messages, None, true).unwrap()).len();
    let system = json!([{"role": "system", "content": "Count."}, {"role": "user", "content": "Hello"}]);
    assert_eq!(prompt(system.clone(), json!({})), rendered(system.clone()));
    let developer = json!([{"role": "developer", "content": "Count."}, {"role": "user", "content": "Hello"}]);
    assert_eq!(prompt(developer, json!({})), rendered(system));
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]);
    assert_eq!(prompt(parts, json!({})), rendered(json!([{"role": "user", "content": "Hello"}])));
    let begun = json!([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Tom has"}]);
    assert_eq!(
        prompt(begun.clone(), json!({"continue_final_message": true, "add_generation_prompt": false})),
        rendered(json!([{"role": "user", "content": "Hello"}])) + tokenizer.encode("Tom has").len()
    );
    let body = json!({"model": MODEL, "messages": begun});
    assert_eq!(server.post("/v1/chat/completions", &body).error(400)["param"], "messages");
}

#[test]
fn what_would_change_the_answer_and_is_not_heeded_is_refused() {
    let server = Server::start(|_| {});
    for (more, param) in [
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"logit_bias": {"5": 10}}), "logit_bias"),
        (json!({"presence_penalty": 0.5}), "presence_penalty"),
        (json!({"frequency_penalty": -1}), "frequency_penalty"),
        (json!({"skip_special_tokens": true}), "skip_special_tokens"),
        (json!({"prompt": "x"}), "prompt"),
        (json!({"guided_regex": "x"}), "guided_regex"),
    ] {
        let error = server.chat(QUESTION, more).error(400);
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!("unsupported_parameter")), "{error}");
    }
    for more in [json!({"echo": true}), json!({"suffix": "x"}), json!({"best_of": 2})] {
        server.post("/v1/completions", &text(json!("Tom"), more)).error(400);
    }
    let harmless = json!({
        "temperature": 0, "max_tokens": 3, "user": "me", "metadata": {"a": "b"}, "store": false, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "presence_penalty": 0,
        "frequency_penalty": 0.0, "seed": null, "stop": null, "top_p": null, "n": 1, "top_k": -1,
        "parallel_tool_calls": true, "logprobs": false, "repetition_penalty": 1.0,
    });
    let with_all = server.chat(QUESTION, harmless).ok();
    assert_eq!(content(&with_all), content(&server.chat(QUESTION, json!({"temperature": 0, "max_tokens": 3})).ok()));
}

#[test]
fn wrong_types_and_ranges_are_named() {
    let server = Server::start(|_| {});
    for (more, param) in [
        (json!({"n": 0}), "n"),
        (json!({"n": 129}), "n"),
        (json!({"n": 1.5}), "n"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.1}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": "12"}), "max_tokens"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": ["a", 1]}), "stop"),
        (json!({"stop": vec!["a"; 17]}), "stop"),
        (json!({"stop_token_ids": [512]}), "stop_token_ids"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"x": true}}), "stream_options"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logprobs": 5}), "logprobs"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hello"}), "messages"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), "messages[0]"),
        (json!({"messages": [{"role": "user", "content": "x"}, {"role": "user"}]}), "messages[1]"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "messages[0]"),
        (json!({"messages": [5]}), "messages[0]"),
        (json!({"model": 5}), "model"),
        (json!({"model": null}), "model"),
    ] {
        let error = server.chat(QUESTION, more.clone()).error(400);
        assert_eq!(error["param"], param, "{more}: {error}");
    }
    for prompt in [
        json!(null),
        json!(5),
        json!([]),
        json!(""),
        json!([[]]),
        json!(["a", 5]),
        json!([1, "a"]),
        json!([999]),
        json!([-1]),
        json!([[1.5]]),
    ] {
        let error = server.post("/v1/completions", &text(prompt.clone(), json!({}))).error(400);
        assert_eq!(error["param"], "prompt", "{prompt}: {error}");
    }
    let error = server.post("/v1/completions", &text(json!(vec!["a"; 100]), json!({"n": 2}))).error(400);
    assert_eq!(error["param"], "n");
    let error = server.post("/v1/chat/completions", &chat("x", json!({"model": "gpt-5"}))).error(404);
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
}

#[test]
fn the_bytes_of_tokens_are_the_text_of_their_ids() {
    for folder in ["pipelines/mini/tokenizer", "tests/golden/data/tied/model"] {
        let files =
            pipe::files::Files::from_dir(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap();
        let tokenizer = pipe::data::Tokenizer::load(&files).unwrap();
        assert!(tokenizer.is_byte_level());
        let limit = tokenizer.id_limit() as u32;
        let mut all: Vec<u32> = (0..limit).collect();
        for step in [1, 7, 11, 101, 211] {
            all = (0..limit).map(|i| all[(i as usize * step) % limit as usize]).collect();
            let bytes: Vec<u8> = all.iter().flat_map(|id| tokenizer.bytes(*id)).collect();
            assert_eq!(String::from_utf8_lossy(&bytes), tokenizer.decode(&all, false), "{folder}, step {step}");
        }
        let spoken = "Zoë's 🐈‍⬛: naïve — 30 %\t\n\u{0}\u{7f}\u{ad}\u{a0}<|im_start|>";
        let bytes: Vec<u8> = tokenizer.encode(spoken).iter().flat_map(|id| tokenizer.bytes(*id)).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), tokenizer.decode(&tokenizer.encode(spoken), false));
        assert!(tokenizer.bytes(limit + 5).is_empty());
    }
}

#[test]
fn the_model_is_listed_and_known_by_its_name() {
    let server = Server::start(|service| service.name = "sft[size=3B,data=mixed]".into());
    let list = server.get("/v1/models").ok();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("sft[size=3B,data=mixed]")));
    let one = server.get("/v1/models/sft%5Bsize%3D3B%2Cdata%3Dmixed%5D").ok();
    assert_eq!(
        (&one["object"], &one["id"], &one["max_model_len"]),
        (&json!("model"), &list["data"][0]["id"], &json!(512))
    );
    assert_eq!(server.get("/v1/models/other").error(404)["code"], "model_not_found");
    assert_eq!(server.get("/health").ok(), json!({"status": "ok"}));
    assert_eq!(server.get("/health?x=1").ok(), json!({"status": "ok"}));
}
