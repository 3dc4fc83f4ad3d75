"""A split -> its scores and predictions: perplexity, and BLEU of greedy generations against all references."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sized
from dataclasses import dataclass
from pathlib import Path

import sacrebleu

from pipeline.evaluate.gather import Gathering, choose
from pipeline.evaluate.generate import generate
from pipeline.evaluate.perplexity import perplexity
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
    split: str
    metrics: dict[str, float]
    """perplexity; bleu from 0 to 100."""
    predictions: list[Prediction]
    too_long: int
    gathering: Gathering


def score(
    root: Causal,
    engine: Engine,
    data: EvaluationSet,
    tokens: Tokens,
    evaluate: Evaluate,
    train: Train,
    ranks: Ranks,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Scores:
    """Scores on all ranks together; every rank gets the result.

    Args:
        progress: wraps the iteration over batches of prompts, for a progress bar.
    """
    root.eval()
    context = root.model.config.max_position_embeddings
    ends = (tokens.end_id, *evaluate.eos_tokens)
    engine.release()
    gathering = choose(root, evaluate, ranks)
    with gathering.held(root):
        ids = generate(root, data.prompt_tokens, ranks, evaluate, ends, context, gathering.each_pass, progress)
        fit = perplexity(root, data.sequences, ranks, train.micro_batch_tokens, train.packing)
    texts = [tokens.text(new, ends) for new in ids]
    metrics = {"perplexity": fit, "bleu": bleu(texts, [prompt.references for prompt in data.prompts])}
    engine.release()
    root.train()
    predictions = [Prediction(p.text, text, tuple(r.strip() for r in p.references)) for p, text in zip(data.prompts, texts, strict=True)]
    return Scores(data.split, metrics, predictions, data.too_long, gathering)


def bleu(predictions: list[str], references: Sized[Sized[str]]) -> float:
    """Corpus BLEU by sacrebleu's defaults; each prediction may have its own number of references."""
    most = max(map(len, references))
    streams = [[refs[n].strip() if n < len(refs) else None for refs in references] for n in range(most)]
    return float(sacrebleu.corpus_bleu(predictions, streams).score)


def write_predictions(file: Path, predictions: list[Prediction]) -> None:
    """One JSON object a prompt."""
    lines = [
        json.dumps({"prompt": p.prompt, "prediction": p.prediction, "references": p.references}, ensure_ascii=False) for p in predictions
    ]
    write_text(file, "\n".join(lines) + "\n")
