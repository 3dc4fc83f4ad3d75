"""Loading a base of a billion parameters into ZeRO-3 shards: ours beside transformers' own way.

    python benchmarks/load.py [--parameters 1.1e9] [--ranks 2] [--rounds 3] [--out DIR] [--record FILE]

Makes a random bf16 Llama checkpoint, then runs the ways in turn, each in fresh rank processes over gloo, with the files in the
page cache. Prints what every rank read, held and sent, and whether the promises hold. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TypeAlias

from llama_checkpoint import VOCABULARY, WIDTH, write_llama
from machine import origin
from rich.console import Console
from rich.table import Table

from pipeline.cluster.launch import CPU_RANK, rank_environment

HERE = Path(__file__).parent
CONFIG = HERE.parent / "ds_configs" / "zero3.json"
ALLOCATOR = [name for name in CPU_RANK if name.startswith("MALLOC")]
OURS, THEIRS = "ours", "transformers"
LARGEST_BYTES = 2 * VOCABULARY * WIDTH
COLUMNS = (
    "round", "way", "allocator", "rank", "seconds", "counted MB", "read() MB", "mapped MB",
    "imports MB", "built MB", "peak MB", "shard MB", "collectives", "sent MB",
)  # fmt: skip
Rank: TypeAlias = dict[str, float]
Run: TypeAlias = tuple[int, str, str, list[Rank]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1.1e9)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="keep the checkpoint here, or take the one that is here")
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    busy = os.getloadavg()[0]
    console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        folder = asked.out or Path(scratch) / "base"
        if not (folder / "config.json").exists():
            console.print(f"writing {asked.parameters:.3g} random parameters to {folder}")
            write_llama(folder, asked.parameters)
        files = sorted(folder.glob("*.safetensors"))
        runs: list[Run] = []
        for turn in range(1, asked.rounds + 1):
            for allocator in ("launched", "default"):
                for way in (OURS, THEIRS):
                    runs.append((turn, way, allocator, load_once(way, allocator, folder, files, asked.ranks, Path(scratch))))
                    console.print(f"round {turn}: {way}, allocator as {allocator}: {seconds(runs[-1]):.2f} s")
        model_bytes = sum(rank["shard"] for rank in runs[0][3])
        file_bytes = sum(file.stat().st_size for file in files)
    rows = [row(run, number, rank) for run in runs for number, rank in enumerate(run[3])]
    table = Table(title="Loading alone, imports excluded", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("way", "allocator") else "right")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    summary = summarise(runs, model_bytes)
    checks = promises(runs, file_bytes)
    for line in summary:
        console.print(line)
    for text, kept in checks:
        console.print(f"{'kept  ' if kept else 'BROKEN'}  {text}")
    if asked.record:
        record(asked.record, busy, rows, summary, checks)
    return 0 if all(kept for _, kept in checks) else 1


def load_once(way: str, allocator: str, folder: Path, files: list[Path], ranks: int, scratch: Path) -> list[Rank]:
    """Fresh ranks, in the environment that `zlora train` gives to ranks on CPUs; files are read once before."""
    for file in files:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    with tempfile.TemporaryDirectory(dir=scratch) as meeting:
        children, outs = [], []
        for rank in range(ranks):
            environment = {**rank_environment(rank, ranks, Path(meeting), gpus=0), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            if allocator != "launched":
                environment = {name: value for name, value in environment.items() if name not in ALLOCATOR}
            outs.append(Path(meeting) / f"{rank}.json")
            command = [sys.executable, HERE / "load_rank.py", way, folder, CONFIG, outs[-1]]
            log = (Path(meeting) / f"{rank}.txt").open("wb")
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        codes = [child.wait() for child in children]
        if any(codes):
            logs = "\n".join((Path(meeting) / f"{rank}.txt").read_text()[-3000:] for rank in range(ranks))
            raise SystemExit(f"{way}: ranks ended with {codes}\n{logs}")
        return [json.loads(out.read_text()) for out in outs]


def seconds(run: Run) -> float:
    """Until the slowest rank has its shards."""
    return max(rank["seconds"] for rank in run[3])


def row(run: Run, number: int, rank: Rank) -> tuple[str, ...]:
    turn, way, allocator, _ = run

    def mb(key: str) -> str:
        return f"{rank[key] / 1e6:.0f}" if key in rank else "-"

    sizes = [mb(key) for key in ("counted", "rchar", "mapped", "rss_imports", "rss_built", "peak", "shard")]
    return (str(turn), way, allocator, str(number), f"{rank['seconds']:.2f}", *sizes, f"{rank['calls']:.0f}", mb("moved"))


def chosen(runs: list[Run], way: str, allocator: str) -> list[Run]:
    return [run for run in runs if run[1:3] == (way, allocator)]


def ratio(runs: list[Run], ours: str, theirs: str) -> float:
    """Median over the rounds of transformers' seconds to ours of the same round, each with an allocator setting."""
    pairs = zip(chosen(runs, OURS, ours), chosen(runs, THEIRS, theirs), strict=True)
    return median(seconds(b) / seconds(a) for a, b in pairs)


