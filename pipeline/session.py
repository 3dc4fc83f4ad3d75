"""The job's model on these ranks, and its data: what training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.evaluate.score import EvaluationSet, Scores, score
from pipeline.job.errors import JobError
from pipeline.job.spec import Job, Split
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import Delta, attach
from pipeline.model.build import checkpointed, read_config, require_dtype
from pipeline.model.causal import Causal
from pipeline.model.load import LoadedBase, load_base
from pipeline.screen import Screen
from pipeline.tasks.example import Example, Sequence, grouped
from pipeline.tasks.fingerprint import fingerprint
from pipeline.tasks.open import read_examples, separator_text
from pipeline.tasks.tokens import Tokens, fit
from pipeline.train.engine import Engine, Ranks, one_rank_first
from pipeline.weights.digest import file_digests, sha256_of
from pipeline.weights.hub import local_base
from pipeline.weights.state import DataFile


@dataclass(frozen=True)
class TrainingSet:
    """The training split, ready to be trained on."""

    sequences: list[Sequence]
    sources: list[str]
    """File and line of each."""
    files: tuple[DataFile, ...]
    """What it is, by content."""
    too_long: int
    """Examples that did not fit and were cut or left out, as the job says."""


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
    base_config: str
    """sha256 of the base's config.json."""

    def training_set(self) -> TrainingSet:
        """The training split, as sequences that fit."""
        limit = min(self.job.train.max_tokens or self.context, self.context)
        examples, sequences, too_long = self._fitted("train", limit)
        return TrainingSet(sequences, [example.source for example in examples], fingerprint(examples, sequences), too_long)

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
            self.root,
            self.engine,
            data,
            self.job.task.kind,
            self.tokens,
            self.job.evaluate,
            self.job.train,
            self.ranks,
            self._bar(f"scoring {data.split}"),
        )

    def _bar(self, label: str) -> Callable[[Iterable[int]], Iterable[int]]:
        return lambda items: self.ranks.watch.over(label, self.screen.progress(label, items))


def open_session(job: Job, ranks: Ranks, screen: Screen) -> Session:
    """The base on these ranks, sharded, with the job's delta attached."""
    zero = deepspeed_config(Path(job.memory.config))
    dtype = require_dtype(job.base.dtype, ranks.device)
    ranks.watch.at("fetching the base", patient=True)
    folder = one_rank_first(ranks, lambda: local_base(job.base.model, job.base.revision))
    ranks.watch.at("starting")
    config = read_config(folder)
    tokens = Tokens(folder, lambda end: separator_text(job.task, end))
    loading = "loading the base"
    base = load_base(
        folder,
        config,
        dtype,
        ranks.device,
        zero,
        job.train.dropout,
        lambda names: ranks.watch.over(loading, screen.progress(loading, names)),
    )
    digests = ThreadPoolExecutor(1).submit(file_digests, base.checkpoint.files) if ranks.first else None
    delta = attach(base.model, base.family, job.methods, job.train.seed, ranks.device)
    root = Causal(base.model, base.family)
    root.train()
    if job.memory.gradient_checkpointing:
        checkpointed(base.model, base.family)
    return Session(
        job,
        ranks,
        screen,
        base,
        digests,
        tokens,
        delta,
        root,
        Engine(root, zero),
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        base_config=sha256_of(folder / "config.json"),
    )
