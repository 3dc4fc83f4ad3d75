"""Which rows of a batch go through which delta, where one resident base serves many.

In: the delta of each row, said by every pass (`Decode.owners`). Out: for whatever a delta has hung on the model, the rows that are its own.
Rows of one delta are neighbours, so they are a slice and nothing is copied to find them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch

BASE = -1
"""The owner of rows that the base answers alone."""
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(output, x) -> the changed output."""
OnRows = Callable[[Change, torch.Tensor, torch.Tensor], torch.Tensor]
"""(change, output, x) -> the output, changed in the rows that the change is meant for."""


def every_row(change: Change, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return change(output, x)


@dataclass
class Routing:
    """Of one model, the same for all its modules."""

    owners: tuple[int, ...] = ()
    """Number of each row's delta, or `BASE`; equal ones together."""
    numbers: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """The same."""
    together: tuple[int, ...] = ()
    """Deltas whose tensors are laid side by side: those of the batch, of which some may have finished since."""
    _runs: tuple[tuple[int, int, int], ...] = ()
    """Delta, first row, end."""

    def set(self, owners: tuple[int, ...], device: torch.device) -> None:
        """Before each pass."""
        if owners == self.owners:
            return
        self.owners, self.numbers = owners, torch.tensor(owners, dtype=torch.long, device=device)
        counts = [(owner, len(list(same))) for owner, same in groupby(owners)]
        ends = accumulate(count for _, count in counts)
        self._runs = tuple((owner, end - count, end) for (owner, count), end in zip(counts, ends, strict=True) if owner != BASE)
        inside = {owner for owner, _, _ in self._runs}
        # Laid anew seldom: when half of them have finished, not after each.
        if not inside <= set(self.together) or 2 * len(inside) < len(self.together):
            self.together = tuple(sorted(inside))

    def runs(self, tensor: torch.Tensor) -> Iterator[tuple[int, slice]]:
        """Each delta of the batch, and its part of a tensor's first dimension: rows, or rows x tokens where they are flattened (OPT)."""
        each = len(tensor) // max(1, len(self.owners))
        return ((delta, slice(first * each, end * each)) for delta, first, end in self._runs)

    def on(self, delta: int) -> OnRows:
        """For a delta's own changes. They are made in place: nothing is trained while many are served."""

        def on_rows(change: Change, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            for owner, rows in self.runs(output):
                if owner == delta:
                    output[rows] = change(output[rows], x[rows])
            return output

        return on_rows
