"""What a memory configuration costs that it need not: key by key, for this job on these GPUs, and the mended configuration.

Keys that have no place there (the job's, and those that DeepSpeed does not know) are all named first; other commands refuse them, and
every command refuses stages that shard nothing (pipeline/job/zero.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipeline.job.zero_keys import strangers, without_strangers
from pipeline.plan.memory import Setting, memory
from pipeline.plan.prefetch import Prefetch
from pipeline.plan.work import work

_OF_THE_OPTIMIZER = {
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "sub_group_size",
    "round_robin_gradients",
    "offload_optimizer",
    "load_from_fp32_weights",
    "stage3_gather_16bit_weights_on_model_save",
    "elastic_checkpoint",
    "ignore_unused_parameters",
}
"""DeepSpeed reads them in its own optimizer and checkpoints, and has neither here (pipeline/train/engine.py)."""
_GROUP = "zero_hpz_partition_size"
_PREFETCH, _LIVE, _REUSE = "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"


@dataclass(frozen=True)
class Finding:
    key: str
    """Of `zero_optimization`, or of the file's top."""
    costs: str
    mended: int | None
    """A better value. None: leave the key out."""


def lint(asked: Setting, written: dict[str, Any]) -> list[Finding]:
    """Keys of a file that cost, in the order in which to mend them.

    Args:
        written: what is in the file.
    """
    section = without_strangers(written)["zero_optimization"]
    strange = [Finding(key.removeprefix("zero_optimization."), instead, None) for key, instead in strangers(written).items()]
    return strange + _costly(asked, section)


def _costly(asked: Setting, section: dict[str, Any]) -> list[Finding]:
    found = [
        Finding(key, "nothing, and does nothing: DeepSpeed has no optimizer here", None)
        for key in section
        if key in _OF_THE_OPTIMIZER or (key.startswith("stage3_") and asked.stage == 0)
    ]
    if asked.stage == 0 or asked.ranks == 1:
        return found
    lean = lean_prefetch(asked)
    now = asked.prefetch
    if now.bucket == 0:
        done = work(asked, memory(asked))
        wait = (done.compute_s + done.communication_s) / done.step_s
        found.append(Finding(_PREFETCH, f"every gather is waited for: a step takes up to {wait:.2f} times as long", lean.bucket))
    whole = asked.shape.parameters
    if now.live >= whole and now.reuse >= whole:
        peak = memory(asked).training_peak
        less = peak - memory(replace(asked, prefetch=lean)).training_peak
        if less > 0 and peak > asked.gpu.memory_bytes:
            found += [
                Finding(_LIVE, f"the whole base stays gathered from forward to backward: {less / 2**30:.2f} GiB a GPU more", lean.live),
                Finding(_REUSE, "the same", lean.reuse),
            ]
    elif now.live == 0:
        # Nothing is ever fetched ahead.
        found.append(Finding(_LIVE, "nothing is gathered ahead, whatever the prefetch bucket", lean.live))
    found += _between_nodes(asked)
    if now.reuse == 0:
        # No module is further from its next use than a forward and two backward passes.
        keeping = replace(asked, prefetch=replace(now, reuse=3 * whole))
        more = memory(asked).gathered.fetched / memory(keeping).gathered.fetched
        if more > 1.01 and memory(keeping).training_peak <= asked.gpu.memory_bytes:
            found.append(Finding(_REUSE, f"gathers {more:.2f} times as many bytes, and there is memory to keep them", 3 * whole))
    return found


def _between_nodes(asked: Setting) -> list[Finding]:
    """Groups of a node's ranks that are missing, where each node has room for the base."""
    local = asked.local_ranks
    if asked.nodes == 1 or local == 1 or asked.ranks % local or asked.sharers <= local or asked.trains_matrices:
        return []
    within = replace(asked, group=local)
    now, then = (work(setting, memory(setting)) for setting in (asked, within))
    if memory(within).peak > asked.gpu.memory_bytes:
        return []
    longer = now.step_s / then.step_s
    time = f"a step takes {longer:.2f} times as long" if longer > 1.01 else "hidden behind computing"
    moved = f"{now.between_nodes_bytes / 1e9:,.1f} GB of the base come to each node from others in a step"
    return [Finding(_GROUP, f"{moved}; {time}", local)]


def lean_prefetch(asked: Setting) -> Prefetch:
    """A layer ahead of the one in use, and nothing but vectors longer than it is used."""
    layer = sum(sum(part.sizes) for part in asked.shape.layer)
    vectors = [size for part in asked.shape.layer for size in part.sizes if size not in part.matrices()]
    return Prefetch(layer, max(vectors, default=asked.shape.width), 3 * layer, 0)


def mended(written: dict[str, Any], found: list[Finding]) -> dict[str, Any]:
    """The file without what costs."""
    better = {finding.key: finding.mended for finding in found}
    kept = without_strangers(written)
    section = {key: better.get(key, value) for key, value in kept["zero_optimization"].items()}
    section |= {key: value for key, value in better.items() if value is not None}
    return {**kept, "zero_optimization": {key: value for key, value in section.items() if value is not None}}
