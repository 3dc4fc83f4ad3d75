"""Names of parameters in a model <-> names of tensors in its checkpoint: exact, without the body's prefix (hub GPT-2), or as older
releases called them."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from transformers import PreTrainedModel

from pipeline.job.errors import JobError
from pipeline.model.families import Family
from pipeline.weights.index import Checkpoint, Entry


def match_names(model: PreTrainedModel, family: Family, checkpoint: Checkpoint) -> dict[str, Entry]:
    """The checkpoint entry of every parameter, tied ones once under their first name.

    Raises:
        JobError: a parameter without a tensor, a tensor without a parameter, or one of another shape.
    """
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    matched: dict[str, Entry] = {}
    used: set[str] = set()
    for name, parameter in parameters.items():
        entry = find(name, family, checkpoint)
        if entry is None:
            # A tied tensor may be stored under its other name only.
            entry = next((found for t in tied if _same(model, t, name) and (found := find(t, family, checkpoint))), None)
        if entry is None:
            raise JobError(f'{checkpoint.folder}: no tensor for parameter "{name}". Is config.json that of these weights?')
        if entry.shape != tuple(parameter.shape):
            raise JobError(
                f'{entry.file}: tensor "{entry.name}" has shape {list(entry.shape)}, the config asks for {list(parameter.shape)}. '
                "Is config.json that of these weights?"
            )
        matched[name] = entry
        used.add(entry.name)
    again = {candidate for name in tied for candidate in _candidates(name, family)}
    for name in checkpoint.entries:
        if name not in used and name not in again and not any(fnmatchcase(name, pattern) for pattern in family.ignored):
            raise JobError(
                f'{checkpoint.folder}: tensor "{name}" has no place in a {model.config.model_type}. Is config.json that of these weights?'
            )
    return matched


def find(name: str, family: Family, checkpoint: Checkpoint) -> Entry | None:
    """The tensor of a parameter, by whichever of its names."""
    return next((checkpoint.entries[found] for found in _candidates(name, family) if found in checkpoint.entries), None)


def _candidates(name: str, family: Family) -> Iterator[str]:
    """What a parameter may be called, the likeliest first."""
    for prefixed in (name, name.removeprefix(f"{family.body}."), f"{family.body}.{name}"):
        yield prefixed
        yield from (prefixed.replace(new, old) for new, old in family.renamed if new in prefixed)


def _same(model: PreTrainedModel, one: str, other: str) -> bool:
    return model.get_parameter(one) is model.get_parameter(other)
