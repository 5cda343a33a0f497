"""What `pipe export` writes, loaded by transformers and PEFT: the same logits, the same ids.

    python tests/peer/exports.py PIPE [--keep FOLDER]

PIPE is the binary. Four small random models (head tied and not, stored in f32 and in bf16) are made, each gets an
adapter by a short `pipe run`, and `pipe export` writes the adapter and the merged model. One line is printed for every
comparison; the exit code is 1 if one fails. `--keep` puts everything into FOLDER, for a look at it afterwards.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

TOKENIZER = Path(__file__).parent.parent / "golden/data/tied/model"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
# Two f32 implementations that add in different orders are about 1e-5 apart on logits up to 8.
F32 = 5e-5
# Merged weights in bf16 keep 8 bits; relative to the largest logit.
BF16 = 2e-2
# One rounding to bf16, relative to the weight.
ROUNDED = 2.0**-8

MANIFEST = """\
manifest = 1
title    = "An adapter to be exported"

[stage.base]
kind   = "model"
source = "path:base"

[stage.rows]
kind   = "dataset"
source = "path:rows.jsonl"

[stage.sequences]
kind   = "dataset"
source = "path:sequences.jsonl"

[stage.sft]
kind          = "sft"
model         = "base"
data          = "rows"
format        = "text"
max_steps     = 5
batch_size    = 2
learning_rate = 1e-2
max_tokens    = 256
lora          = { rank = 8, alpha = 16, targets = TARGETS }

[stage.before]
kind       = "probe"
model      = "base"
data       = "sequences"
format     = "text"
max_tokens = 256
logits     = true

