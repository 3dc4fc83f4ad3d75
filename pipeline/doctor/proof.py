"""The proof: ranks of this machine train a tiny base for three steps under ZeRO-3, as `zlora train` would. No torch in this process."""

from __future__ import annotations

import io
import json
import math
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass

from pipeline.cluster.launch import launch
from pipeline.doctor.finding import Finding, Group
from pipeline.screen import size_text

_GROUP: Group = "Proof"
_LONGEST_S = 180.0
_HIDE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Proof:
    """What `take_steps` found, or why it came to nothing."""

    ranks: int
    on: str
    """"GPU" or "CPU"."""
    failed: str = ""
    device: str = ""
    dtype: str = ""
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    apart: float = 0.0
    """Largest difference between two ranks' trained tensors."""
    load_s: float = 0.0
    step_s: float = 0.0
    memory_bytes: int = 0
    """Of the first rank, at most."""


def grounds(usable_gpus: int) -> list[tuple[int, str]]:
    """How many ranks on what: two on GPUs if there are two; with fewer, two on the CPU, and one on the GPU that there is."""
    if usable_gpus >= 2:
        return [(2, "GPU")]
    return [*([(1, "GPU")] if usable_gpus else []), (2, "CPU")]


def prove(ranks: int, on: str) -> Proof:
    """Starts the ranks and hears what they have to say."""
    heard: list[str] = []

    def hear(first: subprocess.Popen[bytes], alive: Callable[[], bool]) -> None:
        heard.append(_all_of(first, alive))

    told = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="zlora-doctor-") as folder, _gpus_hidden(on == "CPU"), redirect_stderr(told):
        try:
            code = launch(["doctor", "--run", folder], ranks, talk=hear)
        except TimeoutError as error:
            return Proof(ranks, on, str(error))
    if code == 130:
        raise KeyboardInterrupt
    if code:
        return Proof(ranks, on, _cause(told.getvalue()) or f"exit code {code}")
    facts = json.loads(heard[0].splitlines()[-1])
    return Proof(**{**facts, "on": on, "losses": _numbers(facts["losses"]), "grad_norms": _numbers(facts["grad_norms"])})


def _numbers(values: list[float | None]) -> tuple[float, ...]:
    """JSON has no NaN."""
    return tuple(math.nan if value is None else value for value in values)


def _cause(text: str) -> str:
    """The line that says why: of a traceback its last one."""
    lines = [line for line in text.splitlines() if line.strip() and "Traceback" not in line]
    return (lines[-1] if "Traceback" in text else lines[0]).removeprefix("error: ").strip() if lines else ""


def _all_of(first: subprocess.Popen[bytes], alive: Callable[[], bool]) -> str:
    """The first rank's standard output.

    Raises:
        TimeoutError: it does not come to an end.
    """
    assert first.stdout
    deadline, text = time.monotonic() + _LONGEST_S, b""
    while time.monotonic() < deadline:
        if select.select([first.stdout], [], [], 0.2)[0]:
            if not (chunk := os.read(first.stdout.fileno(), 65536)):
                return text.decode()
            text += chunk
        elif not alive():
            return text.decode()
    raise TimeoutError(f"the ranks came to no end in {_LONGEST_S:.0f} s")


@contextmanager
def _gpus_hidden(hide: bool) -> Iterator[None]:
    """From the ranks that are started in the block."""
    before = os.environ.get(_HIDE)
    if hide:
        os.environ[_HIDE] = ""
    try:
        yield
    finally:
        if before is not None:
            os.environ[_HIDE] = before
        elif hide:
            del os.environ[_HIDE]


def judge_proof(proof: Proof) -> Finding:
    """A proof is good if the loss is finite and falls, gradients are not zero, and all ranks have trained the same."""
    name = f"{proof.ranks} {proof.on} rank{'s'[: proof.ranks != 1]}"
    if proof.failed:
        return Finding(_GROUP, name, proof.failed, "problem", _repair(proof))
    first, last = proof.losses[0], proof.losses[-1]
    value = (
        f"ZeRO-3, LoRA, {proof.dtype}: loss {first:.3f} -> {last:.3f} in {len(proof.losses)} steps, "
        f"{proof.step_s * 1e3:.0f} ms a step, {size_text(proof.memory_bytes)} on the first rank"
    )
    numbers = "This chip, driver or torch build computes wrongly. Try another build (make setup TORCH=...) and another node."
    if not all(map(math.isfinite, (first, last))) or last >= first:
        return Finding(_GROUP, name, f"{value}: it does not fall", "problem", numbers)
    # Of the last step: fp16 may begin with steps whose gradients are not finite.
    if not proof.grad_norms[-1] > 0:
        return Finding(_GROUP, name, f"{value}: the gradient is zero", "problem", numbers)
    if proof.apart:
        repair = "Their all-reduce gives each another sum. On GPUs try NCCL_P2P_DISABLE=1, then tell the administrator."
        return Finding(_GROUP, name, f"{value}: the ranks differ by {proof.apart:.3g}", "problem", repair)
    return Finding(_GROUP, name, value)


def _repair(proof: Proof) -> str:
    """For the words that ranks fail with."""
    told = proof.failed.lower()
    if "shm" in told or "shared memory" in told:
        return "Enlarge /dev/shm (containers: --shm-size=1g), or set NCCL_SHM_DISABLE=1 if that cannot be."
    if "out of memory" in told or "sigkill" in told:
        return "Free memory: other processes hold it, or the batch system lets this one have too little."
    if "came to no end" in told:
        return "Ranks cannot reach each other: NCCL_DEBUG=INFO says where on GPUs; on CPU ranks try GLOO_SOCKET_IFNAME=lo."
    if "nccl" in told:
        return "NCCL_DEBUG=INFO shows NCCL's own reason; try NCCL_P2P_DISABLE=1 where a virtual machine hides how GPUs are connected."
    if "gloo" in told or "connect" in told or "resolve" in told:
        return "Put this machine's name into /etc/hosts, or set GLOO_SOCKET_IFNAME to a network interface that is up."
    return "Repair what is named above, then run zlora doctor again."
