"""What becomes of each tensor of a base when deltas are folded into it: the arithmetic of merging, without files.

Of deltas i with weights w_i: W + sum w_i ((W_i - W) + (alpha_i / R_i) B_i A_i), where W_i stands for W if delta i does not have a trained
copy of W. One delta of weight 1 gives exactly its own W_i, plus its own B A.
Shapes: W [D, K] (or [K, D] as GPT-2's Conv1D stores it), A [R, K], B [D, R].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from pipeline.weights.delta import StoredDelta
from pipeline.weights.manifest import Module


@dataclass(frozen=True)
class Addition:
    """What is added to one tensor of the base."""

    module: Module
    a: torch.Tensor
    b: torch.Tensor
    weight: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor it adds to."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.module.transposed else shape

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of the update in the checkpoint's own orientation, fp32."""
        scale = self.weight * self.module.alpha / self.module.rank
        if self.module.transposed:
            return (self.a[:, first:last].T @ self.b.T) * scale
        return (self.b[first:last] @ self.a) * scale


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor of the base: other values in its place, additions, or both."""

    replaced: tuple[tuple[float, torch.Tensor], ...] = ()
    """Weight and trained copy."""
    added: tuple[Addition, ...] = ()
    new: tuple[tuple[int, ...], torch.Tensor] | None = None
    """Ids and rows of added tokens [N, D]: in the place of rows that are there, or behind them."""

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Of the result.

        Args:
            stored: of the tensor in the base.
        """
        if self.new is None:
            return stored
        return (max(stored[0], self.new[0][-1] + 1), *stored[1:])

    @property
    def expected(self) -> list[tuple[int | None, ...]]:
        """Shapes that the tensor must have in the base. None: whatever it is."""
        shapes: list[tuple[int | None, ...]] = [tuple(tensor.shape) for _, tensor in self.replaced]
        shapes += [addition.shape for addition in self.added]
        return shapes + ([(None, self.new[1].shape[1])] if self.new else [])

    def behind(self, rows: int) -> torch.Tensor | None:
        """What stands behind the base's rows."""
        if self.new is None or self.new[0][-1] < rows:
            return None
        return self.new[1][[place for place, token in enumerate(self.new[0]) if token >= rows]]

    def rows(self, stored: torch.Tensor, first: int, of: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the result, and where an exact change is not zero.

        Args:
            stored: rows of the base [N, ...] in fp32 or wider.
            first: which of the base's rows is the first of them.
            of: how many rows the base has.
        """
        last = first + len(stored)
        update = (
            stored.new_zeros(())
            if not self.added
            else sum((one.rows(first, last) for one in self.added[1:]), self.added[0].rows(first, last))
        )
        moved = (update != 0).expand_as(stored)
        result = stored + update
        if self.replaced:
            # 1 exactly where one copy stands in the base's place: what it stands in the place of must not be rounded into it.
            left = 1 - sum(weight for weight, _ in self.replaced)
            result = stored * left + update if left else update
            for weight, tensor in self.replaced:
                part = tensor.reshape(of, -1)[first:last].to(stored.dtype)
                result = result + (part if weight == 1 else weight * part)
            moved = result != stored
        for token, row in zip(*self.new, strict=True) if self.new else ():
            if first <= token < last:
                result[token - first] = row
                moved = moved.clone()
                moved[token - first] = row != stored[token - first]
        return result, moved


def changes_of(deltas: Iterable[tuple[float, StoredDelta]]) -> dict[str, Change]:
    """By the name of the tensor in the checkpoint.

    Args:
        deltas: each with its weight.
    """
    changes: dict[str, Change] = {}
    for weight, stored in deltas:
        for one in stored.manifest.replaced:
            for name in one.tensors:
                old = changes.get(name, Change())
                changes[name] = replace(old, replaced=(*old.replaced, (weight, stored.replaced[one.name])))
        for module in stored.manifest.modules:
            old = changes.get(module.tensor, Change())
            changes[module.tensor] = replace(old, added=(*old.added, Addition(module, *stored.pairs[module.name], weight)))
        if added := stored.manifest.added:
            for name, tensors in added.rows.items():
                for tensor in tensors:
                    changes[tensor] = replace(changes.get(tensor, Change()), new=(added.ids, stored.added[name]))
    return changes
