"""A `Delta` in memory <-> the delta folder: to PEFT's form and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.job.errors import JobError
from pipeline.job.method import Lora
from pipeline.job.spec import Base
from pipeline.methods.attach import Delta
from pipeline.methods.lora import PeftPair, from_peft, to_peft
from pipeline.weights.delta import Head, Manifest, Module, head_key, keys_of, read_delta, read_head, write_delta
from pipeline.weights.digest import base_digest
from pipeline.weights.index import Entry


def store(
    delta: Delta,
    values: dict[str, torch.Tensor],
    folder: Path,
    method: Lora,
    base: Base,
    base_files: dict[str, str],
    tensors: dict[str, Entry],
    job_digest: str,
    step: int,
    prompt: tuple[str | None, bool],
    beside: dict[str, Any] | None = None,
) -> None:
    """Writes the delta.

    Args:
        values: of the trained tensors, by name, in main memory: as they were at `step`, while training goes on.
        base_files: sha256 of each of the base's weight files.
        tensors: parameter name -> checkpoint entry, from loading the base.
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
    modules = tuple(
        Module(
            name=adapted.module,
            tensor=tensors[f"{adapted.module}.weight"].name,
            transposed=adapted.linear.transposed,
            rank=pairs[adapted.module].rank,
            alpha=pairs[adapted.module].alpha,
        )
        for adapted in delta.adapted
    )
    manifest = {
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
    }
    write_delta(folder, stored, _peft_config(delta, pairs, method, base.model), manifest, beside)


def restore(delta: Delta, folder: Path, digest: str) -> Manifest:
    """Copies a stored delta into the attached branches.

    Args:
        digest: of the base that was loaded.

    Raises:
        JobError: trained on another base, or by a job with other targets or rank.
    """
    manifest, pairs = read_delta(folder)
    refuse_other_base(manifest, folder, digest)
    if set(pairs) != {adapted.module for adapted in delta.adapted}:
        raise JobError(f"{folder}: adapts other modules than the job's methods do. Use the job.toml of the run it came from.")
    for adapted in delta.adapted:
        try:
            from_peft(adapted, *pairs[adapted.module])
        except ValueError as error:
            raise JobError(f"{folder}: {error}. Use the job.toml of the run it came from.") from None
    head = read_head(folder)
    own = delta.head.tensors if delta.head else {}
    if {name: tensor.shape for name, tensor in head.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise JobError(f"{folder}: its head is not that of the job's task. Use the job.toml of the run it came from.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(head[name])
    return manifest


def refuse_other_base(manifest: Manifest, folder: Path, digest: str) -> None:
    """Raises:
    JobError: the base at hand is not the one the delta was trained on."""
    if manifest.base_digest != digest:
        raise JobError(
            f"{folder}: was trained on a base with digest {manifest.base_digest[:12]}... ({manifest.base}), this one has "
            f"{digest[:12]}.... Name the base it was trained on."
        )


def _peft_config(delta: Delta, pairs: dict[str, PeftPair], method: Lora, base: str) -> dict[str, Any]:
    """LoraConfig as PEFT 0.10 and later read it."""
    ranks = {name: pair.rank for name, pair in pairs.items()}
    alphas = {name: pair.alpha for name, pair in pairs.items()}
    first = next(iter(pairs.values()))
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if delta.head else "CAUSAL_LM",
        "modules_to_save": list(delta.head.form.modules) if delta.head else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != first.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != first.alpha},
        "target_modules": sorted(ranks),
        "lora_dropout": method.dropout,
        "fan_in_fan_out": any(adapted.linear.transposed for adapted in delta.adapted),
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
