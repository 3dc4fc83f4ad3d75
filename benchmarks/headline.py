"""The README's table of measurements, from the recorded ones.

    python benchmarks/headline.py

Writes it between two marks of README.md. Numbers are medians of the rounds, ours over the peer's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- made by benchmarks/headline.py -->\n", "<!-- end -->\n"
BASES = {"gpt2-small": "GPT-2 of 30M", "gpt2": "GPT-2 of 124M", "llama": "Llama of 101M"}


def main() -> None:
    README.write_text(with_headline(README.read_text(encoding="utf-8")), encoding="utf-8")


def with_headline(text: str) -> str:
    """The README, its table made anew."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + headline(HERE / "results") + END + rest.partition(END)[2]


def headline(results: Path) -> str:
    """Markdown."""
    trained = json.loads((results / "train.json").read_text(encoding="utf-8"))["cases"]
    shared = [case for case in trained if case["ranks"] == 2]
    alone = [case for case in trained if case["ranks"] == 1]
    lines = [
        "| E2E, LoRA, two CPU ranks, the base sharded by ZeRO-3 in both | examples/s | peak memory | first step after |",
        "|---|---|---|---|",
        *map(_training, shared),
        "",
        "Ours / PEFT + Trainer + DeepSpeed with examples grouped by length and the same allocator: medians of interleaved runs",
        "([all of them](benchmarks/results/train.md)). Beside the bare step (the frozen model, LoRA, AdamW, packed examples; no sharding,",
        f"no framework) it does {_span(alone)} of the examples/s on one rank, and on two that share the base",
        f"{_span(shared)} of those of two bare steps, which are {_fastest(shared)} times as fast as the peer.",
        "",
    ]
    return "\n".join(lines)


def _training(case: dict[str, Any]) -> str:
    ratio = case["ratios"]
    cells = f"x {ratio['examples_per_s']:.2f} | x {ratio['peak_bytes']:.2f} | x {ratio['first_step_s']:.2f}"
    return f"| {BASES[case['shape']]}, {case['dtype']} | {cells} |"


def _fastest(cases: list[dict[str, Any]]) -> str:
    times = sorted(case["ratios"]["examples_per_s"] / case["ratios"]["of_the_limit"] for case in cases)
    return f"{times[0]:.1f} to {times[-1]:.1f}"


def _span(cases: list[dict[str, Any]]) -> str:
    shares = sorted(round(100 * case["ratios"]["of_the_limit"]) for case in cases)
    return f"{shares[0]} %" if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]} %"


if __name__ == "__main__":
    main()
