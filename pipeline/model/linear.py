"""A linear map of the base that owns its trained branches: one module, one ZeRO-3 hook. Its own weight is frozen unless a method trains it.

torch's own linear keeps `weight.t()` for the backward pass, a view that pins a gathered ZeRO-3 weight between forward and
backward. This one keeps the parameter object only, whose data the pre-backward hook gathers again.

Shapes: x [..., K], weight [D, K] (or [K, D] for GPT-2's Conv1D), bias [D], output [..., D].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Branch(Protocol):
    """What a method adds to a linear map's output."""

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The output [..., D] with this branch's share of x [..., K] added."""
        ...


class _Linear(torch.autograd.Function):
    """x [N, K] -> [N, D]."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool
    ) -> torch.Tensor:
        # Not save_for_backward: it would keep the gathered data alive.
        ctx.weight, ctx.transposed = weight, transposed  # type: ignore[attr-defined]
        if weight.requires_grad:
            ctx.save_for_backward(x)
        matrix = weight if transposed else weight.t()
        return x @ matrix if bias is None else torch.addmm(bias, x, matrix)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        gradient, (for_x, for_weight, for_bias, _) = grads[0], ctx.needs_input_grad  # type: ignore[attr-defined]
        weight, transposed = ctx.weight, ctx.transposed  # type: ignore[attr-defined]
        of_x = gradient @ (weight.t() if transposed else weight) if for_x else None
        of_weight = None
        if for_weight:
            (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
            of_weight = x.t() @ gradient if transposed else gradient.t() @ x
        return of_x, of_weight, gradient.sum(0) if for_bias else None, None


class BaseLinear(nn.Module):
    """Takes over the parameters, and so the names, of an `nn.Linear` or `Conv1D`."""

    def __init__(self, original: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.transposed = isinstance(original, Conv1D)
        self.weight = original.weight
        self.bias = original.bias
        rows, columns = original.weight.shape
        self.out_features, self.in_features = (columns, rows) if self.transposed else (rows, columns)
        self.branches: list[Branch] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Two-dimensional inside, so that the result is no view: branches add to it in place.
        flat = _Linear.apply(x.reshape(-1, self.in_features), self.weight, self.bias, self.transposed)
        output = flat.view(*x.shape[:-1], self.out_features)
        for branch in self.branches:
            output = branch.add_to(output, x)
        return output


def replace_linears(model: nn.Module) -> None:
    """Replaces every linear map of the model by a `BaseLinear` with the same parameters."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | Conv1D):
                setattr(parent, name, BaseLinear(child))
