"""What becomes of each tensor of a base when a delta is folded into it: the arithmetic of merging, without files.

Shapes: W [D, K] (or [K, D] as GPT-2's Conv1D stores it), A [R, K], B [D, R].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.job.errors import JobError
from pipeline.weights.delta import Manifest, Module, StoredDelta
from pipeline.weights.index import Checkpoint


@dataclass(frozen=True)
class Addition:
    """What is added to one tensor of the base."""

    module: Module
    a: torch.Tensor
    b: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor it adds to."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.module.transposed else shape

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of the update in the checkpoint's own orientation, fp32."""
        scale = self.module.alpha / self.module.rank
        if self.module.transposed:
            return (self.a[:, first:last].T @ self.b.T) * scale
        return (self.b[first:last] @ self.a) * scale


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor of the base: other values in its place, an addition, or both."""

    replaced: torch.Tensor | None = None
    added: Addition | None = None
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
    def expected(self) -> tuple[int | None, ...]:
        """Shape that the tensor has in the base. None: whatever it is."""
        found = self.replaced if self.replaced is not None else self.added
        if found is not None:
            return tuple(found.shape)
        assert self.new is not None
        return (None, self.new[1].shape[1])

    def behind(self, rows: int) -> torch.Tensor | None:
        """What stands behind the base's rows."""
        if self.new is None or self.new[0][-1] < rows:
            return None
        return self.new[1][[place for place, token in enumerate(self.new[0]) if token >= rows]]

    def rows(self, stored: torch.Tensor, first: int) -> torch.Tensor:
        """Of the result, from rows of the base [N, ...] in fp32 or wider, the first of them `first`."""
        last = first + len(stored)
        if self.replaced is not None:
            stored = self.replaced[first:last].to(stored.dtype).view_as(stored)
        result = stored if self.added is None else stored + self.added.rows(first, last)
        for token, row in zip(*self.new, strict=True) if self.new else ():
            if first <= token < last:
                result[token - first] = row
        return result


def changes_of(stored: StoredDelta) -> dict[str, Change]:
    """By the name of the tensor in the checkpoint."""
    changes = {name: Change(stored.replaced[one.name]) for one in stored.manifest.replaced for name in one.tensors}
    for module in stored.manifest.modules:
        addition = Addition(module, *stored.pairs[module.name])
        changes[module.tensor] = replace(changes.get(module.tensor, Change()), added=addition)
    if added := stored.manifest.added:
        for name, tensors in added.rows.items():
            for tensor in tensors:
                changes[tensor] = replace(changes.get(tensor, Change()), new=(added.ids, stored.added[name]))
    return changes


def refuse_unfolded(manifest: Manifest, delta: Path) -> None:
    if not manifest.other:
        return
    kinds = [method["kind"] for method in manifest.methods if method["kind"] in ("adapter", "prefix_embed", "prefix_layer")]
    raise JobError(
        f"{delta}: was trained by {' and '.join(kinds)}, which puts into the model what no ordinary checkpoint has a place for. "
        "Use it as it is (zlora generate --delta, zlora evaluate), or train by a method that merges: lora, full, full_top, bitfit."
    )


def refuse_misfit(checkpoint: Checkpoint, changes: dict[str, Change], delta: Path) -> None:
    for name, change in changes.items():
        entry = checkpoint.entries.get(name)
        wanted, shape = change.expected, entry.shape if entry else ()
        fits = len(shape) == len(wanted) and all(size in (None, own) for size, own in zip(wanted, shape, strict=True))
        if not fits:
            found = "not there" if entry is None else f"of shape {list(entry.shape)}"
            raise JobError(
                f'{delta}: adapts tensor "{name}" of shape {list(wanted)}, which in {checkpoint.folder} is {found}. Name the right base.'
            )
