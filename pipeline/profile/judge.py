"""What a profile says: what the step spends its time on, what is unlike the plan, and what to change. No measuring here."""

from __future__ import annotations

from dataclasses import dataclass

_BOUND = 0.2
"""Share of a step from which on a part is worth a sentence."""
_APART = 0.15
"""How far from the plan is worth one."""
_FULL = 0.8
_PADDED = 0.1


@dataclass(frozen=True)
class Facts:
    """Of an average step."""

    shares: dict[str, float]
    """Of a step's time: data, gather, forward, backward, reduce, optimizer, other, save."""
    slowest_over_mean: float
    """Computing time of the slowest rank over that of the mean."""
    padding_share: float
    invalidations: int
    micro_batch_tokens: int
    """The job's."""
    micro_batches: float
    """Of one rank in a step."""
    sharded: bool
    whole_fits: bool
    """The plan says that the base fits whole on every rank."""
    largest_micro_batch_tokens: int | None
    """That fit, by the plan."""
    peak_bytes: int
    capacity_bytes: int
    largest_part: str
    largest_part_share: float
    advice: tuple[str, ...]
    """The plan's changes that need less memory, the first ones first."""
    predicted: dict[str, tuple[float, float]]
    """Part -> (the plan's, measured), where they are promised to be near."""


def judge(facts: Facts) -> list[str]:
    """Sentences, the most important first; each names what to change."""
    sentences = {"data": _data, "gather": _gather, "reduce": _reduce, "save": _save, "optimizer": _update}
    bound = sorted((share, name) for name, share in facts.shares.items() if name in sentences and share >= _BOUND)
    said = [f"{100 * share:.0f} % of a step is {sentences[name](facts)}" for share, name in reversed(bound)]
    if facts.invalidations:
        said.append(
            f"ZeRO-3's trace broke {facts.invalidations} times: modules ran in another order than before, so nothing was gathered ahead. "
            "That is a fault of zlora's; report it with the job."
        )
    if facts.peak_bytes > _FULL * facts.capacity_bytes:
        share, part = 100 * facts.largest_part_share, facts.largest_part.replace("_", " ")
        first = f" What helps first: {facts.advice[0]}." if facts.advice else ""
        said.append(f"memory-bound: {100 * facts.peak_bytes / facts.capacity_bytes:.0f} % is full, {share:.0f} % of it {part}.{first}")
    if facts.padding_share >= _PADDED:
        said.append(
            f"{100 * facts.padding_share:.0f} % of the computed tokens are padding: set train.packing = true where the base allows it; "
            "smaller micro-batches hold examples of like length."
        )
    for name, (plan, measured) in facts.predicted.items():
        if measured and abs(plan / measured - 1) > _APART:
            said.append(f"{name.replace('_', ' ')}: the plan said {plan / measured:.2f} times what is measured.")
    return said or [_computing(facts)]


def _computing(facts: Facts) -> str:
    share = 100 * (facts.shares.get("forward", 0.0) + facts.shares.get("backward", 0.0))
    return f"compute-bound: {share:.0f} % of a step computes, which is as it should be."


def _data(_: Facts) -> str:
    return (
        "dealing and reading examples (data-bound): the base is small beside the cost of an example, or the token cache is on a slow disk: "
        "XDG_CACHE_HOME puts it on a local one. A larger base or longer examples hide it."
    )


def _save(_: Facts) -> str:
    return "saves: training stands still for them; set train.save_every_steps higher."


def _update(_: Facts) -> str:
    return "the update: the delta is large beside the work of a step; raise train.batch_examples."


def _gather(facts: Facts) -> str:
    """A rank gathers the same bytes for a micro-batch of any size, so larger ones gather less often."""
    words = "waiting for gathered weights (gather-bound): "
    if facts.whole_fits and facts.sharded:
        return words + 'the base fits whole on every rank: memory.config = "auto" or zero0.json gathers nothing.'
    computing = facts.shares.get("forward", 0.0) + facts.shares.get("backward", 0.0)
    wanted = round(facts.micro_batch_tokens * max(1.0, facts.shares["gather"] / max(computing, 1e-9)))
    if facts.micro_batches > 1:
        most = facts.largest_micro_batch_tokens
        room = f" (the plan has room for {most:,})" if most and most > facts.micro_batch_tokens else ""
        return words + f"gathers are paid for once a micro-batch; raise train.micro_batch_tokens to {wanted:,} or more{room}."
    return (
        words
        + "a step has too few tokens to hide them; raise train.batch_examples, or use fewer ranks, or node.json to gather within nodes."
    )


def _reduce(facts: Facts) -> str:
    if facts.slowest_over_mean > 1 + _APART:
        return (
            "summing gradients, most of it waiting for the slowest rank, which computes "
            f"{facts.slowest_over_mean:.2f} times as long as the mean: is something else running there? Else raise train.batch_examples: "
            "larger steps are dealt out more evenly."
        )
    return "summing gradients: the link is slow beside the work of a step; raise train.batch_examples, or lower the rank of the delta."
