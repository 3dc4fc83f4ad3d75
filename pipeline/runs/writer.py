"""All that training leaves in its run folder, written by the first rank: steps, scores, states, the delta, the result."""

from __future__ import annotations

import time
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from pipeline.evaluate.best import SCORE, BestDelta
from pipeline.evaluate.score import Scores, write_predictions
from pipeline.job.errors import JobError
from pipeline.job.metrics import names_of
from pipeline.job.read import job_digest, job_toml
from pipeline.methods.files import store
from pipeline.methods.spectrum import singular_values
from pipeline.runs.folder import clear, remove, remove_halves
from pipeline.runs.outlook import Outlook
from pipeline.runs.report import comparable, markdown
from pipeline.runs.resume import Start
from pipeline.runs.session import Session
from pipeline.tasks.open import prompt_form
from pipeline.train.board import Board
from pipeline.train.engine import first_rank_alone
from pipeline.train.environment import environment
from pipeline.train.loop import Course, Taken
from pipeline.train.saver import Saver
from pipeline.train.step import Stepper
from pipeline.weights.atomic import write_json, write_text
from pipeline.weights.digest import base_digest
from pipeline.weights.record import DataFile
from pipeline.weights.state import Best, Progress, Record, State, tidy, write_state

_BASE_PATIENCE_S = 10.0


