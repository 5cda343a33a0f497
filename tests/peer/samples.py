"""What `pipe export --format lm-eval` writes, read by lm-evaluation-harness 0.4.9, pandas and datasets.

    python tests/peer/samples.py PIPE [--keep FOLDER]

PIPE is the binary. Two evaluations of a small random model (one sample of a problem, and three) are run and exported.
The harness's own functions find the files, compute the hashes of every row again and write every row again; pandas
and datasets load them. A line is printed for every comparison; the exit code is 1 if one fails.

The harness is imported without its `__init__`, which would need torch and every metric it knows.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas
from datasets import load_dataset

for name in ["lm_eval", "lm_eval.loggers"]:
    bare = types.ModuleType(name)
    where = importlib.util.find_spec("lm_eval").submodule_search_locations if name == "lm_eval" else None
    bare.__path__ = list(where) if where else [str(Path(sys.modules["lm_eval"].__path__[0]) / "loggers")]
    bare.__spec__ = importlib.util.spec_from_loader(name, None, is_package=True)
    sys.modules[name] = bare

from lm_eval import utils
from lm_eval.loggers.evaluation_tracker import EvaluationTracker

MANIFEST = """\
manifest = 1
title    = "Samples for another program"

[stage.base]
kind      = "model"
source    = "init:random"
tokenizer = "init:mini"
init      = { hidden_size = 32, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, \
intermediate_size = 48, seed = 1 }

[stage.pens]
kind   = "dataset"
source = "path:pens.jsonl"

[stage.eval]
kind        = "eval"
axes        = { n = [1, 3] }
model       = "base"
task        = "pens"
prefill     = "\\\\boxed{7}\\n"
max_tokens  = 12
temperature = 1.0
n           = "{n}"
"""

# Everything that text, numbers and nesting can do to a hash.
PENS = [
    {"id": "plain", "problem": "Eva has 7 pens.", "answer": "7"},
    {"id": 12, "problem": 'Eva has "8" pens.\n\tAll \\ of them: \u00e9 \u6570 \U0001f58a \u007f \u0001', "answer": 8},
    {"problem": "Eva has 9 pens.", "answer": "7.0", "weights": [1.0, 1e-7, 2.5e16, -0.0, 1e15, 0.0001, 3], "no": None},
    {"id": "nested", "problem": "Eva?", "answer": "7", "more": {"empty": {}, "list": [], "deep": [[1, {"a": True}]]}},
    {"id": "choice", "question": "Which?", "choices": ["red", "green", "blue"], "answer": "blue"},
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("pipe", type=Path)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    failures = []

    def check(what, holds):
        print(f"{'ok  ' if holds else 'FAIL'}  {what}", flush=True)
        if not holds:
            failures.append(what)

    (folder / "study.toml").write_text(MANIFEST, encoding="utf-8")
    lines = [json.dumps(pen, ensure_ascii=False) + "\n" for pen in PENS]
    (folder / "pens.jsonl").write_text("".join(lines), encoding="utf-8")
    binary = arguments.pipe.resolve()
    for command in [["run", "study.toml"], ["export", "study.toml", "eval", "logs", "--format", "lm-eval"]]:
        subprocess.run([binary, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)

    models = [path for path in (folder / "logs").iterdir() if path.is_dir()]
    check("a folder for the model", len(models) == 1)
    model = models[0]
    names = [path.as_posix() for path in model.iterdir()]
    found = utils.get_results_filenames(names)
    check("the harness finds one file of results", len(found) == 1)
    results = json.loads(Path(utils.get_latest_filename(found)).read_text(encoding="utf-8"))
    check("the folder has the name it gives it", model.name == utils.sanitize_model_name(results["model_name"]))
    for name in ["group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples"]:
        check(f"`{name}` names the tasks", set(results[name]) == set(results["results"]))
    samples = {utils.get_file_task_name(Path(path).name): path for path in utils.get_sample_results_filenames(names)}
    check("it finds the samples of every task", set(samples) == set(results["configs"]) and len(samples) == 2)

    # The harness writes what it would have had in memory.
    again = EvaluationTracker(output_path=str(folder / "again"))
    again.general_config_tracker.model_name = results["model_name"]
    again.general_config_tracker.model_name_sanitized = results["model_name_sanitized"]
    rows = {task: [json.loads(line) for line in open(path, encoding="utf-8")] for task, path in samples.items()}
    memory = {}
    for task, all_rows in rows.items():
        memory[task] = [dict(row, arguments=[tuple(row["arguments"]["gen_args_0"].values())]) for row in all_rows]
    ours = {name: value for name, value in results.items() if name != "task_hashes"}
    again.save_results_aggregated(results=dict(ours), samples=memory)
    for task, all_rows in memory.items():
        again.save_results_samples(task_name=task, samples=all_rows)
    written = folder / "again" / model.name
    theirs = json.loads(next(written.glob("results_*.json")).read_text(encoding="utf-8"))
    check("the hashes of tasks are those it computes", theirs["task_hashes"] == results["task_hashes"])
    check("it adds nothing to the results that is not there", set(theirs) == set(results))
    for task, all_rows in rows.items():
        path = next(written.glob(f"samples_{task}_*.jsonl"))
        theirs = [json.loads(line) for line in open(path, encoding="utf-8")]
        check(f"{task}: rows are those it writes, all {len(PENS)}", theirs == all_rows and len(theirs) == len(PENS))
        for row in all_rows:
            doc = json.dumps(row["doc"], indent=2, default=utils.handle_non_serializable, ensure_ascii=False)
            prompt = row["arguments"]["gen_args_0"]["arg_0"]
            hashes = [utils.hash_string(text) for text in (doc, prompt, str(row["target"]))]
            same = hashes == [row["doc_hash"], row["prompt_hash"], row["target_hash"]]
            # A record without an id was given one.
            kept = row["doc"] == {"id": row["doc"]["id"], **PENS[row["doc_id"]]}
            check(f"{task}: hashes of row {row['doc_id']}", same and kept)
        values = [row["exact_match"] for row in all_rows]
        score = results["results"][task]
        check(f"{task}: the score is the mean", math.isclose(score["exact_match,extract"], statistics.mean(values)))
        error = statistics.stdev(values) / math.sqrt(len(values))
        check(f"{task}: and its standard error", math.isclose(score["exact_match_stderr,extract"], error))
        repeats = results["configs"][task]["repeats"]
        check(f"{task}: {repeats} samples a row", all(len(row["resps"][0]) == repeats for row in all_rows))
        frame = pandas.read_json(samples[task], lines=True)
        same = math.isclose(frame["exact_match"].mean(), statistics.mean(values))
        check(f"{task}: pandas", len(frame) == len(PENS) and same)
        # Records of one shape are what datasets can hold; ours differ on purpose.
        alike = [{name: value for name, value in row.items() if name != "doc"} for row in all_rows]
        plain = folder / "plain.jsonl"
        plain.write_text("".join(json.dumps(row) + "\n" for row in alike), encoding="utf-8")
        loaded = load_dataset("json", data_files=str(plain), split="train", cache_dir=str(folder / "datasets"))
        check(f"{task}: datasets", len(loaded) == len(PENS) and loaded[0]["filter"] == "extract")

    first = {path.name: path.read_bytes() for path in model.iterdir()}
    command = [binary, "export", "study.toml", "eval", "twice", "--format", "lm-eval"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    second = {path.name: path.read_bytes() for path in (folder / "twice" / model.name).iterdir()}
    check("a second export has the same bytes", first == second)
    if not arguments.keep:
        shutil.rmtree(folder)
    print(f"{len(failures)} failed" if failures else "all hold")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
