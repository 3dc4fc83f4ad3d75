"""Our delta on disk: a folder that PEFT loads as it is where PEFT has the method, and a manifest that says what it belongs to.

`adapter_model.safetensors` (the trained tensors, fp32), `adapter_config.json` (as PEFT reads it; LoRA and heads only), `manifest.json`
(base and job digests, counts, sha256, the methods, and the checkpoint tensors that they add to or replace), written last.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.job.errors import JobError
from pipeline.weights.atomic import new_folder, write_json
from pipeline.weights.digest import sha256_of
from pipeline.weights.index import read_header
from pipeline.weights.manifest import CONFIG, DAMAGED, MANIFEST, TENSORS, Manifest, read_manifest
from pipeline.weights.tensors import load_tensors, save_tensors

_STORED_FOR_TRAINED = 16
"""Elements at most for each trained one: a fused map's pair has zero rows for the parts that are not trained."""


def head_key(tensor: str) -> str:
    """PEFT's name of a head's tensor."""
    return f"base_model.model.{tensor}"


def keys_of(module: str) -> tuple[str, str]:
    """PEFT's names of a module's A and B."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def write_delta(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any] | None,
    manifest: dict[str, Any],
    beside: dict[str, Any] | None = None,
) -> None:
    """Writes a delta, whole or not at all; an older one in its place gives way.

    Args:
        config: PEFT's, where PEFT can load it.
        manifest: the fields of `Manifest` without `sha256`.
        beside: more JSON files of the folder, by name.
    """
    with new_folder(folder, replace=True) as partial:
        save_tensors(partial / TENSORS, tensors)
        if config is not None:
            write_json(partial / CONFIG, config)
        for name, value in (beside or {}).items():
            write_json(partial / name, value)
        write_json(partial / MANIFEST, asdict(Manifest(**manifest, sha256=sha256_of(partial / TENSORS))))


@dataclass(frozen=True)
class StoredDelta:
    manifest: Manifest
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """LoRA's, by module name: A [R, K] and B [D, R]."""
    head: dict[str, torch.Tensor]
    """By their names in transformers' model."""
    replaced: dict[str, torch.Tensor]
    """The base's own, by their names in the model."""
    other: dict[str, torch.Tensor]
    added: dict[str, torch.Tensor]
    """Rows of added tokens [A, D]."""


def read_delta(folder: Path) -> StoredDelta:
    """Raises:
    JobError: damaged or incomplete files, or tensors that the manifest does not tell the truth of."""
    manifest, file = read_manifest(folder), folder / TENSORS
    try:
        elements = sum(entry.numel for entry in read_header(file))
    except JobError as error:
        raise JobError(f"{file}: cannot be read ({error}) {DAMAGED}") from None
    uncounted = f"{file}: holds {elements:,} elements, and {MANIFEST} says that {manifest.parameters:,} were trained. {DAMAGED}"
    # Before anything is loaded: what is too large may be too large for this machine.
    if elements > _STORED_FOR_TRAINED * manifest.parameters:
        raise JobError(uncounted)
    try:
        tensors = load_tensors(file)
    except ValueError as error:
        raise JobError(f"{file}: cannot be read ({error}). {DAMAGED}") from None
    if sha256_of(file) != manifest.sha256:
        raise JobError(f"{file}: its sha256 is not the manifest's. The delta is damaged or was changed; save it again.")

    def stored(key: str, *shape: int | None) -> torch.Tensor:
        if key not in tensors:
            raise JobError(f"{file}: no {key}, though {MANIFEST} names it. {DAMAGED}")
        found = tensors[key]
        fits = not shape or (found.dim() == len(shape) and all(want in (None, size) for want, size in zip(shape, found.shape, strict=True)))
        if not fits or not found.is_floating_point():
            wanted = f", {MANIFEST} says {list(shape)} (None: any)" if shape else ""
            raise JobError(f"{file}: {key} is {found.dtype} of shape {list(found.shape)}{wanted}. {DAMAGED}")
        return found

    pairs = {
        module.name: (stored(keys_of(module.name)[0], module.rank, None), stored(keys_of(module.name)[1], None, module.rank))
        for module in manifest.modules
    }
    head = {name: stored(head_key(name)) for name in (manifest.head.tensors if manifest.head else ())}
    replaced = {one.name: stored(one.name) for one in manifest.replaced}
    other = {name: stored(name) for name in manifest.other}
    added = {name: stored(name, len(manifest.added.ids), None) for name in manifest.added.rows} if manifest.added else {}
    if elements < manifest.parameters:
        raise JobError(uncounted)
    return StoredDelta(manifest, pairs, head, replaced, other, added)
