"""`zlora profile`: a few real steps of a job on these ranks -> a report for programs, tables, a picture, a trace.

Nothing is trained to be kept: the delta ends with the process.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from pipeline.job.spec import Job
from pipeline.model.build import TORCH_DTYPES
from pipeline.profile.board import write_board
from pipeline.profile.measure import FIRST, LOOKS, Measured, measure
from pipeline.profile.picture import draw
from pipeline.profile.rate import matrix_flops_s
from pipeline.profile.report import of_rank, report_of
from pipeline.profile.show import show_profile
from pipeline.profile.stopwatch import Places
from pipeline.runs.session import open_session
from pipeline.screen import Screen
from pipeline.train.engine import Ranks
from pipeline.train.environment import environment
from pipeline.train.loop import Course
from pipeline.weights.atomic import new_folder, write_json

FOLDER, REPORT, PICTURE, TRACE = "profile", "profile.json", "profile.png", "trace.json.gz"


def profile(job: Job, run: Path, ranks: Ranks, screen: Screen, steps: int) -> dict[str, Any]:
    """Takes the steps and writes report, picture, trace and TensorBoard's events into `profile/` of the run folder.

    Args:
        steps: as they are, and so many more by the clock.

    Returns:
        The report, on the first rank.
    """
    places, started_s = Places(ranks.rank), time.time() - psutil.Process().create_time()
    ranks = replace(ranks, watch=places)
    session = open_session(job, ranks, screen)
    data = session.training_set()
    count = FIRST + 2 * steps + LOOKS
    course = Course(data.sequences, data.stream, session.train.model_copy(update={"steps": count, "epochs": None}))
    course.refuse_impossible()
    rate = matrix_flops_s(ranks.device, TORCH_DTYPES[job.base.dtype])
    with new_folder(run / FOLDER, replace=True) if ranks.first else nullcontext() as folder:
        measuring = measure(session, course, places, steps, folder / TRACE if folder else None)
        *_, found = screen.named("profiling", measuring, count + 1)
        assert isinstance(found, Measured)
        everyone: list[Any] = [None] * ranks.count
        dist.all_gather_object(everyone, of_rank(found, ranks, rate))
        where = environment(ranks)
        if folder is None:
            return {}
        report = report_of(session, course, {"starting the process": started_s, **places.seconds}, found, everyone, where)
        write_json(folder / REPORT, report)
        draw(report, folder / PICTURE)
        write_board(report, folder / PICTURE, folder)
    show_profile(screen, report, run / FOLDER)
    return report
