"""Latency of a forward pass: GPT-2 small as it is, with LoRA merged and not, with adapters; table 1 of the LoRA paper at a small scale.

    python benchmarks/latency.py [--batch 1,2,4,8] [--sequence 32,64,128,256] [--rounds 15] [--row-seconds 20] [--busy] [--record FILE]

`zlora latency` on the shape of GPT-2 small (drawn weights), LoRA of rank 4, adapters of a width that brings Adapter-H to the paper's share
of the base (3 %). Quote the percentages, which are medians over interleaved rounds, not the milliseconds. On a machine that
other work shares, --busy takes the processor's time in place of the clock's: with one thread (OMP_NUM_THREADS=1) the two are the same where
nothing else runs. With --record FILE.md the table goes to that file, every number to FILE.json and the heat maps to FILE.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import origin
from transformers import GPT2Config

from pipeline.latency.measure import Asked, measure
from pipeline.latency.show import draw, show_latency
from pipeline.latency.variants import BASE, METHODS
from pipeline.screen import Screen

RANK, BOTTLENECK = 4, 112


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(scratch)
        sizes = (asked.batch, asked.sequence, RANK, (BOTTLENECK,))
        clock = time.process_time if asked.busy else time.perf_counter
        report = measure(Asked(scratch, METHODS, *sizes, asked.dtype, asked.rounds, asked.row_seconds, clock), Screen(sys.stderr))
    report |= {"base": "GPT-2 small", "clock": "processor" if asked.busy else "wall"}
    show_latency(Screen(sys.stdout), report)
    if asked.record:
        asked.record.write_text(markdown(report), encoding="utf-8")
        asked.record.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        draw(report, asked.record.with_suffix(".png"))


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=numbers, default=(1, 2, 4, 8), help="texts of a pass")
    parser.add_argument("--sequence", type=numbers, default=(32, 64, 128, 256), help="tokens of each")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--row-seconds", type=float, default=20.0)
    parser.add_argument("--busy", action="store_true", help="take the processor's time, because other work shares the machine")
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file, and JSON and PNG files beside it")
    return parser.parse_args()


def markdown(report: dict[str, Any]) -> str:
    names, host = report["order"], report["host"]
    heads = ["batch", "tokens", "rounds", f"{BASE}: ms", *(f"{name}: % over it" for name in names if name != BASE)]
    lines = [heads, ["---"] * len(heads)]
    for row in report["rows"]:
        cells = [str(row[key]) for key in ("batch", "sequence", "rounds")]
        for name in names:
            time = row["times"][name]
            low, high = time["quartiles_ms"] if name == BASE else (100 * share for share in time["over_base_quartiles"])
            middle = f"{time['median_ms']:.1f}" if name == BASE else f"{100 * time['over_base']:+.1f}"
            cells.append(f"{middle} [{low:.1f} .. {high:.1f}]")
        lines.append(cells)
    middle = ", ".join(f"{name} {100 * value:+.1f} %" for name, value in report["over_base"].items() if name != BASE)
    trained = ", ".join(f"{one['name']} {one['trained_parameters']:,}" for one in report["variants"] if one["trained_parameters"])
    apart = report["certificate"]
    busy = (
        ["- **processor time**, because other work shared the machine: run it again on a quiet one"]
        if report["clock"] == "processor"
        else []
    )
    return "\n".join(
        [
            "# Latency of a forward pass",
            "",
            *origin("latency.py", "torch", "transformers"),
            f"- {host['threads']} threads; the machine's load when it began and ended: {host['load'][0]:.1f}, {host['load'][1]:.1f}",
            *busy,
            "",
            f"{report['base']} (drawn weights, {report['dtype']}), logits at every position. Median [quartiles] over the rounds: of the"
            " base its ms, of the others their time over the base's in the same round. `again` is the base a second time: noise.",
            "",
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
            f"Median of the rows: {middle}.",
            f"Trained: {trained}. Logits differ by at most {apart['merged_and_lora']:.1e} (merged and unmerged LoRA), "
            f"{apart['merged_and_base']:.1e} (merged and base).",
            "",
            "![percent over the base, batch by tokens](latency.png)",
            "",
        ]
    )


if __name__ == "__main__":
    main()
