"""The whole program on a page: what every rank does, one call per room, in order.

job -> base (weights, model) -> delta (methods) -> sequences (tasks) -> steps (train) -> scores (evaluate)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.evaluate.score import EvaluationSet, Scores, score, write_predictions
from pipeline.job.errors import JobError
from pipeline.job.read import job_digest, job_toml
from pipeline.job.spec import Job, Split
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import Delta, attach
from pipeline.methods.files import restore, store
from pipeline.model.build import checkpointed, read_config, require_dtype
from pipeline.model.causal import Causal
from pipeline.model.load import LoadedBase, load_base
from pipeline.report import markdown, show_end, show_scores, show_start
from pipeline.run_folder import clear, refuse_earlier
from pipeline.screen import Screen
from pipeline.tasks.example import Example, Sequence, grouped
from pipeline.tasks.open import has_split, read_examples, separator_text
from pipeline.tasks.tokens import Tokens, fit
from pipeline.train.board import Board
from pipeline.train.engine import Engine, Ranks
from pipeline.train.environment import environment
from pipeline.train.loop import Course, run_course
from pipeline.train.step import Stepper
from pipeline.weights.atomic import write_json, write_text
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.hub import local_base


@dataclass(frozen=True)
class Session:
    """What training and evaluation share: the job's model on these ranks."""

    job: Job
    ranks: Ranks
    screen: Screen
    base: LoadedBase
    digests: Future[dict[str, str]] | None
    """sha256 of the base's files, computed beside the first steps; on the first rank only."""
    tokens: Tokens
    delta: Delta
    root: Causal
    engine: Engine
    context: int
    """Positions the model has."""
    vocabulary: int

    def training_sequences(self) -> tuple[list[Sequence], int]:
        """The training split as sequences that fit, and how many were too long."""
        limit = min(self.job.train.max_tokens or self.context, self.context)
        _, sequences, too_long = self._fitted("train", limit)
        return sequences, too_long

    def evaluation(self, split: Split) -> EvaluationSet:
        """A split as it is scored: `train.max_tokens` does not bind it, and a prompt never depends on its references."""
        examples, sequences, too_long = self._fitted(split, self.context)
        prompts = grouped(examples)[: self.job.evaluate.max_prompts]
        kept = {prompt.text for prompt in prompts}
        room = max(1, self.context - self.job.evaluate.max_new_tokens)
        ids = [tokens[-room:] if len(tokens) >= self.context else tokens for tokens in self.tokens.prompts([p.text for p in prompts])]
        chosen = [s for e, s in zip(examples, sequences, strict=True) if e.prompt in kept]
        return EvaluationSet(split, prompts, ids, chosen, too_long)

    def _fitted(self, split: Split, limit: int) -> tuple[list[Example], list[Sequence], int]:
        examples = read_examples(self.job.task, split)
        sequences = self.tokens.sequences(examples, self._bar(f"tokenising {split}"))
        for example, sequence in zip(examples, sequences, strict=True):
            if max(sequence.tokens) >= self.vocabulary:
                raise JobError(
                    f"{example.source}: token {max(sequence.tokens)} is not among the model's {self.vocabulary} embeddings. "
                    "Use the tokenizer of this base."
                )
        return fit(examples, sequences, limit, self.job.task.too_long)

    def score(self, data: EvaluationSet) -> Scores:
        return score(
            self.root, self.engine, data, self.tokens, self.job.evaluate, self.job.train, self.ranks, self._bar(f"scoring {data.split}")
        )

    def _bar(self, label: str) -> Callable[[Iterable[int]], Iterable[int]]:
        return lambda items: self.screen.progress(label, items)


