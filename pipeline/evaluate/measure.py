"""One pass over a split's sequences: the mean loss over all ranks, and what a head puts out for each."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from pipeline.model.causal import Causal
from pipeline.tasks.batch import collate
from pipeline.tasks.order import deal
from pipeline.tasks.sequences import Sequences
from pipeline.train.engine import Ranks, StopAgreed


@torch.no_grad()
def measure(root: Causal, sequences: Sequences, ranks: Ranks, micro_batch_tokens: int, packed: bool) -> tuple[float, list[list[float]]]:
    """The loss per target token or label, as in training but without label smoothing; NaN where all labels are withheld.

    Returns:
        The loss, and of each sequence the head's outputs, where there is a head; on every rank.

    Raises:
        StopAgreed: a rank was asked to stop.
    """
    dealt = deal([sequences.tokens(i) for i in range(len(sequences))], ranks.count, micro_batch_tokens, packed)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    mine: dict[int, list[float]] = {}
    for chosen in dealt[ranks.rank]:
        ranks.watch.at("loss")
        if ranks.any(ranks.stop.asked)[0]:
            raise StopAgreed
        _, loss, *outputs = root(batch=collate([sequences[i] for i in chosen], chosen, packed, ranks.device))
        total += loss.double()
        if outputs:
            mine.update(zip(chosen, outputs[0].tolist(), strict=True))
    dist.all_reduce(total)
    targets = sum(sequences.targets(i) for i in range(len(sequences)))
    loss = total.item() / targets if targets else math.nan
    if not root.has_readout:
        return loss, []
    parts: list[dict[int, list[float]]] = [{}] * ranks.count
    dist.all_gather_object(parts, mine)
    together = {index: found for part in parts for index, found in part.items()}
    return loss, [together[index] for index in range(len(sequences))]


def perplexity(loss: float) -> float:
    """exp of the loss per token."""
    return math.exp(min(700.0, loss)) if math.isfinite(loss) else math.nan
