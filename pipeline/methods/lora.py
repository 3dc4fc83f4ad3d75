"""LoRA (Hu et al. 2021, equation 3): h = W x + (alpha / r) B A x, W frozen, A random, B zero at the start.

In: the roles to adapt. Out: branches on the model's frozen linear maps, and the same pairs in PEFT's form.
A fused projection (GPT-2's q, k, v in one matrix) has one branch per adapted role; for PEFT they become one pair of rank
r x branches, B block-diagonal with zero rows for the rest and alpha multiplied likewise, which is exactly the same map.

Shapes: x [..., K], A [R, K], B [P, R] with P the role's output rows, output [..., D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.job.errors import JobError
from pipeline.job.method import Lora
from pipeline.methods.draw import generator_of
from pipeline.methods.dropout import DropoutClock, keyed_dropout
from pipeline.model.families import Family
from pipeline.model.linear import BaseLinear


@dataclass(frozen=True)
class Rows:
    """Output rows of a linear map that a branch adds to: the same run in each of equal groups (GPT-NeoX: one group a head)."""

    first: int
    count: int
    """In each group."""
    groups: int = 1

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """View of the rows: [..., D] -> [..., groups, count]."""
        return output.unflatten(-1, (self.groups, -1)).narrow(-1, self.first, self.count)

    def places(self, out_features: int) -> torch.Tensor:
        """Their numbers, in the order of B's rows."""
        return self.of(torch.arange(out_features)).flatten()

    def overlaps(self, other: Rows) -> bool:
        return self.groups != other.groups or (self.first < other.first + other.count and other.first < self.first + self.count)


@dataclass(frozen=True)
class LoraBranch:
    """One adapted role of one linear map. Its tensors are not registered with the module: ZeRO-3 must not shard them."""

    name: str
    """Module and first row: the same in every run of a job."""
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    rows: Rows
    dropout: float
    layer: int
    clock: DropoutClock
    target: str = ""
    """What the job calls it; empty where it comes from a file."""

    def scaled_b(self, dtype: torch.dtype) -> torch.Tensor:
        return self.b.to(dtype) * self.scale

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """(alpha / r) B A x."""
        x = keyed_dropout(x, self.dropout, self.clock, self.layer)
        return nn.functional.linear(nn.functional.linear(x, self.a.to(x.dtype)), self.scaled_b(x.dtype))

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        share = self.of(x)
        if share.shape == output.shape:
            return output + share
        rows = self.rows.of(output)
        rows += share.view_as(rows)
        return output


@dataclass(frozen=True)
class PeftPair:
    """One pair as PEFT stores it for a whole module: A [R, K], B [D, R], W + (alpha / R) B A."""

    a: torch.Tensor
    b: torch.Tensor
    rank: int
    alpha: float


@dataclass(frozen=True)
class AdaptedLinear:
    """The branches of one linear map, in the order of their rows."""

    module: str
    linear: BaseLinear
    branches: tuple[LoraBranch, ...]


def attach_lora(
    model: PreTrainedModel, family: Family, method: Lora, number: int, clock: DropoutClock, seed: int, device: torch.device
) -> list[AdaptedLinear]:
    """Puts a branch on every target of every layer. A is drawn from (seed, name), so every rank draws the same.

    Args:
        number: of the method in the job, for messages.

    Raises:
        JobError: a target that the model does not have, with those that it has; a rank above that of the map it adapts.
    """
    adapted = []
    linears = linears_of(model, family)
    heads = model.config.num_attention_heads
    for place, (name, runs) in enumerate(rows_of(linears, family, method.targets, f"methods[{number}].targets", heads).items()):
        linear, branches = linears[name], []
        for target, rows in sorted(runs, key=lambda run: run[1].first):
            rank = method.rank_of(target)
            if rank > (largest := min(linear.in_features, rows.count * rows.groups)):
                raise JobError(f"methods[{number}].rank = {rank}: {name} has room for {largest} at most. Use a smaller rank.")
            branches.append(
                LoraBranch(
                    name=f"{name}.{rows.first}",
                    a=_draw(method.init, rank, f"{name}:{rows.first}", linear.in_features, seed).to(device).requires_grad_(),
                    b=torch.zeros(rows.count * rows.groups, rank, device=device).requires_grad_(),
                    scale=method.scale_of(target),
                    rows=rows,
                    dropout=method.dropout,
                    layer=place,
                    clock=clock,
                    target=target,
                )
            )
        linear.branches.extend(branches)
        adapted.append(AdaptedLinear(name, linear, tuple(branches)))
    return adapted


