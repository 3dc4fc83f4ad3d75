"""One rank as a process: library output to its log, one clear error, the right exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.cluster.launch import DIVERGED, JOB_ERROR, die_with_parent, report_failure, report_start
from pipeline.job.errors import Diverged, JobError, of_system
from pipeline.screen import Screen, take_terminal

if TYPE_CHECKING:
    from pipeline.train.engine import Ranks


def as_rank(run: Path, body: Callable[[Ranks, Screen], dict[str, Any] | None], as_json: bool = False) -> NoReturn:
    """Runs `body` as one rank of many and ends the process.

    Args:
        run: the run folder, for the logs.
        as_json: the body's answer is printed as one JSON object on standard output, all else on standard error.
    """
    die_with_parent()
    # By way of an exception, so that a half-written file is removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rank = int(os.environ["RANK"])
    out, terminal, code = sys.stdout, sys.stderr, 0
    try:
        out, terminal = take_terminal(run / "logs", rank)
        # Only now: libraries print while they are imported.
        from pipeline.train.engine import join_ranks, leave_ranks

        ranks = join_ranks()
        if ranks.first:
            report_start()
        answer = body(ranks, Screen(terminal if as_json else out, shown=ranks.first))
        if as_json and ranks.first:
            print(json.dumps(answer), file=out)
        leave_ranks()
    except JobError as error:
        code = JOB_ERROR
        report_failure(f"error: {error}", code, terminal)
    except Diverged as error:
        code = DIVERGED
        report_failure(f"diverged: {error}", code, terminal)
    except SystemExit as request:
        code = int(request.code or 0)
    except Exception as error:
        if isinstance(error, OSError) and (text := of_system(error)):
            code = JOB_ERROR
            report_failure(f"error: {text}", code, terminal)
        else:  # our bug, whatever it is: the person gets it once, the log has it whole
            code = 1
            traceback.print_exc()
            log = run / "logs" / f"rank{rank}.txt"
            report_failure(f"rank {rank} failed: {error!r}\nThis is a fault of zlora's; the whole story is in {log}", code, terminal)
    for stream in (out, terminal, sys.stdout, sys.stderr):
        stream.flush()
    # Not sys.exit: after a failure the other ranks may wait in a collective, and the interpreter's clean-up would wait with them.
    os._exit(code)
