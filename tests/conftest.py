"""What several test files share: rank pools, small bases made on the spot, and the reference data where it is there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait for each other, in models this small, take the cores from the ranks and from the other worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pipeline.cli import main
from tests import bases
from tests.families import make_family
from tests.ranks import Ranks

# A shell's background jobs ignore it, and so would every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    """Digests of test bases must not end up in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def _pool(count):
    @pytest.fixture(scope="session")
    def pool():
        ranks = Ranks(count)
        yield ranks
        ranks.stop()

    return pool


ranks1, ranks2, ranks3, ranks4 = _pool(1), _pool(2), _pool(3), _pool(4)


@pytest.fixture(scope="session")
def gpt2_base(tmp_path_factory) -> Path:
    """A random GPT-2 of 3 layers with a tokenizer of its own, fp32, one file."""
    return bases.make_gpt2(tmp_path_factory.mktemp("bases") / "gpt2")


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory) -> Path:
    """A random Llama of 3 layers with grouped heads and an untied head, fp32, in several shards."""
    return bases.make_llama(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data sets beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"the reference data sets are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> Callable[[str], Path]:
    """A small random base of a family, by its `model_type`; made once."""
    folder = tmp_path_factory.mktemp("families")
    return cache(lambda name: make_family(name, folder / name))


@pytest.fixture
def zlora(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """`zlora("check", "job.toml")` -> exit code, standard output, standard error; in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["zlora", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capfd.readouterr())

    return call
