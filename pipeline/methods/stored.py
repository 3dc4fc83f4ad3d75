"""A stored delta -> a base that computes with it, as it lies in its files: no job is needed, and nothing is trained.

A module's LoRA branches were stored as one pair, which is exactly the same map (see `lora.py`); it becomes one branch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from pipeline.job.errors import JobError
from pipeline.job.method import Adapter, Method, PrefixEmbed, PrefixLayer
from pipeline.methods.attach import attach
from pipeline.methods.dropout import DropoutClock
from pipeline.methods.files import restore_added, restore_placed
from pipeline.methods.lora import LoraBranch, Rows
from pipeline.model.linear import BaseLinear
from pipeline.model.load import LoadedBase
from pipeline.model.routing import OnRows, every_row
from pipeline.model.zero3 import fill, shape_of
from pipeline.tasks.tokens import NewTokens
from pipeline.weights.delta import StoredDelta
from pipeline.weights.manifest import MANIFEST, Manifest


def attach_stored(
    base: LoadedBase,
    stored: StoredDelta,
    folder: Path,
    device: torch.device,
    on_rows: OnRows = every_row,
    first_special: int | None = None,
    fill_base: bool = True,
) -> None:
    """Puts everything but a head into the model.

    Args:
        folder: of the delta, for messages.
        on_rows: see `attach`; so `first_special`.
        fill_base: its parameters of the base too, in the place of the base's own.

    Raises:
        JobError: a module or parameter that the model does not have, or of another shape.
    """
    model, clock = base.model, DropoutClock(0)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, BaseLinear)}
    for place, module in enumerate(stored.manifest.modules):
        linear, (a, b) = linears.get(module.name), stored.pairs[module.name]
        if linear is None or (b.shape[0], a.shape[1]) != (linear.out_features, linear.in_features):
            raise JobError(f"{folder}: {module.name} of {b.shape[0]} x {a.shape[1]} is not in this base. Name the base it was trained on.")
        scale, rows = module.alpha / module.rank, Rows(0, b.shape[0])
        linear.branches.append(LoraBranch(module.name, a.to(device), b.to(device), scale, rows, dropout=0.0, layer=place, clock=clock))
    placed = tuple(method for method in methods_of(stored.manifest, folder) if isinstance(method, Adapter | PrefixEmbed | PrefixLayer))
    added = stored.manifest.added
    new = NewTokens(added.tokens, added.ids) if added else None
    delta = attach(base, placed, 0, device, train=False, new=new, on_rows=on_rows, first_special=first_special)
    restore_placed(delta, stored, folder, "Name the base it was trained on.")
    if not restore_added(delta, stored):
        raise JobError(f"{folder}: its added tokens are not of this base. Name the base it was trained on.")
    parameters = dict(model.named_parameters())
    for name, tensor in stored.replaced.items():
        if name not in parameters or shape_of(parameters[name]) != tuple(tensor.shape):
            raise JobError(f"{folder}: {name} of shape {list(tensor.shape)} is not in this base. Name the base it was trained on.")
        if fill_base:
            fill(parameters[name], tensor)


def methods_of(manifest: Manifest, folder: Path) -> tuple[Method, ...]:
    """As the job had them; none where an older version wrote the delta, which had LoRA only.

    Raises:
        JobError: another version wrote it.
    """
    try:
        return TypeAdapter(tuple[Method, ...]).validate_python(manifest.methods, strict=False)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise JobError(f"{folder / MANIFEST}: methods.{key}: not known to this zlora. Use the version that wrote it.") from None
