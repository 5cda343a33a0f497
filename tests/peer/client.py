"""`pipe` as a client of a real OpenAI-compatible server: llama.cpp's, which comes in the wheel `xllamacpp`.

    python tests/peer/client.py PIPE [--keep FOLDER]

PIPE is the binary. The bundled model `mini-teacher` is exported, written as GGUF and served on this machine; `generate`
stages ask the server through an endpoint. One line is printed for every check; the exit code is 1 if one fails. `--keep`
puts everything into FOLDER, for a look at it afterwards.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

KEY = "sk-of-the-peer-0123456789abcdef"
RECORDS = 80
MAX_TOKENS = 40

MANIFEST = """\
manifest = 1
title    = "Answers by a server"

[endpoint.peer]
url             = "http://127.0.0.1:PORT/v1"
model           = "mini-teacher"
api_key_env     = "PEER_KEY"
max_concurrency = 4
price_in        = 1.0
price_out       = 2.0

[endpoint.other]
url         = "http://127.0.0.1:PORT/v1"
model       = "nobody"
api_key_env = "PEER_KEY"

[stage.teacher]
kind   = "model"
source = "init:mini-teacher"

[stage.problems]
kind   = "dataset"
source = "path:problems.jsonl"

[stage.answers]
kind       = "generate"
endpoint   = "peer"
data       = "problems"
prompt     = "{{ problem }}"
max_tokens = MAX_TOKENS

[stage.here]                    # the same by the engine itself
kind       = "generate"
model      = "teacher"
data       = "problems"
prompt     = "{{ problem }}"
max_tokens = MAX_TOKENS

[stage.drawn]
kind        = "generate"
endpoint    = "peer"
data        = "problems"
prompt      = "{{ problem }}"
n           = 2
temperature = 1.0
seed        = 7
max_tokens  = MAX_TOKENS