class Writer:
    """Open for one sitting. On all ranks but the first it only keeps step with it.

    Args:
        best: as the state has it.

    Raises:
        JobError: the base is not the one that the run began with.
    """

    def __init__(
        self, session: Session, run: Path, course: Course, data: tuple[DataFile, ...], stepper: Stepper, start: Start, best: BestDelta
    ) -> None:
        self._session, self._run, self._course, self._data, self._stepper = session, run, course, data, stepper
        self._expected_base = start.record.base_digest if start.record else None
        self._rate = start.record.learning_rate if start.record else 0.0
        # The steps whose state and delta are on disk, or on their way.
        self._state_step = start.record.progress.step if start.record else None
        self._delta_step = self._state_step if start.delta_written else None
        self._best, self._best_step = best, -1
        self._checked, self._bad = False, start.progress.bad_steps > 0
        self._saver = Saver()
        self._board: Board | None = None
        found = environment(session.ranks)
        if session.ranks.first:
            self._check_base(_BASE_PATIENCE_S)
            self._outlook = Outlook(session, course)
            self._board = self._open(start, found)
        if start.scores is not None:
            # Ended after these scores were written down, and before anything that follows from them.
            self._take(start.progress.step, start.scores)

    def _open(self, start: Start, found: dict[str, Any]) -> Board:
        job = self._session.job
        if not start.goes_on:
            clear(self._run)
        remove_halves(self._run)
        tidy(self._run / "state", start.progress.step)
        (self._run / "result.json").unlink(missing_ok=True)
        if self._best.best is None or self._best.best.step is None:
            remove(self._run / "best")
        write_json(self._run / "environment.json", found)
        write_text(self._run / "job.toml", job_toml(job))
        if choice := self._session.choice:
            write_json(self._run / "deepspeed.json", {"schema_version": 1, "config": choice.config, "reasons": choice.reasons})
        board, step = Board(self._run, start.progress.step), start.progress.step
        board.text("job", f"```toml\n{job_toml(job)}```", step)
        board.text("plan", self._outlook.text, step)
        board.settings(comparable(job), job.evaluate.split, names_of(job.task))
        return board

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
        self._rate, self._bad = taken.values["learning_rate"], taken.bad
        if self._board:
            self._check_base(0.0)
            self._saver.check()
            self._board.step(taken.progress.step, taken.values)
            self._warn(taken.progress.step, self._outlook.took(taken))

    def scored(self, step: int, scores: Scores) -> None:
        """Writes scores, samples and predictions down."""
        if self._board:
            self._board.evaluation(step, scores.split, scores.metrics, markdown(scores))
            write_predictions(self._run / "predictions" / f"{scores.split}-{step:06d}.jsonl", scores)
            self._board.singular_values(step, singular_values(self._session.delta.adapted, self._session.delta.tensors()))
            self._warn(step, self._outlook.scored(scores))
        # A bad step changed nothing, and the state that may be saved now is of the one before it.
        if not self._bad:
            self._take(step, dict(scores.metrics))

    def _warn(self, step: int, lines: list[str]) -> None:
        for line in lines:
            assert self._board is not None, "only the first rank warns"
            self._board.warning(step, line)
            self._session.screen.print(f"step {step:,}: {line}")

    @property
    def patience_is_over(self) -> bool:
        """The same on every rank."""
        return self._best.patience_is_over

    def _take(self, step: int, metrics: dict[str, float | None]) -> None:
        self._best.take(step, metrics, self._stepper.capture_weights)
        if self._board and self._best.best and self._best.best.step == step:
            best, weights = self._best.best, self._best.weights
            self._saver.start(lambda: self._write_best(best, weights))

    def save(self, progress: Progress) -> None:
        """Takes a copy of what is trained and writes it as state and delta, behind training.

        A delta names its base by digest. While the base is still being hashed, the state alone is written.
        """
        if self._state_step == progress.step:
            return
        self._state_step = progress.step
        board, rate = self._board, self._rate
        self._session.ranks.watch.at("saving")
        start = time.perf_counter()
        self._saver.finish()
        waited_s = time.perf_counter() - start
        tensors, best, weights = self._stepper.capture(), self._best.best, self._best.weights
        if board is None:
            return
        kept = self._best.tensors()
        self._saver.start(lambda: self._write(progress, tensors | kept, rate, board, best, weights))
        board.saved(progress.step, time.perf_counter() - start, waited_s)

    def settle(self) -> None:
        """All ranks leave together when what was saved is on disk."""
        watch = self._session.ranks.watch
        watch.at("writing the last state" if self._board else "waiting for the first rank to write the last state")
        self._saver.finish()
        dist.barrier()

    def conclude(self, steps: int) -> dict[str, Any]:
        """Ends a finished run: the content of `result.json`, on the first rank.

        Args:
            steps: that were taken.
        """
        # A large base on a slow disk may still be being hashed.
        ranks = self._session.ranks
        ranks.watch.at("writing the delta", patient=True)
        first_rank_alone(ranks, "base hashed", self._await_base)
        if ranks.any(ranks.first and self._delta_step != steps)[0]:
            weights = self._stepper.capture_weights()
            first_rank_alone(ranks, "delta written", lambda: self._write_delta(steps, weights, self._digests()))
        first_rank_alone(ranks, "best written", lambda: self._write_best(self._best.best, self._best.weights))
        if self._board is None:
            return {}
        job, board, best = self._session.job, self._board, self._best.best
        result = {"schema_version": 1, "job_digest": job_digest(job), "steps": steps, "stopped_early": steps < self._course.steps}
        result |= board.last_values()
        if best:
            result["best"] = None if best.step is None else _score(best)
        result |= {split: metrics for (step, split), metrics in board.evaluated.items() if step == steps}
        write_json(self._run / "result.json", result)
        return result

    def _await_base(self) -> None:
        self._saver.finish()
        self._digests()

    def _digests(self) -> dict[str, str]:
        assert self._session.digests is not None, "only the first rank writes"
        return self._session.digests.result()

    def _write(
        self,
        progress: Progress,
        tensors: dict[str, torch.Tensor],
        rate: float,
        board: Board,
        best: Best | None,
        weights: dict[str, torch.Tensor],
    ) -> None:
        session, job = self._session, self._session.job
        assert session.digests is not None, "only the first rank writes"
        self._check_base(0.0)
        digests = self._digests() if session.digests.done() else None
        board.sync()
        record = Record(
            progress=progress,
            total_steps=self._course.steps,
            learning_rate=rate,
            seed=job.train.seed,
            ranks=session.ranks.count,
            job=job.model_dump(mode="json"),
            job_digest=job_digest(job),
            base_digest=base_digest(digests) if digests else self._expected_base,
            base_config=session.base_config,
            data=self._data,
            best=best,
        )
        write_state(self._run / "state", State(record, tensors), job.train.keep_states)
        masters = {name.removeprefix("weight/"): tensor for name, tensor in tensors.items() if name.startswith("weight/")}
        board.singular_values(progress.step, singular_values(session.delta.adapted, masters))
        if digests:
            self._write_delta(progress.step, masters, digests)
        self._write_best(best, weights)

    def _write_delta(self, step: int, values: dict[str, torch.Tensor], digests: dict[str, str]) -> None:
        self._store(self._run / "delta", step, values, digests, {})
        self._delta_step = step

    def _write_best(self, best: Best | None, weights: dict[str, torch.Tensor]) -> None:
        """Once the base is hashed, which a delta names; until then the state has it. Again in every sitting: it may be of another."""
        digests = self._session.digests
        if best is None or best.step is None or best.step == self._best_step or digests is None or not digests.done():
            return
        self._check_base(0.0)
        self._store(self._run / "best", best.step, weights, digests.result(), {SCORE: {"schema_version": 1, **_score(best)}})
        self._best_step = best.step

    def _store(self, folder: Path, step: int, values: dict[str, torch.Tensor], digests: dict[str, str], beside: dict[str, Any]) -> None:
        session, job = self._session, self._session.job
        prompt = prompt_form(job.task, session.tokens.end_text)
        store(session.delta, values, folder, job.base, digests, session.base, job_digest(job), step, prompt, beside)

    def _check_base(self, patience_s: float) -> None:
        """A base is hashed beside the first steps; one that is not the run's stops it before anything is saved."""
        if self._checked or self._expected_base is None or self._session.digests is None:
            return
        try:
            found = base_digest(self._session.digests.result(patience_s))
        except NotYet:
            return
        if found != self._expected_base:
            raise JobError(
                f"{self._session.job.base.model}: is another base than the run's: its digest is {found[:12]}..., "
                f"the run's {self._expected_base[:12]}.... Put the base back, or use --run for another folder."
            )
        self._checked = True


def _score(best: Best) -> dict[str, Any]:
    return best.model_dump(include={"metric", "split", "step", "value"})