def summarise(runs: list[Run], model_bytes: float) -> list[str]:
    lines = []
    for ours, theirs, words in (
        ("launched", "default", "each as its users start it"),
        ("launched", "launched", "both with the allocator as launched"),
        ("default", "default", "both with the default allocator"),
    ):
        sides = chosen(runs, OURS, ours), chosen(runs, THEIRS, theirs)
        medians = [median(map(seconds, side)) for side in sides]
        peaks = [max(max(rank["peak"] for rank in run[3]) for run in side) / 1e9 for side in sides]
        lines.append(
            f"{words}: median {medians[0]:.2f} s against {medians[1]:.2f} s, median ratio {ratio(runs, ours, theirs):.1f}; "
            f"highest peak {peaks[0]:.2f} GB against {peaks[1]:.2f} GB"
        )
    moved = max(rank["moved"] for rank in chosen(runs, THEIRS, "launched")[0][3])
    lines.append(f"transformers' ranks take part in collectives of {moved / 1e9:.2f} GB, {moved / model_bytes:.2f} times the model")
    return lines


def promises(runs: list[Run], file_bytes: int) -> list[tuple[str, bool]]:
    """What the loader promises, checked on every round and every rank, with either allocator setting."""
    all_ours = [rank for run in runs if run[1] == OURS for rank in run[3]]
    share = file_bytes / len(runs[0][3])
    most_read = max(max(rank["counted"], rank["rchar"]) for rank in all_ours)
    spare = max(rank["peak"] - rank["rss_imports"] - rank["shard"] for rank in all_ours)
    calls = max(rank["calls"] for rank in all_ours)
    times = min(ratio(runs, ours, theirs) for ours in ("launched", "default") for theirs in ("launched", "default"))
    crcs = {tuple(rank["crc"] for rank in run[3]) for run in runs}
    return [
        (f"each rank reads 1/N of the bytes: at most {most_read / share - 1:+.3%} (limit +1 %)", most_read <= 1.01 * share),
        (
            f"peak memory above imports and shard: {spare / 1e6:.0f} MB (limit {2 * LARGEST_BYTES / 1e6:.0f}, twice the largest tensor)",
            spare < 2 * LARGEST_BYTES,
        ),
        (f"no collective moves weights: {calls:.0f} calls", calls == 0),
        (f"at least twice as fast as transformers: {times:.1f} times, whatever the allocator settings", times >= 2),
        ("every rank's shards are the same bytes both ways (CRC-32)", len(crcs) == 1),
    ]


def record(file: Path, busy: float, rows: list[tuple[str, ...]], summary: list[str], checks: list[tuple[str, bool]]) -> None:
    text = [
        "# Loading a base: ours beside transformers' ZeRO-3 load",
        "",
        *origin("load.py", "torch", "deepspeed", "transformers", "accelerate", "safetensors"),
        f"- `{CONFIG.parent.name}/{CONFIG.name}`, gloo, one thread a rank, page cache warm, bf16",
        "",
        *(f"- {line}" for line in summary),
        "",
        "| promise | |",
        "|---|---|",
        *(f"| {text} | {'kept' if kept else '**broken**'} |" for text, kept in checks),
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
        "Seconds: from a barrier after all imports to the rank's own end. counted: by our reader; read(): by the kernel (`rchar`);",
        "mapped: file pages that became resident, which is how transformers reads. peak: `VmHWM`, imports and mapped pages included.",
        "sent: bytes of the whole tensors that collectives handled on this rank. MB are 10^6 bytes.",
        f"allocator: launched has {', '.join(ALLOCATOR)} as `pipeline/cluster/launch.py` sets them for CPU ranks; default: glibc's own.",
        "",
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
