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
from pipeline.model.head import Head
from pipeline.model.names import find, match_names
from pipeline.model.vocabulary import Embedding
from pipeline.model.zero3 import Partitioner, run_of, shape_of, shard_of
from pipeline.plan.prefetch import prefetch_of
from pipeline.weights.index import Checkpoint, Entry, open_checkpoint
from pipeline.weights.read import Reader

_COMPARED_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class LoadedBase:
    model: PreTrainedModel
    family: Family
    checkpoint: Checkpoint
    tensors: dict[str, Entry]
    """Parameter name -> where it lies in the checkpoint."""
    again: dict[str, list[Entry]]
    """Parameter name -> where else it lies there, tied to it."""
    parameters: int
    """Elements, tied ones counted once."""
    bytes_read: int
    """By this rank."""
    load_s: float

    def stored_names(self, parameter: str) -> tuple[str, ...]:
        """Of the tensors of the checkpoint that hold a parameter."""
        return (self.tensors[parameter].name, *(entry.name for entry in self.again.get(parameter, ())))


def load_base(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    zero: dict[str, Any],
    dropout: float = 0.0,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    trains_tables: bool = False,
) -> LoadedBase:
    """Builds the model and reads its weights, converted to `dtype` while they are read.

    Args:
        zero: the DeepSpeed dict; stage 3 shards the base, stage 0 keeps it whole on every rank.
        progress: wraps the iteration over parameter names, for a progress bar.
        trains_tables: embedding and head are trained, and so sharded as any other matrix is.

    Raises:
        JobError: truncated or corrupt files, missing, unexpected or misshapen tensors, by name.
    """
    start = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    model, family = build(config, dropout)
    tensors = match_names(model, family, checkpoint)
    partitioner = Partitioner(zero, dtype) if zero_stage(zero) == 3 else None
    with Reader() as reader:
        places, again = _places(model), _stored_again(model, family, checkpoint, tensors)
        largest_kept = prefetch_of(zero).persistence
        for name in progress(tensors):
            entry = tensors[name]
            by_rows = not trains_tables and entry.numel > largest_kept and all(_uses_rows(module) for module, _ in places[name])
            parameter = _read(entry, reader, dtype, device, partitioner, by_rows)
            for other in again.get(name, []):
                _refuse_untied(folder, name, parameter, other, reader)
            for module, key in places[name]:
                module._parameters[key] = parameter
        bytes_read = reader.bytes_read
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    count = sum(entry.numel for entry in tensors.values())
    return LoadedBase(model, family, checkpoint, tensors, again, count, bytes_read, time.perf_counter() - start)


def _read(
    entry: Entry, reader: Reader, dtype: torch.dtype, device: torch.device, partitioner: Partitioner | None, by_rows: bool
) -> nn.Parameter:
    if partitioner is not None:
        return partitioner.parameter(entry.shape, lambda first, out: reader.read(entry, first, out), by_rows)
    whole = torch.empty(entry.shape, dtype=dtype, device=device)
    reader.read(entry, 0, whole.view(-1))
    return nn.Parameter(whole, requires_grad=False)


def _uses_rows(module: nn.Module) -> bool:
    """Whether it needs no more of its weight than this rank's rows of the vocabulary."""
    return isinstance(module, Embedding) or (isinstance(module, Head) and module.bias is None)


def _places(model: PreTrainedModel) -> dict[str, list[tuple[nn.Module, str]]]:
    """Parameter name -> every slot that holds it: a tied parameter has several."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(first_name[id(parameter)], []).append((module, key))
    return places


def _stored_again(model: PreTrainedModel, family: Family, checkpoint: Checkpoint, tensors: dict[str, Entry]) -> dict[str, list[Entry]]:
    """Parameter name -> further tensors of the checkpoint that are tied to it."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    again: dict[str, list[Entry]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_name[id(parameter)]
        if name not in tensors and (entry := find(name, family, checkpoint)) and tensors[first].name != entry.name:
            again.setdefault(first, []).append(entry)
    return again


def _refuse_untied(folder: Path, name: str, parameter: nn.Parameter, other: Entry, reader: Reader) -> None:
    """A checkpoint may store a tied tensor twice; then both must be the same, or the config is wrong about the tie.

    Each rank compares its own run of elements: all of them are compared, and a rank reads no more than its share.
    """
    same = other.shape == shape_of(parameter)
    shard, (first, held) = shard_of(parameter).view(-1), run_of(parameter)
    buffer = torch.empty(min(_COMPARED_ELEMENTS, held), dtype=shard.dtype, device=shard.device)
    for begin in range(0, held if same else 0, _COMPARED_ELEMENTS):
        piece = buffer[: held - begin]
        reader.read(other, first + begin, piece)
        same = same and torch.equal(piece.view(torch.uint8), shard[begin : begin + len(piece)].view(torch.uint8))
    if not same:
        raise JobError(
            f'{folder}: config.json ties "{other.name}" to "{name}", but their stored values differ. '
            'Set "tie_word_embeddings": false in config.json if they are meant to.'
        )
