"""Merging a delta into a base of a billion parameters: `zlora merge` and `zlora switch` beside PEFT's merge and save, and a plain copy.

    python benchmarks/merge.py [--parameters 1.1e9] [--rounds 5] [--folder DIR] [--record FILE]

Makes a random bf16 Llama checkpoint and two random LoRA deltas (q and v, rank 8), then runs the ways in turn, each in a fresh process,
with the base in the page cache, and each with its files synced to disk at its end. Prints seconds, the load of the machine, the peak
resident memory and that beyond the way's imports, and the bytes written. Ratios are medians over the rounds of one way beside another
in the same round: what else runs on the machine meets all ways alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from llama_checkpoint import HEADS, KV_HEADS, VOCABULARY, WIDTH, write_llama
from machine import origin
from rich.console import Console
from rich.table import Table

from pipeline.weights.delta import keys_of, write_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.index import open_checkpoint
from pipeline.weights.manifest import Module

RANK, ALPHA = 8, 16.0
LARGEST_BYTES = 2 * VOCABULARY * WIDTH
IMPORTS = {
    "zlora merge": "import pipeline.cli, pipeline.deltas.merge, pipeline.screen, torch",
    "zlora switch": "import pipeline.cli, pipeline.deltas.switch, pipeline.screen, torch",
    "PEFT": "import torch, peft; from transformers import AutoModelForCausalLM, LlamaForCausalLM",
    "cp": "",
}
PEFT_MERGE = """
import os, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, delta, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), delta)
model.merge_and_unload().save_pretrained(out)
for file in Path(out).iterdir():
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
"""
WATCH = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss * 1024, usage.ru_oublock * 512]))
sys.exit(bool(status))
"""
# A process of its own, and a small one: the system counts a child's peak from the memory of the parent it was forked from.


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak: int
    """Bytes."""
    written: int
    """Bytes of weights."""
    load: float
    """Processes that were running or waiting before, beside this one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1.1e9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="disk to measure on; that of the temporary files when absent")
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-", dir=asked.folder) as scratch:
        place = Path(scratch)
        console.print(f"writing {asked.parameters:.3g} random parameters")
        write_llama(place / "base", asked.parameters)
        for seed in (0, 1):
            write_random_delta(place / "base", place / f"delta{seed}", seed)
        subprocess.run(["sync"], check=True)
        imports = {way: measure([sys.executable, "-c", code]).peak for way, code in IMPORTS.items()}
        runs: dict[str, list[Measured]] = {way: [] for way in IMPORTS}
        for turn in range(1, asked.rounds + 1):
            for way in runs:
                runs[way].append(one(way, place))
                console.print(f"round {turn}: {way} {runs[way][-1].seconds:.1f} s, load {runs[way][-1].load:.1f}")
    lines = report(runs, imports)
    table = Table(*lines[0], title=f"Merging q and v of {asked.parameters:.2g} parameters, bf16", title_justify="left")
    for cells in lines[1:]:
        table.add_row(*cells)
    console.print(table)
    summary = conclusions(runs, imports)
    console.print(*summary, sep="\n")
    if asked.record:
        rows = ["| " + " | ".join(cells) + " |" for cells in lines]
        rows.insert(1, "|" + "---|" * len(lines[0]))
        head = ["# Merging and switching deltas", "", *origin("merge.py", "torch", "transformers", "peft", "safetensors"), ""]
        asked.record.write_text("\n".join([*head, *rows, "", *(f"- {line}" for line in summary)]) + "\n", encoding="utf-8")


def write_random_delta(base: Path, delta: Path, seed: int) -> None:
    """A delta on q and v of every layer, as training would leave it."""
    checkpoint = open_checkpoint(base)
    generator = torch.Generator().manual_seed(seed)
    rows = {"q_proj": WIDTH, "v_proj": WIDTH // HEADS * KV_HEADS}
    names = [n for n in checkpoint.entries if n.endswith(("q_proj.weight", "v_proj.weight"))]
    modules = tuple(Module(name.removesuffix(".weight"), name, False, RANK, ALPHA) for name in names)
    tensors = {}
    for module in modules:
        a, b = keys_of(module.name)
        tensors[a] = torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5
        tensors[b] = torch.randn(rows[module.name.rsplit(".", 1)[1]], RANK, generator=generator) / 100
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
    files = file_digests(checkpoint.files)
    manifest = {"base": str(base), "base_digest": base_digest(files), "base_files": files, "job_digest": "", "step": 1}
    count = sum(tensor.numel() for tensor in tensors.values())
    write_delta(delta, tensors, config, {**manifest, "parameters": count, "modules": modules})


def one(way: str, place: Path) -> Measured:
    """One run, of which nothing is left; a switch goes from a merge that is made before, unmeasured."""
    base, deltas, out = place / "base", [place / "delta0", place / "delta1"], place / "out"
    merging = [sys.executable, "-m", "pipeline", "merge", str(base), str(deltas[0]), "--out", str(out)]
    words = merging
    match way:
        case "zlora switch":
            subprocess.run(merging, check=True, capture_output=True, env=environment())
            words = [sys.executable, "-m", "pipeline", "switch", str(out), str(deltas[1]), "--base", str(base)]
        case "PEFT":
            words = [sys.executable, "-c", PEFT_MERGE, str(base), str(deltas[0]), str(out)]
        case "cp":
            words = ["sh", "-c", f"cp -r --reflink=never '{base}' '{out}' && sync '{out}'/*"]
    measured = measure(words)
    shutil.rmtree(out)
    subprocess.run(["sync"], check=True)
    return measured


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def measure(words: list[str]) -> Measured:
    """One process."""
    load = os.getloadavg()[0]
    done = subprocess.run([sys.executable, "-S", "-c", WATCH, *words], capture_output=True, text=True, check=True, env=environment())
    seconds, peak, written = json.loads(done.stdout)
    return Measured(seconds, peak, written, load)


def report(runs: dict[str, list[Measured]], imports: dict[str, int]) -> list[list[str]]:
    lines = [["way", "seconds (median)", "peak MB", "beyond imports MB", "written MB", "load before"]]
    for way, measured in runs.items():
        peak = max(one.peak for one in measured)
        loads = [one.load for one in measured]
        cells = [f"{median(one.seconds for one in measured):.1f}", f"{peak / 1e6:.0f}", f"{(peak - imports[way]) / 1e6:.0f}"]
        lines.append([way, *cells, f"{median(one.written for one in measured) / 1e6:.0f}", f"{min(loads):.1f} to {max(loads):.1f}"])
    return lines


def conclusions(runs: dict[str, list[Measured]], imports: dict[str, int]) -> list[str]:
    def times(way: str, other: str) -> str:
        ratios = [a.seconds / b.seconds for a, b in zip(runs[way], runs[other], strict=True)]
        return f"{median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"

    ours, theirs = (max(one.peak for one in runs[way]) for way in ("zlora merge", "PEFT"))
    beyond, theirs_beyond = ours - imports["zlora merge"], theirs - imports["PEFT"]
    written = median(one.written for one in runs["zlora switch"]) / median(one.written for one in runs["zlora merge"])
    return [
        f"time of zlora merge / PEFT, median of {len(runs['PEFT'])} rounds (smallest to largest): {times('zlora merge', 'PEFT')}",
        f"time of zlora merge / a plain copy that is synced: {times('zlora merge', 'cp')}",
        f"time of zlora switch / zlora merge: {times('zlora switch', 'zlora merge')}; bytes written: {written:.2f} x",
        f"memory of zlora merge / PEFT, whole process: 1/{theirs / ours:.1f}; beyond the imports: 1/{theirs_beyond / beyond:.0f}",
        f"zlora merge beyond its imports: {beyond / 1e6:.0f} MB at most, the largest tensor has {LARGEST_BYTES / 1e6:.0f} MB",
    ]


if __name__ == "__main__":
    main()
