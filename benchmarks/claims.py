"""The paper's claims of memory, size and speed at a small scale: full fine-tuning with Adam beside LoRA, under ZeRO-3 on the same ranks.

    python benchmarks/claims.py [--ranks 2] [--rounds 3] [--steps 6] [--busy] [--record FILE]

The base is a random GPT-2 of 12 layers, width 512, bf16; the data are the demo's films. Bytes of the state are counted by `zlora profile`,
which follows every tensor storage; memory of a process (VmHWM in the steps after the first), seconds of a step and what is on disk are of
`zlora train`. All ways run in turn, and a step's ratio is the median over the rounds of one round's two; processor time says more than the
clock where other work shares the machine, and with --busy stands alone. With --record FILE.md the table goes to that file, every number to
FILE.json, and docs/memory.md is made again from it (`python docs/make_claims.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from machine import origin
from rich.console import Console
from tables import markdown_table, show
from transformers import GPT2Config
from ways import ALLOCATOR, FILMS, HERE, NO_DROPOUT, QUIET, make_base, make_tokenizer, start

CONFIG = {"n_layer": 12, "n_embd": 512, "n_head": 8, "n_positions": 256, **NO_DROPOUT}
METHODS = {"full": 'kind = "full"', "lora": 'kind = "lora"\ntargets = ["q", "v"]\nrank = 4\nalpha = 32'}
WARM_UP, EXAMPLES = 3, 32
PARTS = {"base_shard": "base", "delta": "master weights, delta", "gradients": "gradients", "optimizer": "both moments"}
JOB = """
[base]
model = "{base}"
dtype = "bf16"
[[methods]]
{method}
[task]
kind = "jsonl"
data = "{data}"
separator = "\\n"
[train]
steps = {steps}
batch_examples = {examples}
micro_batch_tokens = 2048
learning_rate = 1e-5
schedule = "constant"
save_every_steps = {steps}
[memory]
config = "zero3_cpu.json"
gradient_checkpointing = {recompute}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed")
    parser.add_argument("--busy", action="store_true", help="leave seconds by the clock out: other work shares the machine")
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file, and to a JSON file beside it")
    asked = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    os.environ.update(QUIET)
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        folder, tokenizer = Path(scratch), make_tokenizer(FILMS)
        ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        base = make_base(folder / "base", GPT2Config(vocab_size=len(tokenizer), **ends, **CONFIG), tokenizer, "bf16")
        ways = {name: write_job(folder, base, name, recompute, asked.steps) for name, recompute in wanted()}
        parts = {name: counted(folder, ways[f"{name}, recomputed"], name, asked.ranks) for name in METHODS}
        rounds = []
        for number in range(1, asked.rounds + 1):
            rounds.append({name: trained(folder, job, asked) for name, job in ways.items()})
            said = ", ".join(f"{name} {run['step_s']:.2f}" for name, run in rounds[-1].items())
            console.print(f"round {number} of {asked.rounds}: {said} s a step")
    report = {
        "measured_on": origin("claims.py", "torch", "deepspeed", "transformers"),
        "load": [busy, os.getloadavg()[0]],
        "ranks": asked.ranks,
        "busy": asked.busy,
        "trained": {name: rounds[0][f"{name}, recomputed"]["trained"] for name in METHODS},
        "parts": parts,
        "rounds": rounds,
    }
    heads, cells = table(report)
    show(console, title(report), heads, cells)
    if asked.record:
        lines = markdown_table(heads, cells)
        head = [
            "# Full fine-tuning beside LoRA, same shards",
            "",
            *report["measured_on"],
            f"- the machine's load when it began and ended: {busy:.1f}, {report['load'][1]:.1f}",
        ]
        asked.record.write_text("\n".join([*head, "", f"{title(report)}.", "", *lines, ""]), encoding="utf-8")
        asked.record.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        start([[HERE.parent / "docs" / "make_claims.py"]], {})


def wanted() -> list[tuple[str, bool]]:
    return [(f"{name}, {'recomputed' if recompute else 'kept'}", recompute) for recompute in (True, False) for name in METHODS]


