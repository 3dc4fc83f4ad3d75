"""`zlora export`: a delta -> what other tools read: the folder that PEFT saves, or the file of loralib's `lora_state_dict`.

Nothing is rounded. What a form cannot express is refused with what to do instead; `zlora import` reads both back to the same tensors.
loralib's file has no alpha and one scale, alpha / R of each part; of n parts of a fused map A is [n R, K], B only their rows [n P, R].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.deltas.lowrank import blocks_of
from pipeline.deltas.mixture import refuse_not_finite
from pipeline.deltas.settings import LORALIB, SETTINGS, LoralibSettings
from pipeline.job.errors import JobError
from pipeline.weights.atomic import new_folder, write_json
from pipeline.weights.delta import StoredDelta, head_key, keys_of
from pipeline.weights.manifest import CONFIG, TENSORS, Manifest, Module
from pipeline.weights.peft import peft_config
from pipeline.weights.tensors import save_tensors

_FUSED, _PARTS = ".attn.c_attn", ("q", "k", "v")
"""GPT-2's map of q, k and v, the one that loralib's own models take apart."""
_ELSE = "Merge it (zlora merge), write the difference (--format dense), or keep it as it is"


def write_peft(stored: StoredDelta, folder: Path, out: Path) -> None:
    """The folder that PEFT saves.

    Raises:
        JobError: what PEFT's LoRA does not have.
    """
    refuse_inexpressible(stored, folder, "PEFT's LoRA")
    with new_folder(out) as partial:
        put_peft(stored, partial, stored.manifest.base)


def put_peft(stored: StoredDelta, partial: Path, base: str) -> None:
    """The two files.

    Args:
        base: what they are to call it.
    """
    tensors = {key: tensor for name, pair in stored.pairs.items() for key, tensor in zip(keys_of(name), pair, strict=True)}
    tensors |= {head_key(name): tensor for name, tensor in stored.head.items()}
    for name, tensor in stored.replaced.items():
        module = name.removesuffix(".bias")
        tensors[head_key(f"{module}.base_layer.bias" if module in stored.pairs else name)] = tensor
    save_tensors(partial / TENSORS, {name: tensor.contiguous() for name, tensor in tensors.items()})
    manifest = stored.manifest
    dropout = next((float(method.get("dropout", 0.0)) for method in manifest.methods if method.get("kind") == "lora"), 0.0)
    write_json(partial / CONFIG, peft_config(manifest.modules, base, manifest.head, dropout, bool(stored.replaced)))


def write_loralib(stored: StoredDelta, folder: Path, out: Path) -> dict[str, Any]:
    """The file of `lora_state_dict`, and beside it what the file does not hold: alpha, parts, labels.

    Raises:
        JobError: what loralib does not have, a scale for each module among it.
    """
    refuse_inexpressible(stored, folder, "loralib")
    tensors: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for module in stored.manifest.modules:
        a, b = stored.pairs[module.name]
        a, b, of = _taken_apart(module, a, b, folder)
        if of:
            parts[module.name] = of
        alphas[module.name] = module.alpha / module.rank * b.shape[1]
        tensors[f"{module.name}.lora_A"], tensors[f"{module.name}.lora_B"] = a.contiguous(), b.contiguous()
    for what, values in (("alpha", set(alphas.values())), ("parts of a fused map", set(parts.values()))):
        if len(values) > 1:
            told = " and ".join(str(value) for value in sorted(values, key=str)[:2])
            raise JobError(
                f"{folder}: its modules have {what} {told}, and a loralib file is read with one for all. "
                "Use --format peft, or zlora deltas resize DELTA --rank R first."
            )
    tensors |= {name: tensor.contiguous() for name, tensor in (stored.head | stored.replaced).items()}
    manifest = stored.manifest
    settings = LoralibSettings(
        lora_alpha=next(iter(alphas.values())),
        parts=next(iter(parts.values()), ()),
        labels=tuple(manifest.head.labels) if manifest.head and manifest.head.labels else None,
        base=manifest.base,
        base_digest=manifest.base_digest,
    ).as_json()
    with new_folder(out) as partial:
        torch.save(tensors, partial / LORALIB)
        write_json(partial / SETTINGS, settings)
    return settings


def _taken_apart(module: Module, a: torch.Tensor, b: torch.Tensor, folder: Path) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """A and B of the parts that are trained, and their names; the pair as it is where the map is whole."""
    third, blocks = b.shape[0] // len(_PARTS), blocks_of(b)
    places = [int(block.rows[0]) // third for block in blocks]
    within = all(int(block.rows[-1]) // third == place for block, place in zip(blocks, places, strict=True))
    if not module.name.endswith(_FUSED) or not module.transposed or not within:
        return a, b, ()
    if places != sorted(places) or len({len(block.columns) for block in blocks}) > 1:
        raise JobError(
            f"{folder}: {module.name} has parts of ranks {', '.join(str(len(block.columns)) for block in blocks)}, and loralib has one. "
            "Use --format peft, or zlora deltas resize DELTA --rank R first."
        )
    rows = [b[place * third : (place + 1) * third][:, list(block.columns)] for place, block in zip(places, blocks, strict=True)]
    order = [column for block in blocks for column in block.columns]
    return a[order], torch.cat(rows), tuple(_PARTS[place] for place in places)


def refuse_inexpressible(stored: StoredDelta, folder: Path, form: str) -> None:
    """Raises:
    JobError: it is more than LoRA, a head and biases, or has no LoRA."""
    if reason := inexpressible(stored.manifest):
        raise JobError(f"{folder}: {form} has no place for {reason}. {_ELSE}.")
    if not stored.pairs:
        raise JobError(f"{folder}: has no LoRA, and {form} is nothing else. {_ELSE}.")
    refuse_not_finite(stored, folder)


def inexpressible(manifest: Manifest) -> str | None:
    """What of a delta is neither LoRA's, nor a head's, nor a bias."""
    if manifest.other:
        kinds = [str(method["kind"]) for method in manifest.methods if method["kind"] in ("adapter", "prefix_embed", "prefix_layer")]
        return f"{' and '.join(kinds) or 'adapters and special tokens'} of zlora's form"
    if manifest.added:
        return f"rows of {len(manifest.added.tokens)} added tokens"
    if whole := [one.name for one in manifest.replaced if not one.name.endswith(".bias")]:
        return f"trained parameters of the base that are not biases ({whole[0]}{' and others' if len(whole) > 1 else ''})"
    return None