[stage.probe]
kind       = "probe"
model      = "sft"
data       = "sequences"
format     = "text"
max_tokens = 256
logits     = true
"""

ROWS = [
    {"id": f"row-{i}", "prompt": f"<|im_start|>user\nWrite {word} {count} times.<|im_end|>\n<|im_start|>assistant\n",
     "completion": " ".join([word] * count) + "<|im_end|>"}
    for i, (word, count) in enumerate([("no", 3), ("oak", 2), ("sun", 4), ("hm", 5), ("é", 2), ("ox", 3)])
]
TEXTS = ["", "Two words", " e\u0301 = é\n\n", "<|im_start|>user\nHow many?<|im_end|>\n", "12 + 345 🐈", "a<tool_call>b"]


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


def make_model(folder, tied, dtype):
    """Random weights that give logits up to about 8; head_dim is not hidden / heads, the vocabulary has spare rows."""
    torch.manual_seed(7 + tied)
    config = Qwen2Config(
        vocab_size=340, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rope_theta=1e6, rms_norm_eps=1e-6,
        initializer_range=0.2, tie_word_embeddings=tied, bos_token_id=320, eos_token_id=322, use_cache=True)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # transformers starts biases at 0 and norms at 1, where a fault in them would not show.
            if name.endswith("bias"):
                tensor.normal_(0, 0.2)
            elif "norm" in name:
                tensor.normal_(1, 0.1)
    model.to(dtype).save_pretrained(folder)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copyfile(TOKENIZER / name, folder / name)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def sequences(tokenizer):
    """Texts, and ids in no order: the shortest with anything to predict, and one over several query blocks."""
    draw = torch.Generator().manual_seed(3)
    rows = {"text": tokenizer(ROWS[0]["prompt"] + ROWS[0]["completion"])["input_ids"]}
    rows |= {f"random-{length}": torch.randint(0, 340, (length,), generator=draw).tolist() for length in (2, 9, 70)}
    return [{"id": name, "input_ids": ids, "labels": ids} for name, ids in rows.items()]


class Pipe:
    def __init__(self, binary, folder):
        self.binary, self.folder = str(binary), folder

    def __call__(self, *arguments):
        command = [self.binary, *map(str, arguments), "--cache", str(self.folder / "cache")]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            raise SystemExit(f"exit code {done.returncode}: {' '.join(command)}")
        return done.stdout

    def export(self, stage, *flags):
        """The folder an export wrote; what `--json` says of it must be what lies in it."""
        folder = self.folder / "-".join(["export", stage, *(flag.strip("-") for flag in flags)])
        said = json.loads(self("export", "manifest.toml", stage, folder, *flags, "--json"))
        listed = {name for one in said["exports"] for name in one["files"]}
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        if listed != there:
            raise SystemExit(f"{folder}: said {sorted(listed)}, is {sorted(there)}")
        return folder


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def apart(model, rows, logits):
    """The largest difference over all sequences; NaN stays NaN."""
    worst = torch.zeros(())
    for row in rows:
        got = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()
        want = logits[f"final/{row['id']}"]
        assert got.shape == want.shape and want.dtype == torch.float32, (row["id"], got.shape, want.shape)
        worst = torch.maximum(worst, (got - want).abs().max())
    return worst.item()


def compare(report, binary, folder, name, tied, dtype):
    (folder / "base").mkdir(parents=True)
    make_model(folder / "base", tied, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = sequences(tokenizer)
    write_lines(folder / "rows.jsonl", ROWS)
    write_lines(folder / "sequences.jsonl", rows)
    (folder / "manifest.toml").write_text(MANIFEST.replace("TARGETS", json.dumps(TARGETS)))
    pipe = Pipe(binary, folder)
    pipe("run", "manifest.toml", "-q")

    before = load_file(pipe.export("before") / "logits.safetensors")
    after = load_file(pipe.export("probe") / "logits.safetensors")
    report.fact(f"{name}: one tensor for every sequence", set(after) == {f"final/{row['id']}" for row in rows})
    report.line(f"{name}: base", apart(load(folder / "base"), rows, before), F32)
    moved = max((after[key] - before[key]).abs().max().item() for key in after)
    report.fact(f"{name}: training moved logits by {moved:.2g}, which none of this would miss", moved > 1000 * F32)

    adapter = pipe.export("sft")
    with warnings.catch_warnings():
        # PEFT says that a LoRA on a tied head needs care; that it gets it is what is compared.
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load(folder / "base"), adapter).eval()
    lora = load_file(adapter / "adapter_model.safetensors")
    report.fact(f"{name}: PEFT takes every tensor of the adapter, and expects no other", set(lora) == expected(model))
    report.line(f"{name}: adapter on the base, by PEFT", apart(model, rows, after), F32)

    merged = pipe.export("sft", "--merge")
    scale = max(tensor.abs().max().item() for tensor in after.values())
    bound = F32 if dtype == torch.float32 else BF16 * scale
    report.line(f"{name}: merged model, by transformers", apart(load(merged), rows, after), bound)
    config = json.loads((merged / "config.json").read_text())
    with safe_open(merged / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    report.fact(f"{name}: merged weights are stored as the base's", {t.dtype for t in stored.values()} == {dtype})
    slack = ROUNDED if dtype == torch.bfloat16 else 0.0
    wanted = folded(load(folder / "base"), adapter, lora)
    off = max(beyond(stored[key], want, slack) for key, want in wanted.items())
    report.line(f"{name}: merged weights against W + (alpha / r) B A", off, 1e-6)
    said = getattr(torch, config.get("dtype") or config["torch_dtype"])
    report.fact(f"{name}: the merged configuration says so", said == dtype)
    both = {"lm_head.weight", "model.embed_tokens.weight"} <= set(stored)
    report.fact(f"{name}: the merged head is a tensor of its own", both and config["tie_word_embeddings"] is False)
    start = load(folder / "base", dtype).get_input_embeddings().weight
    report.fact(f"{name}: the merged embedding is the base's", torch.equal(stored["model.embed_tokens.weight"], start))

    again = AutoTokenizer.from_pretrained(merged)
    same = all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)
    turns = [{"role": "user", "content": "How many?"}]
    chat = [t.apply_chat_template(turns, add_generation_prompt=True) for t in (again, tokenizer)]
    report.fact(f"{name}: ids and chats of the merged model's tokenizer", same and chat[0] == chat[1])

    verified = [pipe.export("sft", "--verify"), pipe.export("sft", "--merge", "--verify")]
    alike = all(same_files(a, b) for a, b in zip(verified, [adapter, merged]))
    report.fact(f"{name}: `--verify` passes and writes the same bytes", alike)


def folded(base, adapter, lora):
    """The weights that the adapter changes, added up here; a tied head starts as the embedding."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights, made = base.state_dict(), {}
    for key in lora:
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            update = lora[key.replace("lora_A", "lora_B")].double() @ lora[key].double()
            made[name] = weights[name].double() + config["lora_alpha"] / config["r"] * update
    return made


def beyond(got, want, relative):
    """The largest difference that is left after `relative` of the value."""
    return ((got.double() - want).abs() - relative * want.abs()).max().clamp(min=0).item()


def expected(model):
    """The names that PEFT itself would write for the adapter of `model`."""
    return {key.replace(".default.", ".") for key, _ in model.named_parameters() if ".lora_" in key}


def same_files(a, b):
    contents = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (a, b)]
    return contents[0] == contents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pipe", type=Path, help="the binary")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder that everything stays in")
    arguments = parser.parse_args()
    binary = arguments.pipe.resolve(strict=True)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="exports-") as scratch:
        folder = arguments.keep.resolve() if arguments.keep else Path(scratch)
        for tied in [True, False]:
            for dtype, word in [(torch.float32, "f32"), (torch.bfloat16, "bf16")]:
                name = f"{'tied' if tied else 'untied'} {word}"
                compare(report, binary, folder / name.replace(" ", "-"), name, tied, dtype)
    print(f"{report.failed} comparisons failed" if report.failed else "all as they should be")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
