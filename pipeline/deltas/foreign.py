"""A delta of another tool -> its pairs and head in memory: a checkpoint of loralib, or the folder of a LoRA that PEFT saved.

In: the files alone, whatever base they are of. Out: `Foreign`. loralib's scale is alpha / R of each part, and its file does not hold
alpha; a fused map's pair has the parts' As below one another, and only their rows of B (its `MergedLinear`). What the file does not hold
is asked for, or read from the JSON that `zlora export` writes beside it.
Shapes: A [R, K], B [D, R]; of n parts, A [n R, K], B [n P, R].
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.deltas.settings import LORALIB, SETTINGS, LoralibSettings, read_settings
from pipeline.job.errors import JobError
from pipeline.weights.manifest import CONFIG, TENSORS
from pipeline.weights.parse import read_json
from pipeline.weights.tensors import load_tensors

_PEFT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_LORALIB = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])")
_PICKLED = "adapter_model.bin"
_LONGEST_NAME, _REPEATS = 300, 4
"""Of a pattern: characters, and signs that repeat."""
_CHANGED = ("use_dora", "alora_invocation_tokens", "use_qalora", "lora_bias", "layer_replication", "megatron_config")
"""Settings of PEFT's that make another map of A and B, or of the base."""


@dataclass(frozen=True)
class Foreign:
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """By module."""
    scales: dict[str, float]
    """What B A is multiplied by."""
    rest: dict[str, torch.Tensor]
    """All that is no part of a pair: a head, or what is not known."""
    config: dict[str, Any] | None
    """PEFT's; None: loralib has none."""
    settings: LoralibSettings | None = None
    """What lies beside a file of loralib's that we wrote."""


def read_foreign(source: Path, alpha: float | None) -> Foreign:
    """What the file or folder holds, in fp32.

    Args:
        alpha: of a loralib checkpoint; None: as the settings beside it say.

    Raises:
        JobError: no such file or folder, not a LoRA, a pair without its other half, no alpha, or a variant whose map is another.
    """
    if source.is_dir() and (source / LORALIB).is_file() and not (source / CONFIG).exists():
        source = source / LORALIB
    if source.is_dir():
        if alpha is not None:
            raise JobError(f"--alpha {alpha:g}: {source / CONFIG} says what alpha is. Leave the option out.")
        return _read_peft(source)
    if not source.is_file():
        raise JobError(f"{source}: no such file or folder. Name a checkpoint of loralib's, or the folder that PEFT saved.")
    beside = source.parent / SETTINGS
    settings = read_settings(beside) if source.name == LORALIB and beside.is_file() else None
    told = settings.lora_alpha if settings else alpha
    if told is None:
        raise JobError(f"{source}: a loralib checkpoint does not hold alpha. Give --alpha, as lora_alpha of the training that made it.")
    if alpha not in (None, told):
        raise JobError(f"--alpha {alpha:g}: {beside} says {told:g}. Leave the option out.")
    pairs, rest = _paired(source, _named(_unpickled(source)), _LORALIB)
    return Foreign(pairs, {module: told / b.shape[1] for module, (_, b) in pairs.items()}, rest, None, settings)


def _read_peft(folder: Path) -> Foreign:
    file = folder / CONFIG
    try:
        config = read_json(file)
        kind, alpha, patterns = config["peft_type"], config["lora_alpha"], config.get("alpha_pattern") or {}
        if not all(type(number) in (int, float) and math.isfinite(number) for number in (alpha, *patterns.values())):
            raise ValueError("lora_alpha or alpha_pattern: not a number")
    except FileNotFoundError:
        raise JobError(f"{folder}: has no {CONFIG}, so PEFT did not save it. Name the folder that has it, or a loralib file.") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise JobError(f"{file}: cannot be read as the config of a LoRA ({error!r}). Only PEFT's LoRA is imported.") from None
    if kind != "LORA":
        raise JobError(f'{file}: peft_type = "{kind}". Only PEFT\'s LoRA is imported.')
    if changed := next((key for key in _CHANGED if config.get(key)), None):
        raise JobError(
            f"{file}: {changed} = {json.dumps(config[changed])} makes it another map than W + (alpha / r) B A. It is not imported."
        )
    if (folder / TENSORS).is_file():
        source = folder / TENSORS
        try:
            tensors = load_tensors(source)
        except ValueError as error:
            raise JobError(f"{source}: cannot be read ({error}). Fetch it again.") from None
    else:
        source = folder / _PICKLED
        if not source.is_file():
            raise JobError(f"{folder}: neither {TENSORS} nor {_PICKLED} is here. Fetch it again.")
        tensors = _unpickled(source)
    pairs, rest = _paired(source, tensors, _PEFT)
    scales = {}
    endings = [(_ending(file, key), value) for key, value in patterns.items()]
    for module, (a, _) in pairs.items():
        # As PEFT looks it up: the first pattern that the module's name ends with.
        own = next((value for ending, value in endings if ending.fullmatch(module)), alpha)
        scales[module] = own / (math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0])
    return Foreign(pairs, scales, {name.removeprefix("base_model.model."): tensor for name, tensor in rest.items()}, config)


