"""A pool of rank processes that lives through the whole test session, so that multi-rank tests do not pay for start-up.

They are forked from a server that has torch, DeepSpeed and transformers loaded; so are those of `tests.lives`.

`Ranks(2).run(function, *args)` calls `function(ranks, *args)` on every rank, where `ranks` is the program's own `Ranks`, and
returns the answers in rank order. `function` must be importable (module level) and its answer picklable; return plain numbers,
lists, numpy arrays. An exception on any rank is raised here with its traceback, and the pool is replaced.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path

TIMEOUT_S = 300
_ROOT = Path(__file__).parent.parent
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.rank_imports"])


def forks():
    """A multiprocessing context whose processes start with everything loaded."""
    # The server looks for what it loads in PYTHONPATH alone, and says nothing when it does not find it.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(_ROOT)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return _CONTEXT


def rank_environment(rank: int, count: int, folder: str) -> dict[str, str]:
    """Of a CPU rank that meets the others through a file in `folder`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ZLORA_RENDEZVOUS": f"file://{folder}/rendezvous",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


class RankError(Exception):
    pass


class Ranks:
    def __init__(self, count: int) -> None:
        self.count = count
        self._folder = ""
        self._pipes: list[Connection] = []
        self._processes = []

    def run(self, function, *args):
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            # A rank whose peer failed may wait in a collective for ever.
            if not pipe.poll(5 if errors else TIMEOUT_S):
                errors.append(f"rank {rank} did not answer")
                continue
            try:
                good, answer = pipe.recv()
            except EOFError:
                good, answer = False, f"rank {rank} died"
            (answers if good else errors).append(answer)
        if errors:
            self.stop()
            raise RankError("\n".join(errors))
        return answers

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        context = forks()
        folder = self._folder = tempfile.mkdtemp(prefix="zlora-test-")
        for rank in range(self.count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.count, folder, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)


def _serve(rank: int, count: int, folder: str, pipe: Connection) -> None:
    os.environ |= rank_environment(rank, count, folder)
    log = os.open(Path(folder) / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    torch.set_num_threads(1)
    from pipeline.train.engine import join_ranks

    ranks = join_ranks()
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(ranks, *args)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
