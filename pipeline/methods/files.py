"""A `Delta` in memory <-> the delta folder: LoRA and heads in PEFT's form, the rest by name; and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.job.errors import JobError
from pipeline.job.method import Adapter, BitFit, Full, FullTop, Lora, PrefixEmbed, PrefixLayer
from pipeline.job.spec import Base
from pipeline.methods.attach import Delta
from pipeline.methods.lora import from_peft, to_peft
from pipeline.model.load import LoadedBase
from pipeline.model.zero3 import run_of
from pipeline.weights.delta import StoredDelta, head_key, keys_of, read_delta, write_delta
from pipeline.weights.digest import base_digest
from pipeline.weights.manifest import Head, Manifest, Module, Replaced, delta_folder
from pipeline.weights.peft import peft_config


def store(
    delta: Delta,
    values: dict[str, torch.Tensor],
    folder: Path,
    base: Base,
    base_files: dict[str, str],
    loaded: LoadedBase,
    job_digest: str,
    step: int,
    prompt: tuple[str | None, bool],
    beside: dict[str, Any] | None = None,
) -> None:
    """Writes the delta.

    Args:
        values: of the trained tensors, by name and whole, in main memory: as they were at `step`, while training goes on.
        base_files: sha256 of each of the base's weight files.
        prompt: text between prompt and completion, if it is always the same, and whether the base's chat template was used.
        beside: more JSON files of the folder, by name.
    """
    pairs = {adapted.module: to_peft(adapted, values) for adapted in delta.adapted}
    stored: dict[str, torch.Tensor] = {}
    for name, pair in pairs.items():
        a_key, b_key = keys_of(name)
        stored[a_key], stored[b_key] = pair.a.contiguous(), pair.b.contiguous()
    head = tuple(delta.head.tensors) if delta.head else ()
    stored |= {head_key(name): values[name].contiguous() for name in head}
    other, added = tuple(_placed(delta)), tuple(delta.new_tokens.rows) if delta.new_tokens else ()
    stored |= {name: values[name].contiguous() for name in (*(one.name for one in delta.base), *added, *other)}
    modules = tuple(
        Module(
            name=adapted.module,
            tensor=loaded.tensors[f"{adapted.module}.weight"].name,
            transposed=adapted.linear.transposed,
            rank=pairs[adapted.module].rank,
            alpha=pairs[adapted.module].alpha,
        )
        for adapted in delta.adapted
    )
    manifest: dict[str, Any] = {
        "base": base.model,
        "base_digest": base_digest(base_files),
        "base_files": base_files,
        "job_digest": job_digest,
        "step": step,
        "parameters": delta.parameters,
        "modules": modules,
        "head": Head(delta.head.labels, delta.head.architecture, head) if delta.head else None,
        "separator": prompt[0],
        "chat": prompt[1],
        "dtype": base.dtype,
        "methods": tuple(method.model_dump(mode="json", exclude={"start"}) for method in delta.methods),
        "replaced": tuple(Replaced(one.name, loaded.stored_names(one.name)) for one in delta.base),
        "added": delta.added,
        "other": other,
    }
    config = None
    if delta.adapted and not delta.base and not delta.added and not other:
        (lora,) = (method for method in delta.methods if isinstance(method, Lora))
        config = peft_config(modules, base.model, manifest["head"], lora.dropout)
    write_delta(folder, stored, config, manifest, beside)


def restore(delta: Delta, folder: Path, digest: str) -> Manifest:
    """Copies a stored delta into the attached methods.

    Args:
        digest: of the base that was loaded.

    Raises:
        JobError: trained on another base, or by a job with other methods.
    """
    stored = read_delta(folder)
    refuse_other_base(stored.manifest, folder, digest)
    repair = "Use the job.toml of the run it came from."
    restore_lora(delta, stored, folder, repair)
    restore_placed(delta, stored, folder, repair)
    restore_base(delta, stored, folder, repair)
    if not restore_added(delta, stored):
        raise JobError(f"{folder}: was trained with other base.added_tokens. {repair}")
    if not restore_head(delta, stored):
        raise JobError(f"{folder}: its head is not that of the job's task. {repair}")
    return stored.manifest


def restore_lora(delta: Delta, stored: StoredDelta, folder: Path, repair: str) -> None:
    """Raises:
    JobError: it adapts other modules, or in another rank."""
    if set(stored.pairs) != {adapted.module for adapted in delta.adapted}:
        raise JobError(f"{folder}: LoRA adapts other modules in it than in the job. {repair}")
    scales = {module.name: module.alpha / module.rank for module in stored.manifest.modules}
    for adapted in delta.adapted:
        try:
            from_peft(adapted, *stored.pairs[adapted.module], scales[adapted.module])
        except ValueError as error:
            raise JobError(f"{folder}: {error}. {repair}") from None


def restore_placed(delta: Delta, stored: StoredDelta, folder: Path, repair: str) -> None:
    """Of adapters and special tokens.

    Raises:
        JobError: it has others.
    """
    if not _copy(_placed(delta), stored.other):
        raise JobError(_unlike(folder, repair))


def restore_base(delta: Delta, stored: StoredDelta, folder: Path, repair: str) -> None:
    """Of the base's own parameters.

    Raises:
        JobError: it has others.
    """
    if {one.name: tuple(one.shape) for one in delta.base} != {name: tuple(tensor.shape) for name, tensor in stored.replaced.items()}:
        raise JobError(_unlike(folder, repair))
    for one in delta.base:
        values = stored.replaced[one.name]
        with torch.no_grad():
            if not one.sharded:
                one.master.copy_(values)
                continue
            first, held = run_of(one.parameter)
            one.master[:held].copy_(values.reshape(-1)[first : first + held])
    delta.publish()


def restore_added(delta: Delta, stored: StoredDelta) -> bool:
    """Whether the stored rows are of the job's added tokens; if not, nothing is changed."""
    if (delta.added and delta.added.tokens) != (stored.manifest.added and stored.manifest.added.tokens):
        return False
    return _copy(delta.new_tokens.rows if delta.new_tokens else {}, stored.added)


