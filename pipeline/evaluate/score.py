"""A split -> its scores and predictions: the task's own metrics of generated texts, and loss and perplexity of the references."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.evaluate.alone import on_first_rank
from pipeline.evaluate.gather import Gathering, choose
from pipeline.evaluate.generate import generate
from pipeline.evaluate.metrics.choose import metrics_of
from pipeline.evaluate.perplexity import loss_of, perplexity
from pipeline.job.spec import Evaluate, Train
from pipeline.model.causal import Causal
from pipeline.tasks.example import Prompt, Sequence
from pipeline.tasks.tokens import Tokens
from pipeline.train.engine import Engine, Ranks
from pipeline.weights.atomic import write_text


@dataclass(frozen=True)
class EvaluationSet:
    """A split, ready to be scored."""

    split: str
    prompts: list[Prompt]
    prompt_tokens: list[list[int]]
    sequences: list[Sequence]
    """Prompt and reference of every example, for the perplexity."""
    too_long: int
    """Examples that did not fit the context and were cut or left out, as the job says."""


@dataclass(frozen=True)
class Prediction:
    prompt: str
    prediction: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    kind: str
    """Of the task."""
    split: str
    metrics: dict[str, float]
    """The task's, as its official script names and scales them; loss per target token; perplexity."""
    notes: tuple[str, ...]
    """What was left out, and why."""
    predictions: list[Prediction]
    too_long: int
    gathering: Gathering


def score(
    root: Causal,
    engine: Engine,
    data: EvaluationSet,
    kind: str,
    tokens: Tokens,
    evaluate: Evaluate,
    train: Train,
    ranks: Ranks,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Scores:
    """Scores on all ranks together; every rank gets the result.

    Args:
        kind: of the task.
        progress: wraps the iteration over batches of prompts, for a progress bar.
    """
    root.eval()
    context = root.model.config.max_position_embeddings
    ends = (tokens.end_id, *evaluate.eos_tokens)
    engine.release()
    gathering = choose(root, evaluate, ranks)
    with gathering.held(root):
        ids = generate(root, data.prompt_tokens, ranks, evaluate, ends, context, gathering.each_pass, progress)
        loss = loss_of(root, data.sequences, ranks, train.micro_batch_tokens, train.packing)
    texts = [tokens.text(new, ends) for new in ids]
    engine.release()
    root.train()
    predictions = [Prediction(p.text, text, tuple(r.strip() for r in p.references)) for p, text in zip(data.prompts, texts, strict=True)]
    # As `zlora score` reads the file of predictions.
    groups = [list(prediction.references) for prediction in predictions]
    metrics, notes = on_first_rank(ranks, "metrics", lambda: metrics_of(kind, texts, groups, evaluate.script))
    metrics |= {"loss": loss, "perplexity": perplexity(loss)}
    return Scores(kind, data.split, metrics, tuple(notes), predictions, data.too_long, gathering)


def write_predictions(file: Path, predictions: list[Prediction]) -> None:
    """One JSON object a prompt."""
    lines = [
        json.dumps({"prompt": p.prompt, "prediction": p.prediction, "references": p.references}, ensure_ascii=False) for p in predictions
    ]
    write_text(file, "\n".join(lines) + "\n")
