"""The job's model on these ranks, and its data: what training and evaluation share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.evaluate.score import EvaluationSet, Scores, score
from pipeline.job.errors import JobError
from pipeline.job.files import AUTO
from pipeline.job.labels import labels_of
from pipeline.job.method import Lora, trains_tables
from pipeline.job.metrics import scored_as
from pipeline.job.section import Split
from pipeline.job.spec import Job, Train
from pipeline.job.task import Mix, SingleTask, titled
from pipeline.job.zero import complete, deepspeed_config
from pipeline.methods.attach import Delta, attach
from pipeline.model.build import checkpointed, require_dtype
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.families import refuse_encoder
from pipeline.model.load import LoadedBase, load_base
from pipeline.model.unknown import family_of, refuse_roles
from pipeline.plan.choose import Choice, choose
from pipeline.plan.families import read_shape
from pipeline.plan.hardware import gpu_of, main_memory_bytes, named
from pipeline.plan.memory import Setting, setting
from pipeline.screen import Screen
from pipeline.tasks.encode import Encoder
from pipeline.tasks.example import Reason, grouped
from pipeline.tasks.open import has_split, sources_of
from pipeline.tasks.order import Stream
from pipeline.tasks.prepare import encoder_of, source_of, split_store, stream_of
from pipeline.tasks.sequences import Chosen, Joined, Sequences, fit
from pipeline.tasks.specials import Specials, Surrounded, specials_of
from pipeline.tasks.store import Store
from pipeline.tasks.texts import wanted_texts
from pipeline.tasks.tokens import Tokens, vocabulary_with
from pipeline.train.engine import Engine, Ranks, one_rank_first
from pipeline.train.process import held
from pipeline.weights.digest import base_digest, file_digests, sha256_of
from pipeline.weights.hub import local_base
from pipeline.weights.record import DataFile


@dataclass(frozen=True)
class TrainingSet:
    """The training split, ready to be trained on."""

    sequences: Sequences
    stream: Stream
    """The order in which they come."""
    files: tuple[DataFile, ...]
    """What it is, by content."""
    too_long: int
    """Examples that did not fit and were cut or left out, as the job says."""
    dropped: tuple[Reason, ...]
    """Rows that were left out before, and why."""


@dataclass(frozen=True)
class Session:
    """What training and evaluation share: the job's model on these ranks."""

    job: Job
    ranks: Ranks
    screen: Screen
    folder: Path
    """Of the base."""
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
    """Ids that the model knows, added tokens included."""
    base_config: str
    """sha256 of the base's config.json."""
    zero: dict[str, Any]
    """The memory configuration, complete."""
    choice: Choice | None
    """Where the plan chose it."""
    held_before: int
    """Bytes of anonymous memory that this process had before the base."""

    @property
    def setting(self) -> Setting:
        """All that the plan depends on: this job on these ranks."""
        return _setting(self.job, self.zero, self.folder, self.ranks)

    @property
    def train(self) -> Train:
        """The job's settings; no packing where the base's attention cannot tell packed examples apart."""
        packing = self.job.train.packing and self.base.family.packs
        return self.job.train.model_copy(update={"packing": packing})

    def training_set(self) -> TrainingSet:
        """The training split, as sequences that fit."""
        limit = min(self.job.train.max_tokens or self.context, self._room)
        tasks = sources_of(self.job.task)
        stores = [self._store(task, "train", limit) for task in tasks]
        fitted = [fit(store, limit, task.too_long) for store, task in zip(stores, tasks, strict=True)]
        parts = [part for part, _ in fitted]
        joined = parts[0] if len(parts) == 1 else Joined(parts)
        return TrainingSet(
            Surrounded(joined, self.specials) if self.specials else joined,
            stream_of(tasks, parts, self.job.train.seed),
            tuple(file for store in stores for file in store.about.files),
            sum(over for _, over in fitted),
            tuple(reason for store in stores for reason in store.about.dropped),
        )

    def base_digest(self) -> str:
        """Of the base's files, once they have been hashed. A collective."""
        self.ranks.watch.at("hashing the base", patient=True)
        digest = [base_digest(self.digests.result()) if self.digests else ""]
        dist.broadcast_object_list(digest)
        return digest[0]

    @property
    def specials(self) -> Specials | None:
        """What stands around every prompt, by the job's methods."""
        return specials_of(self.job.methods, self.vocabulary)

    @property
    def _room(self) -> int:
        """Positions for an example's own tokens."""
        return self.context - len(self.specials or ())

    def _store(self, task: SingleTask, split: Split, limit: int) -> Store:
        """A split's tokens: from the cache, or made by one rank of each machine."""
        self.ranks.watch.at("tokenising", patient=True)
        return one_rank_first(self.ranks, lambda: split_store(task, split, self.encoder(task, limit), self.screen))

    def encoder(self, task: SingleTask, block_tokens: int) -> Encoder:
        return encoder_of(task, self.tokens, self.vocabulary, block_tokens, self.base.family.encoder)

    def evaluation(self, split: Split) -> tuple[EvaluationSet, ...]:
        """A split as it is scored, of each task that has it: `train.max_tokens` does not bind it."""
        mixed = isinstance(self.job.task, Mix)
        return tuple(self._evaluation(task, split, mixed) for task in sources_of(self.job.task) if has_split(task, split))

    def _evaluation(self, task: SingleTask, split: Split, mixed: bool) -> EvaluationSet:
        encoder, most = self.encoder(task, self._room), self.job.evaluate.max_prompts
        store = self._store(task, split, self._room)
        texts = wanted_texts(source_of(task, split, encoder), encoder, most)
        whole = Chosen(store, np.asarray(texts.places or range(min(len(store), most or len(store)))))
        fitted, too_long = fit(whole, self._room, task.too_long)
        left = fitted.kept if isinstance(fitted, Chosen) and fitted is not whole else range(len(whole))
        prompts = grouped(texts.pairs[place] for place in left) if texts.pairs else []
        # A prompt never depends on its references.
        room = max(1, self._room - self.job.evaluate.max_new_tokens)
        ids = [tokens[-room:] if len(tokens) >= self._room else tokens for tokens in encoder.prompts([p.text for p in prompts])]
        labelled = [texts.labelled[place] for place in left] if texts.labelled else []
        if specials := self.specials:
            fitted, ids = Surrounded(fitted, specials), [specials.prompt(tokens) for tokens in ids]
        title = titled(task) if mixed else ""
        dropped = store.about.dropped
        return EvaluationSet(title, scored_as(task), split, fitted, prompts, ids, labelled, labels_of(task), too_long, dropped)

    def score(self, data: tuple[EvaluationSet, ...]) -> Scores:
        return score(self.root, self.engine, data, self.tokens, self.job.evaluate, self.train, self.ranks, self._bar)

    def _bar(self, label: str) -> Callable[[Iterable[int]], Iterable[int]]:
        return lambda items: self.ranks.watch.over(label, self.screen.progress(label, items))


