"""One rank of `generate.py`: generates one way; the first rank writes seconds and texts.

torchrun --nproc-per-node=2 benchmarks/generate_rank.py WAY BASE PROMPTS CONFIG BEAMS OUT
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

from pipeline.evaluate.gather import choose
from pipeline.evaluate.generate import generate
from pipeline.job.spec import Evaluate
from pipeline.job.zero import deepspeed_config
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.load import load_base
from pipeline.train.engine import Engine, Ranks, join_ranks, leave_ranks

NEW_TOKENS, BATCH = 32, 16
NEVER = 10**6
"""No token ends a text, so that all ways do the same work."""


def main() -> None:
    way, base, prompts, config, beams, out = sys.argv[1:]
    ranks = join_ranks()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer([text + tokenizer.eos_token for text in json.loads(Path(prompts).read_text())])["input_ids"]
    function = transformers_way if way == "transformers" else our_way
    seconds, texts = function(Path(base), ids, Path(config), int(beams), ranks, way)
    if ranks.first:
        Path(out).write_text(json.dumps({"seconds": seconds, "texts": texts}))
    leave_ranks()
    # As zlora's own ranks end: the interpreter's clean-up now and then aborts in DeepSpeed's threads.
    os._exit(0)


def our_way(base: Path, ids: list[list[int]], config: Path, beams: int, ranks: Ranks, way: str) -> tuple[float, list[list[int]]]:
    zero, shape = deepspeed_config(config), read_config(base)
    loaded = load_base(base, shape, torch.float32, ranks.device, zero, 0.0, iter)
    root = Causal(loaded.model, loaded.family).eval()
    engine = Engine(root, zero)
    evaluate = Evaluate(max_new_tokens=NEW_TOKENS, beams=beams, gather=way)
    dist.barrier()
    start = time.perf_counter()
    gathering = choose(root, evaluate, ranks)
    with gathering.held(root):
        texts = generate(root, ids, ranks, evaluate, (NEVER,), shape.max_position_embeddings, gathering.each_pass)
    dist.barrier()
    engine.release()
    return time.perf_counter() - start, texts


def transformers_way(base: Path, ids: list[list[int]], config: Path, beams: int, ranks: Ranks, way: str) -> tuple[float, list[list[int]]]:
    import deepspeed

    zero = json.loads(config.read_text()) | {"train_micro_batch_size_per_gpu": 1}
    keep = HfDeepSpeedConfig(zero)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    deepspeed.initialize(model=model, config=zero)
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))[ranks.rank :: ranks.count]
    dist.barrier()
    start = time.perf_counter()
    mine: dict[int, list[int]] = {}
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        longest = max(len(ids[i]) for i in chosen)
        tokens = torch.tensor([[0] * (longest - len(ids[i])) + ids[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in chosen])
        found = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=beams,
            pad_token_id=0,
            eos_token_id=NEVER,
            synced_gpus=True,
        )
        mine |= dict(zip(chosen, found[:, longest:].tolist(), strict=True))
    parts: list[dict[int, list[int]]] = [{} for _ in range(ranks.count)]
    dist.all_gather_object(parts, mine)
    seconds = time.perf_counter() - start
    del keep
    together = {index: text for part in parts for index, text in part.items()}
    return seconds, [together[index] for index in range(len(ids))]


if __name__ == "__main__":
    main()
