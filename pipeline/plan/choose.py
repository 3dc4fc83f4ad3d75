"""`[memory] config = "auto"`: the fastest memory configuration that fits, with a reason for every key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.plan.hardware import GIB
from pipeline.plan.lint import lean_prefetch
from pipeline.plan.memory import Setting, beside, memory


@dataclass(frozen=True)
class Choice:
    setting: Setting
    config: dict[str, Any]
    """As a file of ds_configs/ has it."""
    reasons: dict[str, str]
    """Key of `zero_optimization` -> why it is so."""
    fits: bool


def choose(asked: Setting) -> Choice:
    """The first that fits of: base whole on every rank, sharded within each node, over all ranks, in main memory, on disk.

    Where none does, the one that needs least. Main memory binds where it is known; a disk is chosen only where the job names one.
    """
    tried = list(_candidates(asked))
    return next((choice for choice in tried if choice.fits), min(tried, key=lambda choice: memory(choice.setting).peak))


def _candidates(asked: Setting) -> Iterator[Choice]:
    """From the fastest on."""
    whole = replace(asked, auto=False, stage=0, offload=None, group=None)
    yield _made(whole, {"stage": 0}, {"stage": "the base fits whole on every rank, so nothing need be gathered"})
    lean = lean_prefetch(whole)
    section = {
        "stage": 3,
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": lean.bucket,
        "stage3_param_persistence_threshold": lean.persistence,
        "stage3_max_live_parameters": lean.live,
        "stage3_max_reuse_distance": lean.reuse,
    }
    reasons = {
        "stage": f"the base whole on every rank would need {_gib(memory(whole).peak)} of {_gib(whole.gpu.memory_bytes)}",
        "overlap_comm": "gathers run beside the computation",
        "stage3_prefetch_bucket_size": "one layer is gathered ahead",
        "stage3_param_persistence_threshold": "norms and biases stay gathered, matrices do not: small gathers cost more than they hold",
        "stage3_max_live_parameters": "the layer in use, the one ahead, and the embedding's share",
        "stage3_max_reuse_distance": "what is used is released: the backward pass comes too late to wait for it",
    }
    sharded = replace(whole, stage=3, prefetch=lean)
    local = whole.local_ranks
    if whole.nodes > 1 and local > 1 and local * whole.nodes == whole.ranks and not whole.trains_matrices:
        group = {"zero_hpz_partition_size": local}
        why = f"the base fits on the {local} ranks of a node, so nothing of it is gathered between nodes"
        yield _made(replace(sharded, group=local), section | group, reasons | dict.fromkeys(group, why))
    on_cpu = whole.gpu.name == "cpu"
    if whole.ranks > 1 or not on_cpu:
        yield _made(sharded, section, reasons)
    why = f"sharded on the {'ranks' if on_cpu else 'GPUs'} it would need {_gib(memory(sharded).peak)}"
    if not on_cpu:
        kept = replace(sharded, offload="cpu")
        yield _made(kept, section | {"offload_param": {"device": "cpu", "pin_memory": True}}, reasons | {"offload_param": why})
        if whole.main_memory_bytes is not None:
            why += f", with shards in main memory {_gib(beside(kept).host_per_node)} a node of {_gib(whole.main_memory_bytes)}"
    if whole.nvme_path:
        place = {"device": "nvme", "nvme_path": whole.nvme_path}
        yield _made(replace(sharded, offload="nvme"), section | {"offload_param": place}, reasons | {"offload_param": why})


def _made(asked: Setting, section: dict[str, Any], reasons: dict[str, str]) -> Choice:
    main = asked.main_memory_bytes
    there = asked.offload != "cpu" or main is None or beside(asked).host_per_node <= main
    return Choice(asked, {"zero_optimization": section}, reasons, there and memory(asked).peak <= asked.gpu.memory_bytes)


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
