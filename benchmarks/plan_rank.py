"""One rank of `plan_accuracy.py`: takes real steps and follows every tensor storage from its birth to its end.

A case has a `job` (a TOML file), `set` (overrides), `tokens` (lengths of the examples of each micro-batch), `label_tokens` of them,
`micro_batches`, and `outputs` of a task's own head (0: the vocabulary). `measure` answers with the bytes by part.

What is followed are the storages that operators hand out, so neither the allocator nor Python counts: the kernels' own scratch
memory does not show. Anonymous resident memory, which has all of that, is read from the kernel beside it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.job.method import trains_tables
from pipeline.job.read import read_job
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import attach
from pipeline.model.build import TORCH_DTYPES, checkpointed
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.load import load_base
from pipeline.plan.families import read_shape
from pipeline.plan.hardware import gpu_of
from pipeline.plan.layers import MicroBatch as Batch
from pipeline.plan.memory import memory, setting
from pipeline.profile.follow import Follower
from pipeline.profile.storages import Storages
from pipeline.tasks.batch import MicroBatch, collate
from pipeline.tasks.example import Sequence
from pipeline.tasks.specials import Specials, specials_of
from pipeline.train.engine import Engine, Ranks, join_ranks, leave_ranks
from pipeline.train.step import Stepper

STEPS = 3
"""ZeRO-3 records its trace in the first two; the last one is measured."""


def on_rank(case: dict[str, Any]) -> dict[str, Any]:
    """`measure`, on a rank that has not joined the others yet."""
    found = measure(join_ranks(), case)
    leave_ranks()
    return found


def measure(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    """Bytes by part of the last of a few steps; see the head of this file."""
    job = read_job(Path(case["job"]), tuple(case["set"]))
    zero, dtype = deepspeed_config(Path(job.memory.config), int8=job.memory.int8_gathers), TORCH_DTYPES[job.base.dtype]
    config = read_config(Path(job.base.model))
    anonymous = {"start": anonymous_bytes()}
    loading = Storages()
    with loading:
        base = load_base(
            Path(job.base.model), config, dtype, ranks.device, zero, job.train.dropout, trains_tables=trains_tables(job.methods)
        )
    labels = tuple("abcdefgh"[: case["outputs"]])
    delta = attach(base, job.methods, 1, ranks.device, labels)
    root = Causal(base.model, base.family, delta.head)
    root.train()
    if job.memory.gradient_checkpointing:
        checkpointed(base.model, base.family)
    engine = Engine(root, zero)
    stepper = Stepper(engine, root, delta, job.train, ranks, fp16=job.base.dtype == "fp16")
    specials = specials_of(job.methods, config.vocab_size)
    batches = [batch_of(case, number, base.family.packs, ranks, specials) for number in range(case["micro_batches"])]
    targets = sum(len(batch.labels) for batch in batches) * ranks.count
    with anonymous_peak(anonymous):
        for step in range(STEPS - 1):
            stepper(step, batches, targets, 1e-4)
        gc.collect()
        follower = Follower(stepper.held(), root)
        with follower:
            stepper(STEPS - 1, batches, targets, 1e-4)
        found = follower.found([], batches).bytes
        saving = Follower(stepper.held(), root)
        with saving:
            stepper.capture()
    return found | {
        "load": loading.total,
        # One rank has it all.
        "gathered_elements": follower.gathers.elements if ranks.count > 1 else 0,
        "step": found["backward"],
        "save": saving.found([], batches).bytes["backward"],
        "anonymous": anonymous,
    }


def predict(case: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What the plan says of the same case, by the same names; no margin and no context."""
    job = read_job(Path(case["job"]), tuple(case["set"]))
    zero, shape = deepspeed_config(Path(job.memory.config), int8=job.memory.int8_gathers), read_shape(Path(job.base.model))
    asked = setting(job, zero, shape, gpu_of("cpu"), ranks, 1, case["outputs"], None)
    lengths = case["tokens"]
    views = views_of(lengths) if shape.packs else [lengths]
    padded, pairs = (sum(len(view) * view[0] ** power for view in views) for power in (1, 2))
    tokens, labels = sum(lengths) if shape.packs else padded, len(lengths) if case["outputs"] else case["label_tokens"]
    found = memory(asked, Batch(tokens, padded, labels, len(lengths), max(lengths), pairs))
    return {
        **{name: found.parts[name] for name in ("base_shard", "delta", "gradients", "optimizer")},
        "kept": found.activations.kept,
        "gathered": found.parts["gathered"],
        "gathered_elements": found.gathered.in_step(case["micro_batches"]),
        "forward": found.allocated["forward"],
        "step": max(found.allocated["forward"], found.allocated["backward"]),
        "save": found.allocated["save"],
    }


def views_of(lengths: list[int]) -> list[list[int]]:
    """The views in which attention sees packed examples (pipeline/tasks/batch.py), the longest example of each first."""
    views: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        if not views or length * 2 < views[-1][0]:
            views.append([])
        views[-1].append(length)
    return views


def batch_of(case: dict[str, Any], number: int, packed: bool, ranks: Ranks, specials: Specials | None) -> MicroBatch:
    """Examples of the case's lengths, special tokens included: with a label each, or the last tokens of the first of them learnt."""
    sequences, left = [], 0 if case["outputs"] else case["label_tokens"]
    for length in case["tokens"]:
        length -= len(specials or ())
        own = min(left, length - 1)
        left -= own
        tokens = tuple((7 * number + 3 * place + ranks.rank) % 100 for place in range(length))
        label = float(length % case["outputs"]) if case["outputs"] else None
        sequence = Sequence(tokens, ((length - own, length),) if own else (), label=label)
        sequences.append(specials.around(sequence) if specials else sequence)
    return collate(sequences, list(range(len(sequences))), packed, ranks.device)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@contextmanager
def anonymous_peak(into: dict[str, int]) -> Iterator[None]:
    """The most while the block runs, looked at every 2 ms."""
    end = threading.Event()
    into["peak"] = 0

    def follow() -> None:
        while not end.wait(0.002):
            into["peak"] = max(into["peak"], anonymous_bytes())

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