def open_session(job: Job, ranks: Ranks, screen: Screen) -> Session:
    """The base on these ranks, sharded, with the job's delta attached."""
    held_before, dtype = held().anonymous, require_dtype(job.base.dtype, ranks.device)
    ranks.watch.at("fetching the base", patient=True)
    folder = one_rank_first(ranks, lambda: local_base(job.base.model, job.base.revision))
    ranks.watch.at("starting")
    config, tokens = read_config(folder), Tokens(folder, job.base.added_tokens)
    labels = labels_of(sources_of(job.task)[0])
    if labels == ():
        refuse_encoder(config, f'task.kind = "{job.task.kind}"')
    for method in job.methods:
        if isinstance(method, Lora):
            refuse_roles(config, method.targets)
    if not family_of(config).encoder:
        tokens.require_end()
    choice = _chosen(job, folder, ranks) if job.memory.config == AUTO else None
    int8 = job.memory.int8_gathers
    zero = complete(choice.config, int8) if choice else deepspeed_config(Path(job.memory.config), job.memory.nvme_path, int8=int8)
    loading = "loading the base"
    base = load_base(
        folder,
        config,
        dtype,
        ranks.device,
        zero,
        job.train.dropout,
        lambda names: ranks.watch.over(loading, screen.progress(loading, names)),
        trains_tables(job.methods),
    )
    digests = ThreadPoolExecutor(1).submit(file_digests, base.checkpoint.files) if ranks.first else None
    delta = attach(base, job.methods, job.train.seed, ranks.device, labels, job.train.classifier_dropout, new=tokens.new)
    root = Causal(base.model, base.family, delta.head)
    if (placed := len(specials_of(job.methods, config.vocab_size) or ())) >= root.context - 1:
        raise JobError(
            f"methods: {placed} special tokens fill the base's {root.context} positions. Use fewer.",
            everywhere=True,
        )
    root.train()
    if job.memory.gradient_checkpointing:
        checkpointed(base.model, base.family)
    return Session(
        job,
        ranks,
        screen,
        folder,
        base,
        digests,
        tokens,
        delta,
        root,
        Engine(root, zero),
        context=root.context,
        vocabulary=vocabulary_with(config.vocab_size, tokens.new),
        base_config=sha256_of(folder / "config.json"),
        zero=zero,
        choice=choice,
        held_before=held_before,
    )


def _setting(job: Job, zero: dict[str, Any] | None, folder: Path, ranks: Ranks) -> Setting:
    """Of these ranks, on the GPU that they have.

    Args:
        zero: None: to be chosen.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count))
    if ranks.device.type == "cpu":
        gpu = gpu_of("cpu").shared_by(local)
    else:
        memory_bytes = torch.cuda.mem_get_info(ranks.device)[1]
        found = named(torch.cuda.get_device_name(ranks.device), memory_bytes) or gpu_of("a100-80g")
        gpu = replace(found, memory_bytes=memory_bytes)
    labels = labels_of(sources_of(job.task)[0])
    outputs = 1 if labels is None else len(labels)
    return setting(job, zero, read_shape(folder), gpu, ranks.count, -(-ranks.count // local), outputs, None)


def _chosen(job: Job, folder: Path, ranks: Ranks) -> Choice:
    """The memory configuration that the first rank's plan chooses, on every rank."""
    asked = _setting(job, None, folder, ranks)
    choice = [choose(replace(asked, main_memory_bytes=main_memory_bytes()))]
    dist.broadcast_object_list(choice)
    return choice[0]
