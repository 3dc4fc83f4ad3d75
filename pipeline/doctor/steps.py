"""On every rank: a few training steps of a tiny random base under ZeRO-3 by the program's own parts, and what came of them.

In: an empty folder that the ranks of this machine share. Out: losses, gradients, whether the ranks agree, times and memory.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.job.method import Lora
from pipeline.job.spec import Train
from pipeline.job.zero import complete
from pipeline.methods.attach import attach
from pipeline.model.build import require_dtype
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.load import load_base
from pipeline.plan.hardware import computes_bf16
from pipeline.tasks.batch import collate
from pipeline.tasks.example import Sequence
from pipeline.train.engine import Engine, Ranks, from_first
from pipeline.train.loop import peak_memory_bytes
from pipeline.train.step import Stepper

_STEPS = 3
_MOST_STEPS = 20
"""fp16 may begin by lowering its loss scale, one step each time."""
_VOCABULARY, _TOKENS = 256, 32
# Nothing stays gathered: every layer of so small a base, too.
_ZERO = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def take_steps(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The same facts on every rank."""
    asked = "fp32"
    if ranks.device.type == "cuda":
        asked = "bf16" if computes_bf16(torch.cuda.get_device_capability(ranks.device)) else "fp16"
    dtype = require_dtype(asked, ranks.device)
    base = Path(from_first(ranks, f"base in {folder}", lambda: str(_make_base(folder / "base"))))
    zero = complete(_ZERO)
    loaded = load_base(base, read_config(base), dtype, ranks.device, zero)
    delta = attach(loaded, (Lora(kind="lora", targets=("q", "v"), rank=4, alpha=8.0),), 1, ranks.device)
    root = Causal(loaded.model, loaded.family, delta.head)
    stepper = Stepper(Engine(root, zero), root, delta, Train(learning_rate=0.02), ranks, fp16=asked == "fp16")
    draw = torch.Generator().manual_seed(ranks.rank)
    tokens = torch.randint(_VOCABULARY, (2, _TOKENS), generator=draw).tolist()
    batch = collate([Sequence(tuple(row), ((1, _TOKENS),)) for row in tokens], [2 * ranks.rank, 2 * ranks.rank + 1], True, ranks.device)
    targets, losses, norms, seconds = 2 * (_TOKENS - 1) * ranks.count, [], [], []
    for step in range(_MOST_STEPS):
        begun = time.perf_counter()
        taken = stepper(step, [batch], targets, 0.02)
        losses.append(taken.loss)
        norms.append(taken.grad_norm)
        seconds.append(time.perf_counter() - begun)
        if stepper.progress()["optimizer_steps"] == _STEPS or taken.bad:
            break
    flat = torch.cat([tensor.detach().flatten() for tensor in delta.tensors().values()])
    most, least = flat.clone(), flat.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    return {
        "device": device,
        "ranks": ranks.count,
        "dtype": asked,
        "losses": losses,
        "grad_norms": norms,
        "apart": float((most - least).abs().max()),
        "load_s": loaded.load_s,
        "step_s": seconds[-1],
        "memory_bytes": peak_memory_bytes(ranks.device),
    }


def _make_base(folder: Path) -> Path:
    torch.manual_seed(0)
    # Large weights, so that LoRA's share is seen in the loss at once.
    sizes = {"vocab_size": _VOCABULARY, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder
