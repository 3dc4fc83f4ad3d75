"""How soon it begins: `zlora --help`, `check`, `plan`, and from the process' start to the end of the first step, ours beside the peer.

    python benchmarks/startup.py --data FOLDER [--rounds 5] [--train-rounds 3] [--ranks 2] [--record FILE]

FOLDER has E2E's official trainset.csv; the base is a random GPT-2 of 124M in bf16. Everything is a fresh process. Cold: nothing of the data
is in either's cache, so all 42,061 rows are tokenised; warm: it is. (The files are in the system's page cache either way.) Ours has all
that `zlora train` does before its first step. Exits with 1 if a goal is missed: help in 0.3 s, check and plan in 1 s, the first step in
half of the peer's time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from machine import origin
from rich.console import Console
from ways import QUIET, SHAPES, Setup, make_base, make_data, make_tokenizer, run_ours, run_peer, start

GOALS_S = {"zlora --help": 0.3, "zlora check": 1.0, "zlora plan": 1.0}
GOAL_OF_PEER = 0.5


def main() -> None:
    asked = arguments()
    os.environ.update(QUIET)
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        setup = prepared(Path(scratch), asked)
        # Once beforehand: it writes the job and what the peer is given.
        run_ours(setup)
        seconds = commands(console, setup, asked.rounds)
        first_steps = [first_step(console, setup, number) for number in range(1, asked.train_rounds + 1)]
    found = {name: median(each) for name, each in seconds.items()}
    ratios = {state: median(each[state]["ours"] / each[state]["peer"] for each in first_steps) for state in ("cold", "warm")}
    lines = [f"| {name} | {found[name]:.2f} s | {goal} s |" for name, goal in GOALS_S.items()]
    for state, ratio in ratios.items():
        ours, peer = (median(each[state][way] for each in first_steps) for way in ("ours", "peer"))
        lines.append(f"| first step, {state} | {ours:.1f} s; the peer {peer:.1f} s; ratio {ratio:.2f} | {GOAL_OF_PEER} of the peer's |")
    console.print("\n".join(lines))
    if asked.record:
        measured_on = origin("startup.py", "torch", "deepspeed", "transformers", "peft")
        report: dict[str, Any] = {"measured_on": measured_on, "ranks": asked.ranks, "commands_s": seconds, "first_step_s": first_steps}
        asked.record.with_suffix(".json").write_text(json.dumps(report | {"ratios": ratios}, indent=1) + "\n", encoding="utf-8")
        title = f"Medians of {asked.rounds} and {asked.train_rounds} rounds, fresh processes; first steps on {asked.ranks} ranks."
        head = ["# Start-up", "", *measured_on, "", title, "", "| what | median | goal |", "|---|---|---|"]
        asked.record.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")
    sys.exit(any(found[name] > goal for name, goal in GOALS_S.items()) or max(ratios.values()) > GOAL_OF_PEER)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with E2E's trainset.csv")
    parser.add_argument("--shape", default="gpt2", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5, help="of the commands")
    parser.add_argument("--train-rounds", type=int, default=3, help="of the first steps, cold and warm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file, and to a JSON file beside it")
    return parser.parse_args()


def prepared(scratch: Path, asked: argparse.Namespace) -> Setup:
    data, folder = make_data(asked.data / "trainset.csv", scratch), scratch / "start"
    base = make_base(scratch / "base", SHAPES[asked.shape].config, make_tokenizer(data), "bf16")
    folder.mkdir()
    return Setup(asked.shape, base, data, folder, "bf16", asked.ranks, 8, 1, 1)


def commands(console: Console, setup: Setup, rounds: int) -> dict[str, list[float]]:
    job, zlora = setup.folder / "job.toml", ["-c", "import sys; sys.argv[0] = 'zlora'; from pipeline.cli import main; main()"]
    words = {"zlora --help": ["--help"], "zlora check": ["check", job], "zlora plan": ["plan", job]}
    found: dict[str, list[float]] = {name: [] for name in words}
    for _ in range(rounds):
        for name, each in words.items():
            started = start([[*zlora, *each]], QUIET | {"XDG_CACHE_HOME": str(setup.folder.parent / "cache")})
            found[name].append(time.time() - started)
    for name, each in found.items():
        console.print(f"{name}: {', '.join(f'{one:.2f}' for one in each)} s")
    return found


def first_step(console: Console, setup: Setup, number: int) -> dict[str, dict[str, float]]:
    """Both ways with empty caches, then with what that left in them."""
    for cache in ("cache", "datasets"):
        shutil.rmtree(setup.folder.parent / cache, ignore_errors=True)
    found = {}
    for state in ("cold", "warm"):
        found[state] = {"ours": run_ours(setup).first_step_s, "peer": run_peer(setup).first_step_s}
        said = ", ".join(f"{way} {one:.1f} s" for way, one in found[state].items())
        console.print(f"round {number}, first step {state}: {said}")
    return found


if __name__ == "__main__":
    main()
