"""What was measured on all ranks, put beside what the plan says: the content of `profile.json`.

Source of the work: the 4N rule of frozen weights (pipeline/plan/work.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from typing import Any

import torch

from pipeline.model.zero3 import is_sharded
from pipeline.plan.answers import changes, largest_micro_batch
from pipeline.plan.hardware import named
from pipeline.plan.memory import Memory, Setting, memory
from pipeline.plan.prefetch import sent_bytes
from pipeline.plan.work import model_flops, work
from pipeline.profile.follow import expected
from pipeline.profile.judge import Facts, judge
from pipeline.profile.measure import FIRST, Measured
from pipeline.profile.stopwatch import GATHER, PARTS, Key
from pipeline.runs.session import Session
from pipeline.train.engine import Ranks
from pipeline.train.loop import Course, peak_memory_bytes

SCHEMA_VERSION = 1
_SHOWN_MODULES = 20
_WORTH = 0.1


@dataclass(frozen=True)
class Rank:
    """What the first rank needs of each."""

    seconds: dict[Key, float]
    bytes: dict[str, int]
    peak_memory_bytes: int
    matrix_flops_s: float


def of_rank(found: Measured, ranks: Ranks, rate: float) -> Rank:
    """Args:
    rate: of matrix products, FLOP/s.
    """
    return Rank(found.seconds, found.followed.bytes, peak_memory_bytes(ranks.device), rate)


def report_of(
    session: Session, course: Course, start_s: dict[str, float], found: Measured, everyone: list[Rank], where: dict[str, Any]
) -> dict[str, Any]:
    """Args:
        start_s: seconds by what came before the first step.
        found: of the first rank.
        where: as in `environment.json`.

    Returns:
        Ready for JSON.
    """
    job, asked, plain = session.job, session.setting, found.steps["plain"]
    steps = len(plain)
    step_s = sum(row["step_s"] for row in plain) / steps
    shares_s = _split(everyone, steps)
    save_s = found.capture_s / job.train.save_every_steps
    moved = _moved(found, asked, steps)
    plan = expected(asked, found.followed.sizes)
    speed = _speed(session, course, plain, everyone)
    held = _memory(found, everyone, plan, asked)
    timed_s = sum(shares_s["mean"].values())
    shares = {name: value / timed_s for name, value in shares_s["mean"].items()} | {"save": save_s / step_s}
    facts = _facts(session, asked, found, everyone, shares, held, moved)
    return {
        "schema_version": SCHEMA_VERSION,
        "job": {
            "base": job.base.model,
            "dtype": job.base.dtype,
            "methods": [method.kind for method in job.methods],
            "memory": {"zero_stage": asked.stage, "group": asked.group, "offload": asked.offload, "checkpointing": asked.checkpointing},
            "batch_examples": job.train.batch_examples,
            "micro_batch_tokens": job.train.micro_batch_tokens,
        },
        "environment": where,
        "steps": {name: len(rows) for name, rows in found.steps.items()} | {"first": FIRST},
        "start_s": start_s | {"first step": found.first_s},
        "speed": speed,
        "time": {
            "step_s": step_s,
            "split_s": shares_s["mean"] | {"save": save_s},
            "split_most_s": shares_s["most"],
            "shares": shares,
            "save_s": found.capture_s,
            "save_every_steps": job.train.save_every_steps,
        },
        "gathers": moved,
        "memory": held,
        "modules": [asdict(row) for row in found.modules[:_SHOWN_MODULES]],
        "cost_of_looking": _costs(found),
        "says": judge(facts),
    }


def _split(everyone: list[Rank], steps: int) -> dict[str, dict[str, float]]:
    """Seconds of a step by part: the mean over ranks, and the most of one. Gathers count apart from the pass that waits for them."""
    parts: list[dict[str, float]] = []
    for rank in everyone:
        own = dict.fromkeys(PARTS, 0.0)
        for (phase, name), seconds in rank.seconds.items():
            own[name if name in (GATHER, "reduce") else phase] += seconds / steps
        parts.append(own)
    return {
        "mean": {name: mean(own[name] for own in parts) for name in parts[0]},
        "most": {name: max(own[name] for own in parts) for name in parts[0]},
    }


def _moved(found: Measured, asked: Setting, steps: int) -> dict[str, Any]:
    """Of one rank in a step. With one rank nothing comes from another."""
    e, int8, plan = asked.element_bytes, asked.int8_gathers and asked.sharers > 1, memory(asked).gathered
    fetched = sent_bytes(found.gathers.elements, found.gathers.vectors, e, int8) // steps
    planned = sum(plan.bytes_in_step(count, e, int8) for count in found.micro_batches) if asked.copies else 0
    return {
        "calls": found.gathers.calls / steps,
        "gathered_bytes": fetched,
        "received_bytes": fetched * (asked.sharers - 1) // asked.sharers,
        "exchanged_bytes": found.gathers.exchanged_bytes // steps,
        "predicted_gathered_bytes": planned // steps,
        "trace_invalidations": found.gathers.invalidations,
    }


def _speed(session: Session, course: Course, plain: tuple[dict[str, float], ...], everyone: list[Rank]) -> dict[str, Any]:
    """Of the steps that nobody looked at."""
    asked, seconds = session.setting, sum(row["step_s"] for row in plain)
    needed = again = 0.0
    # Every other step was by the clock.
    for step in range(FIRST, FIRST + 2 * len(plain), 2):
        examples = course.examples(step)
        labels = sum(course.data.targets(index) for index in examples)
        own, recomputed = model_flops(asked, [course.data.tokens(index) for index in examples], labels)
        needed, again = needed + own, again + recomputed
    rate = sum(rank.matrix_flops_s for rank in everyone)
    peak = None
    if session.ranks.device.type == "cuda":
        gpu = named(torch.cuda.get_device_name(session.ranks.device), asked.gpu.memory_bytes)
        peak = gpu and (gpu.single_flops if asked.dtype == "fp32" else gpu.half_flops) * session.ranks.count
    # Examples as long as these, not the longest there can be.
    tokens = round(sum(row["tokens"] for row in plain) / sum(row["examples"] for row in plain))
    planned = work(replace(asked, example_tokens=max(1, tokens)), memory(asked))
    return {
        "step_s": {"median": median(row["step_s"] for row in plain), "predicted": planned.step_s},
        "examples_per_s": sum(row["examples"] for row in plain) / seconds,
        "tokens_per_s": sum(row["tokens"] for row in plain) / seconds,
        "target_tokens_per_s": sum(row["target_tokens"] for row in plain) / seconds,
        "padding_share": mean(row["padding_share"] for row in plain),
        "model_flops_per_s": needed / seconds,
        "recomputed_flops_per_s": again / seconds,
        "matrix_product_flops_per_s": rate,
        "share_of_matrix_products": needed / seconds / rate,
        "makers_flops_per_s": peak,
        "utilisation": needed / seconds / peak if peak else None,
    }


def _memory(found: Measured, everyone: list[Rank], plan: Memory, asked: Setting) -> dict[str, Any]:
    """Bytes of the first rank, with the plan's for the same micro-batches; and the most of any rank."""
    said = {name: plan.parts[name] for name in ("base_shard", "delta", "gradients", "optimizer", "gathered")}
    said |= {"kept": plan.activations.kept, "forward": plan.allocated["forward"]}
    said["backward"] = max(said["forward"], plan.allocated["backward"])
    return {
        "parts": {name: {"measured": found.followed.bytes[name], "predicted": count} for name, count in said.items()},
        "most_of_a_rank_bytes": max(rank.bytes["backward"] for rank in everyone),
        "peak_memory_bytes": max(rank.peak_memory_bytes for rank in everyone),
        "capacity_bytes": asked.gpu.memory_bytes,
        "micro_batches": [asdict(size) for size in found.followed.sizes],
        "timeline": found.followed.timeline,
        "phases": [{"s": seconds, "phase": name} for seconds, name in found.followed.phases],
    }