def restore_head(delta: Delta, stored: StoredDelta) -> bool:
    """Whether the stored head was that of the job's task; if not, nothing is changed."""
    theirs = stored.manifest.head
    if (delta.head is None) != (theirs is None) or (delta.head and theirs and delta.head.labels != theirs.labels):
        return False
    return _copy(delta.head.tensors if delta.head else {}, stored.head)


def begin(delta: Delta, digest: str) -> list[tuple[str, str]]:
    """Copies what the methods are to start from. A head is taken over where it is of the same labels; else it stays as it was drawn.

    Args:
        digest: of the base that was loaded.

    Returns:
        What is to be said of it.

    Raises:
        JobError: no such delta, another base's, or one of other methods or settings.
    """
    told: list[tuple[str, str]] = []
    for place, method in enumerate(delta.methods):
        if method.start is None:
            continue
        folder = delta_folder(Path(method.start))
        stored = read_delta(folder)
        refuse_other_base(stored.manifest, folder, digest)
        repair = f"methods[{place}].start needs one of the same method and settings."
        match method:
            case Lora():
                restore_lora(delta, stored, folder, repair)
            case Adapter(layernorm=True) if method.placement != "lin":
                restore_placed(delta, stored, folder, repair)
                restore_base(delta, stored, folder, repair)
            case Adapter() | PrefixEmbed() | PrefixLayer():
                restore_placed(delta, stored, folder, repair)
            case Full() | FullTop() | BitFit():
                restore_base(delta, stored, folder, repair)
        restore_added(delta, stored)
        head = ""
        if delta.head:
            head = ", its head too" if restore_head(delta, stored) else "; its head is of other labels, so this one is new"
        told.append(("begins", f"from {folder}, after {stored.manifest.step} steps{head}"))
    return told


def _unlike(folder: Path, repair: str) -> str:
    return f"{folder}: was trained by other methods, or with other settings. {repair}"


def _copy(own: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> bool:
    """False, and nothing copied, where names or shapes differ."""
    if {name: tensor.shape for name, tensor in stored.items()} != {name: tensor.shape for name, tensor in own.items()}:
        return False
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    return True


def _placed(delta: Delta) -> dict[str, torch.Tensor]:
    """Of adapters and special tokens."""
    found: dict[str, torch.Tensor] = dict(delta.prefix.rows) if delta.prefix else {}
    for adapter in delta.adapters:
        found |= adapter.tensors()
    return found


def refuse_other_base(manifest: Manifest, folder: Path, digest: str) -> None:
    """Raises:
    JobError: the base at hand is not the one the delta was trained on."""
    if manifest.base_digest != digest:
        raise JobError(
            f"{folder}: was trained on a base with digest {manifest.base_digest[:12]}... ({manifest.base}), this one has "
            f"{digest[:12]}.... Name the base it was trained on."
        )
