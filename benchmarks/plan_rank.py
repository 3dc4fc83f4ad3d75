"""One rank of `plan.py`: takes real steps and follows every tensor storage from its birth to its end.

    python benchmarks/plan_rank.py CASES OUT      (with RANK, WORLD_SIZE, ... as pipeline/cluster/launch.py sets them)

CASES is JSON: a list of objects with `base` (a folder), `config` (a ds_configs file), `job` (a job's TOML file), `tokens` (lengths of
the examples of one micro-batch), `label_tokens`, `micro_batches`. OUT gets, for each, the bytes by part.

What is followed are the storages that operators hand out, so neither the allocator nor Python counts: the kernels' own scratch
memory does not show. Anonymous resident memory is read from the kernel beside it.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.job.read import read_job
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import attach
from pipeline.model.build import TORCH_DTYPES, checkpointed, read_config
from pipeline.model.causal import Causal
from pipeline.model.load import load_base
from pipeline.model.zero3 import shard_bytes
from pipeline.tasks.batch import MicroBatch, collate
from pipeline.tasks.example import Sequence
from pipeline.train.engine import Engine, Ranks, join_ranks, leave_ranks
from pipeline.train.step import Stepper

WARM_STEPS = 3
"""ZeRO-3 records its trace in the first steps; the last one is measured."""
_NAME = "_PartitionedParameterCoordinator__all_gather_params"
_FETCH, _GATHER = PartitionedParameterCoordinator.fetch_sub_module, getattr(PartitionedParameterCoordinator, _NAME)


class Storages(TorchDispatchMode):
    """Live bytes of what was made while it is entered, by who made it; and the most there was."""

    def __init__(self) -> None:
        super().__init__()
        self.live = {"gathered": 0, "other": 0}
        self.peak: dict[str, int] = {}
        self.most = {"gathered": 0, "other": 0}
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
        if sum(self.live.values()) > sum(self.peak.values() or [0]):
            self.peak = dict(self.live)

    @contextmanager
    def phase(self, into: dict[str, Any], name: str) -> Iterator[None]:
        self.peak, self.most = dict(self.live), dict(self.live)
        with self:
            yield
        into[name] = {"peak": sum(self.peak.values()), "at_peak": self.peak, "most": self.most, "end": dict(self.live)}


def measure(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    job = read_job(Path(case["job"]), tuple(case.get("set", ())))
    zero = deepspeed_config(Path(job.memory.config))
    config = read_config(Path(job.base.model))
    storages, report = Storages(), {}
    anonymous = resident()["RssAnon"]
    with storages.phase(report, "load"):
        base = load_base(Path(job.base.model), config, TORCH_DTYPES[job.base.dtype], ranks.device, zero, job.train.dropout)
    delta = attach(base.model, base.family, job.methods, 1, ranks.device)
    root = Causal(base.model, base.family)
    root.train()
    if job.memory.gradient_checkpointing:
        checkpointed(base.model, base.family)
    engine = Engine(root, zero)
    stepper = Stepper(engine, root, delta, job.train, ranks, fp16=job.base.dtype == "fp16")
    tensors = delta.tensors().values()
    state = [part for one in stepper.optimizer.state.values() for part in one.values()]
    report["base_shard"] = shard_bytes(base.model)
    report["delta"] = sum(t.numel() * t.element_size() for t in tensors)
    report["gradient"] = stepper._flat.numel() * 4
    report["optimizer"] = sum(t.numel() * t.element_size() for t in state if t.dim())
    storages = Storages()
    storages.know(iter([*tensors, *state, stepper._flat]))
    storages.know(getattr(p, "ds_tensor", p.data) for p in base.model.parameters())
    batches = [batch_of(case, n, ranks) for n in range(case.get("micro_batches", 1))]
    report["gathered_elements"] = watch_gathers(storages)
    with storages:
        for step in range(WARM_STEPS):
            report["gathered_elements"][:] = [0]
            if step == WARM_STEPS - 1:
                gc.collect()
                anonymous_before = resident()["RssAnon"]
                storages.peak, storages.most = dict(storages.live), dict(storages.live)
                report["between"] = dict(storages.live)
                forward_end(root, storages, report)
            result = stepper(step, batches, sum(len(b.labels) for b in batches) * ranks.count, 1e-4)
    report["step"] = {"peak": sum(storages.peak.values()), "at_peak": storages.peak, "most": storages.most, "end": dict(storages.live)}
    report["anonymous"] = {"start": anonymous, "between": anonymous_before, "end": resident()["RssAnon"]}
    report["loss"] = result.loss
    return report


def forward_end(root: Causal, storages: Storages, report: dict[str, Any]) -> None:
    """What is alive between forward and backward: the saved activations."""

    def note(module: Any, inputs: Any, output: Any) -> None:
        report["forward_end"] = dict(storages.live)
        report["forward_peak"] = dict(storages.peak)

    root.register_forward_hook(note)


def watch_gathers(storages: Storages) -> list[int]:
    """Storages made inside DeepSpeed's fetch are gathered weights; their elements are counted."""
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
    return counted


def batch_of(case: dict[str, Any], number: int, ranks: Ranks) -> MicroBatch:
    sequences = []
    left = case["label_tokens"]
    for length in case["tokens"]:
        own = min(left, length - 1)
        left -= own
        tokens = tuple((7 * number + 3 * place + ranks.rank) % 100 for place in range(length))
        sequences.append(Sequence(tokens, ((length - own, length),) if own else ()))
    return collate(sequences, list(range(len(sequences))), True, ranks.device)


def resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "VmHWM"))}


def main(cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    ranks = join_ranks()
    # Each case in a process of its own would pay for the imports every time; what one leaves behind is not followed.
    reports = [measure(case, ranks) for case in json.loads(cases.read_text())]
    if ranks.first:
        out.write_text(json.dumps(reports))
    leave_ranks()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