def _ending(file: Path, key: str) -> re.Pattern[str]:
    """PEFT's patterns are regular expressions, and some would run for years."""
    if len(key) > _LONGEST_NAME or len(re.findall(r"[*+?{]", key)) > _REPEATS or re.search(r"\)[*+?{]", key):
        raise JobError(f'{file}: alpha_pattern "{key[:80]}" repeats a group, or too much. Write the modules\' names out.')
    try:
        return re.compile(rf"(.*\.)?({key})")
    except (re.error, OverflowError, RecursionError) as error:
        raise JobError(f'{file}: alpha_pattern "{key[:80]}" is no regular expression ({error}). Correct it.') from None


def unfused(pair: tuple[torch.Tensor, torch.Tensor], runs: tuple[int, ...], of: int) -> tuple[torch.Tensor, torch.Tensor]:
    """loralib's pair of some parts of a fused map as one of the whole: A [n R, K], B [D, n R], block-diagonal, zero rows for the rest.

    Args:
        runs: which of the `of` equal runs of output rows each part is.
    """
    a, b = pair
    rank, rows = b.shape[1], b.shape[0] // len(runs)
    whole = b.new_zeros(of * rows, len(runs) * rank)
    for place, run in enumerate(runs):
        whole[run * rows : (run + 1) * rows, place * rank : (place + 1) * rank] = b[place * rows : (place + 1) * rows]
    return a, whole


def _paired(
    source: Path, tensors: dict[str, torch.Tensor], pattern: re.Pattern[str]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    """Pairs by module, and what is left."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if found := pattern.fullmatch(name):
            halves.setdefault(found["module"], {})[found["part"]] = tensor.float()
        else:
            rest[name] = tensor.float()
    if not halves:
        raise JobError(f"{source}: has no tensors of a LoRA, such as {next(iter(tensors), 'any')}. Name another file.")
    for module, half in halves.items():
        if len(half) < 2:
            there, absent = ("A", "B") if "A" in half else ("B", "A")
            raise JobError(f"{source}: {module} has lora_{there}, but no lora_{absent}. The file is incomplete; fetch it again.")
        if half["A"].dim() != 2 or half["B"].dim() != 2:
            raise JobError(f"{source}: the pair of {module} is not of two matrices, so it is not of a linear map. It is not imported.")
        if not half["A"].numel() or not half["B"].numel():
            raise JobError(f"{source}: the pair of {module} is empty. Fetch it again.")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}, rest


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    try:
        _refuse_packed(file)
        # Whatever a file that anybody may have made does to the reader.
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise JobError(f"{file}: cannot be read as a file of tensors alone ({said}). Nothing else is unpickled; fetch it again.") from None
    # So the paper's GPT-2 code saves it.
    found = found.get("model_state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(name, str) and _plain(tensor) for name, tensor in found.items()):
        raise JobError(f"{file}: is not a table of tensors by name. Name the file that lora_state_dict made.")
    return found


def _refuse_packed(file: Path) -> None:
    """torch writes its archives unpacked; a packed one may be a thousand times its size."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                raise ValueError("a packed archive")


def _plain(tensor: Any) -> bool:
    """Of numbers that are all in the file: one that is spread over fewer would take any memory."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_complex()
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what DistributedDataParallel puts before the names."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
