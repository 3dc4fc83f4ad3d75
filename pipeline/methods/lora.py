"""LoRA (Hu et al. 2021, equation 3): h = W x + (alpha / r) B A x, W frozen, A random, B zero at the start.

In: the roles to adapt. Out: branches on the model's frozen linear maps, and the same pairs in PEFT's form.
A fused projection (GPT-2's q, k, v in one matrix) has one branch per adapted role; for PEFT they become one pair of rank
r x branches, B block-diagonal with zero rows for the rest and alpha multiplied likewise, which is exactly the same map.

Shapes: x [..., K], A [R, K], B [P, R] with P the role's output rows, output [..., D].
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.job.errors import JobError
from pipeline.job.spec import Lora
from pipeline.methods.dropout import DropoutClock, keyed_dropout
from pipeline.model.families import Family
from pipeline.model.linear import FrozenLinear


@dataclass(frozen=True)
class LoraBranch:
    """One adapted role of one linear map. Its tensors are not registered with the module: ZeRO-3 must not shard them."""

    name: str
    """Module and first row: the same in every run of a job."""
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    first_row: int
    dropout: float
    layer: int
    clock: DropoutClock

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x = keyed_dropout(x, self.dropout, self.clock, self.layer)
        share = nn.functional.linear(nn.functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype) * self.scale)
        if share.shape == output.shape:
            return output + share
        rows = output.narrow(-1, self.first_row, share.shape[-1])
        rows += share
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
    linear: FrozenLinear
    branches: tuple[LoraBranch, ...]


@dataclass(frozen=True)
class _Run:
    """Output rows of a linear map that a target names."""

    target: str
    first: int
    rows: int


def attach_lora(
    model: nn.Module, family: Family, method: Lora, clock: DropoutClock, seed: int, device: torch.device
) -> list[AdaptedLinear]:
    """Puts a branch on every target of every layer. A is drawn from (seed, name), so every rank draws the same.

    Raises:
        JobError: a target that the model does not have, with those that it has; a rank above that of the map it adapts.
    """
    adapted = []
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear) and name.startswith(f"{family.layers}.")
    }
    for place, (name, runs) in enumerate(_targets(linears, family, method.targets).items()):
        linear, branches = linears[name], []
        for run in sorted(runs, key=lambda run: run.first):
            rank = method.rank_of(run.target)
            if rank > (largest := min(linear.in_features, run.rows)):
                raise JobError(f"methods[0].rank = {rank}: {name} has room for {largest} at most. Use a smaller rank.")
            branches.append(
                LoraBranch(
                    name=f"{name}.{run.first}",
                    a=_draw(method.init, rank, f"{name}:{run.first}", linear.in_features, seed).to(device).requires_grad_(),
                    b=torch.zeros(run.rows, rank, device=device).requires_grad_(),
                    scale=method.scale_of(run.target),
                    first_row=run.first,
                    dropout=method.dropout,
                    layer=place,
                    clock=clock,
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
        rows, rank = branch.b.shape
        # One scale for the pair: that of the first; equal ones change no bit.
        b[branch.first_row : branch.first_row + rows, column : column + rank] = values[f"{branch.name}.b"] * (
            branch.scale / branches[0].scale
        )
        column += rank
    a = torch.cat([values[f"{branch.name}.a"] for branch in branches])
    return PeftPair(a, b, column, branches[0].scale * column)


def from_peft(adapted: AdaptedLinear, a: torch.Tensor, b: torch.Tensor) -> None:
    """Copies a stored pair into the branches.

    Raises:
        ValueError: the pair has another shape.
    """
    rank = sum(branch.a.shape[0] for branch in adapted.branches)
    if a.shape != (rank, adapted.linear.in_features) or b.shape != (adapted.linear.out_features, rank):
        raise ValueError(f"{adapted.module}: A {list(a.shape)} and B {list(b.shape)} are not of the job's rank and targets")
    column = 0
    with torch.no_grad():
        for branch in adapted.branches:
            rows, rank = branch.b.shape
            branch.a.copy_(a[column : column + rank])
            branch.b.copy_(b[branch.first_row : branch.first_row + rows, column : column + rank])
            branch.b.mul_(adapted.branches[0].scale / branch.scale)
            column += rank


def _targets(linears: dict[str, FrozenLinear], family: Family, targets: tuple[str, ...]) -> dict[str, list[_Run]]:
    """Module name -> runs of rows to adapt, modules in model order."""
    chosen: dict[str, list[_Run]] = {}
    for target in targets:
        if role := family.roles.get(target):
            names = [name for name in linears if name.endswith(f".{role.module}")]
        else:
            names = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not names:
            paths = sorted({name.split(".", family.layers.count(".") + 2)[-1] for name in linears})
            raise JobError(
                f'methods[0].targets: "{target}" is not a target of this base. It has {", ".join(family.roles)}; '
                f"or name a module: {', '.join(paths)}."
            )
        for name in names:
            rows = linears[name].out_features // (role.parts if role else 1)
            run = _Run(target, rows * role.part if role else 0, rows)
            if any(run.first < other.first + other.rows and other.first < run.first + run.rows for other in chosen.get(name, [])):
                raise JobError(f'methods[0].targets: "{target}" names rows of {name} that another target names too. Keep one of them.')
            chosen.setdefault(name, []).append(run)
    return {name: chosen[name] for name in linears if name in chosen}


def _draw(init: str, rank: int, name: str, columns: int, seed: int) -> torch.Tensor:
    """A [R, K]. Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(K); the Gaussian option has that variance."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    a = torch.empty(rank, columns)
    if init == "gaussian":
        return a.normal_(0.0, 1.0 / math.sqrt(3 * columns), generator=generator)
    bound = 1.0 / math.sqrt(columns)
    return a.uniform_(-bound, bound, generator=generator)
