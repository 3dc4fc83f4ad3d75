"""A small Slurm for the files that need no more."""

from __future__ import annotations

import pytest

from tests.cluster.slurm import Slurm, missing
from tests.cluster.submitting import settings_of


@pytest.fixture(scope="module")
def slurm():
    """Two nodes."""
    if reason := missing():
        pytest.skip(f"no Slurm here: {reason}")
    with Slurm(2) as cluster, pytest.MonkeyPatch.context() as patch:
        settings_of(cluster, patch)
        yield cluster
