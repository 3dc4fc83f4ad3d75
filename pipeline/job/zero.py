"""A file of ds_configs/ -> the one DeepSpeed dict. No key is set in two places.

A ds_configs file holds memory and communication only; batch, precision, optimizer and schedule belong to the job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.job.zero_keys import ALLOWED, strangers, without_strangers

_NOT_YET = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_nontrainable_weights": False}
"""Key -> its value when off. On, they change how a shard is stored, which the loader does not know."""


def zero_stage(config: dict[str, Any]) -> int:
    """0 (the base whole on every rank) or 3 (the base sharded over all ranks)."""
    return int(config["zero_optimization"]["stage"])


def deepspeed_config(path: Path, lenient: bool = False) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`.

    Args:
        lenient: what has no place there is left out; otherwise it is refused, all of it at once.

    Raises:
        JobError: the file is not JSON, sets what belongs to the job, or asks for a stage that shards nothing here.
    """
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{path}: not a readable JSON file: {error}. Correct or replace it.") from None
    if not isinstance(asked, dict) or not isinstance(asked.get("zero_optimization"), dict):
        raise JobError(f'{path}: not an object with a "zero_optimization" object in it. Start from a file of ds_configs/.')
    if lenient:
        asked = without_strangers(asked)
    elif found := strangers(asked):
        told = " ".join(f"{key}: {instead}" for key, instead in found.items())
        raise JobError(f"{path}: {told} Here are only {', '.join(ALLOWED)}; zlora plan JOB --mend FILE writes one without the rest.")
    stage = asked["zero_optimization"].get("stage")
    if stage not in (0, 3):
        raise JobError(
            f"{path}: zero_optimization.stage = {json.dumps(stage)}: with a frozen base, stages 1 and 2 shard nothing. "
            "Use 3 (base sharded over all ranks) or 0 (base whole on every rank)."
        )
    for key, off in _NOT_YET.items():
        if asked["zero_optimization"].get(key, off) != off:
            raise JobError(f"{path}: zero_optimization.{key}: not supported yet. Remove it.")
    offload = asked["zero_optimization"].get("offload_param") or {}
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise JobError(f'{path}: zero_optimization.offload_param.device = "nvme": not supported yet. Use "cpu".')
    return complete(asked)


def complete(asked: dict[str, Any]) -> dict[str, Any]:
    """A memory configuration with what every run sets."""
    return {
        **asked,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips at 1.0 unless told not to; clipping is done in train/step.py.
        "gradient_clipping": 0.0,
        "steps_per_print": sys.maxsize,
    }
