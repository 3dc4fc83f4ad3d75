"""One rank of `scaling.py`: takes steps until the trace is there, and counts all that comes from other ranks in one more.

A case has a `job` (a TOML file), `set` (overrides), `ranks`, `tokens` of each example (one is a micro-batch), `micro_batches`, and
`per_node` ranks of a node that is thought of. Every rank looks up as many rows of each other one as of its own, each once, and every
token has a label: what the plan reckons with. `measured` answers with elements gathered and bytes received; `said` is the plan of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.job.read import read_job
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import attach
from pipeline.model.build import TORCH_DTYPES
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.gathers import watched_gathers
from pipeline.model.load import load_base
from pipeline.plan.families import read_shape
from pipeline.plan.hardware import gpu_of
from pipeline.plan.memory import memory, setting
from pipeline.plan.work import work
from pipeline.tasks.batch import MicroBatch, collate
from pipeline.tasks.example import Sequence
from pipeline.train.engine import Engine, Ranks, join_ranks, leave_ranks
from pipeline.train.step import Stepper

STEPS = 3
"""ZeRO-3 records its trace in the first two; the last one is counted."""


class Received:
    """Bytes that this process gets from others through collectives: in all, and from ranks of other nodes.

    Made before DeepSpeed joins its ranks, which binds the functions.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.per_node = 1
        """Ranks of a node."""
        gather, swap, reduce = dist.all_gather_into_tensor, dist.all_to_all_single, dist.all_reduce

        def gathering(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
            self._from("gathers", [_bytes(input_tensor)] * dist.get_world_size(group), group)
            return gather(output_tensor, input_tensor, group, async_op)

        def swapping(output: torch.Tensor, parts: torch.Tensor, come: Any = None, go: Any = None, group: Any = None) -> Any:
            ranks = dist.get_world_size(group)
            row = _bytes(output) // max(1, len(output))
            self._from("swaps", [count * row for count in come or [len(output) // ranks] * ranks], group)
            return swap(output, parts, come, go, group=group)

        def reducing(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes["reduced"] += _bytes(tensor)
            return reduce(tensor, *args, **kwargs)

        for module in (dist, dist.distributed_c10d):
            module.all_gather_into_tensor, module.all_to_all_single, module.all_reduce = gathering, swapping, reducing

    def _from(self, kind: str, parts: list[int], group: Any) -> None:
        """Args:
        parts: bytes that come from each rank of the group.
        """
        own = dist.get_rank()
        for rank, count in zip(dist.get_process_group_ranks(group or dist.group.WORLD), parts, strict=True):
            self.bytes[kind] += count if rank != own else 0
            self.bytes[f"far {kind}"] += count if rank // self.per_node != own // self.per_node else 0


def on_rank(cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Counts of one rank, by case."""
    received = Received()
    ranks = join_ranks()
    found = [measured(ranks, case, received) for case in cases]
    leave_ranks()
    return found


def measured(ranks: Ranks, case: dict[str, Any], received: Received) -> dict[str, int]:
    job = read_job(Path(case["job"]), tuple(case["set"]))
    zero, dtype = deepspeed_config(Path(job.memory.config), int8=job.memory.int8_gathers), TORCH_DTYPES[job.base.dtype]
    config = read_config(Path(job.base.model))
    base = load_base(Path(job.base.model), config, dtype, ranks.device, zero, job.train.dropout)
    delta = attach(base, job.methods, 1, ranks.device, ())
    root = Causal(base.model, base.family, delta.head)
    root.train()
    engine = Engine(root, zero)
    stepper = Stepper(engine, root, delta, job.train, ranks, fp16=False)
    batches = [batch_of(case["tokens"], config.vocab_size, ranks)] * case["micro_batches"]
    targets = sum(len(batch.labels) for batch in batches) * ranks.count
    for step in range(STEPS - 1):
        stepper(step, batches, targets, 1e-4)
    received.per_node = case["per_node"]
    received.bytes.clear()
    with watched_gathers() as gathers:
        stepper(STEPS - 1, batches, targets, 1e-4)
    found = {name: received.bytes[name] for name in ("gathers", "far gathers", "swaps", "far swaps", "reduced")}
    engine.release()
    # One rank has it all: nothing is gathered from others.
    return found | {"elements": gathers.elements if ranks.count > 1 else 0, "invalidations": gathers.invalidations}


def batch_of(tokens: int, vocabulary: int, ranks: Ranks) -> MicroBatch:
    """One example, its tokens spread evenly over the vocabulary, each another one, and a label on each."""
    every = vocabulary // tokens
    ids = tuple(number * every + ranks.rank % every for number in range(tokens))
    batch = collate([Sequence(ids, ((1, tokens),))], [0], True, ranks.device)
    labels = torch.tensor(ids, device=ranks.device)
    return replace(batch, label_index=torch.arange(tokens, device=ranks.device), labels=labels)


def said(case: dict[str, Any]) -> dict[str, int]:
    """The plan of it."""
    job, ranks = read_job(Path(case["job"]), tuple(case["set"])), case["ranks"]
    zero, shape = deepspeed_config(Path(job.memory.config), int8=job.memory.int8_gathers), read_shape(Path(job.base.model))
    asked = setting(job, zero, shape, gpu_of("cpu"), ranks, ranks // case["per_node"], 0, None)
    found = memory(asked)
    done = work(asked, found)
    return {
        "elements": found.gathered.in_step(asked.micro_batches),
        "received": done.gathered_bytes + done.exchanged_bytes,
        "between_nodes": done.between_nodes_bytes,
        "reduced": done.reduced_bytes,
        "invalidations": 0,
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
