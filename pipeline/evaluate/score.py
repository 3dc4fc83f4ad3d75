"""A split -> its scores and predictions: the task's own metrics of generated texts or of labels, and the loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluate.alone import on_first_rank
from pipeline.evaluate.gather import Gathering, choose
from pipeline.evaluate.generate import generate
from pipeline.evaluate.measure import measure, perplexity
from pipeline.evaluate.metrics.choose import metrics_of
from pipeline.job.labels import glue_labels
from pipeline.job.spec import Evaluate, Train
from pipeline.model.causal import Causal
from pipeline.screen import json_text
from pipeline.tasks.example import Labelled, Prompt, Reason
from pipeline.tasks.sequences import Sequences
from pipeline.tasks.tokens import Tokens
from pipeline.train.engine import Engine, Ranks
from pipeline.weights.atomic import write_text

Bar = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class EvaluationSet:
    """A split of one task, ready to be scored."""

    title: str
    """In a mix, what its scores are named after; else empty."""
    kind: str
    """Whose metrics."""
    split: str
    sequences: Sequences
    """Of every example, for the loss."""
    prompts: list[Prompt]
    """What is generated and what is expected; none where nothing is generated."""
    prompt_tokens: list[list[int]]
    labelled: list[Labelled]
    """Of each sequence, where the task has labels."""
    labels: tuple[str, ...] | None
    """Their names; None: they are numbers."""
    too_long: int
    """Examples that did not fit the context and were cut or left out, as the job says."""
    dropped: tuple[Reason, ...]
    """Rows that were left out before, and why."""


@dataclass(frozen=True)
class Prediction:
    prompt: str
    prediction: str
    references: tuple[str, ...]
    """None where they are withheld."""


@dataclass(frozen=True)
class Part:
    """What one task of a mix, or the only one, has scored."""

    title: str
    kind: str
    metrics: dict[str, float]
    """The task's, as its official script names and scales them; loss per target; perplexity where targets are tokens."""
    notes: tuple[str, ...]
    """What was left out, and why."""
    predictions: list[Prediction]
    targets: int
    too_long: int


@dataclass(frozen=True)
class Scores:
    split: str
    parts: tuple[Part, ...]
    gathering: Gathering

    @property
    def metrics(self) -> dict[str, float]:
        """Of a mix, each task's under its title, and the loss over all."""
        if len(self.parts) == 1:
            return self.parts[0].metrics
        named = {f"{part.title}/{name}": value for part in self.parts for name, value in part.metrics.items()}
        known = [part for part in self.parts if part.targets]
        total = sum(part.metrics["loss"] * part.targets for part in known)
        return named | {"loss": total / max(1, sum(part.targets for part in known))}


def score(
    root: Causal,
    engine: Engine,
    sets: tuple[EvaluationSet, ...],
    tokens: Tokens,
    evaluate: Evaluate,
    train: Train,
    ranks: Ranks,
    bar: Callable[[str], Bar],
) -> Scores:
    """Scores on all ranks together; every rank gets the result.

    Args:
        bar: given a label, what wraps the iteration over batches of prompts, for a progress bar.
    """
    root.eval()
    engine.release()
    gathering = choose(root, evaluate, ranks)
    with gathering.held(root):
        found = [_run(root, data, tokens, evaluate, train, ranks, gathering, bar) for data in sets]
    engine.release()
    root.train()
    parts = tuple(_part(data, loss, predictions, evaluate.script, ranks) for data, (loss, predictions) in zip(sets, found, strict=True))
    return Scores(sets[0].split, parts, gathering)


def _run(
    root: Causal,
    data: EvaluationSet,
    tokens: Tokens,
    evaluate: Evaluate,
    train: Train,
    ranks: Ranks,
    gathering: Gathering,
    bar: Callable[[str], Bar],
) -> tuple[float, list[Prediction]]:
    """The loss, and what the model says."""
    predictions = []
    if data.prompts:
        ends, context = (tokens.end_id, *evaluate.eos_tokens), root.context
        label = f"scoring {data.split}" + (f" of {data.title}" if data.title else "")
        ids = generate(root, data.prompt_tokens, ranks, evaluate, ends, context, gathering.each_pass, bar(label))
        texts = [tokens.text(new, ends) for new in ids]
        predictions = [
            Prediction(p.text, text, tuple(r.strip() for r in p.references)) for p, text in zip(data.prompts, texts, strict=True)
        ]
    loss, outputs = measure(root, data.sequences, ranks, train.micro_batch_tokens, train.packing)
    if data.labelled:
        predictions = [_judged(text, output, data.labels) for text, output in zip(data.labelled, outputs, strict=True)]
    return loss, predictions


def _judged(text: Labelled, output: list[float], labels: tuple[str, ...] | None) -> Prediction:
    """The likeliest class by its name, or the number."""
    found = repr(output[0]) if labels is None else labels[output.index(max(output))]
    known = () if text.label is None else (repr(text.label) if labels is None else labels[int(text.label)],)
    return Prediction("\n".join(text.texts), found, known)


def _part(data: EvaluationSet, loss: float, predictions: list[Prediction], script: str | None, ranks: Ranks) -> Part:
    # As `zlora score` reads the file of predictions.
    known = [prediction for prediction in predictions if prediction.references]
    texts, groups = [prediction.prediction for prediction in known], [list(prediction.references) for prediction in known]
    if glue_labels(data.kind):
        # A text that is there several times counts as often; equal prompts were put together.
        texts = [text for text, group in zip(texts, groups, strict=True) for _ in group]
        groups = [[label] for group in groups for label in group]
    metrics, notes = dict[str, float](), list[str]()
    if known:
        metrics, notes = on_first_rank(ranks, "metrics", lambda: metrics_of(data.kind, texts, groups, script))
    if len(known) < len(predictions):
        notes = [*notes, f"{len(predictions) - len(known):,} labels of the {data.split} split are withheld: predictions, but no scores."]
    notes = [*notes, *(f"rows of the {data.split} split left out: {reason}" for reason in data.dropped)]
    targets = sum(data.sequences.targets(place) for place in range(len(data.sequences)))
    if targets:
        metrics = {**metrics, "loss": loss} | ({} if data.labelled else {"perplexity": perplexity(loss)})
    return Part(data.title, data.kind, metrics, tuple(notes), predictions, targets, data.too_long)


def write_predictions(file: Path, scores: Scores) -> Path | None:
    """One JSON object a prompt, with the task's title in a mix. No file where nothing is predicted."""
    rows = [
        {**({"task": part.title} if part.title else {}), "prompt": p.prompt, "prediction": p.prediction, "references": p.references}
        for part in scores.parts
        for p in part.predictions
    ]
    if not rows:
        return None
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def add_scores(file: Path, found: dict[str, Any]) -> None:
    """One more object, a line, behind those of earlier calls."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json_text(found) + "\n")
