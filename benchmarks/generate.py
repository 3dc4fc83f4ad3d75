"""Generation under ZeRO-3: examples a second, ours beside transformers' own `generate`, same base, prompts, ranks and texts.

    python benchmarks/generate.py [--ranks 2] [--prompts 64] [--beams 1] [--rounds 3] [--record FILE]

The base is a random GPT-2 of 6 layers, width 384, fp32. Prompts are the demo's films, 32 new tokens each, no early
end. Ours runs twice: with the base gathered once, as it is chosen where it fits, and gathered in each pass. transformers' way is its
ZeRO-3 load and `generate(synced_gpus=True)` in batches of 16 prompts a rank, sorted by length. Runs the ways in turn, each in fresh
rank processes; seconds are of generation alone. Texts are compared.
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

from machine import origin
from rich.console import Console
from tables import markdown_table, show
from ways import CONFIGS, FILMS, HERE, QUIET, SHAPES, make_base, make_tokenizer

WAYS = ("once", "each_pass", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        os.environ.update(QUIET)
        base = make_base(Path(scratch) / "base", SHAPES["gpt2-small"].config, make_tokenizer(FILMS))
        prompts = [json.loads(line)["prompt"] for line in FILMS.read_text().splitlines()][: asked.prompts]
        (Path(scratch) / "prompts.json").write_text(json.dumps(prompts))
        rounds = []
        for turn in range(1, asked.rounds + 1):
            answers = {way: run(Path(scratch), way, base, asked.ranks, asked.beams) for way in WAYS}
            if len({json.dumps(answer["texts"]) for answer in answers.values()}) > 1:
                raise SystemExit("the ways generate different texts")
            rounds.append({way: asked.prompts / answer["seconds"] for way, answer in answers.items()})
            console.print(f"round {turn}: " + ", ".join(f"{way} {rate:.1f} examples/s" for way, rate in rounds[-1].items()))
    heads = ("round", "gathered once", "gathered in each pass", "transformers", "ratio once", "ratio each pass")
    cells = [
        [str(n), *(f"{found[way]:.1f}" for way in WAYS), *(f"{found[way] / found['transformers']:.1f}" for way in WAYS[:2])]
        for n, found in enumerate(rounds, 1)
    ]
    title = f"Examples/s on {asked.ranks} ranks, {asked.prompts} prompts, {asked.beams} beams, 32 new tokens"
    show(console, title, heads, cells)
    ratios = [median(found[way] / found["transformers"] for found in rounds) for way in WAYS[:2]]
    verdict = f"median ratio of {asked.rounds} rounds: {ratios[0]:.1f} gathered once, {ratios[1]:.1f} in each pass; the texts are the same"
    console.print(verdict)
    if asked.record:
        rows = markdown_table(heads, cells)
        head = [
            "# Generation: ours beside transformers' own",
            "",
            *origin("generate.py", "torch", "deepspeed", "transformers"),
            "",
            title,
            "",
        ]
        asked.record.write_text("\n".join([*head, *rows, "", verdict, ""]), encoding="utf-8")


def run(scratch: Path, way: str, base: Path, ranks: int, beams: int) -> dict[str, object]:
    out = scratch / "answer.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, HERE / "generate_rank.py", way, base, scratch / "prompts.json", CONFIGS / "zero3.json", beams, out]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return json.loads(out.read_text())


if __name__ == "__main__":
    main()
