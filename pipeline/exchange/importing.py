"""`zlora import`: a delta of another tool, and the base it is of -> our delta folder, checked against the base's architecture.

No weights are loaded: modules come from config.json, tensors' names and shapes from the files' headers. Shapes: A [R, K], B [D, R].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.deltas.foreign import read_foreign, unfused
from pipeline.job.errors import JobError
from pipeline.methods.dropout import DropoutClock
from pipeline.methods.head import TaskHead, draw_head
from pipeline.model.build import build
from pipeline.model.config import read_config
from pipeline.model.families import Family
from pipeline.model.linear import BaseLinear
from pipeline.model.names import find
from pipeline.weights.atomic import refuse_filled
from pipeline.weights.delta import head_key, keys_of, write_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.hub import local_base
from pipeline.weights.index import Checkpoint, open_checkpoint
from pipeline.weights.manifest import Head, Module, Replaced
from pipeline.weights.peft import peft_config

SCHEMA_VERSION = 1
_SHOWN = 5


def import_delta(
    source: Path, base: str, revision: str | None, out: Path, alpha: float | None, parts: tuple[str, ...], labels: tuple[str, ...]
) -> dict[str, Any]:
    """Writes the delta folder.

    Args:
        source: a loralib checkpoint, or the folder of a LoRA that PEFT saved.
        base: folder or hub id.
        alpha: of a loralib checkpoint.
        parts: roles that a loralib checkpoint's pairs of fused maps are of.
        labels: names of the classes of its head.
            All three are found beside a checkpoint that `zlora export` wrote.

    Returns:
        What was imported.

    Raises:
        JobError: what `read_foreign` refuses; a name or a shape that is not this base's; `out` is there already.
    """
    refuse_filled(out)
    foreign, folder = read_foreign(source, alpha), local_base(base, revision)
    if foreign.settings:
        parts, labels = parts or foreign.settings.parts, labels or foreign.settings.labels or ()
    checkpoint, config = open_checkpoint(folder), read_config(folder)
    model, family = build(config, 0.0)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, BaseLinear)}
    modules: list[Module] = []
    tensors: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for name, pair in foreign.pairs.items():
        # As in the whole model, or as in its body alone.
        module = next((found for found in (name, f"{family.body}.{name}") if found in linears), None)
        entry = find(f"{module}.weight", family, checkpoint) if module else None
        if module is None or entry is None:
            unknown.append(name)
            continue
        a, b = _whole(source, module, pair, linears[module], family, parts)
        rank = a.shape[0]
        modules.append(Module(module, entry.name, linears[module].transposed, rank, foreign.scales[name] * rank))
        a_key, b_key = keys_of(module)
        tensors[a_key], tensors[b_key] = a.contiguous(), b.contiguous()
    head = _head(source, foreign.rest, config, family, labels)
    heads = tuple(head.tensors) if head else ()
    biases, others = _biases({name: tensor for name, tensor in foreign.rest.items() if name not in heads}, model, family, checkpoint)
    unknown += others
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise JobError(
            f"{source}: {', '.join(unknown[:_SHOWN])}{more}: not in a {config.model_type}. Name the base that it was trained on."
        )
    tensors |= {head_key(name): foreign.rest[name].contiguous() for name in heads}
    tensors |= {one.name: tensor for one, tensor in biases}
    digests = file_digests(checkpoint.files)
    if foreign.settings and foreign.settings.base_digest != base_digest(digests):
        raise JobError(f"--base {base}: has other weights than {foreign.settings.base}, which {source} was exported for. Name that base.")
    named = str(folder.resolve()) if Path(base).is_dir() else base
    manifest: dict[str, Any] = {
        "base": named,
        "base_digest": base_digest(digests),
        "base_files": digests,
        "job_digest": "",
        "step": 0,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "modules": tuple(modules),
        "head": Head(head.labels, head.architecture, heads) if head else None,
        "replaced": tuple(one for one, _ in biases),
    }
    own = foreign.config and foreign.config | {"base_model_name_or_path": named, "inference_mode": True}
    # PEFT calls biases otherwise than we store them, so it does not load such a folder; `zlora export` makes one that it loads.
    write_delta(out, tensors, None if biases else own or peft_config(modules, named, manifest["head"]), manifest)
    return {
        "schema_version": SCHEMA_VERSION,
        "source": str(source.resolve()),
        "delta": str(out.resolve()),
        "base": named,
        "base_digest": manifest["base_digest"],
        "modules": len(modules),
        "parameters": manifest["parameters"],
        "biases": len(biases),
        "head": list(heads),
        "labels": list(head.labels) if head and head.labels else None,
    }


def _whole(
    source: Path,
    module: str,
    pair: tuple[torch.Tensor, torch.Tensor],
    linear: BaseLinear,
    family: Family,
    parts: tuple[str, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair of the whole map."""
    (stacked, columns), (rows, rank) = pair[0].shape, pair[1].shape
    roles = {
        name: role for name, role in family.roles.items() if role.parts > 1 and not role.per_head and module.endswith(f".{role.module}")
    }
    if stacked != rank or (roles and rows < linear.out_features):
        if not parts or not set(parts) <= set(roles) or stacked != len(parts) * rank:
            raise JobError(
                f"{source}: A of {module} has {stacked} rows, B {rank} columns: the pairs of {stacked // rank} parts of a fused map. "
                f"Give --parts, those of {', '.join(roles) or 'none that are known here'} that were trained (the paper: q,v)."
            )
        pair = unfused(pair, tuple(roles[part].part for part in parts), roles[parts[0]].parts)
    a, b = pair
    if (b.shape[0], a.shape[1], a.shape[0]) != (linear.out_features, linear.in_features, b.shape[1]):
        raise JobError(
            f"{source}: {module} has A of {stacked} x {columns} and B of {rows} x {rank}; the base's map is of {linear.out_features} x "
            f"{linear.in_features}. Name the base that it was trained on."
        )
    return a, b


