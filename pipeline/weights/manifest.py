"""What a delta says of itself, `manifest.json`: the base it belongs to, its methods, and what of the checkpoint they add to or replace.

In: the file. Out: `Manifest`. No tensor is read and no torch is imported, so a folder of deltas can be looked through on a login node.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.job.errors import JobError
from pipeline.weights.digest import base_digest
from pipeline.weights.parse import read_json

SCHEMA_VERSION = 2
_READ = (1, 2)
"""Version 1 had LoRA only, and did not say with which settings."""
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"
ADDED_EMBEDDINGS, ADDED_HEAD = "added.embeddings", "added.head"
"""Keys of `Added.rows`."""
DAMAGED = "The delta is damaged; save it again."


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
        raise JobError(f"{file}: cannot be read ({key}: {problem['msg']}). {DAMAGED}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{file}: cannot be read ({error!r}). {DAMAGED}") from None
    if wrong := _unsound(manifest):
        raise JobError(f"{file}: {wrong}. {DAMAGED}")
    return manifest


def _unsound(manifest: Manifest) -> str | None:
    """What no training writes."""
    names = [*(module.name for module in manifest.modules), *(one.name for one in manifest.replaced), *manifest.other]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        return f'names "{twice}" twice'
    if manifest.base_files and base_digest(manifest.base_files) != manifest.base_digest:
        return "base_files and base_digest are not of one base"
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
