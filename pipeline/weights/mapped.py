"""A tensor moved from memory into a file of a fast disk, and mapped: the system reads its pages as they are used, and may drop them.

For frozen weights: they are written once, so their pages are never dirty again. The file loses its name as soon as it is mapped:
there is nothing to clean up, whichever way the process ends, and its space is free then.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from pipeline.job.errors import JobError
from pipeline.weights.read import byte_view


def mapped(tensor: torch.Tensor, folder: str) -> torch.Tensor:
    """The same elements (1-D, contiguous, CPU), on disk.

    Args:
        folder: may name environment variables: a batch system's folder on a node's own disk is often another for each job.

    Raises:
        JobError: no such folder, no permission, no room.
    """
    if not tensor.numel():
        return tensor
    place = Path(os.path.expandvars(folder)).expanduser()
    try:
        with tempfile.NamedTemporaryFile(prefix="zlora-", dir=place, buffering=0) as file:
            view = byte_view(tensor)
            while view:
                view = view[file.write(view) :]
            # Written back now: a disk that refuses later could only kill the process.
            os.fsync(file.fileno())
            return torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise JobError(
            f'nvme_path = "{place}": cannot keep shards of the base there: {why}. Name a folder on each node\'s own disk, with room '
            'for the base (zlora plan says how much), or offload to "cpu".'
        ) from None
