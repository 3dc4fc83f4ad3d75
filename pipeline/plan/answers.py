"""The questions a plan answers: does it fit, on how few GPUs, how large a micro-batch, and what to change at what cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.plan.choose import choose
from pipeline.plan.hardware import GIB, Gpu
from pipeline.plan.lint import lean_prefetch
from pipeline.plan.memory import Setting, beside, memory
from pipeline.plan.work import work

_NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_LARGEST_TOKENS = 1 << 20
_STEP_TOKENS = 64


def fits(asked: Setting) -> bool:
    """On the GPUs: a plan does not know whether there is main memory for shards, so it counts on that only where the job says so."""
    if asked.auto:
        choice = choose(asked)
        return choice.fits and not choice.setting.offload
    if asked.group and asked.ranks % asked.group:
        return False
    return memory(asked).peak <= asked.gpu.memory_bytes


def fewest_gpus(asked: Setting, gpu: Gpu) -> int | None:
    """With the job's own settings, on one node or on whole ones; None: on none of up to 128 nodes."""
    if asked.dtype == "bf16" and not gpu.bf16:
        asked = replace(asked, dtype="fp16")
    inside = [count for count in (1, 2, 4) if count < gpu.per_node]
    for ranks in (*inside, *(nodes * gpu.per_node for nodes in ((1,) if gpu.shares_memory else _NODES))):
        if fits(on(asked, gpu, ranks)):
            return ranks
    return None


def on(asked: Setting, gpu: Gpu, ranks: int) -> Setting:
    """The same on other GPUs, on as few nodes as hold them."""
    return replace(asked, gpu=gpu.shared_by(ranks), ranks=ranks, nodes=gpu.nodes_for(ranks))


def largest_micro_batch(asked: Setting) -> int | None:
    """In tokens, a multiple of 64; None: not even one example can be trained on."""
    found = _largest(lambda tokens: memory(replace(asked, micro_batch_tokens=tokens)).training_peak <= asked.gpu.memory_bytes)
    return found if found >= asked.example_tokens else None


def largest_generation_batch(asked: Setting) -> int | None:
    """The same for `evaluate.batch_tokens`; None: not even one text of `evaluate.max_new_tokens` can be generated."""
    found = _largest(lambda tokens: memory(_generating(asked, tokens)).phases["generate"] <= asked.gpu.memory_bytes)
    return found if found >= asked.decoding.max_new_tokens else None


def _generating(asked: Setting, tokens: int) -> Setting:
    return replace(asked, decoding=asked.decoding.model_copy(update={"batch_tokens": tokens}))


def _largest(good: Callable[[int], bool]) -> int:
    low, high = 0, _LARGEST_TOKENS // _STEP_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle * _STEP_TOKENS) else (low, middle - 1)
    return low * _STEP_TOKENS


@dataclass(frozen=True)
class Change:
    """One thing to change, and what comes of it."""

    what: str
    keys: dict[str, object]
    """As `--set` or a memory configuration takes them."""
    peak_bytes: int
    fits: bool
    step_s: float
    cost: str


def changes(asked: Setting) -> list[Change]:
    """Changes that need less memory: those that fit first, more GPUs last.

    Where generation does not fit, each comes on top of mending that.
    """
    now, now_s = memory(asked), _step_s(asked)
    now_bytes = now.peak
    tried: list[tuple[str, dict[str, object], Setting, str]] = []
    first: dict[str, object] = {}
    keys: dict[str, object]
    if now.phases["generate"] > asked.gpu.memory_bytes and (tokens := largest_generation_batch(asked)):
        # Everything else can only help once this does not hide it.
        asked, first = _generating(asked, tokens), {"evaluate.batch_tokens": tokens}
        tried.append(("generate fewer texts at once", {}, asked, "scoring takes longer"))
    if not asked.checkpointing:
        tried.append(
            (
                "recompute activations",
                {"memory.gradient_checkpointing": True},
                replace(asked, checkpointing=True),
                "computes the forward pass twice",
            )
        )
    if asked.micro_batch_tokens > asked.example_tokens:
        fewer = max(asked.example_tokens, asked.micro_batch_tokens // 2)
        tried.append(
            (
                "smaller micro-batches",
                {"train.micro_batch_tokens": fewer},
                replace(asked, micro_batch_tokens=fewer),
                "gathers the base more often in a step",
            )
        )
    evenly = asked.nodes > 1 and asked.local_ranks > 1 and asked.local_ranks * asked.nodes == asked.ranks
    if asked.stage == 0 and evenly and not asked.trains_matrices:
        keys = {"memory.config": "zero3.json", "zero_hpz_partition_size": asked.local_ranks}
        within = replace(asked, stage=3, group=asked.local_ranks)
        tried.append(("shard the base within each node", keys, within, "gathers the base in each pass, from GPUs of the same node"))
    if asked.group and asked.group < asked.ranks:
        keys = {"zero_hpz_partition_size": 1}
        tried.append(("shard the base over all GPUs", keys, replace(asked, group=None), "gathers the base between nodes"))
    if asked.stage == 0 and asked.ranks > 1:
        tried.append(("shard the base", {"memory.config": "zero3.json"}, replace(asked, stage=3), "gathers the base in each pass"))
    if asked.stage == 3:
        lean = lean_prefetch(asked)
        if asked.ranks > 1 and lean != asked.prefetch:
            keys = {"stage3_prefetch_bucket_size": lean.bucket, "stage3_max_live_parameters": lean.live}
            keys |= {"stage3_max_reuse_distance": 0}
            tried.append(("gather a layer ahead only", keys, replace(asked, prefetch=lean), "gathers the base once more in a micro-batch"))
        if not asked.offload:
            stays = "; masters, gradients and moments stay" if asked.sharded_matrices else ""
            node = beside(replace(asked, offload="cpu")).host_per_node / GIB
            tried.append(
                (
                    "shards in main memory",
                    {"offload_param.device": "cpu"},
                    replace(asked, offload="cpu"),
                    f"{node:,.0f} GiB of main memory a node, and the link to it{stays}",
                )
            )
            tried.append(
                (
                    "shards on disk",
                    {"offload_param.device": "nvme"},
                    replace(asked, offload="nvme"),
                    f"{beside(replace(asked, offload='nvme')).nvme_per_node / GIB:,.0f} GiB of a disk of each node, and its rate{stays}",
                )
            )
    if asked.stage == 3:
        more = on(asked, asked.gpu, 2 * asked.ranks)
        tried.append((f"{more.ranks} GPUs", {"--gpus": more.ranks}, more, "twice the GPUs"))
    made = [
        Change(
            what, first | keys, peak, peak <= asked.gpu.memory_bytes, seconds, f"{why}: a step takes {seconds / now_s:.2f} times as long"
        )
        for what, keys, other, why in tried
        if (peak := memory(other).peak) < now_bytes and (seconds := _step_s(other)) > 0
    ]
    return sorted(made, key=lambda change: not change.fits)


def _step_s(asked: Setting) -> float:
    return work(asked, memory(asked)).step_s
