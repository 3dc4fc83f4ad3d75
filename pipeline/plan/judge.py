"""What was measured beside what was expected: a line where it is off by more than 15 %, with the cause that the evidence speaks for.

Only what harms is told: more memory, less throughput. Pure functions of numbers; who measures is pipeline/runs/outlook.py. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

MARGIN = 0.15
_BUSY = 1.25
"""Processes that want a core, to each core: below this nobody waits for long."""
_LAYER_S = 1e-3
"""To launch a layer's kernels, forward and backward, with ZeRO-3's hooks: an assumption."""
_ATTENTION = 1.5
"""Places in attention's views to a token, from which on padding counts."""


_WINDOW_STEPS, _WINDOW_S = 20, 60.0
_MOST = 3


@dataclass(frozen=True)
class Footprint:
    """Memory of one rank, in bytes, and what may explain it."""

    said: int
    """By the plan, for the micro-batches that there were."""
    measured: int
    spare: int
    """What the plan does not count, however small the job: kernels' scratch memory, the allocator's own."""
    margin: float = MARGIN
    scoring: bool = False
    """The peak came with a scoring."""
    returns: bool = True
    """Freed memory goes back to the system: glibc's allocator is set up as `zlora train` does it."""
    guess: str = ""
    """What of the plan is one."""
    ungathered: int = 0
    """Of the base, what the plan does not count as gathered at once."""
    views: float = 1.0
    """Places in attention's views to a token, of the largest micro-batch."""
    reserved: int = 0
    """By CUDA's caching allocator."""
    capacity: int = 0
    """Of the GPU."""


def judge_memory(of: Footprint) -> str | None:
    """A line where the peak is above the plan's."""
    excess, slack = of.measured - of.said, max(of.margin * of.said, of.spare)
    if excess > slack:
        where = "while scoring" if of.scoring else "in training"
        return (
            f"memory: {_size(of.measured)} {where}, {_percent(of.measured / of.said - 1)} above the plan's {_size(of.said)}. "
            f"Likeliest cause: {_memory_cause(of, excess)}."
        )
    wasted = of.reserved - of.measured
    if wasted > slack and of.reserved > (1 - MARGIN) * of.capacity:
        return (
            f"memory: {_size(of.reserved)} of the GPU's {_size(of.capacity)} are taken, of which at most {_size(of.measured)} were in use. "
            "Likeliest cause: fragmentation (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True mends most of it)."
        )
    return None


def _memory_cause(of: Footprint, excess: int) -> str:
    if not of.returns:
        return "glibc keeps what is freed (MALLOC_MMAP_THRESHOLD_=4194304 has it returned at once, and a step takes longer)"
    if of.guess:
        return f"the plan guesses a part of this base: {of.guess}"
    if of.scoring:
        return "generation (lower evaluate.batch_tokens, or set evaluate.gather to each_pass)"
    if of.ungathered and of.ungathered / 2 < excess < of.ungathered * (1 + MARGIN):
        return "gathered weights are kept behind their use (stage3_max_live_parameters, stage3_max_reuse_distance: lower them)"
    if of.views > _ATTENTION:
        return f"examples of very different lengths: attention pads them by {_percent(of.views - 1)} (lower train.max_tokens)"
    return "nothing that is measured here; something else in this process, or a fault of the plan"


@dataclass(frozen=True)
class Pace:
    """Of some steps, each figure their median."""

    step: int
    """The last of them, counted from 1."""
    tokens_per_s: float
    """Of all ranks, padding not counted."""
    data_share: float = 0.0
    """Of a step's time, for dealing and collating its examples."""
    padding_share: float = 0.0
    tokens: float = 0.0
    """Of a micro-batch."""
    processor_s: float = 0.0
    """Of the first rank, for a thousand tokens."""
    runnable: float = 0.0
    """Processes that wanted a core."""
    cores: int = 1
    """Of the machine."""


@dataclass(frozen=True)
class Promise:
    """What the plan says of these steps."""

    tokens_per_s: float
    tokens_to_hide: int
    """Of a micro-batch; 0 where nothing is gathered from other ranks."""
    micro_batch_s: float
    """To compute one."""
    layers: int
    attained: float


