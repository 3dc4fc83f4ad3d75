"""One rank of `plan_accuracy.py`: takes real steps and follows every tensor storage from its birth to its end.

A case has a `job` (a TOML file), `set` (overrides), `tokens` (lengths of the examples of each micro-batch), `label_tokens` of them,
`micro_batches`, and `outputs` of a task's own head (0: the vocabulary). `run` writes the bytes by part.

What is followed are the storages that operators hand out, so neither the allocator nor Python counts: the kernels' own scratch
memory does not show. Anonymous resident memory, which has all of that, is read from the kernel beside it.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.job.read import read_job
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import attach
from pipeline.model.build import TORCH_DTYPES, checkpointed
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.load import load_base
from pipeline.model.zero3 import shard_bytes
from pipeline.plan.families import read_shape
from pipeline.plan.hardware import gpu_of
from pipeline.plan.layers import MicroBatch as Batch
from pipeline.plan.memory import memory, setting
from pipeline.tasks.batch import MicroBatch, collate
from pipeline.tasks.example import Sequence
from pipeline.tasks.specials import Specials, specials_of
from pipeline.train.engine import Engine, Ranks, join_ranks, leave_ranks
from pipeline.train.step import Stepper

STEPS = 3
"""ZeRO-3 records its trace in the first two; the last one is measured."""
_NAME = "_PartitionedParameterCoordinator__all_gather_params"
_FETCH, _GATHER = PartitionedParameterCoordinator.fetch_sub_module, getattr(PartitionedParameterCoordinator, _NAME)


class Storages(TorchDispatchMode):
    """Live bytes of what was made while it is entered, by who made it; and the most there was."""

    def __init__(self) -> None:
        super().__init__()
        self.live = {"gathered": 0, "other": 0}
        self.most = dict(self.live)
        """Of each, at its own moment."""
        self.total = 0
        """The most of both together."""
        self.maker = "other"
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._follow(tensor.untyped_storage())
        return out

    def know(self, tensors: Iterator[torch.Tensor]) -> None:
        """Storages that were there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = weakref.ref(tensor.untyped_storage())

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, maker, count = storage._cdata, self.maker, storage.nbytes()
        if (known := self._known.get(key)) is not None and known() is not None:
            return

        def gone(_: object) -> None:
            self.live[maker] -= count
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live[maker] += count
        self.most[maker] = max(self.most[maker], self.live[maker])
        self.total = max(self.total, sum(self.live.values()))


def measure(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    """Bytes by part of the last of a few steps; see the head of this file."""
    job = read_job(Path(case["job"]), tuple(case["set"]))
    zero, dtype = deepspeed_config(Path(job.memory.config)), TORCH_DTYPES[job.base.dtype]
    config = read_config(Path(job.base.model))
    anonymous = {"start": anonymous_bytes()}
    loading = Storages()
    with loading:
        base = load_base(Path(job.base.model), config, dtype, ranks.device, zero, job.train.dropout)
    labels = tuple("abcdefgh"[: case["outputs"]])
    delta = attach(base, job.methods, 1, ranks.device, labels)
    root = Causal(base.model, base.family, delta.head)
    root.train()
    if job.memory.gradient_checkpointing:
        checkpointed(base.model, base.family)
    engine = Engine(root, zero)
    stepper = Stepper(engine, root, delta, job.train, ranks, fp16=job.base.dtype == "fp16")
    tensors = stepper.optimizer.param_groups[0]["params"]
    state = [part for one in stepper.optimizer.state.values() for part in one.values()]
    report: dict[str, Any] = {
        "load": loading.total,
        "base_shard": shard_bytes(base.model),
        "delta": bytes_of(tensors),
        "gradients": (stepper._flat.numel() + stepper._flat_runs.numel()) * 4,
        "optimizer": bytes_of(t for t in state if t.dim()),
    }
    fixed = sum(report[name] for name in ("base_shard", "delta", "gradients", "optimizer"))
    storages = Storages()
    storages.know(iter([*tensors, *state, stepper._flat, stepper._flat_runs]))
    storages.know(getattr(p, "ds_tensor", p.data) for p in base.model.parameters())
    specials = specials_of(job.methods, config.vocab_size)
    batches = [batch_of(case, number, base.family.packs, ranks, specials) for number in range(case["micro_batches"])]
    targets = sum(len(batch.labels) for batch in batches) * ranks.count
    with storages, watched_gathers(storages) as gathered, anonymous_peak(anonymous):
        for step in range(STEPS):
            gathered[0] = 0
            gc.collect()
            storages.total, storages.most = sum(storages.live.values()), dict(storages.live)
            note = root.register_forward_hook(lambda *_: report.update(kept=storages.live["other"], forward=storages.total))
            stepper(step, batches, targets, 1e-4)
            note.remove()
        took, storages.total = storages.total, sum(storages.live.values())
        stepper.capture()
    report |= {
        # One rank has it all.
        "gathered_elements": gathered[0] if ranks.count > 1 else 0,
        "gathered": storages.most["gathered"],
        "forward": report["forward"] + fixed,
        "step": took + fixed,
        "save": storages.total + fixed,
        "anonymous": anonymous,
    }
    return report


def predict(case: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What the plan says of the same case, by the same names; no margin and no context."""
    job = read_job(Path(case["job"]), tuple(case["set"]))
    zero, shape = deepspeed_config(Path(job.memory.config)), read_shape(Path(job.base.model))
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


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def watched_gathers(storages: Storages) -> Iterator[list[int]]:
    """Storages made inside DeepSpeed's fetch are gathered weights; the elements of what is gathered are counted."""
    counted = [0]

    def fetch(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, storages.maker = storages.maker, "gathered"
        try:
            return _FETCH(self, *args, **kwargs)
        finally:
            storages.maker = before

    def gathering(self: Any, params: Any, forward: bool) -> Any:
        counted[0] += sum(p.ds_numel for p in params if p.ds_status.name == "NOT_AVAILABLE")
        return _GATHER(self, params, forward)

    PartitionedParameterCoordinator.fetch_sub_module = fetch
    setattr(PartitionedParameterCoordinator, _NAME, gathering)
    try:
        yield counted
    finally:
        PartitionedParameterCoordinator.fetch_sub_module = _FETCH
        setattr(PartitionedParameterCoordinator, _NAME, _GATHER)


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


def run(environment: dict[str, str], case: dict[str, Any], folder: Path) -> None:
    """One rank, with its environment as pipeline/cluster/launch.py sets it. The first writes `out.json`; `log0` is what it said."""
    os.environ.update(environment)
    log = os.open(folder / f"log{environment['RANK']}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    ranks = join_ranks()
    report = measure(ranks, case)
    if ranks.first:
        (folder / "out.json").write_text(json.dumps(report))
    leave_ranks()
