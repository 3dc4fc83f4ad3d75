"""Many stored deltas on one base, each for its own rows of a batch, without merging.

LoRA of any ranks and targets, adapters, special tokens, biases and norms mix freely. With one token a row, as in decoding, LoRA of all
deltas in the batch is two products whatever their number: their A below one another, their B side by side, and in between every row
keeps only what its own A put out (the batched choice of Punica and S-LoRA, in plain torch). With many tokens a row, each delta's rows
go through its own pair. What replaces the base's matrices, or changes its vocabulary, does not mix.

Shapes: x [B, T, K] or [B T, K], output [..., D], A [R, K], B [D, R], S the ranks of all deltas in the batch together.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from pipeline.job.errors import JobError
from pipeline.job.method import Adapter
from pipeline.methods.lora import LoraBranch
from pipeline.methods.stored import attach_stored, methods_of
from pipeline.model.linear import BaseLinear, Branch
from pipeline.model.load import LoadedBase
from pipeline.model.routing import OnRows, Routing
from pipeline.tasks.specials import Specials, specials_of
from pipeline.weights.delta import StoredDelta


@dataclass
class Mixed:
    """What many deltas add to one linear map: of each, LoRA first."""

    routing: Routing
    lora: dict[int, LoraBranch] = field(default_factory=dict)
    others: dict[int, list[Branch]] = field(default_factory=dict)
    _laid: tuple[int, ...] | None = None
    """The deltas that `_a` [S, K], `_b` [D, S] and `_owners` [S] are of."""
    _a: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    _b: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    _owners: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def take(self, delta: int, branches: list[Branch]) -> None:
        for branch in branches:
            match branch:
                case LoraBranch():
                    self.lora[delta] = branch
                case Bias():
                    # Before adapters, which read all that the map puts out.
                    self.others.setdefault(delta, []).insert(0, branch)
                case _:
                    self.others.setdefault(delta, []).append(branch)

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        runs = list(self.routing.runs(x))
        pairs = [(self.lora[delta], rows) for delta, rows in runs if delta in self.lora]
        if len(pairs) > 1 and x.numel() == len(self.routing.owners) * x.shape[-1]:
            output += self._of_all(x)
        else:
            for branch, rows in pairs:
                output[rows] += branch.of(x[rows])
        for delta, rows in runs:
            for other in self.others.get(delta, ()):
                output[rows] = other.add_to(output[rows], x[rows])
        return output

    def _of_all(self, x: torch.Tensor) -> torch.Tensor:
        """LoRA's share of rows of one token each."""
        if self._laid != self.routing.together:
            self._lay(x)
        inner = nn.functional.linear(x.reshape(len(self.routing.owners), -1), self._a)
        # Not by a product with zero: in fp16 another delta may be out of range here.
        inner.masked_fill_(self._owners != self.routing.numbers[:, None], 0.0)
        return nn.functional.linear(inner, self._b).view(*x.shape[:-1], -1)

    def _lay(self, x: torch.Tensor) -> None:
        chosen = [delta for delta in self.routing.together if delta in self.lora]
        branches = [self.lora[delta] for delta in chosen]
        self._a = torch.cat([branch.a.to(x.dtype) for branch in branches])
        self._b = torch.cat([branch.scaled_b(x.dtype) for branch in branches], 1)
        ranks = torch.tensor([len(branch.a) for branch in branches], device=x.device)
        self._owners = torch.tensor(chosen, device=x.device).repeat_interleave(ranks)
        self._laid = self.routing.together


@dataclass(frozen=True)
class Bias:
    """A delta's own bias of a linear map in place of the base's, which the output has already."""

    linear: BaseLinear
    own: torch.Tensor

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return output + (self.own - self.linear.bias)


def attach_many(base: LoadedBase, deltas: list[tuple[Path, StoredDelta]], device: torch.device) -> tuple[Routing, list[Specials | None]]:
    """Puts all of them on.

    Returns:
        What says whose the rows of a batch are, and what stands around each delta's prompts.

    Raises:
        JobError: one that does not mix with others, or is not of this base.
    """
    routing, specials = Routing(), list[Specials | None]()
    linears = [module for module in base.model.modules() if isinstance(module, BaseLinear)]
    mixed = {linear: Mixed(routing) for linear in linears}
    # Special tokens have ids of their own in each delta, so that no row can see another's.
    first_id = base.model.config.vocab_size
    for number, (folder, stored) in enumerate(deltas):
        on_rows = routing.on(number)
        specials.append(specials_of(methods_of(stored.manifest, folder), first_id))
        attach_stored(base, stored, folder, device, on_rows, first_id, fill_base=False)
        _replace(base, stored, folder, device, on_rows)
        first_id += len(specials[-1] or ())
        for linear in linears:
            mixed[linear].take(number, linear.branches)
            linear.branches = []
    for linear, own in mixed.items():
        linear.branches = [own] if own.lora or own.others else []
    return routing, specials


def refuse_unmixable(stored: StoredDelta, folder: Path) -> None:
    """Raises:
    JobError: it cannot be served beside others, whatever the base."""
    if (added := stored.manifest.added) is not None:
        raise JobError(
            f"{folder}: has {len(added.tokens)} added tokens, so its vocabulary is not that of the deltas beside it. "
            f"Serve it alone: --delta {folder}.",
            everywhere=True,
        )
    if matrix := next((name for name, tensor in stored.replaced.items() if tensor.dim() > 1), None):
        raise JobError(
            f"{folder}: {matrix} takes the place of the base's, and a batch has one matrix for all its rows. "
            f"Serve it alone (--delta {folder}), or make a low-rank delta of it with zlora deltas extract.",
            everywhere=True,
        )


def _replace(base: LoadedBase, stored: StoredDelta, folder: Path, device: torch.device, on_rows: OnRows) -> None:
    """Biases and norms of the base, for a delta's own rows."""
    model, family = base.model, base.family
    behind = family.norm_behind_mlp(model.config)
    placed = any(isinstance(m, Adapter) and m.placement in ("pfeiffer", "drop") for m in methods_of(stored.manifest, folder))
    norms: dict[nn.Module, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.replaced.items():
        path, _, key = name.rpartition(".")
        module, own = model.get_submodule(path), tensor.to(device, model.dtype)
        if isinstance(module, BaseLinear):
            module.branches.append(Bias(module, own))
        elif "norm" in type(module).__name__.lower() and not (placed and behind and path.endswith(f".{behind}")):
            norms.setdefault(module, {})[key] = own
        else:
            raise JobError(f"{folder}: {name} is trained, which cannot be told by rows. Serve it alone: --delta {folder}.", everywhere=True)
    for norm, tensors in norms.items():
        _norm_of_its_own(norm, tensors, on_rows)


def _norm_of_its_own(norm: nn.Module, tensors: dict[str, torch.Tensor], on_rows: OnRows) -> None:
    # Without hooks, and not a child of the model: ZeRO-3 gathers for the original what both have.
    twin = copy.copy(norm)
    twin._parameters = norm._parameters | {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in tensors.items()}
    norm.register_forward_hook(lambda module, inputs, output: on_rows(lambda out, x: twin.forward(x), output, inputs[0]))
