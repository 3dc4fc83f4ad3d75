"""Tokens that the base did not know: their embeddings, and their rows of the vocabulary projection where that is not tied, are trained.

The base's own matrices stay as they are, in their shards; a merged checkpoint has the rows at their end. A new row begins as the mean of
all that the base has, as transformers' `resize_token_embeddings` does it.

Shapes: A added tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch

from pipeline.job.errors import JobError
from pipeline.methods.overlay import Overlay
from pipeline.model.head import Head
from pipeline.model.load import LoadedBase
from pipeline.tasks.tokens import NewTokens
from pipeline.weights.index import Entry
from pipeline.weights.manifest import ADDED_EMBEDDINGS, ADDED_HEAD, Added
from pipeline.weights.read import Reader

_BLOCK_ELEMENTS = 1 << 22


def attach_added(base: LoadedBase, new: NewTokens, device: torch.device) -> tuple[Overlay, Added]:
    """Makes the model know the tokens. The same on every rank: the base's files are all read.

    Raises:
        JobError: it is not known how this base computes its logits, or the tokens' ids leave a gap behind the vocabulary.
    """
    model, family = base.model, base.family
    vocabulary = model.config.vocab_size
    if family.own_logits:
        raise JobError(
            f'base.added_tokens: how a "{model.config.model_type}" computes its logits is not known. Leave them out.', everywhere=True
        )
    if new.ids[0] > vocabulary:
        raise JobError(
            f"base.added_tokens: the tokenizer has {new.ids[0]} tokens and the base {vocabulary} embeddings. Use this base's tokenizer.",
            everywhere=True,
        )
    embedding = model.get_submodule(family.body).get_input_embeddings()  # type: ignore[operator]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ids = torch.tensor(new.ids, device=device)
    rows = {ADDED_EMBEDDINGS: _mean(base.tensors[names[id(embedding.weight)]], len(new.ids), device)}
    stored = {ADDED_EMBEDDINGS: base.stored_names(names[id(embedding.weight)])}
    head = model.lm_head if not family.encoder else None
    if isinstance(head, Head):
        if head.weight is not embedding.weight:
            rows[ADDED_HEAD] = _mean(base.tensors[names[id(head.weight)]], len(new.ids), device)
            stored[ADDED_HEAD] = base.stored_names(names[id(head.weight)])
        head.added = (ids, rows.get(ADDED_HEAD, rows[ADDED_EMBEDDINGS]))
    overlay = Overlay(ids, rows)
    overlay.watch(embedding)
    # Gemma's embedding scales what it looks up.
    scale = getattr(embedding, "embed_scale", 1.0)
    embedding.register_forward_hook(lambda module, inputs, output: overlay.put(output, rows[ADDED_EMBEDDINGS] * scale))
    return overlay, Added(new.texts, new.ids, stored)


def _mean(entry: Entry, count: int, device: torch.device) -> torch.Tensor:
    """[A, D], each row the mean of all of a stored matrix."""
    rows, columns = entry.shape
    total, block = torch.zeros(columns, dtype=torch.float64), max(1, _BLOCK_ELEMENTS // columns)
    with Reader() as reader:
        for first in range(0, rows, block):
            part = torch.empty(min(block, rows - first), columns)
            reader.read(entry, first * columns, part.view(-1))
            total += part.sum(0, dtype=torch.float64)
    return (total / rows).float().to(device).repeat(count, 1).requires_grad_()
