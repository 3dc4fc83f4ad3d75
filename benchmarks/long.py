"""Long documents on two ranks: `zlora train` beside PEFT + Trainer + DeepSpeed, time and peak memory against the length of an example.

    python benchmarks/long.py --data FOLDER [--lengths 256,512,1024,2048,4096] [--dtype bf16] [--rounds 2] [--picture FILE] [--record FILE]

FOLDER has E2E's official trainset.csv, whose texts are joined to documents of exactly so many tokens; all but the first few are learnt. The
base is a random Llama of 101M parameters; a step has one document for each rank, so that nothing is padded in either way and packing gains
nothing. With --record FILE.md the same goes to that file, and every round's numbers to FILE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from machine import origin
from matplotlib.figure import Figure
from rich.console import Console
from tables import markdown_table, show
from transformers import PreTrainedTokenizerFast
from ways import ALLOCATOR, QUIET, SHAPES, Setup, make_base, make_data, make_tokenizer, run_ours, run_peer

MB = 1e6
WARM_UP, STEPS = 2, 2
DOCUMENTS = 16
COLOURS = {"ours": "#5e81ac", "peer": "#d08770"}
NAMES = {"ours": "zlora", "peer": "PEFT + Trainer + DeepSpeed"}


def main() -> None:
    asked = arguments()
    os.environ.update(QUIET)
    console = Console(highlight=False, soft_wrap=True)
    found = []
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        texts = make_data(asked.data / "trainset.csv", Path(scratch))
        tokenizer = make_tokenizer(texts)
        for dtype in asked.dtype:
            base = make_base(Path(scratch) / dtype, SHAPES[asked.shape].config, tokenizer, dtype)
            for length in asked.lengths:
                folder = Path(scratch) / f"{dtype}-{length}"
                folder.mkdir()
                data = documents(texts, tokenizer, length, folder / "documents.jsonl")
                setup = Setup(asked.shape, base, data, folder, dtype, 2, 2, WARM_UP, STEPS, micro_batch_tokens=length)
                found.append(measure(console, setup, length, asked.rounds))
    heads, cells = rows(found)
    show(console, "A step of one document a rank, two ranks", heads, cells)
    if asked.picture:
        draw(found, asked.picture)
    if asked.record:
        measured_on = origin("long.py", "torch", "deepspeed", "transformers", "peft")
        settings = " ".join(f"{name}={value}" for name, value in ALLOCATOR.items())
        measured_on.append(f"- allocator of every rank: `{settings}`; one thread each")
        report = {"measured_on": measured_on, "cases": found}
        asked.record.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        lines = markdown_table(heads, cells)
        head = ["# Long documents: ours beside PEFT + Trainer", "", *measured_on, "", f"Medians of {asked.rounds} rounds.", ""]
        asked.record.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with E2E's trainset.csv")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=["bf16"], help="fp32, bf16, or both")
    parser.add_argument("--shape", default="llama", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="also draw peak memory against length there")
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file, and to a JSON file beside it")
    return parser.parse_args()


def documents(texts: Path, tokenizer: PreTrainedTokenizerFast, length: int, file: Path) -> Path:
    """Documents of so many tokens, the separator and the end token included."""
    pieces = (json.loads(line)["completion"] for line in texts.read_text(encoding="utf-8").splitlines())
    with file.open("w", encoding="utf-8") as out:
        for _ in range(DOCUMENTS):
            words: list[str] = []
            prompt = " ".join(next(pieces).split()[:2])
            room = length - 2 - len(tokenizer(prompt)["input_ids"])
            while len(tokenizer("".join(words))["input_ids"]) < room:
                # Words are tokenised apart, so that tokens add up.
                words += [f" {word}" for piece in (next(pieces) for _ in range(8)) for word in piece.split()]
            while (much := len(tokenizer("".join(words))["input_ids"]) - room) > 0:
                words = words[: -max(1, much // 4)]
            # " a" is one token.
            words += [" a"] * -much
            out.write(json.dumps({"prompt": prompt, "completion": "".join(words)}) + "\n")
    return file


def measure(console: Console, setup: Setup, length: int, rounds: int) -> dict[str, Any]:
    taken = []
    for number in range(1, rounds + 1):
        runs = {"ours": run_ours(setup), "peer": run_peer(setup)}
        taken.append({way: run.summary() for way, run in runs.items()})
        said = ", ".join(f"{way} {run.step_s:.2f} s a step, {peak(taken[-1][way]):,.0f} MB" for way, run in runs.items())
        console.print(f"{setup.dtype}, {length} tokens, round {number} of {rounds}: {said}")
    pairs = [pair for each in taken for pair in zip(each["ours"]["losses"], each["peer"]["losses"], strict=True)]
    return {"dtype": setup.dtype, "length": length, "rounds": taken, "largest_loss_difference": max(abs(a - b) for a, b in pairs)}


def peak(summary: dict[str, Any]) -> float:
    """Of the rank that has most, in MB."""
    return max(summary["peak_bytes"]) / MB


def rows(cases: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    both = ("ours", "peer")
    heads = ["dtype", "tokens", *(f"{way}: s/step" for way in both), "peer / ours", *(f"{way}: peak MB" for way in both), "ours / peer"]
    cells = []
    for case in cases:
        seconds = [median(each[way]["step_s"] for each in case["rounds"]) for way in both]
        peaks = [median(peak(each[way]) for each in case["rounds"]) for way in both]
        speed = median(each["peer"]["step_s"] / each["ours"]["step_s"] for each in case["rounds"])
        memory = median(peak(each["ours"]) / peak(each["peer"]) for each in case["rounds"])
        cells.append(
            [
                case["dtype"],
                f"{case['length']:,}",
                *(f"{one:.2f}" for one in seconds),
                f"{speed:.2f}",
                *(f"{one:,.0f}" for one in peaks),
                f"{memory:.2f}",
                f"{case['largest_loss_difference']:.1e}",
            ]
        )
    return [*heads, "loss: largest difference"], cells


def draw(cases: list[dict[str, Any]], file: Path) -> None:
    matplotlib.use("agg")
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    figure = Figure(figsize=(5.5 * len(dtypes), 4), layout="constrained")
    for place, dtype in enumerate(dtypes):
        axes = figure.add_subplot(1, len(dtypes), place + 1)
        chosen = [case for case in cases if case["dtype"] == dtype]
        for way, colour in COLOURS.items():
            peaks = [median(peak(each[way]) for each in case["rounds"]) for case in chosen]
            axes.plot([case["length"] for case in chosen], peaks, color=colour, marker="o", label=NAMES[way])
        axes.set(title=f"Peak memory of a rank, {dtype}", xlabel="tokens of an example, one a rank", ylabel="MB")
        axes.set(xticks=[case["length"] for case in chosen], ylim=(0, None))
        axes.tick_params(axis="x", labelsize=7, rotation=45)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
