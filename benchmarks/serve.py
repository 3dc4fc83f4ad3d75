"""Many LoRA deltas on one resident base: memory of one more, and time a token by how many are in a batch, beside PEFT's mixed batches.

    python benchmarks/serve.py [--prompts 16] [--rounds 5] [--rank 8] [--record FILE]

The base is a random GPT-2 of 6 layers, width 384, fp32, where what deltas cost shows most; the deltas are random LoRA
on q and v. A batch is of as many prompts whatever the number of deltas among them, greedy, no early end; one rank, one thread. Time is
the processor's, so that other work on the machine does not count. Ours is `zlora generate`'s own way; theirs is
`generate(adapter_names=...)`. Both are in one process and take turns, and their texts are compared; memory is of processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median

import torch
from machine import origin
from rich.console import Console
from tables import markdown_table, show
from ways import FILMS, HERE, QUIET, SHAPES, make_base, make_tokenizer, start

from pipeline.job.method import Lora
from pipeline.job.spec import Base
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import attach
from pipeline.methods.files import store
from pipeline.model.config import read_config
from pipeline.model.load import load_base
from pipeline.weights.digest import file_digests

NEW_TOKENS = 32
COUNTS = (0, 1, 2, 4, 8, 16)
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as folder:
        scratch = Path(folder)
        base, deltas = make_base(scratch / "base", SHAPES["gpt2-small"].config, make_tokenizer(FILMS)), scratch / "deltas"
        delta_bytes = make_deltas(base, deltas, COUNTS[-1], asked.rank)
        prompts = [json.loads(line)["prompt"] for line in FILMS.read_text().splitlines()][: asked.prompts]
        (scratch / "prompts.json").write_text(json.dumps(prompts))

        def measured(*words: object) -> object:
            command = [HERE / "serve_rank.py", words[0], base, deltas, scratch / "prompts.json", NEW_TOKENS]
            out = scratch / "out.json"
            start([[*command, *words[1:], out]], QUIET)
            return json.loads(out.read_text())

        load = os.getloadavg()[0]
        memory = {way: [measured("memory", count, way) for count in (1, COUNTS[-1])] for way in ("ours", "PEFT")}
        rounds = measured("time", ",".join(map(str, COUNTS)), asked.rounds)
    tokens = asked.prompts * NEW_TOKENS
    heads = ("deltas in the batch", "ours, CPU ms a token", "PEFT, CPU ms a token", "ours / base alone", "PEFT / base alone", "ours / PEFT")
    cells = []
    for place, count in enumerate(COUNTS):

        def over(way: str, other: str, there: int, here: int = place) -> float:
            return median(found[way][here] / found[other][there] for found in rounds)

        each = [median(found[way][place] for found in rounds) * 1000 / tokens for way in ("ours", "PEFT")]
        ratios = over("ours", "ours", 0), over("PEFT", "PEFT", 0), over("ours", "PEFT", place)
        cells.append([str(count or "0 (the base alone)"), *(f"{ms:.2f}" for ms in each), *(f"{ratio:.2f}" for ratio in ratios)])
    title = f"{asked.prompts} prompts in a batch, {NEW_TOKENS} new tokens each, {COUNTS[-1]} deltas of rank {asked.rank} resident"
    show(console, title, heads, cells)
    processes = "; ".join(f"{way} {one / 2**20:,.0f} and {many / 2**20:,.0f}" for way, (one, many) in memory.items())
    lines = [
        f"One more delta: {delta_bytes / 2**20:.2f} MiB of tensors. "
        f"MiB of the process with 1 and with {COUNTS[-1]} deltas, all in one batch: {processes}.",
        f"Ratios are medians of {asked.rounds} rounds, ways in turn; the texts are the same. Load of the machine before: {load:.1f}.",
    ]
    console.print("\n".join(lines))
    if asked.record:
        rows = markdown_table(heads, cells)
        head = ["# Serving many deltas: ours beside PEFT's", "", *origin("serve.py", "torch", "deepspeed", "transformers", "peft")]
        asked.record.write_text("\n".join([*head, "", title, "", *rows, "", *lines, ""]), encoding="utf-8")


def make_deltas(base: Path, folder: Path, count: int, rank: int) -> int:
    """As training writes them, with random values; bytes of the tensors of one."""
    zero = deepspeed_config(HERE.parent / "ds_configs" / "zero0.json")
    loaded = load_base(base, read_config(base), torch.float32, CPU, zero)
    delta = attach(loaded, (Lora(kind="lora", targets=("q", "v"), rank=rank, alpha=2.0 * rank),), 1, CPU)
    digests, generator = file_digests(loaded.checkpoint.files), torch.Generator().manual_seed(0)
    for number in range(count):
        values = {key: 0.05 * torch.randn(tensor.shape, generator=generator) for key, tensor in delta.tensors().items()}
        store(delta, values, folder / str(number), Base(model=str(base), dtype="fp32"), digests, loaded, "", 1, ("", False))
    return (folder / "0" / "adapter_model.safetensors").stat().st_size


if __name__ == "__main__":
    main()
