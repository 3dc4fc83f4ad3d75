"""One rank as a process: library output to its log, one clear error, the right exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.cluster.failures import DIVERGED, JOB_ERROR, report_failure, to_go_on
from pipeline.cluster.launch import die_with_parent, report_start
from pipeline.cluster.stop import STOPPED, StopRequest
from pipeline.cluster.watchdog import ENDED, RANK_FAILED, Watchdog
from pipeline.job.errors import Diverged, JobError, Stopped, of_system
from pipeline.runs.folder import LOGS, Hold
from pipeline.screen import Screen, take_terminal

if TYPE_CHECKING:
    from pipeline.job.spec import Train
    from pipeline.train.engine import Ranks

_LEASE_S = 120.0
"""For which a file server may hold the lock of a machine that died: NFS waits 90 s."""


def as_rank(
    run: Path | None,
    body: Callable[[Ranks, Screen], dict[str, Any] | None],
    as_json: bool = False,
    training: Train | None = None,
    patience_s: float = 1800.0,
) -> NoReturn:
    """Runs `body` as one rank of many and ends the process.

    Args:
        run: the run folder, for the logs; None: nothing is written.
        as_json: the body's answer, if it has one, is printed as one JSON object on standard output, all else on standard error.
        training: the body trains: the run folder is held, signals are requests to stop, the watchdog watches.
        patience_s: with the other ranks, where it does not train.
    """
    die_with_parent()
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    out, terminal, code, watch = sys.stdout, sys.stderr, 0, Watchdog(rank)

    def fail(message: str, exit_code: int, echo: bool = False) -> int:
        report_failure(message, exit_code, terminal, echo)
        return exit_code

    def stop_at_once(name: str) -> None:
        if rank == 0:
            fail(f"Stopped by {name} before the first step; nothing is lost.{to_go_on('Run again to continue.')}", STOPPED)
        os._exit(STOPPED)

    def hung(report: str) -> None:
        os._exit(fail(f"{report}{to_go_on('Run again to continue from the last state.')}", RANK_FAILED))

    stop = StopRequest()
    if training is None:
        # By way of an exception, so that a half-written file is removed on the way out.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    else:
        stop.listen(training.stop_signals, stop_at_once)

    try:
        # First of all, and for the life of the process: nobody else's files are touched without it.
        hold = Hold(run, _LEASE_S) if training and run and rank == 0 else None
        out, terminal = take_terminal(run / LOGS if run else None, rank)
        # Only now: libraries print while they are imported.
        from pipeline.train.engine import join_ranks, leave_ranks

        watch.at("waiting for the other ranks")
        if training and run:
            watch.start(run / LOGS, count, training.timeout_s, hung)
        ranks = join_ranks(training.timeout_s if training else patience_s, stop, watch)
        if ranks.first:
            report_start()
        screen = Screen(terminal if as_json else out, shown=ranks.first, out=out)
        if hold and not hold.shared:
            screen.print(f"{run}: this file system knows no locks, so nothing keeps a second training away from this folder.")
        answer = body(ranks, screen)
        if as_json and answer is not None:
            screen.say(answer)
        watch.at("done")
        leave_ranks()
    except JobError as error:
        code = JOB_ERROR
        if rank == 0 or not error.everywhere:
            fail(f"error: {error}", code)
    except (Diverged, Stopped) as error:
        # All ranks raise it together; one says so.
        diverged = isinstance(error, Diverged)
        code = DIVERGED if diverged else STOPPED
        if rank == 0:
            fail(f"diverged: {error}" if diverged else str(error), code)
    except SystemExit as request:
        code = int(request.code or 0)
    except Exception as error:
        code = _unforeseen(error, run, rank, watch, fail)
    if code:
        watch.at(f"{ENDED}{code}")
    watch.stop()
    for stream in (out, terminal, sys.stdout, sys.stderr):
        stream.flush()
    # Not sys.exit: after a failure the other ranks may wait in a collective, and the interpreter's clean-up would wait with them.
    os._exit(code)


def _unforeseen(error: Exception, run: Path | None, rank: int, watch: Watchdog, fail: Callable[..., int]) -> int:
    """What the system refuses, a lost peer, or our bug: the person gets it in a line or two, the log has it whole."""
    if isinstance(error, OSError) and (text := of_system(error)):
        return fail(f"error: {text}", JOB_ERROR)
    traceback.print_exc()
    whole = f"more is in {run / LOGS / f'rank{rank}.txt'}" if run else traceback.format_exc()
    from pipeline.train.engine import lost_peer

    if lost_peer(error):
        reason, again = (str(error).splitlines() or [repr(error)])[0].rstrip("."), to_go_on("Run again to continue.")
        return fail(f"rank {rank} lost the other ranks ({watch.place}): {reason}.{again}\n{whole}", RANK_FAILED, True)
    return fail(f"rank {rank} failed: {error!r}\nThis is a fault of zlora's; {whole}", 1)
