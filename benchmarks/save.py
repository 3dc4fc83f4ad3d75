"""What a save costs: how long training stands still, and bytes on disk; `zlora train` beside PEFT + Trainer + DeepSpeed ZeRO-3.

    python benchmarks/save.py [--ranks 2] [--rounds 3] [--record FILE]

The base is a random GPT-2 of 6 layers, width 384, fp32; the data are the demo's films; the memory configuration and the peer are those of
`train.py`. Each way takes 20 steps of 16 examples and saves after every fifth, in turn; printed are the median seconds between the end of a
step and the beginning of the next, and the bytes of one checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median

from machine import origin
from rich.console import Console
from tables import markdown_table, show
from ways import FILMS, QUIET, SHAPES, Setup, make_base, make_tokenizer, run_ours, run_peer

SHAPE, STEPS, EVERY = "gpt2-small", 20, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    console = Console(highlight=False)
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        base = make_base(Path(scratch) / "base", SHAPES[SHAPE].config, make_tokenizer(FILMS))
        rounds = []
        for turn in range(1, asked.rounds + 1):
            folder = Path(scratch) / str(turn)
            folder.mkdir()
            setup = Setup(SHAPE, base, FILMS, folder, "fp32", asked.ranks, 16, 0, STEPS, save_every_steps=EVERY)
            ours, our_bytes = save_of_ours(setup)
            theirs, their_bytes = save_of_peer(setup)
            rounds.append((ours, theirs))
            console.print(f"round {turn}: ours {1000 * ours:.1f} ms, PEFT + Trainer {1000 * theirs:.0f} ms a save")
    heads = ("round", "ours ms/save", "PEFT + Trainer ms/save", "ratio")
    cells = [[str(n), f"{1000 * ours:.1f}", f"{1000 * theirs:.0f}", f"{theirs / ours:.0f}"] for n, (ours, theirs) in enumerate(rounds, 1)]
    show(console, "Training stands still for a save", heads, cells)
    ratio = f"median ratio of {asked.rounds} paired rounds: {median(theirs / ours for ours, theirs in rounds):.0f}"
    size = f"bytes of one checkpoint: ours {our_bytes / 1e6:.2f} MB (state and delta), theirs {their_bytes / 1e6:.2f} MB"
    console.print(f"{ratio}\n{size}")
    if asked.record:
        rows = markdown_table(heads, cells)
        head = ["# A save: ours beside PEFT + Trainer", "", *origin("save.py", "torch", "deepspeed", "transformers", "peft"), ""]
        asked.record.write_text("\n".join([*head, *rows, "", ratio, "", size, ""]), encoding="utf-8")


def save_of_ours(setup: Setup) -> tuple[float, int]:
    run_ours(setup)
    run = setup.folder / "ours" / "run"
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    state = max((run / "state").iterdir())
    return median(row["save_stall_s"] for row in rows if "save_stall_s" in row), size_of(state) + size_of(run / "delta")


def save_of_peer(setup: Setup) -> tuple[float, int]:
    run_peer(setup)
    out = setup.folder / "peer"
    return median(json.loads((out / "saves.json").read_text())), size_of(out / "trainer" / f"checkpoint-{STEPS}")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
