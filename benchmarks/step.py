"""A training step under ZeRO-3: `zlora train` beside PEFT + Trainer + DeepSpeed, same base, data, ranks and memory configuration.

    python benchmarks/step.py [--ranks 2] [--steps 30] [--rounds 3] [--record FILE]

The base is a random GPT-2 of 6 layers, width 384, vocabulary 50,257 (30M parameters), fp32; the data are the demo's films, 16
examples a step. Runs the ways in turn and prints the median seconds of a step after the first five (ZeRO-3 records its trace).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from machine import origin
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

HERE = Path(__file__).parent
CONFIG = HERE.parent / "ds_configs" / "zero3.json"
DATA = HERE.parent / "jobs" / "demo" / "data" / "films" / "train.jsonl"
TOKENIZER = HERE.parent / "jobs" / "demo" / "base"
EXAMPLES, WARM_UP = 16, 5
JOB = """
[base]
model = "{base}"
dtype = "fp32"
[[methods]]
kind = "lora"
targets = ["q", "v"]
rank = 4
alpha = 32
[task]
kind = "jsonl"
data = "{data}"
separator = "<|endoftext|>"
[train]
steps = {steps}
batch_examples = {examples}
learning_rate = 1e-3
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        base = make_base(Path(scratch) / "base")
        rounds = []
        for turn in range(1, asked.rounds + 1):
            ours = run_ours(Path(scratch), base, asked.ranks, asked.steps)
            theirs = run_theirs(Path(scratch), base, asked.ranks, asked.steps)
            rounds.append((ours, theirs))
            console.print(f"round {turn}: ours {ours:.3f} s, PEFT + Trainer {theirs:.3f} s a step")
    table = Table(
        "round", "ours s/step", "PEFT + Trainer s/step", "ratio", title="A step of 16 examples under ZeRO-3", title_justify="left"
    )
    cells = [[str(n), f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}"] for n, (ours, theirs) in enumerate(rounds, 1)]
    for row in cells:
        table.add_row(*row)
    console.print(table)
    ratio = f"median ratio of {asked.rounds} paired rounds: {median(theirs / ours for ours, theirs in rounds):.2f}"
    console.print(ratio)
    if asked.record:
        rows = [
            "| round | ours s/step | PEFT + Trainer s/step | ratio |",
            "|---|---|---|---|",
            *("| " + " | ".join(row) + " |" for row in cells),
        ]
        head = ["# A training step: ours beside PEFT + Trainer", "", *origin("step.py", "torch", "deepspeed", "transformers", "peft"), ""]
        asked.record.write_text("\n".join([*head, *rows, "", ratio, ""]), encoding="utf-8")


def make_base(folder: Path) -> Path:
    logging.disable_progress_bar()
    GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=384, n_head=6, n_positions=256)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def run_ours(scratch: Path, base: Path, ranks: int, steps: int) -> float:
    job = scratch / "job.toml"
    job.write_text(JOB.format(base=base, data=DATA, steps=steps, examples=EXAMPLES))
    run = scratch / "run"
    start([sys.executable, "-m", "pipeline", "train", job, "--run", run, "--fresh", "--ranks", ranks])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return median([row["step_s"] for row in rows if "step_s" in row][WARM_UP:])


def run_theirs(scratch: Path, base: Path, ranks: int, steps: int) -> float:
    out = scratch / "seconds.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    start([*torchrun, HERE / "step_peer.py", base, DATA, CONFIG, steps, EXAMPLES // ranks, out])
    return median(json.loads(out.read_text())["steps"][WARM_UP:])


def start(words: list[object]) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])


if __name__ == "__main__":
    main()
