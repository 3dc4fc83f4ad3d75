"""Forward passes by the clock, in turns: every variant once, A B C D E, then all again, so what the machine does meanwhile falls on all.

A pass is timed from its call until the device is idle again, as its caller waits for it; on a GPU the host's work to start it is part
of that, and at a small batch most of it. What a variant costs over the base is the median over the rounds of its time / the base's time
in the same round: a slow minute of the machine is in both.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from pipeline.job.errors import JobError
from pipeline.latency.variants import BASE, LORA, MERGED, Variant, make_variants
from pipeline.model.build import require_dtype
from pipeline.model.config import read_config
from pipeline.model.families import known_family
from pipeline.plan.hardware import cpu_name
from pipeline.screen import Screen
from pipeline.weights.hub import local_config

SCHEMA_VERSION = 1
WARM_UP_ROUNDS = 2
"""The first ones find memory and choose kernels."""
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Asked:
    base: str
    """Folder with a config.json, one of the paper's bases, or a hub id."""
    methods: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of each text."""
    rank: int
    """LoRA's."""
    bottlenecks: tuple[int, ...]
    """Of the adapters."""
    dtype: str
    rounds: int
    row_s: float
    """No new round of a batch and length begins after so long, but for the first `LEAST_ROUNDS`."""
    clock: Callable[[], float] = time.perf_counter
    """`time.process_time`, where other work shares the cores: what the processor worked, not what was waited for."""


def measure(asked: Asked, screen: Screen) -> dict[str, Any]:
    """Times every variant at every batch and length, on the first GPU, or on the processor where there is none.

    Returns:
        Ready for JSON: what was measured and on what, the variants, a row for each batch and length, and the sum of it.

    Raises:
        JobError: no such base or method, a length beyond the base's positions, no room on the GPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = require_dtype(asked.dtype, device)
    config = read_config(local_config(asked.base, None))
    _refuse_larger(asked, config)
    busy = os.getloadavg()[0]
    try:
        variants = make_variants(config, asked.methods, asked.rank, asked.bottlenecks, dtype, device)
        with torch.inference_mode():
            sizes = [(batch, length) for length in asked.lengths for batch in asked.batches]
            rows = [_row(variants, _tokens(config, *size, device), asked, screen) for size in sizes]
            certificate = _certificate(variants, _tokens(config, 1, min(asked.lengths), device))
    except torch.OutOfMemoryError:
        raise JobError(
            f"--batch, --sequence: no room for all of it on {_device_name(device)}. Use smaller ones, or fewer methods."
        ) from None
    return {
        "schema_version": SCHEMA_VERSION,
        "base": asked.base,
        "base_parameters": sum(parameter.numel() for parameter in variants[0].model.parameters()),
        "weights": "drawn",
        "dtype": asked.dtype,
        "device": _device_name(device),
        "host": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": [busy, os.getloadavg()[0]],
            "system": platform.platform(),
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda},
        "order": [one.name for one in variants],
        "warm_up_rounds": WARM_UP_ROUNDS,
        "variants": [{"name": one.name, "method": one.method, "rank": one.rank, "trained_parameters": one.trained} for one in variants],
        "certificate": certificate,
        "rows": rows,
        "over_base": {one.name: statistics.median(row["times"][one.name]["over_base"] for row in rows) for one in variants},
    }


def in_turns(
    passes: Sequence[Callable[[], object]],
    rounds: int,
    row_s: float,
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[list[float]]:
    """Seconds of each pass, round by round, without those that warm up."""
    begun = time.perf_counter()
    for number in range(WARM_UP_ROUNDS + rounds):
        if number >= WARM_UP_ROUNDS + LEAST_ROUNDS and time.perf_counter() - begun > row_s:
            return
        taken = []
        for run in passes:
            synchronize()
            start = clock()
            run()
            synchronize()
            taken.append(clock() - start)
        if number >= WARM_UP_ROUNDS:
            yield taken


def _row(variants: Sequence[Variant], tokens: torch.Tensor, asked: Asked, screen: Screen) -> dict[str, Any]:
    batch, length = tokens.shape
    passes = [lambda one=one: one.logits(tokens) for one in variants]
    synchronize = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    rounds = in_turns(passes, asked.rounds, asked.row_s, synchronize, asked.clock)
    taken = list(screen.named(f"batch {batch}, {length} tokens", rounds, asked.rounds))
    # The base comes first.
    times = {
        one.name: _summary([row[place] for row in taken], [row[place] / row[0] for row in taken]) for place, one in enumerate(variants)
    }
    return {"batch": batch, "sequence": length, "rounds": len(taken), "times": times}


def _summary(seconds: list[float], ratios: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    least, ratio, most = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "median_ms": 1e3 * middle,
        "quartiles_ms": [1e3 * low, 1e3 * high],
        "over_base": ratio - 1.0,
        "over_base_quartiles": [least - 1.0, most - 1.0],
    }


def _certificate(variants: Sequence[Variant], tokens: torch.Tensor) -> dict[str, float | None]:
    """Largest difference of logits, in fp32: that the merged model computes what the unmerged does, and the base something else."""
    found = {one.method: one.logits(tokens).float() for one in variants if one.method in (BASE, MERGED, LORA)}

    def apart(one: str, other: str) -> float | None:
        return float((found[one] - found[other]).abs().max()) if {one, other} <= set(found) else None

    return {"merged_and_lora": apart(MERGED, LORA), "merged_and_base": apart(MERGED, BASE), "lora_and_base": apart(LORA, BASE)}


def _refuse_larger(asked: Asked, config: PretrainedConfig) -> None:
    """Than the base has room for."""
    family = known_family(config)
    context = family.context(config) if family else getattr(config, "max_position_embeddings", None)
    if context and max(asked.lengths) > context:
        raise JobError(f"--sequence {max(asked.lengths)}: {asked.base} has {context} positions. Use {context} at most.")
    for option, size in (("rank", asked.rank), ("bottleneck", max(asked.bottlenecks))):
        if size > config.hidden_size:
            raise JobError(f"--{option} {size}: {asked.base} is {config.hidden_size} wide. Use {config.hidden_size} at most.")


def _tokens(config: PretrainedConfig, batch: int, length: int, device: torch.device) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length)).to(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
