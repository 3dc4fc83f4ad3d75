"""Training on E2E under ZeRO-3: `zlora train`, PEFT + Trainer + DeepSpeed, and the bare step, in turn.

    python benchmarks/train.py --data FOLDER [--case gpt2-small,...] [--dtype fp32,bf16] [--ranks 1,2] [--rounds N] [--record FILE]

FOLDER has E2E's official trainset.csv. Bases have random weights; the tokenizer is made from the data. Both frameworks shard the base over
the ranks; every process has one thread and the same allocator settings (printed). Peers have dynamic padding, examples grouped by length,
persistence as Trainer sets it, no logging, no saving, the better of 0 and 1 data workers (tried in the first round in fp32, on two ranks).
Ours writes its log, TensorBoard and the delta as always. One more run of that peer is without the allocator settings, one without grouping.

Losses are compared in the first steps, where all ways have the same examples; times are of the steps after them, in which the peer has the
same examples in another order. With --record FILE.md the same goes to that file, and every round's numbers to FILE.json, after each case;
cases that were recorded there before and are not measured now stay.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from machine import origin
from rich.console import Console
from tables import markdown_table, show
from ways import ALLOCATOR, QUIET, SHAPES, Run, Setup, make_base, make_data, make_tokenizer, run_bare, run_ours, run_peer, tokens_of

SIZES = {
    # Examples of a step, steps before the timed ones, timed steps, rounds on one rank and on two.
    "gpt2-small": (16, 6, 16, (1, 3)),
    "gpt2": (8, 4, 6, (1, 2)),
    "llama": (8, 4, 6, (1, 2)),
}
SMOKE = (4, 3, 2, (1, 1))
MB = 1e6


def main() -> None:
    asked = arguments()
    os.environ.update(QUIET)
    console = Console(highlight=False, soft_wrap=True)
    settings = " ".join(f"{name}={value}" for name, value in ALLOCATOR.items())
    console.print(f"allocator of every rank: {settings}; one thread each")
    recorded = asked.record and asked.record.with_suffix(".json")
    found = json.loads(recorded.read_text(encoding="utf-8"))["cases"] if recorded and recorded.exists() else []
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        data = make_data(asked.data / "trainset.csv", Path(scratch))
        tokenizer = make_tokenizer(data)
        for shape in asked.case:
            for dtype in asked.dtype:
                base = make_base(Path(scratch) / f"{shape}-{dtype}", SHAPES[shape].config, tokenizer, dtype)
                for ranks in asked.ranks:
                    examples, warm_up, steps, rounds = SMOKE if asked.smoke else SIZES[shape]
                    folder = Path(scratch) / f"{shape}-{dtype}-{ranks}"
                    setup = Setup(shape, base, data, folder, dtype, ranks, examples, warm_up, steps)
                    folder.mkdir()
                    case = measure(console, setup, asked.rounds or rounds[min(ranks, 2) - 1])
                    found = [*(other for other in found if _name(other) != _name(case)), case]
                    if asked.record:
                        write(asked.record, sorted(found, key=_name))
    for title, heads, cells in tables(found):
        show(console, title, heads, cells)


def _name(case: dict[str, Any]) -> tuple[int, str, int]:
    return list(SIZES).index(case["shape"]), case["dtype"], -case["ranks"]


def write(record: Path, cases: list[dict[str, Any]]) -> None:
    record.with_suffix(".json").write_text(json.dumps({"cases": cases}, indent=1) + "\n", encoding="utf-8")
    record.write_text(markdown(cases), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = {"type": lambda text: text.split(",")}
    parser.add_argument("--data", type=Path, required=True, help="folder with E2E's trainset.csv")
    parser.add_argument("--case", **several, default=list(SIZES), help=f"bases among {','.join(SIZES)}")
    parser.add_argument("--dtype", **several, default=["fp32", "bf16"], help="fp32, bf16, or both")
    parser.add_argument("--ranks", type=lambda text: [int(part) for part in text.split(",")], default=[2, 1], help="1, 2, or both")
    parser.add_argument("--rounds", type=int, help="of each case, instead of its own")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps, to see that it runs")
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file, and to a JSON file beside it")
    return parser.parse_args()


def measure(console: Console, setup: Setup, rounds: int) -> dict[str, Any]:
    """One case: rounds of ours, the peer and the bare step in turn."""
    name = f"{setup.shape} {setup.dtype}, {setup.ranks} rank{'s'[: setup.ranks > 1]}"
    found: dict[str, Any] = {
        "measured_on": origin("train.py", "torch", "deepspeed", "transformers", "peft", "accelerate"),
        "allocator": " ".join(f"{key}={value}" for key, value in ALLOCATOR.items()),
        "shape": setup.shape,
        "dtype": setup.dtype,
        "ranks": setup.ranks,
        "examples": setup.examples,
    }
    taken: list[dict[str, Run]] = []
    workers = 0
    for number in range(1, rounds + 1):
        runs = {"ours": run_ours(setup), "peer": run_peer(setup, workers), "bare": run_bare(setup)}
        taken.append(runs)
        said = ", ".join(f"{way} {run.step_s:.3f}" for way, run in runs.items())
        console.print(f"{name}, round {number} of {rounds}: {said} s a step")
        if number == 1 and setup.ranks > 1 and setup.dtype == "fp32":
            others = {
                "one data worker": run_peer(setup, workers=1),
                "allocator as it is": run_peer(setup, workers, allocator=False),
                "not grouped": run_peer(setup, workers, grouped=False),
            }
            workers = int(others["one data worker"].step_s < runs["peer"].step_s)
            console.print(f"{name}, other peers: " + ", ".join(f"{way} {run.step_s:.3f}" for way, run in others.items()) + " s a step")
            found["other_peers"] = {way: run.summary() for way, run in others.items()}
            if workers:
                runs["peer"] = others["one data worker"]
    found |= {"workers": workers, "warm_up": setup.warm_up, "steps": setup.steps, **tokens_of(setup)}
    found["rounds"] = [{way: run.summary() for way, run in runs.items()} for runs in taken]
    # Bare processes side by side do not talk, so after their first step each goes its own way.
    compared = {"peer": setup.warm_up, "bare": setup.warm_up if setup.ranks == 1 else 1}
    found["largest_loss_difference"] = {way: max(difference(runs, way, steps) for runs in taken) for way, steps in compared.items()}
    return found | {"ratios": ratios(found)}


def difference(runs: dict[str, Run], way: str, steps: int) -> float:
    """The largest in the first so many steps between ours and another way's loss."""
    return max(abs(a - b) for a, b in list(zip(runs["ours"].losses, runs[way].losses, strict=True))[:steps])