def _costs(found: Measured) -> dict[str, float]:
    """How many times as long a token takes under each look."""

    def per_token(rows: tuple[dict[str, float], ...]) -> float:
        return sum(row["step_s"] for row in rows) / sum(row["tokens"] for row in rows)

    plain = per_token(found.steps["plain"])
    return {name: per_token(rows) / plain for name, rows in found.steps.items() if name != "plain"}


def _facts(
    session: Session,
    asked: Setting,
    found: Measured,
    everyone: list[Rank],
    shares: dict[str, float],
    held: dict[str, Any],
    moved: dict[str, Any],
) -> Facts:
    computing = [
        sum(seconds for (phase, name), seconds in rank.seconds.items() if phase in ("forward", "backward") and name != GATHER)
        for rank in everyone
    ]
    parts = {name: part["measured"] for name, part in held["parts"].items() if name not in ("forward", "backward")}
    peak = held["parts"]["backward"]["measured"]
    largest = max(parts, key=lambda name: parts[name])
    whole = replace(asked, stage=0, group=None, offload=None)
    predicted = {name: (part["predicted"], part["measured"]) for name, part in held["parts"].items() if name in ("kept", "backward")}
    if moved["predicted_gathered_bytes"]:
        predicted["gathered_bytes"] = (moved["predicted_gathered_bytes"], moved["gathered_bytes"])
    return Facts(
        shares=shares,
        slowest_over_mean=max(computing) / mean(computing),
        padding_share=mean(row["padding_share"] for row in found.steps["plain"]),
        invalidations=moved["trace_invalidations"],
        micro_batch_tokens=asked.micro_batch_tokens,
        micro_batches=mean(found.micro_batches),
        sharded=is_sharded(session.root),
        whole_fits=memory(whole).peak <= asked.gpu.memory_bytes,
        largest_micro_batch_tokens=largest_micro_batch(asked),
        peak_bytes=peak + asked.gpu.context_bytes,
        capacity_bytes=asked.gpu.memory_bytes,
        largest_part=largest,
        largest_part_share=parts[largest] / peak,
        advice=_advice(asked),
        predicted=predicted,
    )


def _advice(asked: Setting) -> tuple[str, ...]:
    """The plan's changes that training needs less memory with, a tenth at least; what scoring needs is not asked for here."""
    training = replace(asked, decoding=asked.decoding.model_copy(update={"batch_tokens": 1, "max_new_tokens": 1}))
    enough = (1 - _WORTH) * memory(training).peak
    # Ranks on a CPU compute where shards in main memory are, and read them from there.
    own = {"shards in main memory", "shards on disk"} if asked.gpu.shares_memory else set()
    found = [change for change in changes(training) if change.peak_bytes <= enough and change.what not in own]
    return tuple(f"{change.what} ({', '.join(f'{key} = {json.dumps(value)}' for key, value in change.keys.items())})" for change in found)
