"""The vocabulary projection and its loss, computed only where there is a label, with no logits kept for the backward pass.

The loss is the graph's end, so its gradient is known in the forward pass but for a factor: it is computed there, in runs of
rows, and the backward pass only scales it. Under ZeRO-3 that also spares a second gather of the vocabulary matrix.

Loss per token: (1 - e) (-log p_y) + e mean_v(-log p_v), e the label smoothing, as in the LoRA paper's code.
Shapes: hidden [M, D], labels [M], weight [V, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class HeadLoss(NamedTuple):
    loss: torch.Tensor
    """Sum of the smoothed loss."""
    nll: torch.Tensor
    """Sum of the plain loss."""
    hidden: torch.Tensor | None
    """Gradient of the first with respect to the hidden states [M, D], if wanted."""
    weight: torch.Tensor | None
    """The same for the weight [V, D], fp32, where it is trained."""
    added: torch.Tensor | None
    """The same for the rows of added tokens [A, D]."""


Collect = Callable[[torch.Tensor], None]
"""Takes a gradient of the whole tensor in."""
_CHUNK_LOGITS = 1 << 25
"""Elements of the logits held at a time: 128 MiB in fp32."""


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
        self.weight = original.weight
        self.bias = original.bias

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None, smoothing: float = 0.0, with_gradient: bool = False
    ) -> torch.Tensor | HeadLoss:
        """Logits [..., V] without labels; with labels [M], the loss of x [M, D] and its gradients, outside any graph."""
        if labels is None:
            logits = self._linear(x)
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return self._loss(x, labels, smoothing, with_gradient)

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.linear(x, self.weight, self.bias)
        if self.added is None:
            return logits
        ids, rows = self.added
        more = int(ids[-1]) + 1 - logits.shape[-1]
        if more > 0:
            logits = nn.functional.pad(logits, (0, more))
        return logits.index_copy(-1, ids, nn.functional.linear(x, rows.to(x.dtype)))

    @torch.no_grad()
    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor, smoothing: float, with_gradient: bool) -> HeadLoss:
        weight, softcap = self.weight, self.softcap
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        nll = torch.zeros_like(loss)
        gradient = torch.empty_like(hidden) if with_gradient else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradient and self.collect else None
        of_added = torch.zeros_like(self.added[1]) if with_gradient and self.added else None
        rows = max(1, _CHUNK_LOGITS // weight.shape[0])
        for first in range(0, len(labels), rows):
            part, label = hidden[first : first + rows], labels[first : first + rows, None]
            logits = self._linear(part).float()
            vocabulary = logits.shape[-1]
            bent = None
            if softcap is not None:
                bent = logits.div_(softcap).tanh_()
                logits = softcap * bent
            log_p = logits.log_softmax(-1)
            del logits
            part_nll = -log_p.gather(1, label).sum()
            nll += part_nll
            loss += (1.0 - smoothing) * part_nll
            if smoothing:
                loss -= smoothing / vocabulary * log_p.sum()
            if gradient is None:
                continue
            slope = log_p.exp_().sub_(smoothing / vocabulary)
            slope.scatter_add_(1, label, slope.new_full(label.shape, smoothing - 1.0))
            if bent is not None:
                slope *= bent.square_().neg_().add_(1.0)
            slope = slope.to(part.dtype)
            through = gradient[first : first + rows]
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
        return HeadLoss(loss, nll, gradient, of_weight, of_added)


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
