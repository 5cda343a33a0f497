"""Writes `data/`: small random Qwen2 models and what the Python libraries compute on them.

    python tests/golden/make.py [FOLDER]

Everything is made here: the texts, the tokenizer, the weights. The numbers come from transformers (`Trainer`,
`generate`), PEFT and TRL (`DPOTrainer`, `SFTTrainer`), on one CPU thread. The class `Exact` states the same
arithmetic once more in float64; its distance from the libraries is kept beside the data as their noise floor.
"""

import os

# Before torch is loaded: one thread and one code path, so that the same machine gives the same bytes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
os.environ.setdefault("MKL_CBWR", "AVX2")

import atexit
import copy
import json
import math
import shutil
import sys
import tempfile
import unicodedata
import warnings
from dataclasses import dataclass, field
from pathlib import Path

SCRATCH = Path(tempfile.mkdtemp(prefix="golden-"))
atexit.register(shutil.rmtree, SCRATCH, True)
os.environ["HF_HOME"] = str(SCRATCH / "hf")

import datasets
import peft
import torch
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, GenerationConfig, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
    TopKLogitsWarper, TopPLogitsWarper, Trainer, TrainerCallback, TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

EOS = "<|im_end|>"
RESPONSE = "<|im_start|>assistant\n"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
BETA = 0.2


# ---------------------------------------------------------------------------------------------------- the studies

@dataclass
class Study:
    """One model and how it is trained."""

    name: str
    seed: int
    config: dict
    store: torch.dtype
    shards: int
    merges: str  # how `tokenizer.json` spells them: "strings" or "pairs"
    rank: int
    alpha: int
    targets: list
    sft: dict
    dpo: list
    folder: Path = field(default=None)

    @property
    def scale(self):
        return self.alpha / self.rank


def studies(ids):
    """The two models; `ids` says how many ids the tokenizer knows and which are special."""
    common = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["eos"], "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 512,
        "model_type": "qwen2", "num_hidden_layers": 2, "use_cache": True, "use_sliding_window": False,
    }
    # The field set of the published Qwen2.5 checkpoints, and `head_dim`, because it is not hidden / heads.
    tied = common | {
        "head_dim": 16, "hidden_size": 32, "intermediate_size": 64, "max_window_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 512,
        "tie_word_embeddings": True, "torch_dtype": "float32", "transformers_version": "4.43.1",
        "vocab_size": ids["len"],
    }
    # The field set that transformers writes since `dtype` and `layer_types`.
    sharded = common | {
        "dtype": "bfloat16", "hidden_size": 56, "intermediate_size": 96, "layer_types": ["full_attention"] * 2,
        "max_window_layers": 28, "num_attention_heads": 7, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": None, "tie_word_embeddings": False,
        "transformers_version": transformers.__version__, "vocab_size": ids["len"] + 14,
    }
    run = {"pairs_per_micro_batch": 2, "grad_accum": 2, "steps": 6, "betas": [0.9, 0.95], "wd": 1e-6, "eps": 1e-8,
           "max_grad_norm": 1.0, "scheduler": "cosine", "loss_type": "sigmoid", "truncation_mode": "keep_end"}
    plain = {"name": "beta0.2", "beta": BETA, "lr": 1e-3, "warmup_ratio": 0.0, "max_prompt_length": 24,
             "max_length": None, "policy": "continue", "start_adapter": "sft/num_items/adapter_final"}
    cut = plain | {"name": "beta0.6", "beta": 0.6, "lr": 5e-4, "warmup_ratio": 0.2, "max_length": 48}
    merged = plain | {"name": "merged_beta0.2", "policy": "merged", "max_prompt_length": None}
    del merged["start_adapter"]
    return [
        Study("tied", 21, tied, torch.float32, 1, "strings", 40, 20, ["v_proj", "down_proj", "lm_head"],
              {"steps": 12, "bs": 2, "ga": 2, "lr": 5e-4, "sched": "cosine_with_restarts", "cycles": 2,
               "warmup_ratio": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6, "max_grad_norm": 1.0},
              [run | plain, run | cut]),
        Study("sharded", 6, sharded, torch.bfloat16, 3, "pairs", 4, 6, TARGETS,
              {"steps": 12, "bs": 2, "ga": 2, "lr": 4e-4, "sched": "linear", "cycles": None,
               "warmup_ratio": 0.15, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "max_grad_norm": 0.5},
              [run | plain, run | cut, run | merged]),
    ]


# ------------------------------------------------------------------------------------------------------ the texts

