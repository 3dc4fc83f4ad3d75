"""What a job's model will see of its data: counts, lengths, labels, what is left out, and examples with the mask of the loss. No torch.

In: a job. Out: one report, as `--json` has it. Of the base only config and tokenizer are read. Tokens come from the same cache as
training's, or are written there, so that training starts with them.
"""

from __future__ import annotations

import logging
from itertools import count, pairwise
from typing import Any

import numpy as np

from pipeline.job.errors import JobError
from pipeline.job.labels import labels_of
from pipeline.job.section import Split
from pipeline.job.spec import Job, Train
from pipeline.job.task import SingleTask, titled
from pipeline.model.config import read_config
from pipeline.model.families import known_family, refuse_encoder
from pipeline.screen import Screen
from pipeline.tasks.example import Sequence
from pipeline.tasks.open import has_split, sources_of
from pipeline.tasks.order import refuse_longer
from pipeline.tasks.prepare import encoder_of, split_store, stream_of
from pipeline.tasks.sequences import Sequences, fit
from pipeline.tasks.specials import specials_of
from pipeline.tasks.store import Store
from pipeline.tasks.tokens import Tokens, vocabulary_with
from pipeline.weights.hub import local_tokenizer

_BINS = 10
_OTHERS: tuple[Split, ...] = ("valid", "test")


def look(job: Job, examples: int, screen: Screen) -> dict[str, Any]:
    """The report.

    Args:
        examples: how many of each source's training examples to show token by token.

    Raises:
        JobError: as training would, but for examples that are too long: then `refusal` is what it would say.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = local_tokenizer(job.base.model, job.base.revision)
    config, tokens = read_config(folder), Tokens(folder, job.base.added_tokens)
    family = known_family(config)
    if any(labels_of(task) == () for task in sources_of(job.task)):
        refuse_encoder(config, f'task.kind = "{job.task.kind}"')
        tokens.require_end()
    vocabulary = vocabulary_with(config.vocab_size, tokens.new)
    context = family.context(config) if family else config.max_position_embeddings
    # Special tokens around each prompt have a share of it.
    context -= len(specials_of(job.methods, vocabulary) or ())
    special = family is not None and family.encoder
    limit = min(job.train.max_tokens or context, context)
    tasks = sources_of(job.task)

    def part(task: SingleTask, split: Split, most: int) -> tuple[dict[str, Any], Store, Sequences | None]:
        store = split_store(task, split, encoder_of(task, tokens, vocabulary, most, special), screen)
        fitted, too_long = _fitted(store, most, task)
        return _row(task, split, store, fitted, too_long), store, fitted

    trained = [part(task, "train", limit) for task in tasks]
    parts = [fitted for _, _, fitted in trained if fitted is not None]
    rows: list[dict[str, Any]] = []
    absent = []
    for split in _OTHERS:
        for task in filter(lambda task: has_split(task, split), tasks):
            try:
                rows.append(part(task, split, context)[0])
            except JobError as error:
                if split == job.evaluate.split:
                    raise
                # Training does not look at it.
                absent.append({"split": split, "source": titled(task), "reason": str(error)})
    return {
        "schema_version": 1,
        "base": job.base.model,
        "context_tokens": context,
        "max_tokens": limit,
        "splits": [row for row, _, _ in trained] + rows,
        "absent": absent,
        "training": _training(job.train, tasks, parts) if len(parts) == len(tasks) else None,
        "refusal": _refusal(job, [row for row, _, _ in trained], parts, rows),
        "examples": [
            _example(task, tokens, fitted or store, index)
            for task, (_, store, fitted) in zip(tasks, trained, strict=True)
            for index in range(min(examples, len(fitted or store)))
        ],
    }


def _fitted(store: Store, limit: int, task: SingleTask) -> tuple[Sequences | None, dict[str, Any]]:
    """What the job's rule leaves of a split, None where that is a refusal."""
    over = int((store.lengths() > limit).sum())
    fitted, refusal = None, None
    try:
        fitted, _ = fit(store, limit, task.too_long)
    except JobError as error:
        refusal = str(error)
    return fitted, {"limit_tokens": limit, "examples": over, "rule": task.too_long, "refusal": refusal}


def _row(task: SingleTask, split: Split, store: Store, fitted: Sequences | None, too_long: dict[str, Any]) -> dict[str, Any]:
    lengths, about = store.lengths(), store.about
    return {
        "split": split,
        "source": titled(task),
        "files": [{"file": file.file, "examples": file.examples} for file in about.files],
        "examples": len(store),
        "tokens": about.total_tokens,
        "targets": about.total_targets,
        "lengths": _statistics(lengths),
        "histogram": _histogram(lengths),
        "labels": _labels(task, store),
        "too_long": too_long,
        "left": _left(store, fitted, lengths, too_long["limit_tokens"]),
        "dropped": [{"reason": reason.reason, "examples": reason.count, "first": reason.first} for reason in about.dropped],
    }


