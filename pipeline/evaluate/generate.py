"""Generation over ranks: every rank continues its share of the prompts.

Where the base is whole on every rank, each goes at its own pace. Where it is sharded, every forward pass is a collective: all
ranks leave a batch together, and one that has nothing left to do keeps the others company.

Shapes: B prompts of a batch, R rows (B x beams that still run), S tokens seen so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from transformers import DynamicCache

from pipeline.evaluate.search import Search
from pipeline.job.spec import Decoding
from pipeline.model.causal import Causal, Decode
from pipeline.train.engine import Ranks, StopAgreed

_PAD = 0
"""Any token: the mask hides it."""


def generate(
    root: Causal,
    prompts: list[list[int]],
    ranks: Ranks,
    decoding: Decoding,
    end_ids: tuple[int, ...],
    context: int,
    sharded: bool,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    seen: Callable[[list[list[int]]], None] | None = None,
    place: int = 0,
    owners: list[int] | None = None,
) -> list[list[int]]:
    """Continues every prompt until an end token, `max_new_tokens` or the context's end.

    Args:
        prompts: the same list on every rank.
        context: positions the model has.
        sharded: forward passes gather the base, so all ranks must make the same ones.
        progress: wraps the iteration over batches, for a progress bar.
        seen: is handed the texts of this rank's batch so far after each pass.
        place: of the first prompt among all prompts, which sampling depends on.
        owners: the number of each prompt's delta, where many are served.

    Raises:
        StopAgreed: a rank was asked to stop.

    Returns:
        The new tokens of each prompt, end token included where there is one, on every rank.
    """
    # Like lengths together, so that little is padded; the longest first, so that what does not fit memory fails at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    shares = [_batches(order[rank :: ranks.count], prompts, decoding) for rank in range(ranks.count)]
    mine: dict[int, list[int]] = {}
    for number in progress(range(max(map(len, shares)))):
        chosen = shares[ranks.rank][number] if number < len(shares[ranks.rank]) else []
        if owners:
            # Rows of one delta are neighbours.
            chosen = sorted(chosen, key=owners.__getitem__)
        rooms = [min(decoding.max_new_tokens, context - len(prompts[i])) for i in chosen]
        search = Search(decoding, end_ids, [prompts[i] for i in chosen], rooms, [place + i for i in chosen])
        _run(root, search, ranks, context, sharded, seen, {place + i: owners[i] for i in chosen} if owners else {})
        if ranks.any(ranks.stop.asked)[0]:
            raise StopAgreed
        mine.update(zip(chosen, search.results(), strict=True))
    parts: list[dict[int, list[int]] | None] = [None] * ranks.count
    dist.all_gather_object(parts, mine)
    together = {index: tokens for part in parts if part for index, tokens in part.items()}
    return [together[index] for index in range(len(prompts))]


def _batches(share: list[int], prompts: list[list[int]], decoding: Decoding) -> list[list[int]]:
    """Runs of prompts that together stay within `batch_tokens`, one at least; a batch is as long as its first prompt."""
    batches: list[list[int]] = []
    for index in share:
        if batches:
            rows = (len(batches[-1]) + 1) * decoding.beams
            if rows * (len(prompts[batches[-1][0]]) + decoding.max_new_tokens) <= decoding.batch_tokens:
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


@torch.no_grad()
def _run(
    root: Causal,
    search: Search,
    ranks: Ranks,
    context: int,
    sharded: bool,
    seen: Callable[[list[list[int]]], None] | None,
    owners: dict[int, int],
) -> None:
    prompts = [text.prompt for text in search.open]
    beams = len(search.open[0].rows) if search.open else 1
    longest = max(map(len, prompts), default=1)
    tokens = torch.tensor([[_PAD] * (longest - len(p)) + p for p in prompts], dtype=torch.long, device=ranks.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=torch.long, device=ranks.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, first = DynamicCache(config=root.model.config), True
    while True:
        if sharded:
            remains, stop = ranks.any(bool(search.open), ranks.stop.asked)
            if stop:
                raise StopAgreed
            if not remains:
                return
            if not search.open:
                root(decode=_company(root, ranks))
                continue
        elif not search.open or ranks.stop.asked:
            return  # the ranks agree on stopping after the batch
        ranks.watch.at("generating")
        rows = 1 if first else beams
        whose = tuple(owners[text.index] for text in search.open for _ in range(rows)) if owners else ()
        (logits,) = root(decode=Decode(tokens, mask, positions, cache, whose))
        if first and beams > 1:
            logits, mask, positions = (part.repeat_interleave(beams, 0) for part in (logits, mask, positions))
            cache.batch_repeat_interleave(beams)
        first = False
        choice = search.advance(logits)
        if seen:
            seen(search.results())
        if len(choice.rows) != len(logits) or beams > 1:
            cache.reorder_cache(choice.rows)
            mask, positions = mask[choice.rows], positions[choice.rows]
        tokens = choice.tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = (positions[:, -1:] + 1).clamp(max=context - 1)


def _company(root: Causal, ranks: Ranks) -> Decode:
    """One token that nobody reads: the smallest pass that takes part in all gathers."""
    one = torch.ones(1, 1, dtype=torch.long, device=ranks.device)
    return Decode(one * _PAD, one, one * 0, DynamicCache(config=root.model.config))