NAMES = ["Ilse", "Bo", "Rana", "Tom", "Mei", "Sam"]
THINGS = ["pears", "shells", "stamps", "coins", "nuts", "maps"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SYSTEMS = ["", "", "Be brief.", "", "Show the sum."]

# question, thought, answer, wrong thought, wrong answer
PROBLEMS = [
    lambda n, t, a, b, d: (f"{n} has {a} {t}, finds {b}. Sum?", f"{a} and {b} make {a + b}.",
                           f"{a + b} {t}", f"{a} and {b}?", f"{a + b + 1}"),
    lambda n, t, a, b, d: (f"{n} had {a + b} {t} and lost {b}.", f"Take {b} from {a + b}: {a} stay.",
                           f"{a}", f"{a + b} plus {b} is {a + 2 * b}.", f"{a + 2 * b} {t}"),
    lambda n, t, a, b, d: (f"{a} bags of {b} {t}. In all?", f"{a} times {b} is {a * b}.",
                           f"\\({a * b}\\)", "Hm.", f"{a + b}"),
    lambda n, t, a, b, d: (f"Is {a} more than {b}?", f"{max(a, b)} is further right.",
                           "yes" if a > b else "no", "Guess.", "no" if a > b else "yes"),
    lambda n, t, a, b, d: (f"{b} days after {DAYS[d]}?", f"Count on, {b} mod 7.",
                           DAYS[(d + b) % 7], f"Start at {DAYS[d]}.", DAYS[(d + b + 1) % 7]),
    lambda n, t, a, b, d: (f"{n} cuts {a * b} {t} into {a} heaps.", f"{a * b} / {a} = {b}\n\nso {b} each.",
                           f"**{b}**", f"{a * b} - {a}?", f"{a * b - a}"),
]

# What the programmed ones lack: other scripts, marks that compose, code, formulas.
ODD = [
    ("Qu'est-ce qu'un cafe\u0301 noir?", "On n'y met pas de lait.", "un café sans lait", "Du thé?", "thé"),
    ("Ist 3 größer als 2?", "3 - 2 = 1 > 0", "ja", "2 > 3", "nein"),
    ("二加三是多少？", "二加三等于五。", "五", "二乘三。", "六"),
    ("Draw a cat 🐈!", "A cat has 2 ears.", "=^.^=", "Dog 🐕", "🐕"),
    ("What does\n\tx = x + 1\ndo?", "It adds one to `x`.", "x grows by 1", "x is x + 1?", "nothing"),
    ("Solve $2x = 8$.", "$x = 8 / 2$, so $x = 4$.", "\\boxed{4}", "x = 8 - 2", "\\boxed{6}"),
]


def conversations():
    """(prompt, right completion, wrong completion), 42 of them; completions end without a mark."""
    told = []
    for i in range(42):
        if i % 7 == 6:
            question, thought, answer, slip, wrong = ODD[i // 7]
        else:
            told_of = PROBLEMS[i % 6]
            question, thought, answer, slip, wrong = told_of(
                NAMES[i % 5], THINGS[(i // 2) % 6], 3 + (5 * i) % 16, 2 + (3 * i) % 9, i % 7)
        system = SYSTEMS[i % 5]
        head = f"<|im_start|>system\n{system}{EOS}\n" if system else ""
        prompt = f"{head}<|im_start|>user\n{question}{EOS}\n{RESPONSE}"
        layout = "<|im_start|>think\n{}\n<|im_start|>answer\n{}"
        told.append((prompt, layout.format(thought, answer), layout.format(slip, wrong)))
    return told


def sft_texts(count):
    """Whole conversations; every fourth has a line end behind the last mark."""
    told = conversations()
    return [prompt + right + EOS + ("\n" if i % 4 == 3 else "")
            for i, (prompt, right, _) in ((i, told[i % len(told)]) for i in range(count))]


def dpo_pairs(count):
    """Pairs in three shapes: bare, closed, and closed with a line end on the better side only."""
    ends = [("", ""), (EOS, EOS), (EOS + "\n", EOS)]
    return [{"prompt": prompt, "chosen": right + ends[i % 3][0], "rejected": wrong + ends[i % 3][1]}
            for i, (prompt, right, wrong) in enumerate(conversations()[:count])]


def probe_pairs():
    told = conversations()
    pairs = [{"prompt": told[i][0], "chosen": told[i][1] + EOS, "rejected": told[i][2] + EOS}
             for i in (0, 8, 13, 20, 27)]
    # The last one counts aloud: longer than the cap of 24 tokens on one side, and nearly empty on the other.
    counted = "<|im_start|>think\n" + ", ".join(str(n) for n in range(1, 16)) + "\n<|im_start|>answer\n15" + EOS
    return pairs + [{"prompt": f"<|im_start|>user\nCount to 15.{EOS}\n{RESPONSE}", "chosen": counted,
                     "rejected": f"<|im_start|>answer\n!{EOS}"}]


TEMPLATE = """\
{%- set opening = '<|im_start|>' -%}
{%- set closing = '<|im_end|>\\n' -%}
{%- if messages[0].role == 'system' -%}
    {%- set rules = messages[0].content -%}
{%- else -%}
    {%- set rules = 'You solve small problems and say how.' -%}
{%- endif -%}
{{- opening + 'system\\n' + rules -}}
{%- if tools %}
    {{- '\\n\\nThese tools can be called, one JSON object a line:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\nA call is written <tool_call>{"name": ..., "arguments": {...}}</tool_call>.' }}
{%- endif %}
{{- closing }}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {#- said above #}
    {%- elif message.role == 'tool' %}
        {{- opening + 'user\\n<tool_response>' + message.content + '</tool_response>' + closing }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- opening + 'assistant\\n' }}
        {%- if message.content %}
            {{- message.content + '\\n' }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}</tool_call>' }}
            {%- if not loop.last %}
                {{- '\\n' }}
            {%- endif %}
        {%- endfor %}
        {{- closing }}
    {%- else %}
        {{- opening + message.role + '\\n' + message.content + closing }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- opening + 'assistant\\n' }}
{%- endif %}
"""

TOOLS = [
    {"type": "function", "function": {
        "name": "add", "description": "Adds two numbers & <rounds> 'em.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                       "required": ["a", "b"]}}},
    {"type": "function", "function": {"name": "heute", "description": "Der Tag in Köln", "parameters": {}}},
]


def chats():
    """(what is special, messages, tools, whether the assistant's turn is opened)"""
    user = {"role": "user", "content": "How many legs has an ant?"}
    call = {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2.5}}},
        {"type": "function", "function": {"name": "heute", "arguments": {}}}]}
    many = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day."},
            {"role": "user", "content": "Sort b, a\nand c."}]
    return [
        ("a question, default rules", [user], None, False),
        ("a question, answer opened", [user], None, True),
        ("own rules", [{"role": "system", "content": "Only digits."}, user], None, True),
        ("empty rules", [{"role": "system", "content": ""}, user], None, True),
        ("several turns", many, None, True),
        ("a closed exchange", many + [{"role": "assistant", "content": "a\nb\nc\n"}], None, False),
        ("rules in the middle", [user, {"role": "system", "content": "Now in French."}, user], None, True),
        ("blank and foreign contents", [{"role": "system", "content": "请简短。"}, {"role": "user", "content": "  "},
                                        {"role": "assistant", "content": ""}, {"role": "user", "content": "é 🐈\n\n"}],
         None, True),
        ("marks inside a content", [{"role": "user", "content": f"say {EOS}\n<|im_start|>system\nno"}], None, True),
        ("tools", [user], TOOLS, True),
        ("tools, own rules, calls and their results", [
            {"role": "system", "content": "Use tools."}, user, call, {"role": "tool", "content": "4.5"},
            {"role": "tool", "content": "Montag"}, {"role": "assistant", "content": "4.5 on Monday"}], TOOLS, False),
        ("a call with words before it", [user, call | {"content": "Let me see."}], TOOLS, False),
    ]


def encode_texts():
    return [
        "", " ", "  ", "   x", "a", "A b  c   d", "the", " the", "the the", "\n", "\n\n", " \n \n", "x \n", "\tx\t\t y",
        "a\r\nb\rc", "don't we'll I'M she'D it'S 'tis", "12345", "3.14, -2e10", "x1y2z", "1 000 000",
        "!?... (a) [b] {c}", "a,b;c:d", "__init__(self)", "https://example.org/?q=1&r=%20#top", "é", "e\u0301",
        "ﬁn Å Å \u1e9b\u0323", "größer Straße", "二加三等于五。", "Привет, мир", "שלום עולם", "안녕", "\u1112\u1161\u11ab",
        "🐈🐕 👩‍👧 🇫🇷", "\u00a0x\u2003y\u3000z", "x² + y₂ = ½ Ⅷ", "zero\u200bwidth\ufeff", "tab\tnewline\nend\n",
        EOS, "<|im_start|>user\nHi<|im_end|>\n", "a<|endoftext|>b <|im_end|> c", "<tool_call>{\"name\": 1}</tool_call>",
        "<|im_start|<|im_start|>|>", "<|IM_END|>", "How many pears has Ilse? " * 3, "\\frac{a}{b} \\boxed{4}",
    ]


# -------------------------------------------------------------------------------------------------------- writing

def write_json(path, value):
    """One line for every entry of the two outer levels: small, and still fit to be compared line by line."""
    def compact(value):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def inner(value, depth):
        if depth == 0 or not isinstance(value, (dict, list)) or not value:
            return compact(value)
        if isinstance(value, list):
            if not any(isinstance(entry, (dict, list)) for entry in value):
                return compact(value)
            return "[\n" + ",\n".join(inner(entry, depth - 1) for entry in value) + "\n]"
        entries = (f"{compact(str(key))}:{inner(entry, depth - 1)}" for key, entry in value.items())
        return "{\n" + ",\n".join(entries) + "\n}"

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(inner(value, 2) + "\n", encoding="utf-8")


def write_tensors(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def write_adapter(model, study, folder, everything=False):
    """As PEFT saves it; a set of targets is put in order and no path of this machine stays."""
    scratch = SCRATCH / "adapter"
    shutil.rmtree(scratch, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = "auto" if everything else False
        model.save_pretrained(scratch, save_embedding_layers=how, selected_adapters=["default"])
    config = json.loads((scratch / "adapter_config.json").read_text())
    config["target_modules"] = study.targets
    config["base_model_name_or_path"] = study.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.copy(scratch / "adapter_model.safetensors", folder / "adapter_model.safetensors")


# The largest difference between a library and float64, by quantity, over both models.
FLOORS = {}
# A third of the tolerance of the README: what a library does not keep itself is asked of nobody.
LIMITS = {"logits": 5e-5 / 3, "sft grads": 2e-6 / 3, "dpo grads": 1e-5, "sft loss": 1e-5 / 3, "sft norm": 1e-5 / 3,
          "sft adapter": 2e-5 / 3, "dpo loss": 1e-4 / 3, "dpo norm": 1e-4 / 3, "dpo logps": 1e-3 / 3,
          "dpo adapter": 5e-4 / 3, "alp": 1e-5 / 3}


def floor(quantity, value):
    value = float(value)
    assert value <= LIMITS[quantity], f"{quantity}: {value} from float64, more than {LIMITS[quantity]}"
    FLOORS[quantity] = max(FLOORS.get(quantity, 0.0), value)
    return value


def apart(a, b):
    return (a.detach().double() - b.detach().double()).abs().max().item()


# ------------------------------------------------------------------------------------------------ float64, by hand

def module_of(key):
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` -> (`model.layers.0.mlp.up_proj`, `A`)"""
    name, _, which = key.removeprefix("base_model.model.").removesuffix(".weight").partition(".lora_")
    return name, which


class Exact:
    """Qwen2 with LoRA in float64, one unpadded sequence at a time; shares no code with the libraries."""

    def __init__(self, config, weights, adapters=()):
        self.config, self.weights, self.adapters = config, weights, []
        for tensors, scale in adapters:
            self.add(tensors, scale)

    @staticmethod
    def of(study, adapters=()):
        weights = {}
        for path in sorted((study.folder / "model").glob("*.safetensors")):
            weights |= {name: tensor.double() for name, tensor in load_file(path).items()}
        if study.config["tie_word_embeddings"]:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        return Exact(study.config, weights, [(study.folder / name, study.scale) for name in adapters])

    def add(self, tensors, scale):
        if isinstance(tensors, Path):
            tensors = {key: t.double() for key, t in load_file(tensors / "adapter_model.safetensors").items()}
        by_module = {}
        for key, tensor in tensors.items():
            name, which = module_of(key)
            by_module.setdefault(name, {})[which] = tensor
        self.adapters.append((by_module, scale, tensors))

    def train(self):
        """The tensors of the last adapter, to be trained; references are the model as it is now."""
        _, scale, tensors = self.adapters.pop()
        fresh = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
        self.add(fresh, scale)
        return fresh

    def linear(self, name, x):
        y = x @ self.weights[name + ".weight"].T
        if name + ".bias" in self.weights:
            y = y + self.weights[name + ".bias"]
        for modules, scale, _ in self.adapters:
            if name in modules:
                y = y + scale * (x @ modules[name]["A"].T) @ modules[name]["B"].T
        return y

    def norm(self, name, x):
        mean = (x * x).mean(-1, keepdim=True)
        return x / (mean + self.config["rms_norm_eps"]).sqrt() * self.weights[name + ".weight"]

    def hidden(self, ids):
        c = self.config
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        dim, count = c.get("head_dim", c["hidden_size"] // heads), len(ids)
        # Angles are fp32 by definition (transformers makes them so); what follows from them is exact.
        powers = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        angles = torch.arange(count, dtype=torch.float32)[:, None] * (1.0 / (c["rope_theta"] ** powers))[None, :]
        cos, sin = angles.double().cos()[:, None, :], angles.double().sin()[:, None, :]

        def turned(x):
            low, high = x[..., : dim // 2], x[..., dim // 2:]
            return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

        x = self.weights["model.embed_tokens.weight"][torch.as_tensor(ids)]
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            h = self.norm(at + "input_layernorm", x)
            q = turned(self.linear(at + "self_attn.q_proj", h).view(count, heads, dim))
            k = turned(self.linear(at + "self_attn.k_proj", h).view(count, kv, dim))
            v = self.linear(at + "self_attn.v_proj", h).view(count, kv, dim)
            k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim)
            mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(later, -math.inf).softmax(-1), v)
            x = x + self.linear(at + "self_attn.o_proj", mixed.reshape(count, heads * dim))
            h = self.norm(at + "post_attention_layernorm", x)
            gate = F.silu(self.linear(at + "mlp.gate_proj", h))
            x = x + self.linear(at + "mlp.down_proj", gate * self.linear(at + "mlp.up_proj", h))
        return self.norm("model.norm", x)

    def logits(self, ids):
        return self.linear("lm_head", self.hidden(ids))

    def logps(self, ids):
        """log p(ids[t + 1] | ids[..t]) for every t."""
        scores = self.logits(ids)[:-1].log_softmax(-1)
        return scores.gather(1, torch.as_tensor(ids)[1:, None])[:, 0]

    def sum_logps(self, ids, start):
        return self.logps(ids)[max(start, 1) - 1:].sum()


class ExactAdamW:
    def __init__(self, params, betas, eps, decay, clip):
        self.params, self.betas, self.eps, self.decay, self.clip = list(params.values()), betas, eps, decay, clip
        self.state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.params]
        self.count = 0

    def step(self, loss, rate):
        """One update; the norm of the gradient before it is clipped."""
        grads = torch.autograd.grad(loss, self.params)
        norm = torch.sqrt(sum((g * g).sum() for g in grads))
        shrink = min(1.0, self.clip / (norm.item() + 1e-6))
        self.count += 1
        one, two = self.betas
        with torch.no_grad():
            for p, (m, v), g in zip(self.params, self.state, grads):
                g = g * shrink
                p.mul_(1 - rate * self.decay)
                m.mul_(one).add_(g, alpha=1 - one)
                v.mul_(two).add_(g * g, alpha=1 - two)
                denominator = (v / (1 - two ** self.count)).sqrt() + self.eps
                p.sub_(rate / (1 - one ** self.count) * m / denominator)
        return norm.item()


# ------------------------------------------------------------------------------------------------ models and texts

def make_tokenizer():
    """Byte-level BPE of a few dozen merges, learned from the texts above."""
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The marks are ids of their own, so they teach no merges.
    texts = [text.replace("<|im_start|>", "").replace(EOS, "") for text in sft_texts(42)]
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token in ["<|endoftext|>", "<|im_start|>", EOS]])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)
                          for token in ["<tool_call>", "</tool_call>", "<|file_sep|>"]])
    return json.loads(tokenizer.to_str()), pattern


def write_tokenizer(folder, tokenizer, merges):
    tokenizer = copy.deepcopy(tokenizer)
    if merges == "strings":
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    added = {str(token["id"]): {key: value for key, value in token.items() if key != "id"}
             for token in tokenizer["added_tokens"]}
    config = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", EOS], "bos_token": None, "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": EOS, "errors": "replace", "model_max_length": 512,
        "pad_token": "<|endoftext|>", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")) + "\n",
                                           encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n",
                                                  encoding="utf-8")


def write_model(study, ids):
    """Random weights large enough for logits of about +-6, so that a fault anywhere shows in them."""
    c, folder = study.config, study.folder / "model"
    draw = torch.Generator().manual_seed(study.seed)
    heads, kv, hidden, inter = (c[key] for key in ["num_attention_heads", "num_key_value_heads", "hidden_size",
                                                   "intermediate_size"])
    dim, unit = c.get("head_dim", hidden // heads), 1 / math.sqrt(hidden)

    def normal(*shape, std):
        return (torch.randn(*shape, generator=draw) * std).to(study.store)

    def scale_of_norm(size):
        return (1 + torch.randn(size, generator=draw) * 0.15).to(study.store)

    tensors = {"model.embed_tokens.weight": normal(c["vocab_size"], hidden, std=1.9 * unit)}
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": scale_of_norm(hidden),
            at + "post_attention_layernorm.weight": scale_of_norm(hidden),
            at + "self_attn.q_proj.weight": normal(heads * dim, hidden, std=1.4 * unit),
            at + "self_attn.q_proj.bias": normal(heads * dim, std=0.3),
            at + "self_attn.k_proj.weight": normal(kv * dim, hidden, std=1.4 * unit),
            at + "self_attn.k_proj.bias": normal(kv * dim, std=0.3),
            at + "self_attn.v_proj.weight": normal(kv * dim, hidden, std=1.1 * unit),
            at + "self_attn.v_proj.bias": normal(kv * dim, std=0.2),
            at + "self_attn.o_proj.weight": normal(hidden, heads * dim, std=1.1 * unit),
            at + "mlp.gate_proj.weight": normal(inter, hidden, std=1.1 * unit),
            at + "mlp.up_proj.weight": normal(inter, hidden, std=1.1 * unit),
            at + "mlp.down_proj.weight": normal(hidden, inter, std=1.1 * unit),
        }
    tensors["model.norm.weight"] = scale_of_norm(hidden)
    if not c["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(c["vocab_size"], hidden, std=1.9 * unit)
    if study.shards == 1:
        write_tensors(folder / "model.safetensors", tensors)
    else:
        groups = [["lm_head.weight"], ["model.embed_tokens.weight"]]
        groups.append([name for name in tensors if name not in sum(groups, [])])
        where = {}
        for i, names in enumerate(groups, 1):
            file = f"model-{i:05}-of-{len(groups):05}.safetensors"
            write_tensors(folder / file, {name: tensors[name] for name in names})
            where |= {name: file for name in names}
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(c, indent=2, sort_keys=True) + "\n")
    generation = {"bos_token_id": ids["endoftext"], "do_sample": True, "eos_token_id": [ids["eos"], ids["endoftext"]],
                  "pad_token_id": ids["pad"], "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20,
                  "top_p": 0.8, "transformers_version": "4.43.1"}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def load(study, adapter=None, dtype=torch.float32, trainable=False, attention="eager"):
    """The base, with an adapter on top if one is named."""
    model = AutoModelForCausalLM.from_pretrained(study.folder / "model", dtype=dtype, attn_implementation=attention)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, study.folder / adapter, is_trainable=trainable)
    return model.eval()


def with_lora(model, study, seed):
    """A new adapter as PEFT makes it: A Kaiming-uniform, B zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=study.rank, lora_alpha=study.alpha, lora_dropout=0.0, bias="none",
                             target_modules=study.targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def lora_of(model):
    """Trained tensors under the names that PEFT gives them in a file."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits_of(model, ids, **others):
    return model(input_ids=torch.tensor([ids]), **others).logits[0]


def padded(rows, pad, side="right"):
    """ids and mask of rows of different lengths."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    if side == "left":
        return [[pad] * len(f) + row for f, row in zip(fill, rows)], [f + [1] * len(row) for f, row in zip(fill, rows)]
    return [row + [pad] * len(f) for f, row in zip(fill, rows)], [[1] * len(row) + f for f, row in zip(fill, rows)]


# ---------------------------------------------------------------------------------------------------- the goldens

def tokenization(study, tokenizer, pattern, ids):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    known = [token.content for token in tokenizer.added_tokens_decoder.values()]
    encode, decode = [], []
    for text in encode_texts():
        case = {"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
        if not any(token in text for token in known):
            case["pieces"] = [piece for piece, _ in split.pre_tokenize_str(unicodedata.normalize("NFC", text))]
        encode.append(case)
        if len(decode) < 34:
            decode.append((case["ids"], False))
    cat = tokenizer("🐈", add_special_tokens=False)["input_ids"]
    marked = tokenizer("<|im_start|>a<tool_call>b<|file_sep|><|im_end|>\n<|endoftext|>", add_special_tokens=False)
    decode += [(marked["input_ids"], False), (marked["input_ids"], True), (cat[:1], False), (cat[:-1], False),
               (cat[1:], False), (cat[:2] + [cat[0]] + cat, True), ([ids["eos"]], True), ([ids["eos"]], False)]
    # Ids that no text maps to decode to nothing.
    decode += [([cat[0], study.config["vocab_size"] - 1, cat[0]], False)] if study.shards > 1 else []
    chat = []
    for what, messages, tools, opened in chats():
        text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=opened, tokenize=False)
        chat.append({"description": what, "messages": messages, "tools": tools, "add_generation_prompt": opened,
                     "text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]})
    write_json(study.folder / "tokenization.json", {
        "special": ids, "encode": encode,
        "decode": [{"ids": row, "skip_special_tokens": skip,
                    "text": tokenizer.decode(row, skip_special_tokens=skip)} for row, skip in decode],
        "chat": chat})


@torch.no_grad()
def forward(study, ids_of, pad):
    model, fused, exact = load(study), load(study, attention="sdpa"), Exact.of(study)
    text = ids_of(sft_texts(9)[8] + "\n" + sft_texts(3)[2])
    lengths, tensors, noise = [1, 2, 7, 33], {}, {}
    for i, length in enumerate(lengths):
        ids = text[i: i + length]
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        logits, want = out.logits[0], exact.logits(ids)
        tensors[f"ids.T{length}"] = torch.tensor(ids)
        # The last rows see everything before them.
        tensors[f"logits.T{length}"] = logits[-8:]
        if length > 1:
            tensors[f"logps.T{length}"] = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
            floor("logits", apart(tensors[f"logps.T{length}"], exact.logps(ids)))
        tensors[f"last_hidden.T{length}"] = out.hidden_states[-1][0]
        if length == 7:
            tensors["embed.T7"] = out.hidden_states[0][0]
            seen = []
            hooks = [layer.register_forward_hook(lambda _, __, y: seen.append(y[0] if isinstance(y, tuple) else y))
                     for layer in model.model.layers]
            model(input_ids=torch.tensor([ids]))
            [hook.remove() for hook in hooks]
            tensors |= {f"layer_out.{layer}.T7": y.reshape(7, -1) for layer, y in enumerate(seen)}
        noise[f"T{length}"] = {"eager_fp32_vs_fp64": floor("logits", apart(logits, want)),
                               "sdpa_vs_eager": apart(logits_of(fused, ids), logits),
                               "max_abs_logit": logits.abs().max().item()}
    rows = [text[3:5], text[10:15], text[20:23]]
    for side in ["right", "left"]:
        ids, mask = (torch.tensor(t) for t in padded(rows, pad, side))
        others = {}
        if side == "left":
            others["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
            tensors["left.position_ids"] = others["position_ids"]
        logits = model(input_ids=ids, attention_mask=mask, **others).logits * mask[..., None]
        tensors |= {f"{side}.ids": ids, f"{side}.mask": mask, f"{side}.logits": logits}
        worst = max(apart(logits[i][mask[i] == 1], exact.logits(row)) for i, row in enumerate(rows))
        noise[f"{side}_padded_vs_fp64_unpadded"] = floor("logits", worst)
    if study.store == torch.bfloat16:
        half, stored = load(study, dtype=torch.bfloat16), {}
        for length in [7, 33]:
            ids = tensors[f"ids.T{length}"].tolist()
            stored[f"logits_bf16.T{length}"] = logits_of(half, ids)
            noise[f"bf16_vs_fp32.T{length}"] = apart(stored[f"logits_bf16.T{length}"], logits_of(model, ids))
        write_tensors(study.folder / "forward_bf16.safetensors", stored)
    write_tensors(study.folder / "forward.safetensors", tensors)
    write_json(study.folder / "forward.json", {
        "lengths": lengths, "rows_kept": 8, "noise_floor": noise, "padded_lengths": [len(row) for row in rows]})


def learned_rows(tokenizer, texts):
    """Ids of whole conversations, and how many of them the prompt is: it ends behind the first opened answer."""
    rows = []
    for text in texts:
        prompt = text[: text.index(RESPONSE) + len(RESPONSE)]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids[: len(start)] == start
        rows.append({"text": text, "prompt_chars": len(prompt), "prompt_len": len(start), "input_ids": ids})
    return rows


def batch_of(rows, pad):
    ids, mask = padded([row["input_ids"] for row in rows], pad)
    labels = [[-100] * row["prompt_len"] + row["input_ids"][row["prompt_len"]:] for row in rows]
    width = len(ids[0])
    return {"input_ids": ids, "attention_mask": mask, "labels": [row + [-100] * (width - len(row)) for row in labels]}


def dpo_loss(policy, reference, beta):
    """Mean loss of chosen rows followed by as many rejected ones."""
    half = len(policy) // 2
    gain = [p - r for p, r in zip(policy, reference)]
    return sum(-F.logsigmoid(beta * (gain[i] - gain[half + i])) for i in range(half)) / half


def row_logps(model, ids, mask, learned):
    """Summed log-probs of the learned tokens of every row of a padded batch."""
    logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return (logps.gather(2, ids[:, 1:, None])[..., 0] * learned[:, 1:]).sum(1)


def norm_of(grads):
    return torch.sqrt(sum((g.double() ** 2).sum() for g in grads.values())).item()


def gradients(study, tokenizer, pad):
    folder = study.folder / "grads"
    model = with_lora(load(study), study, 100 + study.seed)
    for name, tensor in lora_of(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(tensor, std=0.05)
    write_adapter(model, study, folder / "adapter")
    exact = Exact.of(study, ["grads/adapter"])
    trained = exact.train()

    def compared(loss, want):
        """The library's gradients, the largest difference, and the largest beyond 1e-4 of the value."""
        model.zero_grad()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in lora_of(model).items()}
        exactly = dict(zip(trained, torch.autograd.grad(want, list(trained.values()))))
        off = max(apart(grads[name], exactly[name]) for name in trained)
        rest = max(((grads[name] - g).abs() - 1e-4 * g.abs()).max() for name, g in exactly.items())
        return grads, off, rest

    rows = learned_rows(tokenizer, [sft_texts(7)[i] for i in (0, 3, 6)])
    batch = batch_of(rows, pad)
    write_json(folder / "batch.json", batch)
    ids, mask, labels = (torch.tensor(batch[key]) for key in ["input_ids", "attention_mask", "labels"])
    sums = -row_logps(model, ids, mask, labels != -100)
    count = int((labels[:, 1:] != -100).sum())
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    want = -sum(exact.sum_logps(row["input_ids"], row["prompt_len"]) for row in rows) / count
    grads, off, rest = compared(loss, want)
    floor("sft grads", rest)
    write_tensors(folder / "grads_sft.safetensors", grads)
    facts = {
        "lora": {"r": study.rank, "alpha": study.alpha, "scale": study.scale},
        "loss": loss.item(), "loss_fp64": want.item(), "n_label_tokens": count,
        "per_sequence": [{"nll_sum": s.item(), "label_tokens": len(row["input_ids"]) - row["prompt_len"]}
                         for s, row in zip(sums, rows)],
        "grad_norm": norm_of(grads),
        "noise_floor": {"loss": floor("sft loss", abs(loss.item() - want.item())),
                        "grad_max_abs_diff_vs_fp64": off,
                        "grad_max_abs": max(g.abs().max().item() for g in grads.values())},
    }

    pairs = [DPOTrainer.tokenize_row(pair, tokenizer, add_special_tokens=False) for pair in dpo_pairs(5)[3:]]
    rows = [(pair["prompt_input_ids"], pair[side]) for side in ["chosen_input_ids", "rejected_input_ids"]
            for pair in pairs]
    ids, mask = padded([prompt + completion for prompt, completion in rows], pad)
    learned = [[0] * len(prompt) + [1] * len(completion) for prompt, completion in rows]
    learned = [row + [0] * (len(ids[0]) - len(row)) for row in learned]
    write_json(folder / "dpo_batch.json", {"input_ids": ids, "attention_mask": mask, "completion_mask": learned,
                                           "rows": "chosen_0, chosen_1, rejected_0, rejected_1"})
    ids, mask, learned = torch.tensor(ids), torch.tensor(mask), torch.tensor(learned)
    with torch.no_grad(), model.disable_adapter():
        reference = row_logps(model, ids, mask, learned)
    policy = row_logps(model, ids, mask, learned)
    loss = dpo_loss(policy, reference, BETA)
    bare = Exact(exact.config, exact.weights)
    exact_policy = [exact.sum_logps(prompt + completion, len(prompt)) for prompt, completion in rows]
    exact_reference = [bare.sum_logps(prompt + completion, len(prompt)) for prompt, completion in rows]
    want = dpo_loss(exact_policy, exact_reference, BETA)
    grads, off, rest = compared(loss, want)
    floor("dpo grads", rest)
    write_tensors(folder / "grads_dpo.safetensors", grads)
    facts["dpo"] = {
        "beta": BETA, "loss": loss.item(), "loss_fp64": want.item(),
        "policy_logps": {"chosen": policy[:2].tolist(), "rejected": policy[2:].tolist()},
        "reference_logps": {"chosen": reference[:2].tolist(), "rejected": reference[2:].tolist()},
        "grad_norm": norm_of(grads),
        "noise_floor": {
            "loss": floor("dpo loss", abs(loss.item() - want.item())),
            "logps": floor("dpo logps", max(apart(policy, torch.stack(exact_policy)),
                                            apart(reference, torch.stack(exact_reference)))),
            "grad_max_abs_diff_vs_fp64": off,
            "grad_max_abs": max(g.abs().max().item() for g in grads.values())},
    }
    write_json(folder / "grads.json", facts)
    ids = learned_rows(tokenizer, [sft_texts(2)[1]])[0]["input_ids"][:8]
    logits = logits_of(model, ids)
    floor("logits", apart(logits, exact.logits(ids)))
    write_tensors(folder / "logits_with_adapter.safetensors", {"ids": torch.tensor(ids), "logits": logits})


class Recorder(TrainerCallback):
    """The log of every step, before anything is rounded for the screen."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        if "grad_norm" in logs:
            self.logs.append(dict(logs))


class Recorded:
    """Mixed into a trainer: rows in order, micro losses as `training_step` returns them, nothing printed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(transformers.PrinterCallback)

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.micro = getattr(self, "micro", []) + [loss.item()]
        return loss


class PlainTrainer(Recorded, Trainer):
    pass


class RecordedSFT(Recorded, SFTTrainer):
    pass


class RecordedDPO(Recorded, DPOTrainer):
    def dpo_loss(self, chosen, rejected, ref_chosen, ref_rejected, *args, **kwargs):
        columns = (t.tolist() for t in (chosen, rejected, ref_chosen, ref_rejected))
        keys = ["logp_chosen", "logp_rejected", "ref_logp_chosen", "ref_logp_rejected"]
        self.pairs = getattr(self, "pairs", []) + [dict(zip(keys, row)) for row in zip(*columns)]
        return super().dpo_loss(chosen, rejected, ref_chosen, ref_rejected, *args, **kwargs)


def arguments(kind, **own):
    # A run under autocast leaves this behind, and every later run would be one.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state()
    fixed = dict(output_dir=str(SCRATCH / "trainer"), report_to="none", save_strategy="no", logging_steps=1, seed=0,
                 use_cpu=True, disable_tqdm=True, gradient_checkpointing=False, optim="adamw_torch",
                 dataloader_num_workers=0)
    return kind(**(fixed | {"bf16": False, "fp16": False} | own))


def sft_arguments(c, kind=TrainingArguments, **own):
    return arguments(kind, max_steps=c["steps"], per_device_train_batch_size=c["bs"],
                     gradient_accumulation_steps=c["ga"], learning_rate=c["lr"], lr_scheduler_type=c["sched"],
                     lr_scheduler_kwargs={} if c["cycles"] is None else {"num_cycles": c["cycles"]},
                     warmup_ratio=c["warmup_ratio"], adam_beta1=c["betas"][0], adam_beta2=c["betas"][1],
                     adam_epsilon=c["eps"], weight_decay=c["weight_decay"], max_grad_norm=c["max_grad_norm"], **own)


def grouped(values, size):
    return [values[i: i + size] for i in range(0, len(values), size)]


def sft_run(study, rows, pad, variant, bf16=False):
    """A run of `Trainer`; `mean_of_means` is what it does for models that take no count of the labels."""
    model = load(study, "sft/adapter_init", trainable=True)
    trainer = PlainTrainer(model, sft_arguments(study.sft, bf16=bf16, remove_unused_columns=False), train_dataset=rows,
                           data_collator=lambda rows: {k: torch.tensor(v) for k, v in batch_of(rows, pad).items()},
                           callbacks=[recorder := Recorder()])
    if variant == "mean_of_means":
        trainer.model_accepts_loss_kwargs = False
    assert trainer.model_accepts_loss_kwargs == (variant == "num_items")
    trainer.train()
    micro = grouped(trainer.micro, study.sft["ga"])
    return model.eval(), {"loss": [sum(step) for step in micro], "micro_loss": micro,
                          "grad_norm": [float(log["grad_norm"]) for log in recorder.logs],
                          "lr": [log["learning_rate"] for log in recorder.logs]}


def sft_exactly(study, rows, variant, rates):
    c, exact = study.sft, Exact.of(study, ["sft/adapter_init"])
    trained = exact.train()
    adamw = ExactAdamW(trained, c["betas"], c["eps"], c["weight_decay"], c["max_grad_norm"])
    losses, norms = [], []
    for step, rate in zip(grouped(rows, c["bs"] * c["ga"]), rates):
        micros = grouped(step, c["bs"])
        counts = [sum(len(row["input_ids"]) - row["prompt_len"] for row in micro) for micro in micros]
        loss = 0
        for micro, count in zip(micros, counts):
            total = sum(counts) if variant == "num_items" else count * len(micros)
            loss = loss - sum(exact.sum_logps(row["input_ids"], row["prompt_len"]) for row in micro) / total
        losses.append(loss.item())
        norms.append(adamw.step(loss, rate))
    return losses, norms, trained, exact


def relative(a, b):
    return max(abs(x / y - 1) for x, y in zip(a, b))


def sft(study, tokenizer, pad):
    c, folder = study.sft, study.folder / "sft"
    rows = learned_rows(tokenizer, sft_texts(c["steps"] * c["bs"] * c["ga"]))
    write_json(folder / "examples.json", rows)
    micros = [batch_of(micro, pad) for micro in grouped(rows, c["bs"])]
    write_json(folder / "batches.json", {"pad_token_id": pad, "steps": grouped(micros, c["ga"])})
    write_adapter(with_lora(load(study), study, 200 + study.seed), study, folder / "adapter_init")
    start = load_file(folder / "adapter_init/adapter_model.safetensors")
    facts = {"config": c | {"warmup_steps": math.ceil(c["steps"] * c["warmup_ratio"]), "lora": {
        "r": study.rank, "alpha": study.alpha, "scale": study.scale, "dropout": 0.0, "targets": study.targets}}}
    shown = [row["input_ids"][:length] for row, length in zip(rows[2:], (5, 3))]
    after, made = {f"ids.{i}": torch.tensor(ids) for i, ids in enumerate(shown)}, {}
    for variant in ["num_items", "mean_of_means"]:
        model, run = sft_run(study, rows, pad, variant)
        write_adapter(model, study, folder / variant / "adapter_final")
        if variant == "num_items" and study.shards > 1:
            write_adapter(model, study, folder / variant / "adapter_final_peft_default_save", everything=True)
        final = load_file(folder / variant / "adapter_final/adapter_model.safetensors")
        losses, norms, exactly, exact = sft_exactly(study, rows, variant, run["lr"])
        logits = [logits_of(model, ids) for ids in shown]
        after |= {f"{variant}.logits.{i}": tensor for i, tensor in enumerate(logits)}
        run["label_tokens"] = grouped([sum(label != -100 for row in micro["labels"] for label in row)
                                       for micro in micros], c["ga"])
        run["crosscheck"] = {"fp64": {
            "loss": floor("sft loss", max(abs(a - b) for a, b in zip(run["loss"], losses))),
            "grad_norm": floor("sft norm", relative(run["grad_norm"], norms)),
            "adapter": floor("sft adapter", max(apart(final[key], exactly[key]) for key in final)),
            "logits": floor("logits", max(apart(a, exact.logits(ids)) for a, ids in zip(logits, shown)))}}
        run["update_size"] = max(apart(final[key], start[key]) for key in final)
        made[variant] = run
    facts["variant_gap"] = {key: max(abs(a - b) for a, b in zip(made["num_items"][key], made["mean_of_means"][key]))
                            for key in ["loss", "grad_norm"]}
    if study.store == torch.bfloat16:
        _, run = sft_run(study, rows, pad, "num_items", bf16=True)
        facts["bf16_autocast_num_items"] = {
            "loss": run["loss"], "grad_norm": run["grad_norm"],
            "max_diff_vs_fp32": {key: max(abs(a - b) for a, b in zip(run[key], made["num_items"][key]))
                                 for key in ["loss", "grad_norm"]}}
    facts |= {f"variants.{variant}": run for variant, run in made.items()}
    write_json(folder / "sft.json", facts)
    write_tensors(folder / "logits_after.safetensors", after)
    sft_of_trl(study, tokenizer, rows, made["num_items"])


def trl_trainer(study, tokenizer, model, rows, **own):
    settings = sft_arguments(study.sft, SFTConfig, packing=False, pad_token="<|endoftext|>", eos_token=EOS, **own)
    return RecordedSFT(model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
                       callbacks=[Recorder()])


def sft_of_trl(study, tokenizer, rows, run):
    """What TRL makes of rows of every kind, and that its run on given ids is the one of `Trainer`."""
    given = [{"input_ids": row["input_ids"],
              "completion_mask": [int(t >= row["prompt_len"]) for t in range(len(row["input_ids"]))]} for row in rows]
    model = load(study, "sft/adapter_init", trainable=True)
    trainer = trl_trainer(study, tokenizer, model, given, max_length=None, completion_only_loss=True)
    trainer.train()
    write_adapter(model, study, SCRATCH / "trl")
    mine, theirs = (load_file(folder / "adapter_model.safetensors")
                    for folder in [study.folder / "sft/num_items/adapter_final", SCRATCH / "trl"])
    losses = [sum(step) for step in grouped(trainer.micro, study.sft["ga"])]
    facts = {"sfttrainer_vs_num_items": {"loss": max(abs(a - b) for a, b in zip(losses, run["loss"])),
                                         "adapter": max(apart(mine[key], theirs[key]) for key in mine)}}
    prompt, right, _ = conversations()[3]
    say = {"role": "user", "content": "Two and two?"}
    kinds = {
        "text_plain": [{"text": text} for text in ["One more.", f"Closed.{EOS}", f"Closed, line end.{EOS}\n",
                                                   prompt + right + EOS]],
        "prompt_completion_text": [
            {"prompt": prompt, "completion": right + EOS}, {"prompt": "2 + 2 =", "completion": " 4"},
            {"prompt": "2 + 2 = ", "completion": f"4{EOS}\n"}, {"prompt": "row\n", "completion": "\nrow"}],
        "prompt_completion_chat": [
            {"prompt": [say], "completion": [{"role": "assistant", "content": "Four."}]},
            {"prompt": [{"role": "system", "content": "Digits."}, say],
             "completion": [{"role": "assistant", "content": "\n4\n"}]}],
        "messages": [{"messages": [say, {"role": "assistant", "content": "Four."}]}],
    }
    for kind, rows in kinds.items():
        for length in [None, 16]:
            trainer = trl_trainer(study, tokenizer, load(study), copy.deepcopy(rows), max_length=length)
            made = list(trainer.train_dataset)
            labels = trainer.data_collator(made)["labels"].tolist()
            facts[f"{kind}|max_length={length}"] = [
                {"row": row, "input_ids": out["input_ids"], "completion_mask": out.get("completion_mask"),
                 "labels": line} for row, out, line in zip(rows, made, labels)]
    write_json(study.folder / "sft/trl_sft.json", facts)


def dpo_exactly(study, c, rows, rates):
    """The run in float64: losses, norms, sums of the policy and of the reference, the trained tensors."""
    started = [c["start_adapter"]] if c["policy"] == "continue" else [
        "sft/num_items/adapter_final", f"dpo/{c['name']}/adapter_init"]
    reference, exact = Exact.of(study, started), Exact.of(study, started)
    trained = exact.train()
    adamw = ExactAdamW(trained, c["betas"], c["eps"], c["wd"], c["max_grad_norm"])
    losses, norms, sums = [], [], []

    def sides(model, row):
        for side in ["chosen_input_ids", "rejected_input_ids"]:
            ids, start = row["prompt_input_ids"] + row[side], len(row["prompt_input_ids"])
            cut = 0 if c["max_length"] is None else max(0, len(ids) - c["max_length"])
            yield model.sum_logps(ids[cut:], start - cut)

    for step, rate in zip(grouped(rows, c["pairs_per_micro_batch"] * c["grad_accum"]), rates):
        loss = 0
        for row in step:
            with torch.no_grad():
                before = list(sides(reference, row))
            now = list(sides(exact, row))
            loss = loss + dpo_loss(now, before, c["beta"]) / len(step)
            sums.append([t.item() for t in now + before])
        losses.append(loss.item())
        norms.append(adamw.step(loss, rate))
    return losses, norms, sums, trained


def dpo_run(study, tokenizer, c, pairs):
    folder = study.folder / "dpo" / c["name"]
    own = {}
    if c["policy"] == "continue":
        model = load(study, c["start_adapter"], trainable=True)
        model.load_adapter(study.folder / c["start_adapter"], adapter_name="ref", is_trainable=False)
        # Loading the second one froze the first.
        model.set_adapter("default")
        own = {"model_adapter_name": "default", "ref_adapter_name": "ref"}
        start = load_file(study.folder / c["start_adapter"] / "adapter_model.safetensors")
    else:
        base = load(study, "sft/num_items/adapter_final").merge_and_unload()
        model = with_lora(base, study, 300 + study.seed)
        write_adapter(model, study, folder / "adapter_init")
        start = load_file(folder / "adapter_init/adapter_model.safetensors")
    settings = arguments(
        DPOConfig, max_steps=c["steps"], per_device_train_batch_size=c["pairs_per_micro_batch"],
        gradient_accumulation_steps=c["grad_accum"], learning_rate=c["lr"], lr_scheduler_type=c["scheduler"],
        warmup_ratio=c["warmup_ratio"], adam_beta1=c["betas"][0], adam_beta2=c["betas"][1], adam_epsilon=c["eps"],
        weight_decay=c["wd"], max_grad_norm=c["max_grad_norm"], beta=c["beta"], loss_type=c["loss_type"],
        max_prompt_length=c["max_prompt_length"], max_length=c["max_length"], truncation_mode=c["truncation_mode"],
        max_completion_length=None, **own)
    trainer = RecordedDPO(model, args=settings, train_dataset=datasets.Dataset.from_list(pairs),
                          processing_class=tokenizer, callbacks=[recorder := Recorder()])
    trainer.train()
    write_adapter(model, study, folder / "adapter_final")
    final = load_file(folder / "adapter_final/adapter_model.safetensors")
    keys = ["prompt_input_ids", "chosen_input_ids", "rejected_input_ids"]
    rows = [{key: row[key] for key in keys} for row in trainer.train_dataset]
    logged = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
              "logps/rejected", "logits/chosen", "logits/rejected"]
    per_step = c["pairs_per_micro_batch"] * c["grad_accum"]
    steps = [{"step": i, "loss": sum(micro), "grad_norm": float(log["grad_norm"]), "lr": log["learning_rate"]}
             | {key: float(log[key]) for key in logged} | {"pairs": pairs}
             for i, (micro, log, pairs) in enumerate(zip(grouped(trainer.micro, c["grad_accum"]), recorder.logs,
                                                         grouped(trainer.pairs, per_step)))]
    losses, norms, sums, exactly = dpo_exactly(study, c, rows, [step["lr"] for step in steps])
    pair_keys = ["logp_chosen", "logp_rejected", "ref_logp_chosen", "ref_logp_rejected"]
    off = [[abs(pair[key] - want) for key, want in zip(pair_keys, row)] for pair, row in zip(trainer.pairs, sums)]
    whole = [DPOTrainer.tokenize_row(pair, tokenizer, add_special_tokens=False) for pair in pairs]
    longer = [max(len(row[side]) for side in keys[1:]) + len(row[keys[0]]) for row in rows]
    write_json(folder / "dpo.json", {
        "config": c | {"warmup_steps": math.ceil(c["steps"] * c["warmup_ratio"]),
                       "lora": {"r": study.rank, "alpha": study.alpha, "scale": study.scale}},
        "prompts_truncated": sum(len(a[keys[0]]) > len(b[keys[0]]) for a, b in zip(whole, rows)),
        "pairs_hit_by_max_length": 0 if c["max_length"] is None else sum(n > c["max_length"] for n in longer),
        "crosscheck_fp64": {
            "loss": floor("dpo loss", max(abs(step["loss"] - want) for step, want in zip(steps, losses))),
            "grad_norm": floor("dpo norm", relative([step["grad_norm"] for step in steps], norms)),
            "logps": floor("dpo logps", max(max(row[:2]) for row in off)),
            "ref_logps": floor("dpo logps", max(max(row[2:]) for row in off)),
            "adapter": floor("dpo adapter", max(apart(final[key], exactly[key]) for key in final))},
        "update_size": max(apart(final[key], start[key]) for key in final),
        "rows": rows, "steps": steps})


def dpo(study, tokenizer):
    run = study.dpo[0]
    pairs = dpo_pairs(run["steps"] * run["pairs_per_micro_batch"] * run["grad_accum"])
    write_json(study.folder / "dpo/pairs.json", pairs)
    prompt = pairs[0]["prompt"]
    awkward = [pairs[0], pairs[1], pairs[2], {"prompt": prompt, "chosen": "", "rejected": "\n"},
               {"prompt": prompt, "chosen": "\n\nx", "rejected": " y"},
               {"prompt": "no marks, ends in a blank ", "chosen": f"a{EOS}b", "rejected": EOS + EOS}]
    rows = []
    for pair in awkward:
        for limits in [{"max_prompt_length": None, "max_completion_length": None},
                       {"max_prompt_length": 11, "max_completion_length": 5}]:
            rows.append(pair | limits | DPOTrainer.tokenize_row(pair, tokenizer, add_special_tokens=False, **limits))
    write_json(study.folder / "dpo/tokenize_row.json", rows)
    for c in study.dpo:
        dpo_run(study, tokenizer, c, pairs)


def probe(study, ids_of):
    folder, caps = study.folder / "probe", [1000, 24]
    pairs = [pair | {"chosen_ids": ids_of(pair["chosen"]), "rejected_ids": ids_of(pair["rejected"]),
                     "prompt_ids": ids_of(pair["prompt"])} for pair in probe_pairs()]
    assert any(len(pair["chosen_ids"]) > 24 for pair in pairs)
    write_json(folder / "pairs.json", pairs)
    facts, worst, tokens = {}, 0.0, {}
    for name, adapter in [("base", None), ("sft", "sft/num_items/adapter_final"), ("dpo", "dpo/beta0.2/adapter_final")]:
        model, exact = load(study, adapter), Exact.of(study, [adapter] if adapter else [])
        rows = []
        for i, pair in enumerate(pairs):
            values = {}
            for side in ["chosen", "rejected"]:
                start, ids = len(pair["prompt_ids"]), pair["prompt_ids"] + pair[f"{side}_ids"]
                logits = logits_of(model, ids)[:-1]
                logps = logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[start - 1:, 0]
                values[side] = logps.double().tolist(), exact.logps(ids)[start - 1:].tolist()
                if name == "sft" and i < 2:
                    tokens[f"sft.pair{i}.{side}"] = logps
            of_caps = {}
            for cap in caps:
                entry = {}
                for side in ["chosen", "rejected"]:
                    mean, want = (sum(v[:cap]) / len(v[:cap]) for v in values[side])
                    entry |= {f"n_{side}": len(values[side][0][:cap]), f"alp_{side}": mean}
                    worst = max(worst, abs(mean - want))
                of_caps[str(cap)] = entry | {"margin": entry["alp_chosen"] - entry["alp_rejected"]}
            rows.append({"pair": i, "caps": of_caps})
        facts[f"models.{name}"] = {"adapter": adapter, "rows": rows, "mean_margin": {
            str(cap): sum(row["caps"][str(cap)]["margin"] for row in rows) / len(rows) for cap in caps}}
    write_json(folder / "probe.json", {"caps": caps, "noise_floor": {"alp_vs_fp64": floor("alp", worst)}} | facts)
    write_tensors(folder / "token_logps.safetensors", tokens)


def greedy(model, ids, mask, length, **own):
    """New ids of every row, and how far the best logit was ahead of the second at the closest choice of each."""
    settings = GenerationConfig(max_new_tokens=length, do_sample=False, **({"eos_token_id": None} | own))
    # What the model's own file says (sampling, a penalty) would come in wherever these say nothing.
    model.generation_config = GenerationConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), generation_config=settings,
                             return_dict_in_generate=True, output_scores=True)
    best = torch.stack(out.scores).topk(2, dim=-1).values
    new = out.sequences[:, len(ids[0]):].tolist()
    return new, (best[..., 0] - best[..., 1]).min(0).values.tolist()


def generation(study, ids_of, pad):
    model, length = load(study), 24
    texts = ["Once, in a small town", conversations()[2][0], conversations()[13][0]]
    prompts = [{"text": text, "ids": ids_of(text)} for text in texts]

    def single(model, **own):
        runs = [greedy(model, [p["ids"]], [[1] * len(p["ids"])], length, pad_token_id=pad, **own) for p in prompts]
        return {"new_ids": [new[0] for new, _ in runs], "min_top2_logit_gap": [gap[0] for _, gap in runs]}

    plain = single(model)
    ids, mask = padded([p["ids"] for p in prompts], pad, "left")
    batch, _ = greedy(model, ids, mask, length, pad_token_id=pad)
    assert batch == plain["new_ids"]
    # A stop id that comes late in one completion and, best, in no other at the same place.
    first = plain["new_ids"][0]
    stop = next(token for i, token in enumerate(first) if i >= 5 and token not in first[:i])
    stopped = single(model, eos_token_id=stop)["new_ids"]
    facts = {
        "max_new_tokens": length, "prompts": prompts, "greedy": plain,
        "greedy_left_padded_batch": {"input_ids": ids, "attention_mask": mask, "new_ids": batch},
        "greedy_eos": {"eos_token_id": stop, "single_new_ids": stopped,
                       "batch_new_ids": greedy(model, ids, mask, length, pad_token_id=pad, eos_token_id=stop)[0]},
        "greedy_repetition_penalty_1.1": single(model, repetition_penalty=1.1) | {
            "note": "ids of the prompt count as said; a logit above 0 is divided by the penalty, one below multiplied"},
    }
    if not study.config["tie_word_embeddings"]:
        facts["greedy_sft_merged"] = single(load(study, "sft/num_items/adapter_final").merge_and_unload())
    gaps = [gap for entry in facts.values() if isinstance(entry, dict) for gap in entry.get("min_top2_logit_gap", [])]
    assert min(gaps) > 1e-3, f"{study.name}: a choice of greedy decoding is too close ({min(gaps)}); take another seed"
    write_json(study.folder / "generate.json", facts)


@torch.no_grad()
def sampling(study, ids_of):
    context = ids_of(conversations()[2][0])
    logits = logits_of(load(study), context)[-1]
    tensors, cases = {"context_ids": torch.tensor(context), "logits": logits}, []
    settings = [(1.0, 1.0, 0, 1.0), (1.0, 0.7, 0, 1.0), (1.0, 1.0, 20, 1.0), (1.0, 1.0, 0, 0.8), (1.1, 0.7, 20, 0.8),
                (1.05, 0.6, 50, 0.95), (1.3, 1.5, 1, 1.0), (1.0, 0.3, 0, 0.05)]
    for i, (penalty, temperature, top_k, top_p) in enumerate(settings):
        scores, row = logits[None].clone(), torch.tensor([context])
        if penalty != 1.0:
            scores = RepetitionPenaltyLogitsProcessor(penalty)(row, scores)
        scores = TemperatureLogitsWarper(temperature)(row, scores)
        if top_k:
            scores = TopKLogitsWarper(top_k)(row, scores)
        if top_p < 1.0:
            # Where the sum lands on the limit itself, rounding would decide what is kept.
            sums = scores.double().softmax(-1).sort(descending=True).values.cumsum(-1)
            assert (sums - top_p).abs().min() > 1e-5
            scores = TopPLogitsWarper(top_p)(row, scores)
        probs = scores.softmax(-1)[0]
        tensors[f"probs.{i}"] = probs
        cases.append({"case": i, "repetition_penalty": penalty, "temperature": temperature, "top_k": top_k,
                      "top_p": top_p, "kept": int((probs > 0).sum())})
    write_tensors(study.folder / "sampling.safetensors", tensors)
    write_json(study.folder / "sampling.json", {
        "order": "repetition_penalty, temperature, top_k, top_p, softmax (fp32)", "cases": cases})


@torch.no_grad()
def merged(study, ids_of):
    """Weights with the adapter in them. A tied head is written out: only it changes, the embedding stays."""
    folder, adapter = study.folder / "merged", "sft/num_items/adapter_final"
    tied = study.config["tie_word_embeddings"]
    ids = ids_of(sft_texts(6)[5])[:6]
    base, active = load(study), load(study, adapter)
    deltas = {name.removeprefix("base_model.model."): module.get_delta_weight("default")
              for name, module in active.named_modules() if hasattr(module, "get_delta_weight")}
    whole = copy.deepcopy(base)
    if tied:
        whole.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
        whole.config.tie_word_embeddings = False
    weights = {}
    for name, delta in deltas.items():
        weight = whole.get_submodule(name).weight
        weight += delta
        weights[name + ".weight"] = weight
    exact = Exact.of(study, [adapter])
    logits = {"logits_base": logits_of(base, ids), "logits_adapter": logits_of(active, ids),
              "logits_merged": logits_of(whole, ids)}
    floor("logits", apart(logits["logits_merged"], exact.logits(ids)))
    start = dict(base.named_parameters()) | {"lm_head.weight": base.lm_head.weight}
    facts = {
        "adapter": adapter,
        "max_abs_diff_merged_vs_adapter_logits": floor("logits", apart(logits["logits_merged"],
                                                                      logits["logits_adapter"])),
        "max_abs_diff_adapter_vs_base_logits": apart(logits["logits_adapter"], logits["logits_base"]),
        "max_abs_weight_change": {"model.embed_tokens.weight": apart(whole.model.embed_tokens.weight,
                                                                     base.model.embed_tokens.weight)}
        | {name: apart(weight, start[name]) for name, weight in weights.items()},
    }
    write_tensors(folder / "merged_weights_fp32.safetensors", weights)
    by_peft = load(study, adapter).merge_and_unload()
    if tied:
        # PEFT adds the head's part to the shared tensor, so the embedding moves as well.
        logits["logits_naive_tied_merge"] = logits_of(by_peft, ids)
        facts["naive_tied_merge"] = {
            "embedding_changed": apart(by_peft.model.embed_tokens.weight, base.model.embed_tokens.weight),
            "still_tied": by_peft.lm_head.weight.data_ptr() == by_peft.model.embed_tokens.weight.data_ptr(),
            "max_abs_diff_vs_adapter_logits": apart(logits["logits_naive_tied_merge"], logits["logits_adapter"])}
    else:
        assert max(apart(dict(by_peft.named_parameters())[name], weight) for name, weight in weights.items()) < 1e-6
    if study.store == torch.bfloat16:
        half = dict(load(study, adapter, dtype=torch.bfloat16).merge_and_unload().named_parameters())
        stored = {name: half[name] for name in weights}
        facts["bf16"] = {
            "note": "base in bfloat16, LoRA in float32, merged by PEFT; how many elements are not the fp32 merge, "
                    "rounded to bfloat16",
            "elements_differing": sum(int((stored[name] != weights[name].bfloat16()).sum()) for name in weights),
            "of": sum(t.numel() for t in stored.values()),
            "max_abs_diff": max(apart(stored[name], weights[name].bfloat16()) for name in weights),
            "total_changed_vs_base": sum(int((stored[name] != start[name].bfloat16()).sum()) for name in weights)}
        write_tensors(folder / "merged_weights_bf16_peft.safetensors", stored)
        saved = load_file(study.folder / adapter.replace("adapter_final", "adapter_final_peft_default_save")
                          / "adapter_model.safetensors")
        facts["peft_default_save_extra_keys"] = {key: [list(tensor.shape)] for key, tensor in saved.items()
                                                 if ".lora_" not in key}
    write_tensors(folder / "logits.safetensors", {"ids": torch.tensor(ids)} | logits)
    write_json(folder / "merged.json", facts)


def schedules(folder):
    cases = []
    for name, steps, ratio, cycles in [
            ("cosine_with_restarts", 12, 0.1, 2), ("cosine_with_restarts", 29, 0.05, 3), ("cosine", 6, 0.0, None),
            ("cosine", 23, 0.1, None), ("linear", 17, 0.05, None), ("constant", 4, 0.0, None),
            ("constant_with_warmup", 9, 0.3, None)]:
        warmup = math.ceil(steps * ratio)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps,
                                              scheduler_specific_kwargs={"num_cycles": cycles} if cycles else {})
        cases.append({"scheduler": name, "total_steps": steps, "warmup_ratio": ratio, "warmup_steps": warmup,
                      "num_cycles": cycles,
                      "multiplier": [float(schedule.lr_lambdas[0](i)) for i in range(steps + 1)]})
    write_json(folder / "schedules.json", cases)


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    if folder.exists() and any(folder.iterdir()) and not (folder / "schedules.json").is_file():
        raise SystemExit(f"{folder} holds something else; name a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # PEFT says at every load that a LoRA on a tied head needs care; `merged` is about that.
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    datasets.disable_progress_bars()
    datasets.disable_caching()
    spec, pattern = make_tokenizer()
    id_of = {token["content"]: token["id"] for token in spec["added_tokens"]}
    ids = {"pad": id_of["<|endoftext|>"], "eos": id_of[EOS], "im_start": id_of["<|im_start|>"],
           "endoftext": id_of["<|endoftext|>"], "len": max(id_of.values()) + 1,
           "bpe_vocab": len(spec["model"]["vocab"])}
    for study in studies(ids):
        study.folder = folder / study.name
        write_tokenizer(study.folder / "model", spec, study.merges)
        write_model(study, ids)
        tokenizer = AutoTokenizer.from_pretrained(study.folder / "model")
        assert len(tokenizer) == ids["len"] and tokenizer.eos_token_id == ids["eos"]

        def ids_of(text):
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        tokenization(study, tokenizer, pattern, ids)
        forward(study, ids_of, ids["pad"])
        gradients(study, tokenizer, ids["pad"])
        sft(study, tokenizer, ids["pad"])
        dpo(study, tokenizer)
        probe(study, ids_of)
        generation(study, ids_of, ids["pad"])
        sampling(study, ids_of)
        merged(study, ids_of)
    schedules(folder)
    for quantity, value in FLOORS.items():
        print(f"{quantity:12} {value:.1e} from float64, at most {LIMITS[quantity]:.1e}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{size} bytes in {folder}")


if __name__ == "__main__":
    main()