def ratios(case: dict[str, Any]) -> dict[str, float]:
    """Medians over the rounds."""

    def of(name: str, over: str, under: str) -> float:
        values = ((_one(each[over][name]), _one(each[under][name])) for each in case["rounds"])
        return median(a / b for a, b in values)

    return {
        "examples_per_s": of("examples_per_s", "ours", "peer"),
        "peak_bytes": of("peak_bytes", "ours", "peer"),
        "peak_steps_bytes": of("peak_steps_bytes", "ours", "peer"),
        "first_step_s": of("first_step_s", "ours", "peer"),
        "of_the_limit": of("examples_per_s", "ours", "bare"),
    }


def _one(value: float | list[float]) -> float:
    """Of the rank that has most."""
    return max(value) if isinstance(value, list) else value


def tables(cases: list[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    speed, memory, wire = [], [], []
    for case in cases:
        name, ratio = f"{case['shape']} {case['dtype']}, {case['ranks']}", case["ratios"]

        def mid(way: str, what: str, case: dict[str, Any] = case) -> float:
            return median(_one(each[way][what]) for each in case["rounds"])

        targets = case["target_tokens"] / case["examples"]
        rate = {way: mid(way, "examples_per_s") for way in ("ours", "peer", "bare")}
        differences = [f"{case['largest_loss_difference'][way]:.1e}" for way in ("peer", "bare")]
        speed.append(
            [
                name,
                *(f"{rate[way]:.1f}" for way in rate),
                *(f"{rate[way] * targets:,.0f}" for way in ("ours", "peer")),
                f"{ratio['examples_per_s']:.2f}",
                f"{100 * ratio['of_the_limit']:.0f} %",
                *differences,
            ]
        )
        memory.append(
            [
                name,
                *(f"{mid(way, 'first_step_s'):.1f}" for way in ("ours", "peer")),
                f"{ratio['first_step_s']:.2f}",
                *(f"{mid(way, 'peak_bytes') / MB:,.0f}" for way in ("ours", "peer")),
                f"{ratio['peak_bytes']:.2f}",
                *(f"{mid(way, 'peak_steps_bytes') / MB:,.0f}" for way in ("ours", "peer", "bare")),
            ]
        )
        wire.append(
            [
                name,
                *(f"{mid(way, 'base_bytes') / MB:,.1f}" for way in ("bare", "ours", "peer")),
                *(f"{mid(way, 'gathered_bytes') / MB:,.1f} in {mid(way, 'gathers'):.0f}" for way in ("ours", "peer")),
                *(f"{mid(way, 'sent_bytes') / MB:,.1f}" for way in ("ours", "peer")),
            ]
        )
    counts = sorted({len(case["rounds"]) for case in cases})
    several = f"medians of {' or '.join(map(str, counts))} rounds"
    both = ["ours", "peer"]
    return [
        (
            f"Speed: {several}",
            ["base, dtype, ranks", "ours examples/s", "peer", "bare", "ours target tokens/s", "peer", "ours / peer", "of bare"]
            + [f"loss: largest difference to {way}" for way in ("peer", "bare")],
            speed,
        ),
        (
            "Start (the data's tokens are cached after the first round) and memory of the rank that has most",
            ["base, dtype, ranks", *(f"first step, {way}: s" for way in both), "ratio", *(f"peak, {way}: MB" for way in both), "ratio"]
            + [f"peak of steps, {way}: MB" for way in ("ours", "peer", "bare")],
            memory,
        ),
        (
            "Base held by a rank, and collectives of a step: whole tensors' bytes",
            ["base, dtype, ranks", "base whole: MB", *(f"{way} holds: MB" for way in both), *(f"{way} gathers: MB" for way in both)]
            + [f"{way}, all collectives: MB" for way in both],
            wire,
        ),
    ]


def markdown(cases: list[dict[str, Any]]) -> str:
    origins = dict.fromkeys(line for case in cases for line in case["measured_on"])
    lines = ["# Training: ours beside PEFT + Trainer, and the bare step", "", *origins]
    lines += [f"- allocator of every rank: `{each}`; one thread each" for each in dict.fromkeys(case["allocator"] for case in cases)]
    lines.append("")
    for title, heads, cells in tables(cases):
        lines += [title + ".", "", *markdown_table(heads, cells), ""]
    lines += ["Other settings of the peer, 2 ranks: examples/s, and the most memory of a rank in the steps.", ""]
    for case in cases:
        if others := case.get("other_peers"):
            lines.append(
                f"- {case['shape']} {case['dtype']}: "
                + "; ".join(
                    f"{way} {run['examples_per_s']:.1f}, {_one(run['peak_steps_bytes']) / MB:,.0f} MB" for way, run in others.items()
                )
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
