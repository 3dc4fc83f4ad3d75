"""Greedy generation on a sharded base: all ranks leave the loop together, because every forward pass is a collective.

Shapes: B prompts of a batch, S tokens seen so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from transformers import DynamicCache

from pipeline.model.causal import Causal, Decode
from pipeline.train.engine import Ranks, StopAgreed


def generate_greedy(
    root: Causal,
    prompts: list[list[int]],
    ranks: Ranks,
    batch_prompts: int,
    max_new_tokens: int,
    context: int,
    end_id: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[list[int]]:
    """Continues every prompt until its end token, `max_new_tokens` or the context's end.

    Args:
        prompts: the same list on every rank; each rank generates its share.
        context: positions the model has.
        progress: wraps the iteration over batches, for a progress bar.

    Raises:
        StopAgreed: a rank was asked to stop.

    Returns:
        The new tokens of each prompt, end token included where there is one, on every rank.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    share = order[ranks.rank :: ranks.count]
    rounds = -(-len(order[:: ranks.count]) // batch_prompts)
    mine: dict[int, list[int]] = {}
    for number in progress(range(rounds)):
        chosen = share[number * batch_prompts : (number + 1) * batch_prompts]
        texts = _continue(root, [prompts[i] for i in chosen] or [[end_id]], ranks, max_new_tokens if chosen else 0, context, end_id)
        mine.update(zip(chosen, texts, strict=False))
    parts: list[dict[int, list[int]] | None] = [None] * ranks.count
    dist.all_gather_object(parts, mine)
    together = {index: tokens for part in parts if part for index, tokens in part.items()}
    return [together[index] for index in range(len(prompts))]


@torch.no_grad()
def _continue(root: Causal, prompts: list[list[int]], ranks: Ranks, max_new_tokens: int, context: int, end_id: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[end_id] * (longest - len(p)) + p for p in prompts], device=ranks.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=ranks.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=root.model.config)
    new: list[list[int]] = [[] for _ in prompts]
    room = [min(max_new_tokens, context - len(p)) for p in prompts]
    while True:
        open_rows = [row for row, text in enumerate(new) if len(text) < room[row] and (not text or text[-1] != end_id)]
        remains, stop = ranks.any(bool(open_rows), ranks.stop.asked)
        if stop:
            raise StopAgreed
        if not remains:
            return new
        ranks.watch.at("generating")
        (logits,) = root(decode=Decode(tokens, mask, positions, cache))
        chosen = logits.argmax(-1)
        for row, token in zip(open_rows, chosen[open_rows].tolist(), strict=True):
            new[row].append(token)
        tokens = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        # Rows that are done keep the others company; their positions must stay inside the table.
        positions = (positions[:, -1:] + 1).clamp(max=context - 1)
