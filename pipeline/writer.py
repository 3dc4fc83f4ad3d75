"""All that training leaves in its run folder, written by the first rank: steps, scores, states, the delta, the result."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from pipeline.evaluate.score import Scores, write_predictions
from pipeline.job.errors import JobError
from pipeline.job.read import job_digest, job_toml
from pipeline.methods.files import store
from pipeline.report import markdown
from pipeline.resume import Start
from pipeline.run_folder import clear
from pipeline.session import Session
from pipeline.train.board import Board
from pipeline.train.environment import environment
from pipeline.train.loop import Course, Taken
from pipeline.train.saver import Saver
from pipeline.train.step import Stepper
from pipeline.weights.atomic import write_json, write_text
from pipeline.weights.digest import base_digest
from pipeline.weights.state import DataFile, Progress, Record, State, tidy, write_state

_BASE_PATIENCE_S = 10.0


class Writer:
    """Open for one sitting. On all ranks but the first it only keeps step with it.

    Args:
        state: that the run goes on from.
    """

    def __init__(
        self, session: Session, run: Path, course: Course, data: tuple[DataFile, ...], stepper: Stepper, start: Start, state: State | None
    ) -> None:
        self._session, self._run, self._course, self._data, self._stepper = session, run, course, data, stepper
        self._base_digest = state.record.base_digest if state else None
        self._stated = start.progress.step if start.from_state else None
        self._saved = self._stated if start.delta_written else None
        self._rate = state.record.learning_rate if state else 0.0
        self._saver = Saver()
        self._board: Board | None = None
        if session.ranks.first:
            self._check_base(_BASE_PATIENCE_S)
            self._open(start)

    def _open(self, start: Start) -> None:
        job, ranks = self._session.job, self._session.ranks
        if not start.goes_on:
            clear(self._run)
        tidy(self._run / "state", start.progress.step)
        for path in self._run.glob(".delta.*"):
            shutil.rmtree(path)
        (self._run / "result.json").unlink(missing_ok=True)
        write_json(self._run / "environment.json", environment(ranks.count, ranks.device))
        write_text(self._run / "job.toml", job_toml(job))
        self._board = Board(self._run, start.progress.step)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._saver.finish()
        except Exception:
            # What went wrong first is the news.
            if error is None:
                raise
        finally:
            if self._board:
                self._board.close()

    def took(self, taken: Taken) -> None:
        """Writes a step down."""
        self._rate = taken.values["learning_rate"]
        if self._board:
            self._check_base(0.0)
            self._saver.check()
            self._board.step(taken.progress.step, taken.values)

    def scored(self, step: int, scores: Scores) -> None:
        """Writes scores, samples and predictions down."""
        if self._board:
            self._board.evaluation(step, scores.split, scores.metrics, markdown(scores))
            write_predictions(self._run / "predictions" / f"{scores.split}-{step:06d}.jsonl", scores.predictions)

    def save(self, progress: Progress) -> None:
        """Takes a copy of what is trained and writes it as state and delta, behind training."""
        if self._board is None or self._saved == progress.step:
            return
        watch, board = self._session.ranks.watch, self._board
        watch.at("saving")
        start = time.perf_counter()
        self._saver.finish()
        waited_s = time.perf_counter() - start
        tensors, rate = self._stepper.capture(), self._rate
        self._saver.start(lambda: self._write(progress, tensors, rate, board))
        self._saved = progress.step
        board.saved(progress.step, time.perf_counter() - start, waited_s)

    def settle(self) -> None:
        """All ranks leave together when what was saved is on disk."""
        watch = self._session.ranks.watch
        watch.at("writing the last state" if self._board else "waiting for the first rank to write the last state")
        self._saver.finish()
        dist.barrier()

    def conclude(self) -> dict[str, Any]:
        """Ends a finished run: the content of `result.json`, on the first rank."""
        self.settle()
        if self._board is None:
            return {}
        job, board = self._session.job, self._board
        result = {
            "schema_version": 1,
            "job_digest": job_digest(job),
            "steps": self._course.steps,
            **{key: board.last.get(key) for key in ("loss", "skipped_steps", "peak_memory_bytes")},
            "seconds": board.last.get("seconds"),
        }
        for (step, split), metrics in board.evaluated.items():
            if step == self._course.steps:
                result[split] = metrics
        board.text("job", f"```toml\n{job_toml(job)}```")
        write_json(self._run / "result.json", result)
        return result

    def _write(self, progress: Progress, tensors: dict[str, torch.Tensor], rate: float, board: Board) -> None:
        session, job = self._session, self._session.job
        assert session.digests is not None, "only the first rank writes"
        digests, values = session.digests.result(), {n.removeprefix("weight/"): t for n, t in tensors.items() if n.startswith("weight/")}
        self._check_base(None)
        board.sync()
        if progress.step != self._stated:
            record = Record(
                progress=progress,
                total_steps=self._course.steps,
                learning_rate=rate,
                seed=job.train.seed,
                ranks=session.ranks.count,
                job=job.model_dump(mode="json"),
                job_digest=job_digest(job),
                base_digest=base_digest(digests),
                data=self._data,
            )
            write_state(self._run / "state", State(record, tensors), job.train.keep_states)
            self._stated = progress.step
        store(
            session.delta,
            values,
            self._run / "delta",
            job.methods[0],
            job.base.model,
            digests,
            session.base.tensors,
            job_digest(job),
            progress.step,
        )

    def _check_base(self, patience_s: float | None) -> None:
        """A base is hashed beside the first steps; one that is not the run's stops it before anything is saved."""
        if self._base_digest is None or self._session.digests is None:
            return
        try:
            found = base_digest(self._session.digests.result(patience_s))
        except NotYet:
            return
        if found != self._base_digest:
            raise JobError(
                f"{self._session.job.base.model}: is another base than the run's: its digest is {found[:12]}..., "
                f"the run's {self._base_digest[:12]}.... Put the base back, or use --run for another folder."
            )
        self._base_digest = None
