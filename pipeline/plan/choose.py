"""`[memory] config = "auto"`: the fastest memory configuration that fits, with a reason for every key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.plan.lint import lean_prefetch
from pipeline.plan.memory import Setting, memory


@dataclass(frozen=True)
class Choice:
    setting: Setting
    config: dict[str, Any]
    """As a file of ds_configs/ has it."""
    reasons: dict[str, str]
    """Key of `zero_optimization` -> why it is so."""
    fits: bool


def choose(asked: Setting) -> Choice:
    """The first that fits of: base whole on every rank, sharded, sharded in main memory; else the one that needs least."""
    tried = list(_candidates(asked))
    return next((choice for choice in tried if choice.fits), min(tried, key=lambda choice: memory(choice.setting).peak))


def _candidates(asked: Setting) -> Iterator[Choice]:
    whole = _made(replace(asked, auto=False, stage=0, offload=False), {"stage": 0}, {})
    yield replace(whole, reasons={"stage": "the base fits whole on every rank, so nothing need be gathered"})
    if asked.ranks == 1 and asked.gpu.name == "cpu":
        return
    lean = lean_prefetch(asked)
    section = {
        "stage": 3,
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": lean.bucket,
        "stage3_param_persistence_threshold": lean.persistence,
        "stage3_max_live_parameters": lean.live,
        "stage3_max_reuse_distance": lean.reuse,
    }
    needs, has = memory(whole.setting).peak, asked.gpu.memory_bytes
    reasons = {
        "stage": f"the base whole on every rank would need {needs / 2**30:.1f} GiB of {has / 2**30:.1f} GiB",
        "overlap_comm": "gathers run beside the computation",
        "stage3_prefetch_bucket_size": "one layer is gathered ahead",
        "stage3_param_persistence_threshold": "norms and biases stay gathered: many small gathers cost more than they hold",
        "stage3_max_live_parameters": "the layer in use, the one ahead, and the embedding's share",
        "stage3_max_reuse_distance": "what is used is released: the backward pass comes too late to wait for it",
    }
    sharded = replace(asked, auto=False, stage=3, offload=False, prefetch=lean)
    yield _made(sharded, section, reasons)
    if asked.gpu.name != "cpu":
        offload = {"offload_param": {"device": "cpu", "pin_memory": True}}
        why = {"offload_param": f"sharded on the GPUs it would need {memory(sharded).peak / 2**30:.1f} GiB"}
        yield _made(replace(sharded, offload=True), section | offload, reasons | why)


def _made(asked: Setting, section: dict[str, Any], reasons: dict[str, str]) -> Choice:
    return Choice(asked, {"zero_optimization": section}, reasons, memory(asked).peak <= asked.gpu.memory_bytes)
