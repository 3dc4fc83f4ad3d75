"""A file of ds_configs/ -> the one DeepSpeed dict. No key is set in two places.

A ds_configs file holds memory and communication only; batch, precision, optimizer and schedule belong to the job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from pipeline.job.errors import JobError
from pipeline.job.zero_keys import ALLOWED, strangers, without_strangers

_GROUP = "zero_hpz_partition_size"
_INT8 = "zero_quantized_weights"
_QUANTIZED = (_INT8, "zero_quantized_nontrainable_weights")
"""They change what is computed, so they belong to the job."""
_SEQUENTIAL = {"stage3_allgather_sequential", "allgather_sequential"}
"""Both are DeepSpeed's."""
Offload = Literal["cpu", "nvme"]
"""Where shards are, if not on the device that computes."""


def zero_stage(config: dict[str, Any]) -> int:
    """0 (the base whole on every rank) or 3 (the base sharded over ranks)."""
    return int(config["zero_optimization"]["stage"])


def group_of(config: dict[str, Any]) -> int | None:
    """So many consecutive ranks hold one copy of the base among them; None: all ranks together do."""
    count = int(config["zero_optimization"].get(_GROUP, 1))
    return count if count > 1 else None


def one_by_one(config: dict[str, Any]) -> bool:
    """Whether each parameter is gathered by itself."""
    return any(config["zero_optimization"].get(key, False) for key in _SEQUENTIAL)


def int8_gathers(config: dict[str, Any]) -> bool:
    """Whether matrices of the base come to other ranks in 8 bits."""
    return bool(config["zero_optimization"].get(_INT8, False))


def offload_of(config: dict[str, Any]) -> Offload | None:
    device = (config["zero_optimization"].get("offload_param") or {}).get("device")
    return device if device in ("cpu", "nvme") else None


def nvme_path_of(config: dict[str, Any]) -> str | None:
    """The folder for shards on disk; None: they are elsewhere."""
    return str(config["zero_optimization"]["offload_param"]["nvme_path"]) if offload_of(config) == "nvme" else None


def for_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is told. Groups of ranks, files and 8 bits are ours (pipeline/model/zero3.py): to it, groups are all there is, and
    mapped files are main memory."""
    section = {key: value for key, value in config["zero_optimization"].items() if key not in (_GROUP, _INT8)}
    if offload_of(config) == "nvme":
        section["offload_param"] = {"device": "cpu"}
    return {**config, "zero_optimization": section}


def deepspeed_config(path: Path, nvme_path: str | None = None, lenient: bool = False, int8: bool = False) -> dict[str, Any]:
    """The memory configuration of a file, with what every run sets.

    Args:
        nvme_path: of the job, for a file that asks for shards on disk and names no folder.
        lenient: what has no place there is left out; otherwise it is refused, all of it at once.
        int8: of the job: gathers in 8 bits.

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
    section = asked["zero_optimization"]
    stage = section.get("stage")
    if stage not in (0, 3):
        raise JobError(
            f"{path}: zero_optimization.stage = {json.dumps(stage)}: with a frozen base, stages 1 and 2 shard nothing. "
            "Use 3 (base sharded over ranks) or 0 (base whole on every rank)."
        )
    for key in _QUANTIZED:
        if section.get(key):
            raise JobError(f"{path}: zero_optimization.{key}: it changes results. Set memory.int8_gathers = true in the job instead.")
    group = section.get(_GROUP, 1)
    if type(group) is not int or group < 0:
        raise JobError(f"{path}: zero_optimization.{_GROUP} = {json.dumps(group)}: not a number of ranks. Use those of a node, such as 8.")
    if section.get("offload_param") is not None:
        section["offload_param"] = _offload(path, section["offload_param"], nvme_path)
    found = complete(asked, int8)
    if int8 and stage == 3 and not one_by_one(found):
        key = next(iter(_SEQUENTIAL & section.keys()))
        raise JobError(f"{path}: zero_optimization.{key} = false: memory.int8_gathers gathers matrices one by one. Leave it out.")
    return found


def _offload(path: Path, asked: Any, nvme_path: str | None) -> dict[str, Any]:
    """`offload_param` as it was asked, with the folder for shards on disk."""
    where = f"{path}: zero_optimization.offload_param"
    if not isinstance(asked, dict):
        raise JobError(f'{where} = {json.dumps(asked)}: not an object. Use {{"device": "cpu"}}, or leave it out.')
    device = asked.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise JobError(f'{where}.device = {json.dumps(device)}: not a place for shards. Use "cpu", "nvme" or "none".')
    if device != "nvme":
        return asked
    if asked.get("pin_memory"):
        raise JobError(f'{where}.pin_memory: shards on disk are mapped, and mapped pages cannot be pinned. Leave it out, or use "cpu".')
    folder = asked.get("nvme_path") or nvme_path
    if not folder:
        raise JobError(f"{where}.nvme_path: missing. Name a folder on a disk of each node there, or in a job as memory.nvme_path.")
    if nvme_path and nvme_path != folder:
        raise JobError(f'{where}.nvme_path = "{folder}", but the job has memory.nvme_path = "{nvme_path}". Leave one of them out.')
    return {**asked, "nvme_path": folder}


def complete(asked: dict[str, Any], int8: bool = False) -> dict[str, Any]:
    """A memory configuration with what every run sets.

    Args:
        int8: gathers in 8 bits.
    """
    section = asked["zero_optimization"]
    if section["stage"] == 3 and not _SEQUENTIAL & section.keys():
        # Each matrix comes where it is used; several at once would come in one buffer and be copied out of it.
        section = {**section, "stage3_allgather_sequential": True}
    if int8:
        section = {**section, _INT8: True}
    return {
        **asked,
        "zero_optimization": section,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips at 1.0 unless told not to; clipping is done in train/step.py.
        "gradient_clipping": 0.0,
        "steps_per_print": sys.maxsize,
    }