def write_job(folder: Path, base: Path, name: str, recompute: bool, steps: int) -> Path:
    file = folder / f"{name.replace(', ', '_')}.toml"
    keys = {"base": base, "data": FILMS, "method": METHODS[name.split(",")[0]], "examples": EXAMPLES, "steps": WARM_UP + steps}
    file.write_text(JOB.format(**keys, recompute=str(recompute).lower()), encoding="utf-8")
    return file


def counted(folder: Path, job: Path, name: str, ranks: int) -> dict[str, dict[str, int]]:
    """Bytes of all ranks by part, counted on the first; and what the plan says of them."""
    run = folder / f"profile-{name}"
    start([["-m", "pipeline", "profile", job, "--run", run, "--ranks", ranks, "--steps", 2]], QUIET)
    found = json.loads((run / "profile" / "profile.json").read_text())["memory"]["parts"]
    return {part: {way: ranks * count for way, count in found[part].items()} for part in PARTS}


def trained(folder: Path, job: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """One run by `zlora train`: its slowest rank's seconds, its largest rank's memory, and what it left."""
    out, run = folder / "out", folder / "run"
    out.mkdir(exist_ok=True)
    start([[HERE / "ours.py", out, "train", job, "--run", run, "--fresh", "--ranks", asked.ranks]], QUIET | ALLOCATOR)
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(asked.ranks)]
    manifest = json.loads((run / "delta" / "manifest.json").read_text())
    return {
        "step_s": max(rank["ends"][-1] - rank["ends"][WARM_UP - 1] for rank in ranks) / asked.steps,
        "step_cpu_s": sum(rank["cpu_s"][-1] - rank["cpu_s"][WARM_UP - 1] for rank in ranks) / asked.steps,
        "peak_bytes": max(rank["peak_steps_bytes"] for rank in ranks),
        "loss": ranks[0]["losses"][-1],
        "trained": manifest["parameters"],
        "delta_bytes": sum(file.stat().st_size for file in (run / "delta").glob("*.safetensors")),
        "state_bytes": sum(file.stat().st_size for file in (run / "state").rglob("*.safetensors")),
    }


def title(report: dict[str, Any]) -> str:
    full, lora = report["trained"].values()
    size = f"GPT-2 of {full / 1e6:.1f}M parameters, bf16, {report['ranks']} CPU ranks, ZeRO-3; LoRA of rank 4 on q and v ({lora:,})"
    return f"{size}; MB are 10^6 bytes, medians of {len(report['rounds'])} rounds"


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What docs/memory.md shows, too."""
    full, lora = ({part: each["measured"] for part, each in report["parts"][name].items()} for name in METHODS)
    rows = [_bytes(f"counted on all ranks: {said}", full[part], lora[part]) for part, said in PARTS.items()]
    rows.append(_bytes("counted on all ranks: sum", sum(full.values()), sum(lora.values())))
    kept = {"most of a rank's process, interpreter included": "peak_bytes", "delta on disk": "delta_bytes", "state on disk": "state_bytes"}
    for name, key in kept.items():
        rows.append(_bytes(name, *(median(each[f"{way}, recomputed"][key] for each in report["rounds"]) for way in METHODS)))
    clocks = {"step_cpu_s": "processor time of all ranks in a step"} | ({} if report["busy"] else {"step_s": "a step"})
    for key, name in clocks.items():
        for way in ("recomputed", "kept"):
            seconds = [[each[f"{method}, {way}"][key] for each in report["rounds"]] for method in METHODS]
            ratio = median(a / b for a, b in zip(*seconds, strict=True))
            rows.append([f"{name}, activations {way}", *(f"{median(each):.2f} s" for each in seconds), f"{ratio:.2f}"])
    return ["", "full, Adam", "LoRA", "full / LoRA"], rows


def _bytes(name: str, full: float, lora: float) -> list[str]:
    return [name, f"{full / 1e6:,.1f} MB", f"{lora / 1e6:,.1f} MB", f"{full / lora:,.1f}"]


if __name__ == "__main__":
    main()
