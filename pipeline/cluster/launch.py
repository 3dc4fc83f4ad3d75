"""Starts the ranks of one machine, watches them, and shows the one error that matters. No torch.

A rank is this same program with RANK set; under torchrun or srun the ranks are already there and nothing is started.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from pipeline.cluster.failures import DIVERGED, REPORTS, Failure, cause, report_failure, reported, to_go_on
from pipeline.cluster.stop import STOPPED
from pipeline.cluster.watchdog import RANK_FAILED
from pipeline.job.errors import JobError

PROGRAM = "import sys; sys.path[:] = [p for p in sys.path if p]; from pipeline.cli import main; main()"
"""This program, whatever folder it starts in: `python -m` would look for `pipeline` in the current folder first."""
CPU_RANK = {"DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""Gathered weights are allocated and freed all the time. So glibc keeps them, up to the second size, instead of returning each to the
system and asking for it again: a step of a GPT-2 of 124M takes a fifth less time and a third more memory. It looks at this when a
process starts, so ranks that a batch script starts need it from there."""
_RETURNING_BYTES = 1 << 22
"""As the first of them: what is freed is returned at once."""
_FOLDER = "ZLORA_LAUNCH"
_MEETING = "ZLORA_RENDEZVOUS"
_LAUNCHER = "ZLORA_LAUNCHER_PID"
_STARTED = "started"
_POLL_S = 0.1
_GRACE_S = 3.0
_BOUNCE_S = 1.0
"""Two Ctrl-C closer together are one."""
_LEAVING = (STOPPED, DIVERGED)
_LEAVE_S = 30.0
"""Ranks that end so leave together when everything is saved, but for the time it takes to end a process."""
Conversation = Callable[["subprocess.Popen[bytes]", Callable[[], bool]], None]
"""Is handed the first rank, and a function that says whether all ranks are alive."""
_TOGETHER_S = 0.5
"""Ranks that die this close together: one of them pulled the others down."""


