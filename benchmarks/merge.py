"""Merging a delta into a base of a billion parameters: `zlora merge` beside PEFT's merge_and_unload and save.

    python benchmarks/merge.py [--parameters 1.1e9] [--rounds 3] [--record FILE]

Makes a random bf16 Llama checkpoint and a random LoRA delta (q and v, rank 8), then runs the ways in turn, each in a fresh process
on one thread, with the files in the page cache. Prints seconds and the peak resident memory beyond that way's imports.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from llama_checkpoint import HEADS, KV_HEADS, VOCABULARY, WIDTH, write_llama
from machine import origin
from rich.console import Console
from rich.table import Table

from pipeline.weights.delta import Module, keys_of, write_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.index import open_checkpoint

RANK, ALPHA = 8, 16.0
LARGEST_BYTES = 2 * VOCABULARY * WIDTH
IMPORTS = {
    "ours": "import pipeline.cli, pipeline.deltas.merge, pipeline.screen, torch",
    "PEFT": "import torch, peft; from transformers import AutoModelForCausalLM, LlamaForCausalLM",
}
PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, delta, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), delta)
model.merge_and_unload().save_pretrained(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1.1e9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        base, delta = Path(scratch) / "base", Path(scratch) / "delta"
        console.print(f"writing {asked.parameters:.3g} random parameters")
        write_llama(base, asked.parameters)
        write_random_delta(base, delta)
        imports = {way: measure([sys.executable, "-c", code])[1] for way, code in IMPORTS.items()}
        runs: dict[str, list[tuple[float, int]]] = {"ours": [], "PEFT": []}
        for turn in range(1, asked.rounds + 1):
            for way in runs:
                runs[way].append(measure(command(way, base, delta, Path(scratch) / "out")))
                shutil.rmtree(Path(scratch) / "out")
                console.print(f"round {turn}: {way} {runs[way][-1][0]:.1f} s")
    lines = report(runs, imports)
    table = Table(*lines[0], title="Merging q and v of a 1.1B base, bf16", title_justify="left")
    for cells in lines[1:]:
        table.add_row(*cells)
    console.print(table)
    ratio = median(theirs[0] / ours[0] for ours, theirs in zip(runs["ours"], runs["PEFT"], strict=True))
    beyond = max(peak for _, peak in runs["ours"]) - imports["ours"]
    summary = [
        f"PEFT / ours, median of {asked.rounds} paired rounds: {ratio:.1f} x the time",
        f"ours beyond its imports: {beyond / 1e6:.0f} MB at most, the largest tensor has {LARGEST_BYTES / 1e6:.0f} MB",
    ]
    console.print(*summary, sep="\n")
    if asked.record:
        rows = ["| " + " | ".join(cells) + " |" for cells in lines]
        rows.insert(1, "|" + "---|" * len(lines[0]))
        head = ["# Merging a delta: ours beside PEFT", "", *origin("merge.py", "torch", "transformers", "peft", "safetensors"), ""]
        asked.record.write_text("\n".join([*head, *rows, "", *(f"- {line}" for line in summary)]) + "\n", encoding="utf-8")


def write_random_delta(base: Path, delta: Path) -> None:
    """A delta on q and v of every layer, as training would leave it."""
    checkpoint = open_checkpoint(base)
    generator = torch.Generator().manual_seed(0)
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


def command(way: str, base: Path, delta: Path, out: Path) -> list[str]:
    if way == "ours":
        return [sys.executable, "-m", "pipeline", "merge", str(base), str(delta), "--out", str(out)]
    return [sys.executable, "-c", PEFT_MERGE, str(base), str(delta), str(out)]


def measure(words: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of one process."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    errors = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(errors.decode())
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def report(runs: dict[str, list[tuple[float, int]]], imports: dict[str, int]) -> list[list[str]]:
    lines = [["way", "seconds (median)", "imports MB", "peak MB", "beyond imports MB"]]
    for way, measured in runs.items():
        peak = max(peak for _, peak in measured)
        seconds = median(seconds for seconds, _ in measured)
        lines.append([way, f"{seconds:.1f}", f"{imports[way] / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{(peak - imports[way]) / 1e6:.0f}"])
    return lines


if __name__ == "__main__":
    main()
