"""`pipe serve` asked by the openai Python client, and what it answers beside transformers.

    python tests/peer/serve.py PIPE [--keep FOLDER]

PIPE is the binary. A bundled model gets an adapter by a short `pipe run`, which `pipe serve` serves at a free port, and
which `pipe export --merge` writes for transformers. One line is printed for every comparison; the exit code is 1 if one
fails. `--keep` puts everything into FOLDER.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

CELL = "sft"
# Two f32 implementations that add in different orders.
F32 = 5e-5
KEY = "sk-a-key-that-only-this-script-knows"

MANIFEST = """\
manifest = 1
title    = "An adapter to be served"

[stage.base]
kind   = "model"
source = "init:mini-3B"

[stage.rows]
kind   = "dataset"
source = "path:rows.jsonl"

[stage.sft]
kind          = "sft"
model         = "base"
data          = "rows"
format        = "chat"
max_steps     = 5
batch_size    = 2
learning_rate = 1e-3
max_tokens    = 256
lora          = { rank = 8, alpha = 16 }
"""

QUESTION = "Tom has 12 pens. He finds 30 pens. How many pens does Tom have?"
MESSAGES = [{"role": "user", "content": QUESTION}]


class Report:
    def __init__(self):
        self.failed = 0

    def line(self, what, difference, bound):
        good = difference <= bound  # false for NaN
        self.failed += not good
        print(f"{'ok' if good else 'FAIL':4} {what:64} {difference:10.3e}  bound {bound:8.1e}", flush=True)

    def fact(self, what, good):
        self.failed += not good
        print(f"{'ok' if good else 'FAIL':4} {what}", flush=True)

    def raises(self, what, kind, call):
        try:
            call()
            self.fact(f"{what}: {kind.__name__}, not an answer", False)
        except openai.OpenAIError as error:
            self.fact(f"{what}: {kind.__name__}", type(error) is kind)
            return error


def run(binary, folder, *arguments):
    done = subprocess.run([binary, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"pipe {' '.join(arguments)}: {done.stderr}")


def make(binary, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "m.toml").write_text(MANIFEST)
    rows = [{"prompt": f"What is {i} plus 2?", "answer": f"{i} plus 2 is {i + 2}."} for i in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(binary, folder, "run", "m.toml", CELL)
    run(binary, folder, "export", "m.toml", CELL, "merged", "--merge", "--dtype", "f32")


def streamed(stream):
    """Text, log-probs and finish reason of each choice, and the usage."""
    texts, tokens, ends, usage = {}, {}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            tokens.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    return texts, tokens, ends, usage


def chats(report, client, name):
    chat = client.chat.completions.create
    greedy = chat(model=name, messages=MESSAGES, temperature=0, max_tokens=40)
    text = greedy.choices[0].message.content
    report.fact("chat: a text, its role, its end, its model", bool(text) and greedy.choices[0].message.role == "assistant"
                and greedy.choices[0].finish_reason in ("stop", "length") and greedy.model == name)
    report.fact("chat: usage adds up",
                greedy.usage.total_tokens == greedy.usage.prompt_tokens + greedy.usage.completion_tokens > 0)
    more = dict(model=name, messages=MESSAGES, temperature=1.5, max_tokens=60, seed=5, n=3, logprobs=True, top_logprobs=4)
    whole = chat(**more)
    texts, tokens, ends, usage = streamed(chat(**more, stream=True, stream_options={"include_usage": True}))
    report.fact("stream: n = 3 choices are those of the whole answer",
                [choice.message.content for choice in whole.choices] == [texts[i] for i in range(3)]
                and [choice.finish_reason for choice in whole.choices] == [ends[i] for i in range(3)])
    report.fact("stream: the same log-probs", [choice.logprobs.content for choice in whole.choices] == [tokens[i] for i in range(3)])
    report.fact("stream: the same usage", usage == whole.usage)
    report.fact("log-probs: the bytes of the tokens are the text",
                all(b"".join(bytes(token.bytes) for token in tokens[i]).decode(errors="replace") == texts[i] for i in range(3)))
    report.fact("log-probs: four alternatives, in order",
                all(len(token.top_logprobs) == 4 and all(a.logprob >= b.logprob for a, b in zip(token.top_logprobs, token.top_logprobs[1:]))
                    for token in tokens[0]))
    stop = text[10:14]
    stopped = chat(model=name, messages=MESSAGES, temperature=0, max_tokens=40, stop=[stop])
    report.fact("stop: the text ends before it",
                stopped.choices[0].message.content == text[:text.find(stop)] and stopped.choices[0].finish_reason == "stop")
    pieces, _, _, _ = streamed(chat(model=name, messages=MESSAGES, temperature=0, max_tokens=40, stop=stop, stream=True))
    report.fact("stop: nothing of it in a stream", pieces[0] == text[:text.find(stop)])
    kept = chat(model=name, messages=MESSAGES, temperature=2, max_tokens=20, seed=1,
                extra_body={"top_k": 1, "repetition_penalty": 1.0})
    report.fact("extra_body: top_k = 1 is greedy at any temperature", text.startswith(kept.choices[0].message.content))
    begun = chat(model=name, messages=[*MESSAGES, {"role": "assistant", "content": text[:10]}], temperature=0, max_tokens=5,
                 extra_body={"continue_final_message": True, "add_generation_prompt": False})
    report.fact("extra_body: an answer is continued", bool(begun.choices[0].message.content))


def completions(report, client, name):
    complete = client.completions.create
    single = [complete(model=name, prompt=prompt, temperature=0, max_tokens=12).choices[0].text
              for prompt in ("Tom has 12 pens.", "Ann has 7 boxes.")]
    both = complete(model=name, prompt=["Tom has 12 pens.", "Ann has 7 boxes."], temperature=0, max_tokens=12)
    report.fact("completions: a list of prompts is each of them", [choice.text for choice in both.choices] == single)
    told = complete(model=name, prompt="Tom has 12 pens.", temperature=0, max_tokens=12, logprobs=2)
    logprobs = told.choices[0].logprobs
    report.fact("completions: tokens, log-probs and places",
                "".join(logprobs.tokens) == told.choices[0].text and logprobs.text_offset[0] == 0
                and len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.tokens)
                and all(told.choices[0].text[at:].startswith(token) for at, token in zip(logprobs.text_offset, logprobs.tokens)))
    stream = complete(model=name, prompt="Tom has 12 pens.", temperature=0, max_tokens=12, stream=True)
    report.fact("completions: a stream is the whole", "".join(chunk.choices[0].text for chunk in stream) == single[0])


def together(report, client, name):
    """Sixteen at once, with fixed seeds, beside the same one after another."""
    def ask(i):
        reply = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": QUESTION[: 20 + 2 * i]}], temperature=1.5, seed=i, max_tokens=20 + i,
            logprobs=True)
        return reply.choices[0].message.content, [token.logprob for token in reply.choices[0].logprobs.content]
    alone = [ask(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        report.fact("16 at once with fixed seeds: texts and log-probs as alone", list(pool.map(ask, range(16))) == alone)


def errors(report, client, name, url):
    chat = client.chat.completions.create
    wrong = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    report.raises("a wrong key", openai.AuthenticationError, lambda: wrong.models.list())
    error = report.raises("an unknown model", openai.NotFoundError, lambda: chat(model="gpt-5", messages=MESSAGES))
    report.fact("an unknown model: its code", error is not None and error.code == "model_not_found")
    report.raises("an unknown path", openai.NotFoundError, lambda: client.embeddings.create(model=name, input="x"))
    error = report.raises("too many tokens", openai.BadRequestError, lambda: chat(model=name, messages=MESSAGES, max_tokens=5000))
    report.fact("too many tokens: code and parameter",
                error is not None and (error.code, error.param) == ("context_length_exceeded", "max_tokens"))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    report.raises("tools", openai.BadRequestError, lambda: chat(model=name, messages=MESSAGES, tools=tools))
    report.raises("a penalty", openai.BadRequestError, lambda: chat(model=name, messages=MESSAGES, presence_penalty=1))
    report.raises("an error before a stream", openai.BadRequestError,
                  lambda: chat(model=name, messages=MESSAGES, temperature=-1, stream=True))


def beside_transformers(report, client, name, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32, attn_implementation="eager").eval()
    worst = 0.0
    for i, question in enumerate([QUESTION, "What is 3 plus 2?", "Ann has 7 boxes. Each box holds 4 pens. How many pens?"]):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        ends = [token for token in map(tokenizer.convert_tokens_to_ids, ["<|im_end|>", "<|endoftext|>"]) if token is not None]
        with torch.no_grad():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=ends,
                                  pad_token_id=ends[0])[0, ids.shape[1]:]
            logprobs = model(torch.cat([ids[0], made])[None]).logits[0, ids.shape[1] - 1: -1].double().log_softmax(-1)
        kept = [token for token in made.tolist() if token not in ends]
        reply = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=40, logprobs=True, top_logprobs=5)
        told = reply.choices[0].logprobs.content
        report.fact(f"transformers: greedy text of question {i + 1}, prompt tokens, made tokens",
                    reply.choices[0].message.content == tokenizer.decode(kept, clean_up_tokenization_spaces=False)
                    and (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (ids.shape[1], len(made)))
        for row, (token, found) in enumerate(zip(kept, told)):
            worst = max(worst, abs(logprobs[row, token].item() - found.logprob))
            top = logprobs[row, : len(tokenizer)].topk(5).values.tolist()
            worst = max(worst, *(abs(a - b.logprob) for a, b in zip(top, found.top_logprobs)))
    report.line("transformers: log-probs of tokens and of their alternatives", worst, F32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pipe", type=Path, help="the binary")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder that everything stays in")
    arguments = parser.parse_args()
    binary = arguments.pipe.resolve(strict=True)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="serve-") as scratch:
        folder = arguments.keep.resolve() if arguments.keep else Path(scratch)
        make(binary, folder)
        command = [binary, "serve", "m.toml", CELL, "--port", "0", "--json", "--api-key-env", "PEER_KEY"]
        serving = subprocess.Popen(command, cwd=folder, env={**os.environ, "PEER_KEY": KEY}, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
        try:
            told = json.loads(serving.stdout.readline())
            client = openai.OpenAI(base_url=told["url"], api_key=KEY, max_retries=0, timeout=120)
            models = [model.id for model in client.models.list()]
            report.fact("models: the one that is served", models == [told["model"]])
            report.fact("models: retrieved by its name", client.models.retrieve(told["model"]).id == told["model"])
            name = models[0]
            chats(report, client, name)
            completions(report, client, name)
            together(report, client, name)
            errors(report, client, name, told["url"])
            beside_transformers(report, client, name, folder)
            serving.send_signal(signal.SIGINT)
            report.fact("Ctrl-C: exit code 130", serving.wait(30) == 130)
        finally:
            serving.kill()
    print(f"{report.failed} comparisons failed" if report.failed else "all as they should be")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