[stage.strange]
kind       = "generate"
endpoint   = "other"
data       = "problems"
prompt     = "{{ problem }}"
max_tokens = MAX_TOKENS
"""


class Report:
    def __init__(self):
        self.failed = 0

    def fact(self, what, good):
        self.failed += not good
        print(f"{'ok' if good else 'FAIL':4} {what}", flush=True)

    def note(self, what):
        print(f"     {what}", flush=True)


def floats(raw, dtype, shape):
    import numpy

    if dtype == "BF16":
        values = (numpy.frombuffer(raw, dtype="<u2").astype(numpy.uint32) << 16).view(numpy.float32)
    else:
        values = numpy.frombuffer(raw, dtype="<f4")
    return values.reshape(shape).copy()


def tensors(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, floats(data[start:end], entry["dtype"], entry["shape"])


NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def write_gguf(folder, path):
    """An exported Qwen2 folder as one GGUF file, every weight in f32."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    about = json.loads((folder / "tokenizer_config.json").read_text())
    out = gguf.GGUFWriter(path, "qwen2")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_file_type(gguf.LlamaFileType.ALL_F32)

    texts = {id: text for text, id in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    rows = range(config["vocab_size"])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list([special.get(id) or texts.get(id) or f"[unused {id}]" for id in rows])
    kinds = gguf.TokenType
    out.add_token_types([kinds.CONTROL if id in special else kinds.NORMAL if id in texts else kinds.UNUSED for id in rows])
    merges = tokenizer["model"]["merges"]
    out.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    by_text = {text: id for id, text in special.items()}
    out.add_eos_token_id(by_text[about["eos_token"]])
    out.add_pad_token_id(by_text[about["pad_token"]])
    out.add_add_bos_token(False)
    out.add_chat_template(about["chat_template"])
    for name, values in tensors(folder / "model.safetensors"):
        out.add_tensor(gguf_name(name), values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def serve(model, port):
    """The server's own process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.model_alias = {"mini-teacher"}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.api_keys = [KEY]
    params.n_ctx = 2048
    params.n_parallel = 4
    params.cpuparams.n_threads = 1
    params.use_jinja = True
    params.warmup = False
    params.n_gpu_layers = 0
    # As exact as the engine: by default keys and values are kept in f16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pipe:
    def __init__(self, binary, folder):
        self.binary, self.folder = str(binary), folder

    def start(self, *arguments, cache="cache", key=KEY):
        command = [self.binary, *map(str, arguments), "--cache", cache]
        where = dict(cwd=self.folder, env=os.environ | {"PEER_KEY": key}, text=True)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **where)

    def any(self, *arguments, **how):
        process = self.start(*arguments, **how)
        stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr

    def __call__(self, *arguments, **how):
        code, stdout, stderr = self.any(*arguments, **how)
        if code:
            print(stdout + stderr, file=sys.stderr)
            raise SystemExit(f"exit code {code}: pipe {' '.join(map(str, arguments))}")
        return stdout

    def export(self, stage, name, cache="cache"):
        folder = self.folder / f"{cache}-{stage}"
        shutil.rmtree(folder, ignore_errors=True)
        self("export", "m.toml", stage, folder, cache=cache)
        return folder / name

    def lines(self, stage, cache="cache"):
        return [json.loads(line) for line in self.export(stage, "data.jsonl", cache).read_text().splitlines()]

    def journal(self, cache="cache"):
        """Whole lines, as the next process will find them."""
        text = "".join(path.read_text() for path in (self.folder / cache / "journal").glob("mini-teacher-*.jsonl"))
        return [json.loads(line) for line in text.split("\n")[:-1] if line.endswith("}")]

    def planned(self, stage, cache="cache"):
        cells = json.loads(self("plan", "m.toml", stage, "--json", cache=cache))["cells"]
        return next(cell.get("work") for cell in cells if cell["cell"] == stage)


def replies(journal):
    return [json.loads(line["body"]) for line in journal]


def words(text):
    """Without the marks and blanks around thinking, which the server takes away and `pipe` puts back in its own way."""
    return re.sub(r"</?think>", " ", text).split()


def wait_for(url):
    for _ in range(600):
        try:
            return urllib.request.urlopen(url, timeout=1)
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the server at {url} does not come up")


def check(report, pipe):
    pipe("run", "m.toml", "problems", "teacher", "-q")

    # Found before anything runs.
    code, _, said = pipe.any("run", "m.toml", "answers", key="sk-wrong-0123456789abcdef")
    report.fact("a wrong key is found before the run (exit 3)", code == 3 and "remote::bad_key" in said)
    report.fact("and no reply was asked for with it", pipe.journal() == [])
    code, _, said = pipe.any("run", "m.toml", "strange")
    if code == 3:
        report.fact("a wrong model name is found before the run (exit 3)", "remote::unknown_model" in said)
    else:
        report.fact("this server takes any model name, and the run ends", code == 0)
        bill = json.loads(pipe.export("strange", "usage.json").read_text())
        report.note(f"asked for `nobody`, answered as {', '.join(bill['reported_models'])}")

    # A kill in the middle.
    planned = pipe.planned("answers")
    report.fact(f"the plan counts {RECORDS} calls", planned["at_most"]["calls"] == RECORDS)
    running = pipe.start("run", "m.toml", "answers")
    while len(pipe.journal()) < RECORDS // 4 and running.poll() is None:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    before = pipe.journal()
    report.fact(f"killed with {len(before)} of {RECORDS} replies in the journal", 0 < len(before) < RECORDS)
    planned = pipe.planned("answers")
    left = RECORDS - len(before)
    report.fact(f"the plan counts the {left} calls that are left", planned["at_most"]["calls"] == left)
    likely = planned["likely"]
    report.fact("and tells what is likely, by these replies", likely["by_replies"] == len(before))
    pipe("run", "m.toml", "answers")
    after = pipe.journal()
    keys = [line["key"] for line in after]
    report.fact(f"the next run adds {left} replies and asks nothing twice", len(after) == len(set(keys)) == RECORDS)
    report.fact("replies that were there are as they were", after[: len(before)] == before)
    spent = sum(reply["usage"]["completion_tokens"] for reply in replies(after[len(before) :]))
    report.note(f"completion tokens of the rest: likely {likely['completion_tokens']}, came {spent}")
    pipe("run", "m.toml", "answers")
    report.fact("a third run asks nothing", pipe.journal() == after)

    # What replies say.
    usage = [reply["usage"] for reply in replies(after)]
    bill = json.loads(pipe.export("answers", "usage.json").read_text())
    sums = [sum(one[name] for one in usage) for name in ("prompt_tokens", "completion_tokens")]
    report.fact(f"tokens are counted: {sums[0]} and {sums[1]}", [bill["prompt_tokens"], bill["completion_tokens"]] == sums)
    report.fact("and paid for", abs(bill["cost"] - (sums[0] + 2 * sums[1]) / 1e6) <= 1e-12)
    within = all(line["prompt_bound"] >= one["prompt_tokens"] for line, one in zip(after, usage))
    report.fact("no prompt has more tokens than it was reckoned at", within)
    ends = [reply["choices"][0]["finish_reason"] for reply in replies(after)]
    report.note(f"ends: {', '.join(f'{end} {ends.count(end)}' for end in sorted(set(ends)))}")

    # Cut and asked again.
    short = 6
    pipe("run", "m.toml", "answers", "--set", f"stage.answers.max_tokens={short}", cache="short")
    cut = pipe.journal("short")
    ends = [reply["choices"][0]["finish_reason"] for reply in replies(cut)]
    full = [reply["usage"]["completion_tokens"] for reply in replies(cut)]
    longest = max(full) <= short
    report.fact(f"`max_tokens = {short}` cuts {ends.count('length')} of {RECORDS}", "length" in ends and longest)
    planned = pipe.planned("answers", "short")
    report.fact("the plan would ask again for those alone", planned["at_most"]["calls"] == ends.count("length"))
    pipe("run", "m.toml", "answers", cache="short")
    report.fact("and so does the run", len(pipe.journal("short")) == RECORDS + ends.count("length"))

    # The same again.
    texts = [line["completion"] for line in pipe.lines("answers")]
    again = [line["completion"] for line in pipe.lines("answers", "short")]
    report.fact("temperature 0: the same texts from another cache", texts == again)
    pipe("run", "m.toml", "here")
    here = [line["completion"] for line in pipe.lines("here")]
    same = sum(words(a) == words(b) for a, b in zip(texts, here))
    report.fact(f"temperature 0: {same} of {RECORDS} texts are those of the engine itself", same >= 0.95 * RECORDS)
    one = ("--set", "endpoint.peer.max_concurrency=1")
    drawn = []
    for cache in ("drawn-1", "drawn-2"):
        pipe("run", "m.toml", "drawn", *one, cache=cache)
        drawn.append([line["completion"] for line in pipe.lines("drawn", cache)])
    equal = sum(a == b for a, b in zip(*drawn))
    report.fact(f"temperature 1 with seeds: {equal} of {2 * RECORDS} samples come again", equal >= 0.95 * 2 * RECORDS)
    apart = sum(a != b for a, b in zip(drawn[0][::2], drawn[0][1::2]))
    report.fact(f"and the two samples of a problem differ in {apart} of {RECORDS}", apart > 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pipe", type=Path, nargs="?", help="the binary")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder that everything stays in")
    parser.add_argument("--serve", nargs=2, metavar=("GGUF", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], int(arguments.serve[1]))
    if arguments.pipe is None:
        parser.error("the binary is missing")
    report = Report()
    with tempfile.TemporaryDirectory(prefix="client-") as scratch:
        folder = arguments.keep.resolve() if arguments.keep else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        manifest = MANIFEST.replace("PORT", str(port)).replace("= MAX_TOKENS", f"= {MAX_TOKENS}")
        (folder / "m.toml").write_text(manifest)
        problems = Path(__file__).parent.parent.parent / "pipelines/mini/math500.jsonl"
        lines = problems.read_text().splitlines(keepends=True)[:RECORDS]
        (folder / "problems.jsonl").write_text("".join(lines))
        assert len(lines) == RECORDS
        pipe = Pipe(arguments.pipe.resolve(strict=True), folder)
        pipe("run", "m.toml", "teacher", "-q")
        write_gguf(pipe.export("teacher", "config.json").parent, folder / "teacher.gguf")
        with open(folder / "server.log", "w") as log:
            command = [sys.executable, __file__, "--serve", str(folder / "teacher.gguf"), str(port)]
            server = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                wait_for(f"http://127.0.0.1:{port}/health")
                check(report, pipe)
            finally:
                server.kill()
                server.wait()
    print(f"{report.failed} checks failed" if report.failed else "all as they should be")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
