"""The one rank of `serve.py`: holds a base and many deltas, ours and PEFT's ways in turn, or one of them alone for its memory.

python benchmarks/serve_rank.py time BASE DELTAS PROMPTS NEW_TOKENS COUNTS ROUNDS OUT
python benchmarks/serve_rank.py memory BASE DELTAS PROMPTS NEW_TOKENS COUNT WAY OUT
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
os.environ["ZLORA_RENDEZVOUS"] = f"file://{tempfile.mkdtemp(prefix='zlora-bench-')}/rendezvous"

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from ways import CONFIGS

from pipeline.evaluate.generate import generate
from pipeline.generate.generator import Source, open_generator
from pipeline.job.spec import Decoding
from pipeline.screen import Screen
from pipeline.train.engine import join_ranks

NEVER = 10**6
"""No token ends a text, so that all do the same work."""
KEPT = ExitStack()
Answer = Callable[[list[int]], list[list[int]]]
"""Number of each prompt's delta, -1 for the base alone -> the new tokens of each."""


def main() -> None:
    what, base, folder, prompts, new_tokens, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    deltas = sorted(Path(folder).iterdir(), key=lambda path: int(path.name))
    texts = json.loads(Path(prompts).read_text())
    if what == "time":
        counts, rounds, out = rest
        told = timed(Path(base), deltas, texts, int(new_tokens), [int(count) for count in counts.split(",")], int(rounds))
    else:
        count, way, out = rest
        way_of = {"ours": ours, "PEFT": peft}[way]
        answer = way_of(Path(base), deltas[: int(count)], texts, int(new_tokens))
        # A batch with all of them, so that what is made for it is counted.
        answer([place % int(count) for place in range(len(texts))])
        gc.collect()
        told = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path(out).write_text(json.dumps(told))
    os._exit(0)


def timed(
    base: Path, deltas: list[Path], texts: list[str], new_tokens: int, counts: list[int], rounds: int
) -> list[dict[str, list[float]]]:
    """Of each round: way -> seconds of the processor at each count of deltas in the batch; 0: the base alone."""
    ways = {"ours": ours(base, deltas, texts, new_tokens), "PEFT": peft(base, deltas, texts, new_tokens)}
    found: list[dict[str, list[float]]] = []
    for turn in range(rounds + 1):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for count in counts:
            owners = [place % count if count else -1 for place in range(len(texts))]
            answers = []
            for way, answer in ways.items():
                start = time.process_time()
                answers.append(answer(owners))
                seconds[way].append(time.process_time() - start)
            if answers[0] != answers[1]:
                raise SystemExit(f"the ways generate different texts with {count} deltas")
        # The first is for warming up.
        found += [seconds] * bool(turn)
    return found


def ours(base: Path, deltas: list[Path], texts: list[str], new_tokens: int) -> Answer:
    ranks = join_ranks()
    decoding = Decoding(max_new_tokens=new_tokens, batch_tokens=10**6, gather="once")
    named = {path.name: path for path in deltas}
    source = Source(str(base), None, named, "", "fp32", CONFIGS / "zero3.json")
    generator = open_generator(source, decoding, "refuse", ranks, Screen(sys.stderr, shown=False))
    ids = generator.tokens.ids(texts)
    # Kept open until the process ends: the base stays gathered.
    KEPT.enter_context(generator.ready())

    def answer(owners: list[int]) -> list[list[int]]:
        return generate(generator.root, ids, ranks, decoding, (NEVER,), generator.root.context, sharded=False, owners=owners)

    return answer


def peft(base: Path, deltas: list[Path], texts: list[str], new_tokens: int) -> Answer:
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base)
    first, *others = deltas
    model = PeftModel.from_pretrained(model, str(first), adapter_name=first.name).eval()
    for delta in others:
        model.load_adapter(str(delta), delta.name)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)

    def answer(owners: list[int]) -> list[list[int]]:
        names = ["__base__" if owner < 0 else str(owner) for owner in owners]
        with torch.no_grad():
            found = model.generate(
                **inputs, adapter_names=names, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=NEVER
            )
        return found[:, inputs["input_ids"].shape[1] :].tolist()

    return answer


if __name__ == "__main__":
    main()
