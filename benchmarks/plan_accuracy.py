"""Is the plan true? Jobs are trained on CPU ranks with every tensor storage followed, and what the plan said is put beside it.

    python benchmarks/plan_accuracy.py [--record FILE]

The jobs are in `plan_cases.py`: random small bases of every family, encoders with a head for labels; fp32 and bf16, recomputed or not,
several targets, lengths and memory configurations, on 1 and 2 ranks. Those marked "held out" are of shapes and settings that nobody had
looked at when the formulas were made. Exits with 1 if a promise is broken. Peak memory is that of tensor storages; anonymous resident
memory, with the allocator as `zlora train` sets it, is shown beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import plan_rank
from machine import origin
from plan_cases import cases
from ranks import on_ranks, prepare
from rich.console import Console
from tables import markdown_table

EXACT = ("base_shard", "delta", "gradients", "optimizer")
WITHIN = {"kept": 0.10, "step": 0.10, "save": 0.10}


def broken(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of the parts that are further from the truth than promised."""
    wrong = [name for name in EXACT if expected[name] != found[name]]
    return wrong + [name for name, bound in WITHIN.items() if abs(expected[name] - found[name]) > bound * found[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    prepare("plan_rank")
    console, rows, failed = Console(highlight=False, soft_wrap=True), [], []
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        for case in cases(Path(scratch)):
            expected = plan_rank.predict(case, case["ranks"])
            found = on_ranks(case["ranks"], plan_rank.on_rank, case)[0]
            wrong = broken(expected, found)
            failed += [f"{case['name']}: {', '.join(wrong)}"] if wrong else []
            rows.append(row(case, expected, found, wrong))
            console.print(" | ".join(rows[-1]))
    summary = f"{len(rows)} jobs, {len(failed)} with a promise broken"
    console.print(summary)
    if asked.record:
        head = ["# The plan beside measurement", "", *origin("plan_accuracy.py", "torch", "deepspeed", "transformers"), "", summary, ""]
        names = [
            "job",
            "method",
            "exact parts",
            "fetched",
            "kept MB",
            "said / measured",
            "forward",
            "gathered",
            "peak MB",
            "said / measured",
            "save",
            "anonymous MB",
        ]
        lines = markdown_table(names, rows)
        asked.record.write_text("\n".join([*head, *lines, "", *NOTES]), encoding="utf-8")
    sys.exit(bool(failed))


def row(case: dict[str, Any], expected: dict[str, Any], found: dict[str, Any], wrong: list[str]) -> list[str]:
    def ratio(name: str) -> str:
        return f"{expected[name] / found[name]:.3f}" if found[name] else "-"

    exact = "equal" if not set(wrong) & set(EXACT) else f"NOT: {', '.join(wrong)}"
    anonymous = found["anonymous"]["peak"] - found["anonymous"]["start"]
    kept, peak = f"{found['kept'] / 1e6:.1f}", f"{found['step'] / 1e6:.1f}"
    return [
        case["name"],
        case["method"],
        exact,
        ratio("gathered_elements"),
        kept,
        ratio("kept"),
        ratio("forward"),
        ratio("gathered"),
        peak,
        ratio("step"),
        ratio("save"),
        f"{anonymous / 1e6:.0f}",
    ]


NOTES = [
    "exact parts: base shard, delta, gradients, optimizer. fetched, forward, gathered: said / measured of the elements gathered in a",
    "step, of the forward pass's peak, of gathered weights at their most. kept: activations between forward and backward. peak: of",
    "tensor storages in a step. anonymous: the most beyond what the process had before loading; it has kernels' scratch memory, Python's",
    "own and what the allocator keeps. MB are 10^6 bytes.",
    "",
]


if __name__ == "__main__":
    main()