def to_peft(adapted: AdaptedLinear, values: dict[str, torch.Tensor]) -> PeftPair:
    """The branches of one module as the one pair that PEFT knows.

    Args:
        values: of the trained tensors, by name, in main memory.
    """
    branches, linear = adapted.branches, adapted.linear
    b = torch.zeros(linear.out_features, sum(branch.a.shape[0] for branch in branches))
    column = 0
    for branch in branches:
        rank = branch.b.shape[1]
        # One scale for the pair: that of the first; equal ones change no bit.
        values_b = values[f"{branch.name}.b"] * (branch.scale / branches[0].scale)
        b[branch.rows.places(linear.out_features), column : column + rank] = values_b
        column += rank
    a = torch.cat([values[f"{branch.name}.a"] for branch in branches])
    return PeftPair(a, b, column, branches[0].scale * column)


def from_peft(adapted: AdaptedLinear, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Copies a stored pair into the branches.

    Args:
        scale: alpha / rank that it was stored with. B takes in what differs from the branches' own, so that the update is the same.

    Raises:
        ValueError: the pair has another shape.
    """
    rank = sum(branch.a.shape[0] for branch in adapted.branches)
    if a.shape != (rank, adapted.linear.in_features) or b.shape != (adapted.linear.out_features, rank):
        raise ValueError(f"{adapted.module}: A {list(a.shape)} and B {list(b.shape)} are not of the job's rank and targets")
    column = 0
    with torch.no_grad():
        for branch in adapted.branches:
            rank = branch.b.shape[1]
            branch.a.copy_(a[column : column + rank])
            branch.b.copy_(b[branch.rows.places(adapted.linear.out_features), column : column + rank])
            branch.b.mul_(scale / branch.scale)
            column += rank


def linears_of(model: PreTrainedModel, family: Family) -> dict[str, BaseLinear]:
    """The layers' linear maps, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, BaseLinear) and name.startswith(f"{family.layers}.")
    }


def rows_of(
    linears: dict[str, BaseLinear], family: Family, targets: tuple[str, ...], where: str, heads: int
) -> dict[str, list[tuple[str, Rows]]]:
    """Module name -> targets and the rows that they mean, modules in model order.

    Args:
        linears: of the layers.
        where: the targets were asked for, for messages.

    Raises:
        JobError: a target that the model does not have, rows that two targets name.
    """
    chosen: dict[str, list[tuple[str, Rows]]] = {}
    depth = family.layers.count(".") + 2
    for target in targets:
        if role := family.roles.get(target):
            names = [name for name in linears if name.split(".", depth)[-1] == role.module]
        else:
            names = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not names:
            paths = sorted({name.split(".", depth)[-1] for name in linears})
            raise JobError(
                f'{where}: "{target}" is not a target of this base. It has {", ".join(family.roles)}; or name a module: {", ".join(paths)}.'
            )
        for name in names:
            groups = heads if role and role.per_head else 1
            count = linears[name].out_features // groups // (role.parts if role else 1)
            rows = Rows(count * role.part if role else 0, count, groups)
            if any(rows.overlaps(other) for _, other in chosen.get(name, [])):
                raise JobError(f'{where}: "{target}" names rows of {name} that another target names too. Keep one of them.')
            chosen.setdefault(name, []).append((target, rows))
    return {name: chosen[name] for name in linears if name in chosen}


def _draw(init: str, rank: int, name: str, columns: int, seed: int) -> torch.Tensor:
    """A [R, K]. Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(K); the Gaussian option has that variance."""
    generator = generator_of(seed, name)
    a = torch.empty(rank, columns)
    if init == "gaussian":
        return a.normal_(0.0, 1.0 / math.sqrt(3 * columns), generator=generator)
    bound = 1.0 / math.sqrt(columns)
    return a.uniform_(-bound, bound, generator=generator)
