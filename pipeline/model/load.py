"""Loads a base straight into its shards: each rank reads only its own byte range of every tensor. No collective, no whole tensor.

In: a folder of safetensors, the model built on `meta`. Out: the same model with real frozen parameters, and what it cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.job.errors import JobError
from pipeline.job.zero import zero_stage
from pipeline.model.build import build
from pipeline.model.families import Family
from pipeline.model.names import match_names
from pipeline.model.zero3 import Partitioner
from pipeline.weights.index import Checkpoint, Entry, open_checkpoint
from pipeline.weights.read import Reader


@dataclass(frozen=True)
class LoadedBase:
    model: PreTrainedModel
    family: Family
    checkpoint: Checkpoint
    tensors: dict[str, Entry]
    """Parameter name -> where it lies in the checkpoint."""
    parameters: int
    """Elements, tied ones counted once."""
    bytes_read: int
    """By this rank."""
    load_s: float


def load_base(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    zero: dict[str, Any],
    dropout: float = 0.0,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> LoadedBase:
    """Builds the model and reads its weights, converted to `dtype` while they are read.

    Args:
        zero: the DeepSpeed dict; stage 3 shards the base, stage 0 keeps it whole on every rank.
        progress: wraps the iteration over parameter names, for a progress bar.

    Raises:
        JobError: truncated or corrupt files, missing, unexpected or misshapen tensors, by name.
    """
    start = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    model, family = build(config, dropout)
    tensors = match_names(model, family, checkpoint)
    partitioner = Partitioner(zero, dtype) if zero_stage(zero) == 3 else None
    with Reader() as reader:
        _refuse_untied(model, checkpoint, tensors)
        places = _places(model)
        for name in progress(tensors):
            parameter = _read(tensors[name], reader, dtype, device, partitioner)
            for module, key in places[name]:
                module._parameters[key] = parameter
        bytes_read = reader.bytes_read
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    count = sum(entry.numel for entry in tensors.values())
    return LoadedBase(model, family, checkpoint, tensors, count, bytes_read, time.perf_counter() - start)


def _read(entry: Entry, reader: Reader, dtype: torch.dtype, device: torch.device, partitioner: Partitioner | None) -> nn.Parameter:
    if partitioner is not None:
        return partitioner.parameter(entry.shape, lambda first, out: reader.read(entry, first, out))
    whole = torch.empty(entry.shape, dtype=dtype, device=device)
    reader.read(entry, 0, whole.view(-1))
    return nn.Parameter(whole, requires_grad=False)


def _places(model: PreTrainedModel) -> dict[str, list[tuple[nn.Module, str]]]:
    """Parameter name -> every slot that holds it: a tied parameter has several."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(first_name[id(parameter)], []).append((module, key))
    return places


def _refuse_untied(model: PreTrainedModel, checkpoint: Checkpoint, tensors: dict[str, Entry]) -> None:
    """A checkpoint may store a tied tensor twice; then both must be the same, or the config is wrong about the tie."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(tensors)
    for name in sorted(names & set(checkpoint.entries)):
        twin = next(first for first in tensors if model.get_parameter(first) is model.get_parameter(name))
        if tensors[twin].name != name and not _equal(checkpoint.entries[name], tensors[twin]):
            raise JobError(
                f'{checkpoint.folder}: config.json ties "{name}" to "{twin}", but their stored values differ. '
                'Set "tie_word_embeddings": false in config.json if they are meant to.'
            )


def _equal(one: Entry, other: Entry) -> bool:
    """Compares samples spread over both tensors, which is enough to tell trained tensors apart and reads next to nothing."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    sample, places = min(256, one.numel), 8
    with Reader() as reader:
        for place in range(places):
            first = (one.numel - sample) * place // (places - 1)
            pair = [torch.empty(sample, dtype=one.dtype) for _ in range(2)]
            reader.read(one, first, pair[0])
            reader.read(other, first, pair[1])
            if not torch.equal(*pair):
                return False
    return True
