"""Loss and perplexity of a split: the mean negative log-likelihood of its target tokens over all ranks, and exp of it."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from pipeline.model.causal import Causal
from pipeline.tasks.batch import collate
from pipeline.tasks.example import Sequence
from pipeline.tasks.order import deal
from pipeline.train.engine import Ranks, StopAgreed


@torch.no_grad()
def loss_of(root: Causal, sequences: list[Sequence], ranks: Ranks, micro_batch_tokens: int, packed: bool) -> float:
    """Per target token, as in training; without label smoothing.

    Raises:
        StopAgreed: a rank was asked to stop.
    """
    dealt = deal([len(s) for s in sequences], ranks.count, micro_batch_tokens, packed)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for chosen in dealt[ranks.rank]:
        ranks.watch.at("perplexity")
        if ranks.any(ranks.stop.asked)[0]:
            raise StopAgreed
        batch = collate([sequences[i] for i in chosen], chosen, packed, ranks.device)
        total += root(batch=batch)[1].double()
    dist.all_reduce(total)
    return total.item() / sum(s.target_tokens for s in sequences)


def perplexity(loss: float) -> float:
    return math.exp(min(700.0, loss)) if math.isfinite(loss) else math.nan