def _statistics(lengths: np.ndarray) -> dict[str, float]:
    """In tokens; a percentile is a length that occurs."""
    high = {f"p{percent}": int(np.percentile(lengths, percent, method="inverted_cdf")) for percent in (95, 99)}
    middle = {"min": int(lengths.min()), "median": float(np.median(lengths)), "mean": round(float(lengths.mean()), 2)}
    return {**middle, **high, "max": int(lengths.max())}


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Bins of a round width; the longest fiftieth is in the last one, however long."""
    least, usual, most = int(lengths.min()), int(np.percentile(lengths, 98, method="inverted_cdf")), int(lengths.max())
    width = next(size for scale in count() for size in (10**scale, 2 * 10**scale, 5 * 10**scale) if size * _BINS > usual - least)
    edges = [*range(least // width * width, usual + 1, width)]
    edges.append(edges[-1] + width)
    if most >= edges[-1]:
        edges.append(most + 1)
    found = np.histogram(lengths, edges)[0].tolist()
    return [{"from": first, "to": end - 1, "examples": many} for (first, end), many in zip(pairwise(edges), found, strict=True)]


def _labels(task: SingleTask, store: Store) -> dict[str, Any] | None:
    """Of labelled texts: how many each class has, or where the numbers lie."""
    names = labels_of(task)
    if names == ():
        return None
    labels = store.labels()
    withheld = int(np.isnan(labels).sum())
    if names is not None:
        return {"classes": {name: int((labels == place).sum()) for place, name in enumerate(names)}, "withheld": withheld}
    known = labels[~np.isnan(labels)]
    ends = {"min": float(known.min()), "mean": round(float(known.mean()), 4), "max": float(known.max())} if len(known) else None
    return {"numbers": ends, "withheld": withheld}


def _left(store: Store, fitted: Sequences | None, lengths: np.ndarray, limit: int) -> dict[str, int] | None:
    """What is learnt or scored, after those that are too long are cut or left out."""
    if fitted is None:
        return None
    if fitted is store:
        return {"examples": len(store), "tokens": store.about.total_tokens, "targets": store.about.total_targets}
    over = np.flatnonzero(lengths > limit).tolist()
    targets = store.about.total_targets - sum(map(store.targets, over))
    if len(fitted) < len(store):
        return {"examples": len(fitted), "tokens": int(lengths[lengths <= limit].sum()), "targets": targets}
    cut = sum(map(fitted.targets, over))
    return {"examples": len(fitted), "tokens": int(np.minimum(lengths, limit).sum()), "targets": targets + cut}


def _training(train: Train, tasks: tuple[SingleTask, ...], parts: list[Sequences]) -> dict[str, Any]:
    stream = stream_of(tasks, parts, train.seed)
    epochs = None if train.steps else train.epochs or 1.0
    return {
        "batch_examples": train.batch_examples,
        "epoch_examples": stream.epoch,
        "epoch_steps": round(stream.epoch / train.batch_examples, 4),
        "epochs": epochs or round((train.steps or 0) * train.batch_examples / stream.epoch, 4),
        "steps": -(-stream.end(epochs) // train.batch_examples) if epochs else train.steps,
        "sources": [
            {"source": titled(task), "weight": task.weight, "examples": len(part), "epoch_examples": taken}
            for task, part, taken in zip(tasks, parts, stream.counts, strict=True)
        ],
    }


def _refusal(job: Job, trained: list[dict[str, Any]], parts: list[Sequences], others: list[dict[str, Any]]) -> str | None:
    """The line with which training would end, in the order in which it looks."""
    refused: list[str] = [row["too_long"]["refusal"] for row in trained if row["too_long"]["refusal"]]
    if not refused:
        try:
            refuse_longer(max(part.longest for part in parts), job.train.micro_batch_tokens)
        except JobError as error:
            return str(error)
    # Where only the first prompts are scored, it is not known here whether those too long are among them.
    scored = [row for row in others if row["split"] == job.evaluate.split and job.evaluate.max_prompts is None]
    refused += [row["too_long"]["refusal"] for row in scored if row["too_long"]["refusal"]]
    return next(iter(refused), None)


def _example(task: SingleTask, tokens: Tokens, sequences: Sequences, index: int) -> dict[str, Any]:
    sequence: Sequence = sequences[index]
    learnt = {place for first, end in sequence.spans for place in range(first, end)}
    names, ids = labels_of(task), list(sequence.tokens)
    return {
        "source": titled(task),
        "place": sequences.source(index),
        "label": names[int(sequence.label)] if names and sequence.label is not None else sequence.label,
        "tokens": [
            {"id": token, "text": text, "learnt": place in learnt, "special": token in tokens.special_ids}
            for place, (token, text) in enumerate(zip(ids, tokens.pieces(ids), strict=True))
        ],
    }