def judge_promise(promise: Promise, pace: Pace) -> str | None:
    """A line where throughput is below the plan's."""
    if pace.tokens_per_s >= (1 - MARGIN) * promise.tokens_per_s:
        return None
    return (
        f"throughput: {pace.tokens_per_s:,.0f} tokens/s, {_percent(1 - pace.tokens_per_s / promise.tokens_per_s)} below the plan's "
        f"{promise.tokens_per_s:,.0f}. Likeliest cause: {_promise_cause(promise, pace)}."
    )


def _promise_cause(promise: Promise, pace: Pace) -> str:
    if pace.data_share > MARGIN:
        return f"{_percent(pace.data_share)} of a step go to dealing and collating examples"
    if pace.runnable > _BUSY * pace.cores:
        return _crowded(pace)
    if pace.tokens < promise.tokens_to_hide:
        return (
            f"gathers are not hidden: a micro-batch has {pace.tokens:,.0f} tokens and needs {promise.tokens_to_hide:,} "
            "(raise train.micro_batch_tokens and train.batch_examples)"
        )
    if promise.micro_batch_s < promise.layers * _LAYER_S:
        return (
            f"micro-batches of {pace.tokens:,.0f} tokens are too small to keep the GPU busy (raise train.micro_batch_tokens and "
            "train.batch_examples)"
        )
    if pace.padding_share > MARGIN:
        return f"{_percent(pace.padding_share)} of what is computed is padding"
    return f"nothing that is measured here; the plan takes it that {_percent(promise.attained)} of the GPU's peak rate are reached"


def judge_decline(best: Pace, now: Pace) -> str | None:
    """A line where throughput has fallen from what it was."""
    if now.tokens_per_s >= (1 - MARGIN) * best.tokens_per_s:
        return None
    return (
        f"throughput: {now.tokens_per_s:,.0f} tokens/s, {_percent(1 - now.tokens_per_s / best.tokens_per_s)} below the "
        f"{best.tokens_per_s:,.0f} up to step {best.step:,}. Likeliest cause: {_decline_cause(best, now)}."
    )


def _decline_cause(best: Pace, now: Pace) -> str:
    if now.data_share > best.data_share + MARGIN / 2:
        return f"{_percent(now.data_share)} of a step go to dealing and collating examples, {_percent(best.data_share)} then"
    if now.runnable > _BUSY * now.cores and now.runnable > best.runnable:
        return _crowded(now)
    if now.padding_share > best.padding_share + MARGIN / 2:
        return f"{_percent(now.padding_share)} of what is computed is padding, {_percent(best.padding_share)} then"
    if now.tokens < (1 - MARGIN) * best.tokens:
        return f"smaller micro-batches: {now.tokens:,.0f} tokens, {best.tokens:,.0f} then"
    if now.processor_s > (1 + MARGIN / 2) * best.processor_s:
        return "the cores are slower than they were: throttled, or others on this machine use its memory"
    return "the first rank waits: for other ranks, for the network or for a core"


class OwnBest:
    """Throughput of a sitting beside its own best so far, by windows: what is over in a minute is not worth a line."""

    def __init__(self) -> None:
        self._window: list[Pace] = []
        self._window_s, self._told = 0.0, 0
        self._best: Pace | None = None

    def took(self, pace: Pace, step_s: float) -> str | None:
        """A line where a window that ends here is slower; at most three in all."""
        self._window.append(pace)
        self._window_s += step_s
        if len(self._window) < _WINDOW_STEPS or self._window_s < _WINDOW_S:
            return None
        now, best, line = middle(self._window), self._best, None
        self._window, self._window_s = [], 0.0
        if best and self._told < _MOST and (line := judge_decline(best, now)):
            self._told += 1
        # From a line on, what it has become is what it is held to.
        if best is None or line or now.tokens_per_s > best.tokens_per_s:
            self._best = now
        return line


def middle(paces: list[Pace]) -> Pace:
    """Of single steps, the median of each figure."""

    def of(values: list[float]) -> float:
        return float(median(values))

    return Pace(
        step=paces[-1].step,
        tokens_per_s=of([pace.tokens_per_s for pace in paces]),
        data_share=of([pace.data_share for pace in paces]),
        padding_share=of([pace.padding_share for pace in paces]),
        tokens=of([pace.tokens for pace in paces]),
        processor_s=of([pace.processor_s for pace in paces]),
        runnable=of([pace.runnable for pace in paces]),
        cores=paces[-1].cores,
    )


def _crowded(pace: Pace) -> str:
    return f"{pace.runnable:.1f} processes want the {pace.cores} cores of this machine"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
