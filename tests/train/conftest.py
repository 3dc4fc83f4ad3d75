"""A small job and an uninterrupted run of it, for tests that end runs and go on with them."""

from __future__ import annotations

import pytest

from tests.training import LONG, trained, write_job


@pytest.fixture(scope="session")
def long_job(gpt2_base, tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("long"), gpt2_base)


@pytest.fixture(scope="session")
def whole(long_job, ranks2, tmp_path_factory):
    """LONG, uninterrupted, on two ranks. Copy it before changing anything in it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trained(ranks2, long_job, run, *LONG)
    return run
