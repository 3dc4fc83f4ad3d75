"""`make demo`: the main job on an embedded base. Two tasks, one delta each; scores before and after; a merge, and its proof.

Every step is an ordinary command, shown before it runs. The proof uses transformers alone: the merged folder must answer every
held-out prompt as base + delta did during training.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline.cluster.launch import PROGRAM, visible_gpus

ROOT = Path(__file__).parents[2]
HERE = Path("jobs/demo")
RUNS = Path("runs/demo")
TASKS = ("films", "trains")
MERGED_TASK = TASKS[0]
BATCH_PROMPTS = 30

NEXT = f"""\
1. copy {HERE / "films.toml"}; set base.model to a folder or hub id, and task.data to a folder with train.jsonl,
   valid.jsonl and test.jsonl of {{"prompt": "...", "completion": "..."}}
2. .venv/bin/zlora train my.toml
3. .venv/bin/zlora evaluate runs/my
4. .venv/bin/zlora merge MODEL runs/my/delta --out my-model"""

console = Console(highlight=False)


def main() -> None:
    os.chdir(ROOT)
    start = time.monotonic()
    console.print("One frozen base, two tasks, one small delta each. Nothing is downloaded.\n", style="bold")
    ranks = [] if visible_gpus() else ["--ranks", "2"]
    for task in TASKS:
        run = RUNS / task
        zlora("train", HERE / f"{task}.toml", "--run", run, "--fresh", *ranks)
    delta, merged = RUNS / MERGED_TASK / "delta", RUNS / f"{MERGED_TASK}-merged"
    shutil.rmtree(merged, ignore_errors=True)
    zlora("merge", HERE / "base", delta, "--out", merged)
    same, asked = answers_alike(merged, last_predictions(MERGED_TASK))
    console.print(
        f"\nthe merged model, in transformers, answers {same} of {asked} held-out prompts exactly as base + delta did", soft_wrap=True
    )
    # On a GPU base + delta answered there and the merged model here, so a near-tie may fall the other way.
    if same < (0.95 * asked if visible_gpus() else asked):
        console.print("error: the merged model differs from base + delta", style="bold red")
        sys.exit(1)
    summary(merged, time.monotonic() - start)


def zlora(*arguments: object) -> None:
    """Shows a command and runs it."""
    texts = [str(argument) for argument in arguments]
    console.print(f"\n$ zlora {shlex.join(texts)}", style="bold cyan", soft_wrap=True)
    code = subprocess.run([sys.executable, "-c", PROGRAM, *texts], check=False).returncode
    if code:
        sys.exit(code)


def last_predictions(task: str) -> list[dict[str, str]]:
    """What base + delta generated at the end of training, on the sharded base."""
    file = max((RUNS / task / "predictions").glob("test-*.jsonl"))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def answers_alike(merged: Path, predictions: list[dict[str, str]]) -> tuple[int, int]:
    """How many prompts the merged folder answers identically, by transformers' own greedy generation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(merged, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    same = 0
    batches = [predictions[i : i + BATCH_PROMPTS] for i in range(0, len(predictions), BATCH_PROMPTS)]
    for batch in track(batches, "asking the merged model", console=console, transient=True):
        inputs = tokenizer([row["prompt"] + tokenizer.eos_token for row in batch], return_tensors="pt", padding=True)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        same += sum(text.strip() == row["prediction"] for text, row in zip(texts, batch, strict=True))
    return same, len(predictions)


def summary(merged: Path, seconds: float) -> None:
    """Scores before and after, where everything is, and what to type next."""
    scores = Table(title="\nheld-out test set", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("task", "", "before", "after"):
        scores.add_column(name, justify="left" if name in ("task", "") else "right")
    for task in TASKS:
        rows = [json.loads(line) for line in (RUNS / task / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        evaluations = [row for row in rows if row.get("split") == "test"]
        before, after = evaluations[0], evaluations[-1]
        scores.add_row(task, "BLEU", f"{before['BLEU']:.1f}", f"{after['BLEU']:.1f}")
        scores.add_row("", "perplexity", f"{before['perplexity']:.1f}", f"{after['perplexity']:.2f}")
    console.print(scores)
    places = Table(
        title=f"\ndone in {seconds:.0f} s", title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    for task in TASKS:
        size = sum(file.stat().st_size for file in (RUNS / task / "delta").iterdir())
        places.add_row(f"  delta of {task}", f"{RUNS / task / 'delta'}  ({size / 1024:.0f} KiB)")
    places.add_row("  merged model", f"{merged}  (loads with transformers' from_pretrained)")
    places.add_row("  TensorBoard", f".venv/bin/tensorboard --logdir {RUNS}")
    console.print(places)
    console.print("\nyour own model and data", style="bold")
    for line in NEXT.splitlines():
        console.print(f"  {line}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
