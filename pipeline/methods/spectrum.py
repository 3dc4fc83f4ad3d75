"""Singular values of LoRA's updates (alpha / r) B A, of which section 7 of Hu et al. 2021 asks how many matter.

In: the adapted modules and the trained values. Out: for each role of each layer, R values, the largest first. The update itself, P x K,
is never made: with B = Q_b R_b and A^T = Q_a R_a its singular values are those of the R x R core R_b R_a^T.
"""

from __future__ import annotations

import re

import torch

from pipeline.methods.lora import AdaptedLinear


def singular_values(adapted: tuple[AdaptedLinear, ...], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By name, such as `layer_03.q`, in main memory; none where a value is out of range.

    Args:
        values: of the trained tensors, by name, wherever they are.
    """
    layers = [_layer(each.module) for each in adapted]
    width = len(str(max(layers, default=0)))
    return {
        f"layer_{layer:0{width}}.{branch.target or branch.name}": _of_product(
            values[f"{branch.name}.b"], values[f"{branch.name}.a"], branch.scale
        )
        for layer, each in zip(layers, adapted, strict=True)
        for branch in each.branches
    }


def _layer(module: str) -> int:
    """The first number in a module's path."""
    found = re.search(r"\.(\d+)\.", module)
    return int(found.group(1)) if found else 0


def _of_product(b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """b [P, R], a [R, K] -> [R]."""
    core = torch.linalg.qr(b.detach().float().cpu()).R @ torch.linalg.qr(a.detach().float().cpu().T).R.T
    return torch.linalg.svdvals(core) * scale if bool(core.isfinite().all()) else core.new_empty(0)
