"""The vocabulary projection and its loss, computed only where there is a label, with no logits kept for the backward pass.

Where ranks share the table, each has the logits of its own rows of it, for the labels of all; or it is handed the whole table, where
that is less to send. The loss is the graph's end, so its gradient is known in the forward pass but for a factor: it is computed there,
in runs of labels, and the backward pass only scales it. So ZeRO-3 need not gather the table for it either.

Loss per token: (1 - e) (-log p_y) + e mean_v(-log p_v), e the label smoothing, as in the LoRA paper's code.
Shapes: hidden [M, D], labels [M], weight [V, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from pipeline.model.rows import OwnRows, own_rows
from pipeline.model.vocabulary import Columns, gathered_counts, whole_table
from pipeline.plan.tables import chunk_logits


class HeadLoss(NamedTuple):
    loss: torch.Tensor
    """The smoothed loss: of each label [M], or its sum."""
    nll: torch.Tensor
    """The plain loss."""
    hidden: torch.Tensor | None
    """Gradient of the first's sum with respect to the hidden states [M, D], if wanted."""
    weight: torch.Tensor | None = None
    """The same for the weight [V, D], fp32, where it is trained."""
    added: torch.Tensor | None = None
    """The same for the rows of added tokens [A, D]."""

    def summed(self) -> HeadLoss:
        return self._replace(loss=self.loss.sum(), nll=self.nll.sum())


Collect = Callable[[torch.Tensor], None]
"""Takes a gradient of the whole tensor in."""


