"""A table of the vocabulary that is shared by rows -> the rows that this rank holds.

Apart from `zero3`: a model is also built where there are no ranks, and must not wait there for DeepSpeed, nor print what DeepSpeed prints.

Shapes: V vocabulary, D width, R rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class OwnRows:
    """This rank's rows of a table [V, D] that a group of ranks shares."""

    shard: torch.Tensor
    """[per_rank * D], the last ones padded; where the shards are."""
    vocabulary: int
    width: int
    per_rank: int
    ranks: int
    rank: int
    """In the group."""
    group: dist.ProcessGroup | None

    @property
    def first(self) -> int:
        return self.rank * self.per_rank

    @property
    def table(self) -> torch.Tensor:
        """[R, D], without the padding: R may be 0."""
        return self.shard.view(-1, self.width)[: max(0, self.vocabulary - self.first)]


def own_rows(parameter: nn.Parameter) -> OwnRows | None:
    """Of a table that is shared by rows and not gathered at the moment."""
    # Any: DeepSpeed gives the parameter attributes of its own.
    table: Any = parameter
    width = getattr(table, "row_elements", None)
    if width is None or table.ds_status.name == "AVAILABLE":
        return None
    ranks, rank = table.ds_zero_partition_world_size, table.ds_zero_partition_rank
    return OwnRows(table.ds_tensor, table.ds_shape[0], width, table.ds_tensor.numel() // width, ranks, rank, table.ds_process_group)
