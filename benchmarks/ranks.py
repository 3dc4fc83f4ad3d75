"""CPU ranks of this machine for a measurement, forked from a process that has imported what they need.

In: a function of this folder's modules, called on every rank, which joins the others itself. Out: each rank's answer, in rank order.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.cluster.launch import rank_environment

_FORKED = multiprocessing.get_context("forkserver")


def prepare(module: str) -> None:
    """Has the process that ranks are forked from import a module."""
    # What glibc, torch and DeepSpeed read when a process starts.
    os.environ.update(rank_environment(0, 2, Path(), 0) | {"PYTHONPATH": os.pathsep.join(sys.path)})
    _FORKED.set_forkserver_preload([module])


def on_ranks(count: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `body(*args)` on so many new ranks of one thread each, so that no memory is left from another measurement.

    Returns:
        What it answered, by rank, as JSON has it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        processes = [
            _FORKED.Process(target=_rank, args=(rank_environment(rank, count, folder, 0), folder, body, args)) for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit((folder / "log0").read_text()[-3000:])
        return [json.loads((folder / f"out{rank}.json").read_text()) for rank in range(count)]


def _rank(environment: dict[str, str], folder: Path, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    log = os.open(folder / f"log{environment['RANK']}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    (folder / f"out{environment['RANK']}.json").write_text(json.dumps(body(*args)))
