"""The README's table of measurements, from the recorded ones.

    python benchmarks/headline.py

Writes it between the two marks in README.md. Numbers are medians of the rounds, ours over the peer's.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- made by benchmarks/headline.py -->\n", "<!-- end -->\n"
BASES = {"gpt2-small": "GPT-2, 30M", "gpt2": "GPT-2, 124M", "llama": "Llama, 101M"}


def headline(results: Path) -> str:
    """Markdown."""
    trained, long = (json.loads((results / f"{name}.json").read_text()) for name in ("train", "long"))
    date, hardware = (line.removeprefix("- ").split(";")[0] for line in trained["measured_on"][:2])
    lines = [
        "| training E2E beside PEFT + Trainer + DeepSpeed, both on ZeRO-3 | examples/s | peak memory | first step after |",
        "|---|---|---|---|",
    ]
    lines += [_training(case) for case in trained["cases"] if case["ranks"] == 2]
    lines += ["", "| documents, Llama of 101M, 2 ranks | steps/s | peak memory |", "|---|---|---|"]
    lines += [_document(case) for case in long["cases"] if case["length"] >= 1024]
    limits = [f"{100 * case['ratios']['of_the_limit']:.0f} %" for case in trained["cases"] if case["ranks"] == 1]
    shared = [f"{100 * case['ratios']['of_the_limit']:.0f} %" for case in trained["cases"] if case["ranks"] == 2]
    lines += [
        "",
        "Of the bare step (the frozen model, LoRA and AdamW, packed, with no sharding and no framework) it reaches",
        f"{_span(limits)} on one rank, and {_span(shared)} of two side by side where two ranks share the base.",
        f"Each number is ours / theirs. {hardware.capitalize()}; {date}.",
        "",
    ]
    return "\n".join(lines)


def _training(case: dict[str, Any]) -> str:
    ratio = case["ratios"]
    cells = f"x {ratio['examples_per_s']:.2f} | x {ratio['peak_bytes']:.2f} | x {ratio['first_step_s']:.2f}"
    return f"| {BASES[case['shape']]}, {case['dtype']}, 2 ranks | {cells} |"


def _document(case: dict[str, Any]) -> str:
    speed = median(each["peer"]["step_s"] / each["ours"]["step_s"] for each in case["rounds"])
    memory = median(max(each["ours"]["peak_bytes"]) / max(each["peer"]["peak_bytes"]) for each in case["rounds"])
    return f"| {case['length']:,} tokens, {case['dtype']} | x {speed:.2f} | x {memory:.2f} |"


def _span(shares: list[str]) -> str:
    numbers = sorted(shares, key=lambda share: int(share.split()[0]))
    return numbers[0] if numbers[0] == numbers[-1] else f"{numbers[0].split()[0]} to {numbers[-1]}"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + headline(HERE / "results") + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
