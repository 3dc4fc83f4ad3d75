"""Tokenising a file of your own into the cache, starting again, reading in training order; beside `datasets`' load and map.

    python benchmarks/data.py [--bytes 1e9] [--peer-bytes 5e7] [--rounds 3] [--record FILE]

Makes JSON lines of prompts and completions (random words) and a byte-level BPE of 8,000 entries. The large file is for memory: what a
process holds privately (anonymous pages, sampled) beyond its imports and the tokenizer, while the cache is built and while a second
process trains from it. The small one is for time: ours and `datasets` in turn, each in fresh processes, with the file in the page cache.
Exits with 1 if private memory grew by more than 200 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from machine import origin
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PROMISED_BYTES = 200e6
Measured = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=float, default=1e9, help="of the file that memory is measured on")
    parser.add_argument("--peer-bytes", type=float, default=5e7, help="of the file that both are timed on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        large, small, base, cache = (Path(scratch) / name for name in ("large.jsonl", "small.jsonl", "base", "cache"))
        write_lines(large, asked.bytes)
        write_lines(small, asked.peer_bytes)
        write_tokenizer(base, large)
        runs: dict[str, list[Measured]] = {"ours": [], "datasets": []}
        for turn in range(1, asked.rounds + 1):
            for way in runs:
                runs[way].append(measure(way, "build", small, base, cache))
                console.print(f"round {turn}: {way} {runs[way][-1]['seconds']:.1f} s")
        again = {way: measure(way, "build", small, base, cache, keep=True) for way in runs}
        console.print(f"{large.stat().st_size / 1e6:,.0f} MB")
        steps = {
            "build": measure("ours", "build", large, base, cache),
            "second start": measure("ours", "build", large, base, cache, keep=True),
            "reading": measure("ours", "read", large, base, cache, keep=True),
        }
    worst = max(step["private_bytes"] for step in steps.values())
    lines = [
        ["", "seconds", "of processors", "tokens/s", "private MB beyond imports, peak"],
        *(row_of(f"{asked.bytes / 1e6:,.0f} MB, ours: {name}", [step], name) for name, step in steps.items()),
        *(row_of(f"{asked.peer_bytes / 1e6:,.0f} MB, {way}: build", runs[way], "build") for way in runs),
        *(row_of(f"{asked.peer_bytes / 1e6:,.0f} MB, {way}: second start", [again[way]], "second start") for way in runs),
    ]
    summary = [
        f"datasets / ours, building, median of {asked.rounds} paired rounds: {ratio(runs, 'seconds'):.1f} x the time, "
        f"{ratio(runs, 'cpu_s'):.1f} x the time of processors",
        f"private memory grew by {worst / 1e6:.0f} MB at most; promised: {PROMISED_BYTES / 1e6:.0f} MB",
        "reading: 4,096 examples in training order, one by one",
    ]
    table = Table(*lines[0], title="Your own data: the cache of tokens", title_justify="left")
    for cells in lines[1:]:
        table.add_row(*cells)
    console.print(table)
    console.print(*summary, sep="\n")
    if asked.record:
        rows = ["| " + " | ".join(cells) + " |" for cells in lines]
        rows.insert(1, "|" + "---|" * len(lines[0]))
        versions = origin("data.py", "tokenizers", "transformers", "pyarrow", "datasets")
        text = ["# Your own data: ours beside datasets", "", *versions, "", *rows, "", *(f"- {line}" for line in summary)]
        asked.record.write_text("\n".join(text) + "\n", encoding="utf-8")
    sys.exit(worst > PROMISED_BYTES)


def row_of(name: str, runs: list[Measured], step: str) -> list[str]:
    seconds, cpu_s = (median(run[key] for run in runs) for key in ("seconds", "cpu_s"))
    rate = "" if step == "second start" else f"{runs[0]['tokens'] / seconds:,.0f}"
    return [name, f"{seconds:.2f}", f"{cpu_s:.2f}", rate, f"{max(run['private_bytes'] for run in runs) / 1e6:.0f}"]


def ratio(runs: dict[str, list[Measured]], key: str) -> float:
    return median(theirs[key] / ours[key] for ours, theirs in zip(runs["ours"], runs["datasets"], strict=True))


def write_lines(file: Path, size: float) -> None:
    """Words as often as in English (Zipf), of the lengths of English words."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, length)) for length in rng.integers(2, 10, 20_000)]
    weights = 1 / np.arange(1, len(words) + 1)
    sentences = [
        " ".join(words[place] for place in rng.choice(len(words), count, p=weights / weights.sum())).capitalize() + "."
        for count in rng.integers(5, 25, 5_000)
    ]
    written = 0
    with file.open("w") as stream:
        while written < size:
            chosen = [sentences[place] for place in rng.integers(0, len(sentences), int(rng.integers(3, 12)))]
            written += stream.write(json.dumps({"prompt": " ".join(chosen[:-2]), "completion": " " + " ".join(chosen[-2:])}) + "\n")


def write_tokenizer(folder: Path, file: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    with file.open() as stream:
        tokenizer.train_from_iterator((line for line, _ in zip(stream, range(10_000), strict=False)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def measure(way: str, step: str, file: Path, base: Path, cache: Path, keep: bool = False) -> Measured:
    """One step in a fresh process.

    Args:
        keep: what is in the cache stays there.
    """
    if not keep:
        shutil.rmtree(cache / way, ignore_errors=True)
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache / way), "HF_HOME": str(cache / way), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, str(Path(__file__).parent / "data_process.py"), way, step, str(file), str(base)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
