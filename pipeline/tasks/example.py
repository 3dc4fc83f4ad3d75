"""The two shapes of data: text examples as a task reads them, and token sequences as a model sees them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One prompt and what should follow it."""

    prompt: str
    completion: str
    source: str
    """File and line, for messages."""


@dataclass(frozen=True)
class Sequence:
    """Token ids of one example; the loss counts those from `target_start` on."""

    tokens: tuple[int, ...]
    target_start: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def target_tokens(self) -> int:
        return len(self.tokens) - self.target_start


@dataclass(frozen=True)
class Prompt:
    """One distinct prompt of an evaluation split with all its references, in file order."""

    text: str
    references: tuple[str, ...]


def grouped(examples: list[Example]) -> list[Prompt]:
    """Examples with the same prompt are references of one prompt."""
    groups: dict[str, list[str]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example.completion)
    return [Prompt(text, tuple(references)) for text, references in groups.items()]
