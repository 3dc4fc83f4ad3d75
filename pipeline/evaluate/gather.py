"""Gather the sharded base once for a whole scoring, or each layer in each pass? By arithmetic on shapes and free memory."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.job.spec import Decoding
from pipeline.model.causal import Causal
from pipeline.model.zero3 import exact, gathered, is_sharded, whole_bytes
from pipeline.plan.generation import USED, generation_bytes
from pipeline.train.engine import Ranks


@dataclass(frozen=True)
class Gathering:
    """What was chosen, and the figures it was chosen by, per rank."""

    each_pass: bool
    needed_bytes: int
    """Of the whole base, and of the largest batch's keys, values and logits."""
    free_bytes: int
    sharded: bool

    def held(self, root: nn.Module) -> AbstractContextManager[None]:
        """The base as it was chosen, while the block runs; either way as it is, not as training may see it."""
        if not self.sharded:
            return nullcontext()
        return exact(root) if self.each_pass else gathered(root)


def choose(root: Causal, decoding: Decoding, ranks: Ranks) -> Gathering:
    """All ranks choose the same: once only where it fits on every one."""
    needed, free, sharded = _needed_bytes(root, decoding), _free_bytes(ranks), is_sharded(root)
    match decoding.gather:
        case "once":
            each_pass = False
        case "each_pass":
            each_pass = True
        case "auto":
            (each_pass,) = ranks.any(needed > USED * free)
    return Gathering(sharded and each_pass, needed, free, sharded)


def _needed_bytes(root: Causal, decoding: Decoding) -> int:
    config = root.model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return whole_bytes(root) + generation_bytes(config.num_hidden_layers, width, config.vocab_size, root.model.dtype.itemsize, decoding)


def _free_bytes(ranks: Ranks) -> int:
    if ranks.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(ranks.device)
        return int(free + torch.cuda.memory_reserved(ranks.device) - torch.cuda.memory_allocated(ranks.device))
    # Of the machine, shared by its ranks.
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return kib * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count))
