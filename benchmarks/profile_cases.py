"""The three jobs of docs/profiling.md, each profiled as it is and mended: one bound by gathers, one by memory, one by data.

    python benchmarks/profile_cases.py [--pictures FOLDER] [--record FILE]

Each is a GPT-2 of random weights on two CPU ranks. The small memory of the second is the kernel's own limit (a control group), so that one
needs root; without it it is left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import origin
from rich.console import Console
from tables import markdown_table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast
from transformers.utils import logging

GROUPS = Path("/sys/fs/cgroup")
WORDS = 8000
JOB = """
[base]
model = "{base}"
[[methods]]
kind = "lora"
[task]
{task}
data = "{data}"
[train]
steps = 1000
learning_rate = 1e-3
"""


def make(folder: Path, name: str, width: int, layers: int, examples: int, words: int, labels: bool = False) -> Path:
    """A base, data of examples of so many words, and a job: to go on from one half, or to tell which label it has."""
    base, data, job = folder / name, folder / f"{name}.jsonl", folder / f"{name}.toml"
    sizes = {"n_positions": 1024, "n_embd": width, "n_layer": layers, "n_head": max(1, width // 64)}
    config = GPT2Config(vocab_size=WORDS + 1, bos_token_id=WORDS, eos_token_id=WORDS, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)} | {"<end>": WORDS}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>").save_pretrained(base)
    with data.open("w", encoding="utf-8") as file:
        for number in range(examples):
            text = [f"w{(number * 7919 + place * 31) % WORDS}" for place in range(words)]
            halves = {"prompt": " ".join(text[: words // 2]), "completion": " " + " ".join(text[words // 2 :])}
            file.write(json.dumps({"text": " ".join(text), "label": "odd" if number % 2 else "even"} if labels else halves) + "\n")
    task = 'kind = "classification"\nlabels = ["odd", "even"]' if labels else 'kind = "jsonl"'
    job.write_text(JOB.format(base=base, task=task, data=data), encoding="utf-8")
    return job


@contextmanager
def limited(controller: str, file: str, value: str) -> Iterator[list[str]]:
    """A command's beginning that puts it under a limit of the kernel's."""
    group = GROUPS / controller / f"zlora-{os.getpid()}"
    group.mkdir()
    try:
        (group / file).write_text(value)
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        group.rmdir()


def profiled(job: Path, run: Path, begin: list[str], *overrides: str) -> dict[str, Any]:
    command = [*begin, sys.executable, "-m", "pipeline", "profile", str(job), "--ranks", "2", "--run", str(run), "--json"]
    command += [part for override in overrides for part in ("--set", override)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def gathers(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    job = make(folder, "gathers", 768, 12, 2000, 40)
    size = ("train.batch_examples=16",)
    yield "as it is", profiled(job, folder / "gathers-0", [], *size, "train.micro_batch_tokens=64")
    yield "micro_batch_tokens = 1024", profiled(job, folder / "gathers-1", [], *size, "train.micro_batch_tokens=1024")
    yield (
        "the base whole on every rank",
        profiled(job, folder / "gathers-2", [], *size, "train.micro_batch_tokens=1024", "memory.config=zero0.json"),
    )


def memory(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    job = make(folder, "memory", 512, 12, 400, 500)
    size = ("train.batch_examples=8", "train.micro_batch_tokens=2048")
    with limited("memory", "memory.limit_in_bytes", str(int(2.9 * 2**30))) as begin:
        yield "as it is", profiled(job, folder / "memory-0", begin, *size)
        yield "activations recomputed", profiled(job, folder / "memory-1", begin, *size, "memory.gradient_checkpointing=true")


def data(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Short texts with a label, thousands a step."""
    size = ("train.batch_examples=4096", "train.micro_batch_tokens=32768")
    for number, (title, width, layers) in enumerate((("as it is", 32, 2), ("a base of 6 layers of 256", 256, 6))):
        yield title, profiled(make(folder, f"data{number}", width, layers, 20000, 6, labels=True), folder / f"data-{number}", [], *size)


def row(title: str, report: dict[str, Any]) -> list[str]:
    shares, speed = report["time"]["shares"], report["speed"]
    return [
        title,
        f"{speed['tokens_per_s']:,.0f}",
        *(f"{100 * shares[name]:.0f} %" for name in ("data", "gather", "forward", "backward")),
        f"{report['memory']['parts']['backward']['measured'] / 2**20:,.0f}",
        f"{report['cost_of_looking']['clock']:.2f}",
        " ".join(report["says"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["gathers", "memory", "data"], help="one of them")
    parser.add_argument("--pictures", type=Path, help="also put the pictures there")
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, rows = Console(highlight=False, soft_wrap=True), []
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        for case in (gathers, memory, data):
            if asked.only not in (None, case.__name__):
                continue
            if case is memory and os.geteuid():
                console.print(f"{case.__name__}: left out, it needs root for the kernel's limit")
                continue
            for number, (title, report) in enumerate(case(Path(scratch))):
                rows.append(row(f"{case.__name__}: {title}", report))
                console.print(" | ".join(rows[-1]))
                if asked.pictures:
                    asked.pictures.mkdir(parents=True, exist_ok=True)
                    picture = Path(scratch) / f"{case.__name__}-{number}" / "profile" / "profile.png"
                    shutil.copyfile(picture, asked.pictures / f"profile-{case.__name__}-{number}.png")
    if asked.record:
        names = ["job", "tokens/s", "data", "gather", "forward", "backward", "most MiB", "cost of the clock", "it says"]
        lines = markdown_table(names, rows)
        head = ["# Three jobs and what bounds them", "", *origin("profile_cases.py", "torch", "deepspeed"), ""]
        asked.record.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