def inside_ranks() -> bool:
    """Whether this process is a rank already. Slurm's variables are translated into torchrun's.

    Raises:
        JobError: only some of a rank's variables are set.
    """
    if "RANK" in os.environ:
        needed = {"WORLD_SIZE", "LOCAL_RANK"} | (set() if _MEETING in os.environ else {"MASTER_ADDR", "MASTER_PORT"})
        if missing := sorted(needed - set(os.environ)):
            raise JobError(f"RANK is set but {', '.join(missing)} is not. Set all that torchrun sets, or unset RANK.")
        return True
    # SLURM_STEP_NUM_TASKS is set by srun only, not for the batch script itself.
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return False
    # Jobs on one node must not meet on one port; ports below 32768 are not handed out to outgoing connections.
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=_local_tasks(os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ["SLURM_NODEID"])),
        MASTER_ADDR=os.environ.get("MASTER_ADDR") or _first_host(os.environ["SLURM_STEP_NODELIST"]),
        MASTER_PORT=os.environ.get("MASTER_PORT", str(port)),
    )
    for name, value in _defaults(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")), visible_gpus()).items():
        os.environ.setdefault(name, value)
    return True


def _local_tasks(tasks: str, node: int) -> str:
    """Of the node of that number, in Slurm's list of all nodes' tasks, such as `8(x2),4`."""
    counts: list[str] = []
    for part in tasks.split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[node]


def _first_host(nodes: str) -> str:
    try:
        return subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise JobError(
            f'SLURM_STEP_NODELIST = "{nodes}": scontrol does not say which hosts these are ({error}). '
            "Set MASTER_ADDR to the first of them in the batch script."
        ) from None


def visible_gpus() -> int:
    """GPUs that this machine offers, without importing torch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([part for part in chosen.split(",") if part.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def returns_at_once() -> bool:
    """Whether glibc hands this CPU rank's freed tensors back to the system."""
    # The user may have set anything; glibc passes over what is no number.
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    return threshold.isdecimal() and int(threshold) <= _RETURNING_BYTES


def batch_job() -> str | None:
    """What started this process, where it starts the same command again after a failure."""
    for system, name in (("slurm", "SLURM_JOB_ID"), ("torchrun", "TORCHELASTIC_RUN_ID")):
        if os.environ.get(name):
            return f"{system} {os.environ[name]}"
    return None


def restarted() -> bool:
    """Whether it did so."""
    return any(int(os.environ.get(name, "0") or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def launch(arguments: list[str], ranks: int | None, stop_signals: tuple[str, ...] | None = None, talk: Conversation | None = None) -> int:
    """Runs `zlora ARGUMENTS` on several ranks of this machine and waits for them.

    Args:
        ranks: how many; None: one for each GPU, else one.
        stop_signals: requests that the ranks answer by saving and ending in their own time, as they do Ctrl-C and a closed terminal.
            None: Ctrl-C ends them at once.
        talk: runs between the ranks' start and their end; the first rank's standard input and output are its pipes.

    Returns:
        The exit code for the shell: 0, or that of the rank that failed first (76 where a signal ended it).
    """
    gpus = visible_gpus()
    count = ranks or gpus or 1
    if gpus and count > gpus:
        raise JobError(f"--ranks {count}: this machine shows {gpus} GPUs. Use at most {gpus}, or CUDA_VISIBLE_DEVICES= for the CPU.")
    folder = Path(tempfile.mkdtemp(prefix="zlora-"))
    children: list[subprocess.Popen[bytes]] = []
    try:
        # A rank starts with the requests held back, so that none ends it before it is able to answer.
        requests = [] if stop_signals is None else [signal.Signals[name] for name in {*stop_signals, "SIGINT"}]
        held = signal.pthread_sigmask(signal.SIG_BLOCK, requests)
        for rank in range(count):
            command = [sys.executable, "-c", PROGRAM, *arguments]
            environment = rank_environment(rank, count, folder, gpus)
            # A session of its own: Ctrl-C is for the launcher, which ends the ranks in good order.
            stdin, stdout = (subprocess.PIPE, subprocess.PIPE) if talk and rank == 0 else (subprocess.DEVNULL, None)
            children.append(subprocess.Popen(command, env=environment, stdin=stdin, stdout=stdout, bufsize=0, start_new_session=True))
        if stop_signals is not None:
            _pass_on(stop_signals, children)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        with Console(stderr=True).status(f"starting {count} rank{'s'[: count > 1]}"):
            while not (folder / _STARTED).exists() and all(child.poll() is None for child in children):
                time.sleep(_POLL_S)
        if talk:
            talk(children[0], lambda: all(child.poll() is None for child in children))
        return _watch(children, folder, training=stop_signals is not None)
    except KeyboardInterrupt:
        print(f"\nStopped at once.{' What was saved is in the run folder.' * (stop_signals is not None)}", file=sys.stderr)
        return 130
    finally:
        _end(children)
        shutil.rmtree(folder, ignore_errors=True)


def _pass_on(names: tuple[str, ...], children: list[subprocess.Popen[bytes]]) -> None:
    """From now on, requests to stop go to the ranks. A second Ctrl-C ends them at once."""
    first = 0.0

    def on_signal(number: int, _: object) -> None:
        nonlocal first
        if number == signal.SIGINT:
            if first and time.monotonic() - first > _BOUNCE_S:
                raise KeyboardInterrupt
            if not first:
                first = time.monotonic()
                print("\nStopping after this step, and saving. Ctrl-C once more: at once, back to the last state.", file=sys.stderr)
        for child in children:
            if child.poll() is None:
                child.send_signal(number if signal.Signals(number).name in names else signal.SIGINT)

    for name in {*names, "SIGINT", "SIGHUP"}:
        if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN:  # nohup's
            signal.signal(signal.Signals[name], on_signal)


def die_with_parent() -> None:
    """Has the kernel end this rank when its launcher is gone, however that ended (Linux)."""
    if _LAUNCHER in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
        # The kernel tells of deaths from now on only; this rank took seconds to come up.
        if os.getppid() != int(os.environ[_LAUNCHER]):
            os._exit(RANK_FAILED)


def started_here() -> bool:
    """Whether this rank was started by `launch`, rather than by torchrun or srun."""
    return _FOLDER in os.environ


def report_start() -> None:
    """Tells the launcher that a rank is up and about to write on the terminal."""
    if folder := os.environ.get(_FOLDER):
        (Path(folder) / _STARTED).touch()
        time.sleep(2 * _POLL_S)


def rank_environment(rank: int, count: int, folder: Path, gpus: int) -> dict[str, str]:
    """What a rank of this machine is started with; what the user has set stays."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        _MEETING: f"file://{folder}/rendezvous",
        "ZLORA_GPUS": str(gpus),
        _FOLDER: str(folder),
        REPORTS: str(folder),
        _LAUNCHER: str(os.getpid()),
    }
    return {**_defaults(len(os.sched_getaffinity(0)) // count, gpus), **environment}


def _defaults(cores: int, gpus: int) -> dict[str, str]:
    return {
        **({} if gpus else CPU_RANK),
        "OMP_NUM_THREADS": str(max(1, cores)),
        # Threads that spin while they wait make a step ten times slower as soon as anything else wants a core.
        "OMP_WAIT_POLICY": "PASSIVE",
        # One process of a machine tokenises while the others wait for it.
        "TOKENIZERS_PARALLELISM": "true",
    }


def _watch(children: list[subprocess.Popen[bytes]], folder: Path, training: bool) -> int:
    """Waits until every rank has ended, or one has failed."""
    deadline = None
    while None in (codes := [child.poll() for child in children]):
        if any(code not in (None, 0, *_LEAVING) for code in codes):
            time.sleep(_TOGETHER_S)
            break
        if any(code in _LEAVING for code in codes):
            if deadline is None:
                deadline = time.monotonic() + _LEAVE_S
                # One that was asked while they started has left; the others wait for it, unless they are asked too.
                for child in children:
                    if training and STOPPED in codes and child.poll() is None:
                        child.send_signal(signal.SIGINT)
            if time.monotonic() > deadline:
                break
        time.sleep(_POLL_S)
    if not any(codes):
        return 0
    failure = _first_failure([child.poll() for child in children], folder)
    report_failure(failure.message, failure.exit_code, sys.stderr)
    return failure.exit_code


def _first_failure(codes: list[int | None], folder: Path) -> Failure:
    """What the ranks' exit codes and their own words come to."""
    failures, told = [], reported(folder)
    for rank, code in enumerate(codes):
        if rank in told:
            failures.append(told[rank])
        elif code == STOPPED:
            failures.append(Failure(rank, code, f"Rank {rank} was asked to stop.{to_go_on('Run again to continue.')}", time.time()))
        elif code and code < 0:
            name = signal.Signals(-code).name
            hint = " Out of memory is the usual cause." if name == "SIGKILL" else ""
            failures.append(Failure(rank, RANK_FAILED, f"rank {rank} was ended by {name}.{hint}", 0.0))
        elif code:
            failures.append(Failure(rank, code, f"rank {rank} ended with exit code {code} and said nothing.", time.time()))
    return cause(failures)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + _GRACE_S
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