class Head(nn.Module):
    """The model's last linear map: logits, or the summed loss where labels are given. Takes over the original's parameters.

    Args:
        softcap: logits are bent to stay within it, c tanh(z / c), as Gemma 2's are.
    """

    def __init__(self, original: nn.Linear, softcap: float | None = None) -> None:
        super().__init__()
        self.softcap = softcap
        self.collect: Collect | None = None
        """Where the weight is trained: who takes its gradient."""
        self.added: tuple[torch.Tensor, torch.Tensor] | None = None
        """Ids [A], ascending, and trained rows [A, D] of tokens that the base did not know."""
        self.weight: nn.Parameter = original.weight  # type: ignore[assignment]
        self.bias = original.bias

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None, smoothing: float = 0.0, with_gradient: bool = False
    ) -> torch.Tensor | HeadLoss:
        """Logits [..., V] without labels; with labels [M], the loss of x [M, D] and its gradients, outside any graph."""
        rows = own_rows(self.weight)
        if labels is not None:
            return self._loss(x, labels, smoothing, with_gradient, rows)
        logits = self._linear(x, self.weight) if rows is None else self._logits(x, rows)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._with_added(nn.functional.linear(x, weight, self.bias), x)

    def _with_added(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.added is None:
            return logits
        ids, rows = self.added
        more = int(ids[-1]) + 1 - logits.shape[-1]
        if more > 0:
            logits = nn.functional.pad(logits, (0, more))
        return logits.index_copy(-1, ids, nn.functional.linear(x, rows.to(x.dtype)))

    def _logits(self, x: torch.Tensor, rows: OwnRows) -> torch.Tensor:
        """Those of x [B, D], each rank computing those of its rows for all ranks' x."""
        everyone = gathered_counts(rows, len(x), x.device)
        own = nn.functional.linear(everyone.of(x), rows.table.to(x.device))
        own = nn.functional.pad(own, (0, rows.per_rank - own.shape[1]))
        logits = everyone.returned(own).transpose(0, 1).flatten(1)[:, : rows.vocabulary]
        return self._with_added(logits, x)

    @torch.no_grad()
    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor, smoothing: float, with_gradient: bool, rows: OwnRows | None) -> HeadLoss:
        if rows is None:
            return self._chunks(hidden, labels, smoothing, with_gradient, Columns(self.weight)).summed()
        everyone = gathered_counts(rows, len(labels), hidden.device)
        # Hidden states go to all ranks and their gradients come back, or the table goes once.
        if self.added is not None or 2 * everyone.total > rows.vocabulary:
            return self._chunks(hidden, labels, smoothing, with_gradient, Columns(whole_table(rows, hidden.device))).summed()
        columns = Columns(rows.table.to(hidden.device), rows)
        found = self._chunks(everyone.of(hidden), everyone.of(labels), smoothing, with_gradient, columns)
        own, of_hidden = everyone.own, None
        if found.hidden is not None:
            of_hidden = everyone.returned(found.hidden).sum(0, dtype=torch.float32).to(hidden.dtype)
        return HeadLoss(found.loss[own], found.nll[own], of_hidden).summed()

    def _chunks(self, hidden: torch.Tensor, labels: torch.Tensor, smoothing: float, with_gradient: bool, columns: Columns) -> HeadLoss:
        """The loss of each row; with columns of one rank, its share of the gradients."""
        weight, softcap = columns.weight, self.softcap
        losses, nlls = [hidden.new_empty(0, dtype=torch.float32)], [hidden.new_empty(0, dtype=torch.float32)]
        gradient = torch.zeros_like(hidden) if with_gradient else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradient and self.collect else None
        of_added = torch.zeros_like(self.added[1]) if with_gradient and self.added else None
        # As many on every rank. One piece of memory for all runs: what is new to the process costs time.
        count = min(len(labels), max(1, chunk_logits(hidden.device.type) // columns.most))
        space = hidden.new_empty(count, self._outputs(weight), dtype=torch.float32)
        for first in range(0, len(labels), max(1, count)):
            part, label = hidden[first : first + count], labels[first : first + count]
            logits = self._into(space[: len(part)], part, weight)
            bent = None
            if softcap is not None:
                bent = logits.div_(softcap).tanh()
                torch.mul(bent, softcap, out=logits)
            # A label of another rank's stands nowhere here.
            mine = (label >= columns.first) & (label < columns.first + logits.shape[1])
            place = (label - columns.first).clamp(0, max(0, logits.shape[1] - 1))[:, None]
            log_p, mean_log_p = columns.softmax_(logits, place, mine, with_gradient, bool(smoothing))
            nlls.append(-log_p)
            losses.append((smoothing - 1.0) * log_p - smoothing * mean_log_p if smoothing else -log_p)
            if gradient is None or not logits.shape[1]:
                continue
            if smoothing:
                logits -= smoothing / columns.vocabulary(logits)
            logits.scatter_add_(1, place, (mine * (smoothing - 1.0))[:, None].to(logits.dtype))
            if bent is not None:
                logits *= bent.square_().neg_().add_(1.0)
            slope, through = logits.to(part.dtype), gradient[first : first + count]
            if self.added is None:
                torch.mm(slope, weight, out=through)
            else:
                ids, own = self.added
                assert of_added is not None
                of_added += slope[:, ids].t() @ part
                torch.mm(slope[:, ids], own.to(part.dtype), out=through)
                # Rows of the base that they stand in front of have no part in it.
                slope = slope.index_fill(1, ids, 0.0)[:, : weight.shape[0]]
                through += slope @ weight
            if of_weight is not None:
                of_weight += slope.t() @ part
        return HeadLoss(torch.cat(losses), torch.cat(nlls), gradient, of_weight, of_added)

    def _outputs(self, weight: torch.Tensor) -> int:
        return max(weight.shape[0], int(self.added[0][-1]) + 1) if self.added else weight.shape[0]

    def _into(self, logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Writes those of x [M, D]."""
        rows = logits[:, : weight.shape[0]]
        if x.dtype == logits.dtype:
            torch.mm(x, weight.t(), out=rows)
        else:
            rows.copy_(x @ weight.t())
        if self.bias is not None:
            rows += self.bias
        if self.added is not None:
            ids, own = self.added
            logits[:, ids] = nn.functional.linear(x, own.to(x.dtype)).float()
        return logits


class _Attach(torch.autograd.Function):
    """Gives a computed loss the gradients that are already known."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        rows: torch.Tensor | None,
        computed: HeadLoss,
        collect: Collect | None,
    ) -> torch.Tensor:
        ctx.computed, ctx.collect = computed, collect  # type: ignore[attr-defined]
        return computed.loss.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        computed: HeadLoss = ctx.computed  # type: ignore[attr-defined]
        # The graph outlives this pass, and a weight's gradient is as large as the vocabulary.
        ctx.computed = None  # type: ignore[attr-defined]
        if computed.weight is not None:
            ctx.collect(computed.weight.mul_(grads[0]))  # type: ignore[attr-defined]
        assert computed.hidden is not None
        # In fp32: the factor (loss scale over target tokens) must not be rounded to the gradient's dtype by itself.
        of_hidden = (computed.hidden.float() * grads[0]).to(computed.hidden.dtype)
        return of_hidden, None if computed.added is None else computed.added * grads[0], None, None


def head_loss(head: Head, hidden: torch.Tensor, labels: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the smoothed and of the plain loss, fp32 scalars; the first carries the gradient to `hidden`.

    The head itself stands outside the graph, so ZeRO-3 hangs no backward hook on it and does not gather it again.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    computed = head(hidden.detach(), labels, smoothing, wanted)
    rows = head.added[1] if head.added else None
    return (_Attach.apply(hidden, rows, computed, head.collect) if wanted else computed.loss), computed.nll
