"""Our delta on disk: a folder that PEFT loads as it is where PEFT has the method, and a manifest that says what it belongs to.

`adapter_model.safetensors` (the trained tensors, fp32), `adapter_config.json` (as PEFT reads it; LoRA and heads only), `manifest.json`
(base and job digests, counts, sha256, the methods, and the checkpoint tensors that they add to or replace), written last.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from pipeline.job.errors import JobError
from pipeline.weights.atomic import new_folder, write_json
from pipeline.weights.digest import sha256_of
from pipeline.weights.index import read_header
from pipeline.weights.parse import read_json
from pipeline.weights.tensors import load_tensors, save_tensors

SCHEMA_VERSION = 2
_READ = (1, 2)
"""Version 1 had LoRA only, and did not say with which settings."""
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"
_DAMAGED = "The delta is damaged; save it again."
_STORED_FOR_TRAINED = 16
"""Elements at most for each trained one: a fused map's pair has zero rows for the parts that are not trained."""


@dataclass(frozen=True)
class Module:
    """One adapted linear map."""

    name: str
    """In the model."""
    tensor: str
    """In the base's checkpoint."""
    transposed: bool
    """The checkpoint stores [in, out], as GPT-2's Conv1D does."""
    rank: int
    alpha: float


@dataclass(frozen=True)
class Replaced:
    """One trained parameter of the base, stored whole under its name in the model."""

    name: str
    tensors: tuple[str, ...]
    """In the base's checkpoint: a tied one may be there twice."""


@dataclass(frozen=True)
class Added:
    """Tokens that the base did not know."""

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    """Ascending."""
    rows: dict[str, tuple[str, ...]]
    """Name of the stored rows -> tensors of the base's checkpoint that they belong to."""


@dataclass(frozen=True)
class Head:
    """What a delta puts in place of the vocabulary projection."""

    labels: tuple[str, ...] | None
    """Names of the classes; None: the output is a number."""
    architecture: str
    """transformers' name of the model with such a head."""
    tensors: tuple[str, ...] = ("score.weight",)
    """Their names in that model."""


@dataclass(frozen=True)
class Manifest:
    base: str
    """What the job named."""
    base_digest: str
    base_files: dict[str, str]
    """sha256 of each weight file."""
    job_digest: str
    step: int
    parameters: int
    modules: tuple[Module, ...]
    """LoRA's."""
    sha256: str
    """Of the tensor file."""
    head: Head | None = None
    separator: str | None = None
    """Text between prompt and completion in training. None: there were several."""
    chat: bool = False
    """Trained on conversations in the base's chat template."""
    dtype: str | None = None
    """Of the base in training; None: not known."""
    methods: tuple[dict[str, Any], ...] = ()
    """As the job's sections have them."""
    replaced: tuple[Replaced, ...] = ()
    added: Added | None = None
    other: tuple[str, ...] = ()
    """Names of tensors that are neither LoRA's, nor a head's, nor the base's: adapters, special tokens. They do not merge."""
    schema_version: int = SCHEMA_VERSION


_FORM = TypeAdapter(Manifest)


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


def read_manifest(folder: Path) -> Manifest:
    """Raises:
    JobError: not a delta folder, or one whose manifest cannot be read."""
    file = folder / MANIFEST
    try:
        version = read_json(file)["schema_version"]
        if version not in _READ:
            raise JobError(f"{file}: schema_version {version}; this zlora reads {SCHEMA_VERSION}. Use the version that wrote it.")
        manifest = _FORM.validate_json(file.read_bytes(), strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise JobError(f"{folder}: no {MANIFEST} here, so this is not a delta. Name the delta/ folder of a run.") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        raise JobError(f"{file}: cannot be read ({key}: {problem['msg']}). {_DAMAGED}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{file}: cannot be read ({error!r}). {_DAMAGED}") from None
    if wrong := _unsound(manifest):
        raise JobError(f"{file}: {wrong}. {_DAMAGED}")
    return manifest


def _unsound(manifest: Manifest) -> str | None:
    """What no training writes."""
    names = [*(module.name for module in manifest.modules), *(one.name for one in manifest.replaced), *manifest.other]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        return f'names "{twice}" twice'
    for module in manifest.modules:
        if module.rank < 1 or not math.isfinite(module.alpha):
            return f"{module.name} has rank {module.rank} and alpha {module.alpha}"
    if added := manifest.added:
        ascending = all(a < b for a, b in pairwise(added.ids))
        if not added.ids or len(added.ids) != len(added.tokens) or added.ids[0] < 0 or not ascending:
            return f"{len(added.tokens)} added tokens do not have as many ascending ids"
    return None


def delta_folder(given: Path) -> Path:
    """A delta folder, or that of the run folder that is given."""
    inside = given / "delta"
    return inside if not (given / MANIFEST).is_file() and (inside / MANIFEST).is_file() else given


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
        raise JobError(f"{file}: cannot be read ({error}) {_DAMAGED}") from None
    uncounted = f"{file}: holds {elements:,} elements, and {MANIFEST} says that {manifest.parameters:,} were trained. {_DAMAGED}"
    # Before anything is loaded: what is too large may be too large for this machine.
    if elements > _STORED_FOR_TRAINED * manifest.parameters:
        raise JobError(uncounted)
    try:
        tensors = load_tensors(file)
    except ValueError as error:
        raise JobError(f"{file}: cannot be read ({error}). {_DAMAGED}") from None
    if sha256_of(file) != manifest.sha256:
        raise JobError(f"{file}: its sha256 is not the manifest's. The delta is damaged or was changed; save it again.")

    def stored(key: str, *shape: int | None) -> torch.Tensor:
        if key not in tensors:
            raise JobError(f"{file}: no {key}, though {MANIFEST} names it. {_DAMAGED}")
        found = tensors[key]
        fits = not shape or (found.dim() == len(shape) and all(want in (None, size) for want, size in zip(shape, found.shape, strict=True)))
        if not fits or not found.is_floating_point():
            wanted = f", {MANIFEST} says {list(shape)} (None: any)" if shape else ""
            raise JobError(f"{file}: {key} is {found.dtype} of shape {list(found.shape)}{wanted}. {_DAMAGED}")
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
