"""The token embedding and the head stay in their shards: which of them do, and what goes between ranks in their place.

It mirrors pipeline/model/vocabulary.py and head.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.adapted import Everywhere
from pipeline.plan.shapes import Shape, shard

_ID = 8
"""Bytes of a token's id, of a label and of a count."""


def chunk_logits(device: str) -> int:
    """Elements of the logits held at a time: in fp32 128 MiB, for products large enough for a GPU; on a CPU 32 MiB, from where on they are
    hardly faster (some hundred rows), and new memory costs more."""
    return 1 << 23 if device == "cpu" else 1 << 25


@dataclass(frozen=True)
class Tables:
    """Those whose rows are used where they are."""

    embedding: bool
    head: bool
    """Its own table, or the embedding's."""

    def shard_elements(self, shape: Shape, ranks: int) -> int:
        """That a rank holds of the base: whole rows of these."""
        held, width = shard(shape.sizes, ranks), shape.outer_width
        apart = self.head and not shape.tied and shape.head
        for size in (*(shape.table.sizes if self.embedding else ()), *(apart.sizes if apart else ())):
            held += -(-size // width // ranks) * width - -(-size // ranks)
        return held


def tables_of(shape: Shape, adapted: Everywhere, persistence: int) -> Tables:
    """Args:
    persistence: a parameter up to so many elements stays gathered.
    """
    ours = shape.head is None or (not shape.guessed and len(shape.head.sizes) == 1)
    embedding = not adapted.embeddings.weights and shape.table.sizes[0] > persistence and (ours or not shape.tied)
    if shape.head is None or shape.tied:
        return Tables(embedding, embedding and shape.head is not None)
    return Tables(embedding, ours and not adapted.end.weights and shape.head.sizes[0] > persistence)


@dataclass(frozen=True)
class Loss:
    """Of one rank and micro-batch, where the head's table is shared. Elements, in the base's dtype."""

    labels: int
    """Whose logits this rank computes."""
    columns: int
    """Of each."""
    held: int
    """Beside logits: the gathered table, or hidden states and gradients of all ranks."""
    states: int
    """Of hidden states that come from other ranks."""
    table: int
    """Of the table where it is gathered, since that is less to send."""
    told_bytes: int
    """Of others' labels, their number, and each rank's four fp32 sums of every row of logits."""


def loss_of(shape: Shape, labels: int, ranks: int, added: bool) -> Loss:
    """Args:
    labels: of this rank; the others have as many.
    added: rows of tokens that the base did not know stand beside the table's.
    """
    everyone, width, columns = labels * ranks, shape.outer_width, -(-shape.vocabulary // ranks)
    if added or 2 * everyone > shape.vocabulary:
        table = columns * ranks * width if ranks > 1 else 0
        return Loss(labels, shape.vocabulary, table, 0, table, (ranks - 1) * _ID)
    told = (ranks - 1) * (_ID + labels * _ID + everyone * 4 * 4)
    return Loss(everyone, columns, 2 * everyone * width, (ranks - 1) * labels * width, 0, told)


def looked_up(shape: Shape, tokens: int, ranks: int) -> tuple[int, int]:
    """Elements of the embedding that come from other ranks for a micro-batch, at most: each token's row once; and bytes of the ids by which
    they ask for theirs, evenly spread, and of how many those are."""
    rows = min(tokens, shape.vocabulary)
    return rows * shape.outer_width * (ranks - 1) // ranks, (rows * (ranks - 1) // ranks + ranks - 1) * _ID