def train(job: Job, run: Path, ranks: Ranks, screen: Screen, fresh: bool = False) -> None:
    """Trains the job's delta into the run folder.

    Args:
        fresh: an earlier run in the folder gives way, once everything that can be wrong with the job has been checked.
    """
    if ranks.first:
        refuse_earlier(run, fresh)
    start = time.perf_counter()
    session = open_session(job, ranks, screen)
    sequences, too_long = session.training_sequences()
    course = Course(sequences, job.train)
    course.refuse_impossible()
    held_out = session.evaluation(job.evaluate.split) if has_split(job.task, job.evaluate.split) else None
    stepper = Stepper(session.engine, session.root, session.delta, job.train, fp16=job.base.dtype == "fp16")
    show_start(screen, run, job, session.base, session.delta, session.root, ranks, course, too_long)
    if held_out is None:
        screen.print(f"not scored: there is no {job.evaluate.split} split")
    if ranks.first:
        clear(run)
        write_text(run / "job.toml", job_toml(job))
        write_json(run / "environment.json", environment(ranks.count, ranks.device))
    result: dict[str, Any] = {"schema_version": 1, "steps": course.steps}
    board = Board(run) if ranks.first else None
    with screen.training(course.steps) as bar:

        def on_step(done: int, values: dict[str, float]) -> None:
            bar.update(done, values["loss"], values["tokens"] / values["step_s"])
            result.update(loss=values["loss"], skipped_steps=values["skipped_steps"], peak_memory_bytes=values["peak_memory_bytes"])
            if board:
                board.step(done, values)

        def on_save(done: int) -> None:
            if ranks.first:
                _save(session, run, done)

        def on_evaluate(done: int) -> None:
            if held_out is None:
                return
            scores = session.score(held_out)
            result[scores.split] = scores.metrics
            if board:
                board.evaluation(done, scores.split, scores.metrics, markdown(scores))
                write_predictions(run / "predictions" / f"{scores.split}-{done:06d}.jsonl", scores.predictions)
            show_scores(screen, f"{scores.split} after {done} steps" if done else f"{scores.split} before training", scores)

        if job.evaluate.at_start:
            on_evaluate(0)
        run_course(course, stepper, ranks, on_step, on_save, on_evaluate, job.evaluate.every_steps)
    result["seconds"] = time.perf_counter() - start
    if board:
        with board:
            board.text("job", f"```toml\n{job_toml(job)}```")
        write_json(run / "result.json", result)
    show_end(screen, run, job, result)


def evaluate(job: Job, run: Path, split: Split, ranks: Ranks, screen: Screen) -> dict[str, Any]:
    """Scores a run's delta on a split; writes the predictions into the run folder."""
    session = open_session(job, ranks, screen)
    digest = [base_digest(session.digests.result()) if session.digests else ""]
    dist.broadcast_object_list(digest)
    manifest = restore(session.delta, run / "delta", digest[0])
    scores = session.score(session.evaluation(split))
    file = run / "predictions" / f"{split}.jsonl"
    if ranks.first:
        write_predictions(file, scores.predictions)
    show_scores(screen, f"{split} of {run} after {manifest.step} steps", scores)
    screen.print(f"predictions  {file}")
    return {
        "schema_version": 1,
        "run": str(run),
        "split": split,
        "step": manifest.step,
        "prompts": len(scores.predictions),
        "too_long": scores.too_long,
        "metrics": scores.metrics,
        "predictions": str(file),
    }


def open_session(job: Job, ranks: Ranks, screen: Screen) -> Session:
    """The base on these ranks, sharded, with the job's delta attached."""
    zero = deepspeed_config(Path(job.memory.config))
    dtype = require_dtype(job.base.dtype, ranks.device)
    folder = _one_rank_first(ranks, lambda: local_base(job.base.model, job.base.revision))
    config = read_config(folder)
    tokens = Tokens(folder, lambda end: separator_text(job.task, end))
    base = load_base(folder, config, dtype, ranks.device, zero, job.train.dropout, lambda names: screen.progress("loading the base", names))
    digests = ThreadPoolExecutor(1).submit(file_digests, base.checkpoint.files) if ranks.first else None
    delta = attach(base.model, base.family, job.methods, job.train.seed, ranks.device)
    root = Causal(base.model, base.family)
    root.train()
    if job.memory.gradient_checkpointing:
        checkpointed(base.model, base.family)
    engine, context = Engine(root, zero), config.max_position_embeddings
    return Session(job, ranks, screen, base, digests, tokens, delta, root, engine, context, config.vocab_size)


def _one_rank_first(ranks: Ranks, fetch: Callable[[], Path]) -> Path:
    """The first rank of each machine fetches; the others find its work in the cache."""
    if ranks.local == 0:
        fetch()
    dist.barrier()
    return fetch()


def _save(session: Session, run: Path, step: int) -> None:
    job = session.job
    assert session.digests is not None, "only the first rank saves"
    store(
        session.delta, run / "delta", job.methods[0], job.base.model, session.digests.result(), session.base.tensors, job_digest(job), step
    )