def _biases(
    rest: dict[str, torch.Tensor], model: PreTrainedModel, family: Family, checkpoint: Checkpoint
) -> tuple[list[tuple[Replaced, torch.Tensor]], list[str]]:
    """The base's own that were trained too (`bias = "all"` of PEFT and loralib), and the names of what is none."""
    parameters = dict(model.named_parameters())
    biases, others = [], []
    for name, tensor in rest.items():
        plain = name.replace(".base_layer.", ".")
        own = next((one for one in (plain, f"{family.body}.{plain}") if one.endswith(".bias") and one in parameters), None)
        entry = find(own, family, checkpoint) if own else None
        if own is None or entry is None or entry.shape != tuple(tensor.shape):
            others.append(name)
        else:
            biases.append((Replaced(own, (entry.name,)), tensor.contiguous()))
    return biases, others


def _head(
    source: Path, rest: dict[str, torch.Tensor], config: PretrainedConfig, family: Family, labels: tuple[str, ...]
) -> TaskHead | None:
    """The head that its tensors are of."""
    output = rest.get(f"{family.head.output}.weight")
    if output is None:
        if labels:
            raise JobError(f"--labels {','.join(labels)}: {source} has no head that puts out classes. Leave the option out.")
        return None
    if labels and len(labels) != len(output):
        raise JobError(f"--labels {','.join(labels)}: {len(labels)} names for {len(output)} outputs of {source}. Name each of them once.")
    # As transformers calls classes that nobody named.
    names = labels or tuple(f"LABEL_{place}" for place in range(len(output)))
    head = draw_head(config, family.head, names if len(names) > 1 else None, 0, 0.0, DropoutClock(0), torch.device("cpu"))
    for name, tensor in head.tensors.items():
        if name not in rest:
            raise JobError(f"{source}: its head has no {name}, which that of a {config.model_type} needs. The file is incomplete.")
        if rest[name].shape != tensor.shape:
            raise JobError(
                f"{source}: {name} has shape {list(rest[name].shape)}, the base's head {list(tensor.shape)}. "
                "Name the base that it was trained on."
            )
    return head
