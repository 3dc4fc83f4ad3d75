"""The models whose forward pass is timed: a base as it is, and with each way of adapting it that the LoRA paper's table 1 compares.

In: a base's config.json. Its weights are drawn, not read: what a matrix product takes does not depend on its values. Out: models that
share those weights, each with its own method put on by `pipeline/methods`, in the base's dtype, as it would be served. `merged` has
weights of its own where it is adapted: W + (alpha / r) B A, by the arithmetic of `zlora merge`. Nothing trained is left at zero.
Shapes: B texts, T tokens, V vocabulary, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.deltas.changes import Addition, Change
from pipeline.job.errors import JobError
from pipeline.job.method import Adapter, Lora
from pipeline.methods.adapter import attach_adapters
from pipeline.methods.draw import generator_of
from pipeline.methods.dropout import DropoutClock
from pipeline.methods.lora import AdaptedLinear, attach_lora, to_peft
from pipeline.model.build import build
from pipeline.model.families import Family
from pipeline.weights.manifest import Module

BASE, MERGED, LORA, ADAPTER_L, ADAPTER_H, AGAIN = "base", "merged", "lora", "adapter-l", "adapter-h", "again"
"""`again`: the base a second time, at the end of each round. What it differs by is the machine's noise."""
METHODS = (BASE, MERGED, LORA, ADAPTER_L, ADAPTER_H, AGAIN)
"""In the order in which a round times them."""
_PLACEMENTS = {ADAPTER_L: "lin", ADAPTER_H: "houlsby"}
_STANDARD_DEVIATION = 0.02
_SEED = 1


@dataclass(frozen=True)
class Variant:
    name: str
    method: str
    """One of `METHODS`."""
    rank: int | None
    """LoRA's, or the width of the adapters' bottleneck."""
    tensors: dict[str, torch.Tensor]
    """What the method trains, by name."""
    model: PreTrainedModel
    family: Family

    @property
    def trained(self) -> int:
        """Elements: the paper's |Theta|."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """One forward pass, without a cache: logits [B, T, V]; of an encoder, hidden states [B, T, D].

        Args:
            tokens: [B, T] of whole texts, no padding.
        """
        model, family = self.model, self.family
        first = family.first_position(model.config)
        inputs = {
            "input_ids": tokens,
            "position_ids": torch.arange(first, first + tokens.shape[1], device=tokens.device)[None],
            # Where all attend to all before them no mask is needed, and without one the fast kernels do the work.
            "attention_mask": torch.ones_like(tokens) if family.encoder or not family.packs else None,
            "use_cache": False,
        }
        if family.own_logits:
            return model(**inputs).logits
        hidden = model.get_submodule(family.body)(**inputs).last_hidden_state
        return hidden if family.encoder else model.lm_head(hidden)


@torch.no_grad()
def make_variants(
    config: PretrainedConfig, methods: Iterable[str], rank: int, bottlenecks: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Variant]:
    """In the order of `METHODS`; the base is always among them, and an adapter is there once for each bottleneck.

    Args:
        rank: LoRA's, on q and v.

    Raises:
        JobError: an unknown method or architecture; a rank or a bottleneck that the base has no room for.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise JobError(f'--methods: "{unknown[0]}" is not one of {", ".join(METHODS)}. Name some of them, with commas between.')
    asked = {BASE, *methods}
    model, family = build(config, 0.0)
    _fill(model, dtype, device)
    made = []
    for name in METHODS:
        for size in bottlenecks if name in _PLACEMENTS else (rank if name in (MERGED, LORA) else None,):
            if name in asked:
                made.append(_variant(name, size, model, family, dtype, device))
    return made


def _variant(method: str, rank: int | None, base: PreTrainedModel, family: Family, dtype: torch.dtype, device: torch.device) -> Variant:
    if rank is None:
        return Variant(method, method, None, {}, base, family)
    model = _sharing(base)
    tensors: dict[str, torch.Tensor] = {}
    if method in _PLACEMENTS:
        section = Adapter(kind="adapter", placement=_PLACEMENTS[method], rank=rank)  # type: ignore[arg-type]
        for adapter in attach_adapters(model, family, section, 0, _SEED, device):
            tensors |= _settled(adapter.tensors(), dtype)
    else:
        for adapted in attach_lora(model, family, Lora(kind="lora", rank=rank), 0, DropoutClock(_SEED), _SEED, device):
            for branch in adapted.branches:
                tensors |= _settled({f"{branch.name}.a": branch.a, f"{branch.name}.b": branch.b}, dtype)
            if method == MERGED:
                _merge(adapted)
    name = method if method == MERGED else f"{method} {rank}"
    return Variant(name, method, rank, tensors, model, family)


def _fill(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a model on `meta` drawn weights: matrices normal, norms 1, biases 0. Tied weights stay tied."""
    drawn: dict[int, nn.Parameter] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    generator = torch.Generator(device).manual_seed(_SEED)
    for module in model.modules():
        for key, empty in module._parameters.items():
            if empty is None:
                continue
            if id(empty) not in drawn:
                tensor = torch.empty(empty.shape, dtype=dtype, device=device)
                if tensor.dim() > 1:
                    tensor.normal_(0.0, _STANDARD_DEVIATION, generator=generator)
                else:
                    tensor.fill_(0.0 if names[id(empty)].endswith("bias") else 1.0)
                drawn[id(empty)] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[key] = drawn[id(empty)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    model.eval()


def _sharing(base: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own around the same tensors."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def _settled(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """In the dtype they are served in, and no matrix of zeros, as B and the way up are before training."""
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and not tensor.count_nonzero():
            tensor.copy_(torch.empty(tensor.shape).normal_(0.0, _STANDARD_DEVIATION, generator=generator_of(_SEED, name)))
        tensor.data = tensor.data.to(dtype)
        tensor.requires_grad_(False)
    return tensors


def _merge(adapted: AdaptedLinear) -> None:
    """Into a weight of its own: the base's is shared."""
    linear, old = adapted.linear, adapted.linear.weight
    pair = to_peft(adapted, {f"{one.name}.{key}": getattr(one, key).float().cpu() for one in adapted.branches for key in ("a", "b")})
    module = Module(adapted.module, adapted.module, linear.transposed, pair.rank, pair.alpha)
    change = Change(added=(Addition(module, pair.a, pair.b),))
    merged, _ = change.rows(old.detach().float().cpu(), 0, old.shape[0])
    linear.weight = nn.Parameter(merged.to(old.device, old.dtype), requires_grad=False)
    linear.branches.clear()
