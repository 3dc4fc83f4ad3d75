"""The token embedding, and a table of the vocabulary that stays in its shards: each rank looks up and scores the rows that it holds.

Instead of a table, ids, hidden states and sums go between the ranks: bytes that grow with the tokens of a pass, not with the vocabulary.

Shapes: V vocabulary, D width, R rows of this rank; N tokens of this rank, in its group of ranks T in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from pipeline.model.rows import OwnRows, own_rows


class Embedding(nn.Module):
    """Takes over the parameter, and so the name, of an `nn.Embedding`."""

    def __init__(self, original: nn.Embedding) -> None:
        super().__init__()
        self.weight: nn.Parameter = original.weight  # type: ignore[assignment]
        self.num_embeddings, self.embedding_dim, self.padding_idx = original.num_embeddings, original.embedding_dim, original.padding_idx
        # Gemma's scales what it looks up.
        if (scale := getattr(original, "embed_scale", None)) is not None:
            self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape -> [..., D]."""
        rows = own_rows(self.weight)
        found = nn.functional.embedding(ids, self.weight) if rows is None else _looked_up(rows, ids.flatten()).view(*ids.shape, rows.width)
        scale: torch.Tensor | None = getattr(self, "embed_scale", None)
        return found if scale is None else found * scale.to(found.dtype)


def is_plain(module: nn.Module) -> bool:
    """Whether `Embedding` does all that a module does: it looks up, and scales at most."""
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding"))


@torch.no_grad()
def _looked_up(rows: OwnRows, ids: torch.Tensor) -> torch.Tensor:
    """Ids [N] -> [N, D]. Every rank asks each other one for the rows that it needs of it, each once."""
    wanted, places = ids.unique(return_inverse=True)
    # Ascending: those of one rank lie together.
    asked = torch.bincount(wanted // rows.per_rank, minlength=rows.ranks)
    told = torch.empty_like(asked)
    all_to_all(told, asked, rows)
    ours, theirs = asked.tolist(), told.tolist()
    needed = wanted.new_empty(sum(theirs))
    all_to_all(needed, wanted, rows, theirs, ours)
    table = rows.table
    sent = table[(needed - rows.first).to(table.device)].to(ids.device)
    found = sent.new_empty(len(wanted), sent.shape[1])
    all_to_all(found, sent, rows, ours, theirs)
    return found[places]


@dataclass(frozen=True)
class Gathered:
    """Rows of all ranks of a group, end to end: how many are whose."""

    rows: OwnRows
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def own(self) -> slice:
        first = sum(self.counts[: self.rows.rank])
        return slice(first, first + self.counts[self.rows.rank])

    def of(self, part: torch.Tensor) -> torch.Tensor:
        """[N, ...] of this rank -> [T, ...]."""
        longest = max(self.counts)
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: len(part)] = part
        everyone = part.new_empty(self.rows.ranks * longest, *part.shape[1:])
        all_gather(everyone, padded, self.rows)
        return torch.cat([everyone[rank * longest : rank * longest + count] for rank, count in enumerate(self.counts)])

    def returned(self, parts: torch.Tensor) -> torch.Tensor:
        """[T, ...] of this rank -> [ranks, N, ...]: what each of them has for this one's rows."""
        count = self.counts[self.rows.rank]
        back = parts.new_empty(self.rows.ranks * count, *parts.shape[1:])
        all_to_all(back, parts.contiguous(), self.rows, [count] * self.rows.ranks, list(self.counts))
        return back.unflatten(0, (self.rows.ranks, count))


@dataclass(frozen=True)
class Columns:
    """The logits that this rank computes: all, or those of its rows of the table."""

    weight: torch.Tensor
    """[R, D]"""
    rows: OwnRows | None = None
    """Where other ranks have the others."""

    @property
    def first(self) -> int:
        return self.rows.first if self.rows else 0

    @property
    def most(self) -> int:
        """Of any rank."""
        return self.rows.per_rank if self.rows else self.weight.shape[0]

    def vocabulary(self, logits: torch.Tensor) -> int:
        return self.rows.vocabulary if self.rows else logits.shape[1]

    def softmax_(
        self, logits: torch.Tensor, place: torch.Tensor, mine: torch.Tensor, scaled: bool, meant: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes probabilities of logits, in place.

        Args:
            logits: [M, R] fp32.
            place: [M, 1] of the label among them.
            mine: [M] whether it is there.
            scaled: the probabilities are needed.
            meant: the mean is.

        Returns:
            Log-probability of the label [M], and its mean over the vocabulary [M].
        """
        top, sums, label, total = own = logits.new_zeros(4, len(logits))
        count = self.vocabulary(logits)
        if logits.shape[1]:
            torch.amax(logits, -1, out=top)
            label.copy_(logits.gather(1, place)[:, 0].where(mine, 0.0))
            if meant:
                torch.sum(logits, -1, out=total)
            logits.sub_(top[:, None]).exp_()
            torch.sum(logits, -1, out=sums)
        else:
            top.fill_(torch.finfo(logits.dtype).min)
        everyone = own[None]
        if self.rows is not None:
            everyone = own.new_empty(self.rows.ranks, *own.shape)
            all_gather(everyone.flatten(0, 1), own, self.rows)
        tops, all_sums, labels, totals = everyone.unbind(1)
        highest = tops.amax(0)
        whole = (all_sums * (tops - highest).exp()).sum(0)
        if scaled:
            logits *= ((top - highest).exp() / whole)[:, None]
        log_whole = whole.log()
        return labels.sum(0) - highest - log_whole, totals.sum(0) / count - highest - log_whole


def gathered_counts(rows: OwnRows, count: int, device: torch.device) -> Gathered:
    counts = torch.empty(rows.ranks, dtype=torch.int64, device=device)
    all_gather(counts, torch.tensor([count], device=device), rows)
    return Gathered(rows, tuple(counts.tolist()))


def whole_table(rows: OwnRows, device: torch.device) -> torch.Tensor:
    """[V, D] of all ranks."""
    shard = rows.shard.to(device)
    if rows.ranks == 1:
        return shard.view(-1, rows.width)[: rows.vocabulary]
    whole = shard.new_empty(rows.ranks * len(shard))
    all_gather(whole, shard, rows)
    return whole.view(-1, rows.width)[: rows.vocabulary]


def all_gather(output: torch.Tensor, part: torch.Tensor, rows: OwnRows) -> None:
    if rows.ranks == 1:
        output.copy_(part)
    else:
        dist.all_gather_into_tensor(output, part, group=rows.group)


def all_to_all(
    output: torch.Tensor, parts: torch.Tensor, rows: OwnRows, come: list[int] | None = None, go: list[int] | None = None
) -> None:
    if rows.ranks == 1:
        output.copy_(parts)
    else:
        dist.all_to_all_single(output, parts, come, go, group=rows.group)
