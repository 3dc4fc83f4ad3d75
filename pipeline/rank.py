"""One rank as a process: library output to its log, one clear error, the right exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline.cluster.launch import die_with_parent, report_failure, report_start
from pipeline.job.errors import Diverged, JobError
from pipeline.screen import Screen, take_terminal
from pipeline.train.engine import Ranks, join_ranks, leave_ranks


def as_rank(run: Path, body: Callable[[Ranks, Screen], dict[str, Any] | None], as_json: bool = False) -> NoReturn:
    """Runs `body` as one rank of many and ends the process.

    Args:
        run: the run folder, for the logs.
        as_json: the body's answer is printed as one JSON object on standard output, all else on standard error.
    """
    die_with_parent()
    rank = int(os.environ["RANK"])
    out, error_stream = take_terminal(run / "logs", rank)
    code = 0
    try:
        ranks = join_ranks()
        if ranks.first:
            report_start()
        answer = body(ranks, Screen(error_stream if as_json else out, shown=ranks.first))
        if as_json and ranks.first:
            print(json.dumps(answer), file=out)
        leave_ranks()
    except JobError as error:
        code = 2
        report_failure(f"error: {error}", code, error_stream)
    except Diverged as error:
        code = 4
        report_failure(f"diverged: {error}", code, error_stream)
    except Exception as error:  # our bug, whatever it is: the person gets it once, the log has it whole
        code = 1
        traceback.print_exc()
        log = run / "logs" / f"rank{rank}.txt"
        report_failure(f"rank {rank} failed: {error!r}\nThis is a fault of zlora's; the whole story is in {log}", code, error_stream)
    for stream in (out, error_stream, sys.stdout, sys.stderr):
        stream.flush()
    # Not sys.exit: after a failure the other ranks may wait in a collective, and the interpreter's clean-up would wait with them.
    os._exit(code)
