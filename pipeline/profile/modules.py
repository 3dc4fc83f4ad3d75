"""Time by module: hooks around every module's forward and backward pass, there only while they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from pipeline.profile.stopwatch import GATHER, Key, Stopwatch

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class ModuleTime:
    """Of a step, what modules within it took not counted."""

    module: str
    forward_s: float
    backward_s: float


@contextmanager
def timed_modules(root: nn.Module, stopwatch: Stopwatch) -> Iterator[None]:
    """Each module is pushed under the name it shares with its like in other layers, `transformer.h.*.mlp`; a second is its that no module
    within it took."""
    handles = []
    for path, module in root.named_modules():
        if not path:
            continue
        name = alike(path)

        def begin(*_: object, name: str = name) -> None:
            stopwatch.push(name)

        def end(*_: object, name: str = name) -> None:
            stopwatch.pop(name)

        handles += [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end),
            module.register_full_backward_pre_hook(begin),
            module.register_full_backward_hook(end),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def alike(path: str) -> str:
    """The name that a module shares with its like in other layers."""
    return _NUMBER.sub(".*", path.removeprefix("model."))


def slowest(seconds: dict[Key, float]) -> list[ModuleTime]:
    """By module, the most first.

    Args:
        seconds: of one step.
    """
    names = {name for phase, name in seconds if phase in ("forward", "backward") and name not in (phase, GATHER)}
    rows = [ModuleTime(name, *(seconds.get((phase, name), 0.0) for phase in ("forward", "backward"))) for name in names]
    return sorted(rows, key=lambda row: -row.forward_s - row.backward_s)
