"""Examples -> token sequences, each kind in its own way.

A prompt and its completion are tokenised apart, so that the boundary of the loss is a token boundary, and at generation the model
sees exactly the prompt tokens it was trained on. A conversation is tokenised whole, as the base's chat template renders it.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TypeVar

from pipeline.job.errors import JobError
from pipeline.tasks.chat import Template
from pipeline.tasks.example import Chat, Document, Dropped, Example, Labelled, Pair, Sequence, dropped
from pipeline.tasks.tokens import Tokens

AnyExample = TypeVar("AnyExample", bound=Example)
_WORD = "a"
_BATCH = 1024
_BATCH_CHARACTERS = 1 << 19
"""Tokenised together: the tokenizer needs some fifty bytes for each, and all cores."""


class Encoder:
    """How one task's examples become sequences.

    Args:
        separator: text between prompt and completion, or between two texts that are judged together; None: the tokenizer's own form.
        block_tokens: running text is cut into blocks of so many.
        vocabulary: rows of the base's embeddings.
        chat: prompts are conversations that the base's template has rendered.
        special: judged texts stand between the tokenizer's own tokens, as encoders have learnt them.
    """

    def __init__(
        self, tokens: Tokens, separator: str | None, block_tokens: int, vocabulary: int, chat: bool = False, special: bool = False
    ) -> None:
        self._tokens, self._separator, self._block, self._vocabulary = tokens, separator, block_tokens, vocabulary
        self._special = special
        # A template begins a text as it must be.
        self._lead, self._chat = [] if chat else tokens.lead, chat
        self._template = Template(tokens)

    @property
    def settings(self) -> tuple[object, ...]:
        """All that the sequences depend on beside the examples."""
        return self._tokens.digest, self._separator, self._block, self._vocabulary, self._special

    def asked(self, examples: list[Example]) -> list[Pair]:
        """What is generated and what is expected, where examples have that: of a conversation, the last answer."""
        return [e if isinstance(e, Pair) else self._template.last_turn(e) for e in examples if isinstance(e, Pair | Chat)]

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of prompts with the separator, ready to be continued; an empty one becomes the end token, GPT-2's start."""
        behind = self._separator or ""
        return [self._lead + ids or [self._tokens.end_id] for ids in self._tokens.ids([text + behind for text in texts])]

    def typed(self, texts: list[str]) -> list[list[int]]:
        """The same of prompts as a person types them: where the base's chat template is used, each is a user's turn."""
        return self.prompts([self._template.asked(text) for text in texts] if self._chat else texts)

    def sequences(self, examples: Iterable[Example]) -> Iterator[tuple[Sequence, str]]:
        """Each sequence and the file and line that it is from; in the order of the examples.

        Raises:
            JobError: a token that the base has no embedding for, or a conversation that its template cannot render.
        """
        for sequence, source in self._encoded(iter(examples)):
            if (largest := max(sequence.tokens)) >= self._vocabulary:
                raise JobError(
                    f"{source}: token {largest} is not among the model's {self._vocabulary} embeddings. Use the tokenizer of this base."
                )
            yield sequence, source

    def usable(self, found: Iterable[Example | Dropped]) -> Iterator[Example | Dropped]:
        """With the conversations left out that the base's template cannot render.

        Raises:
            JobError: the base has no template.
        """
        self._template.require()
        for example in found:
            try:
                if isinstance(example, Chat):
                    list(self._template.sequences([example]))
                yield example
            except JobError as error:
                yield dropped(error, example.source)

    def _encoded(self, examples: Iterator[Example]) -> Iterator[tuple[Sequence, str]]:
        for batch in _batches(examples):
            # A task's examples are all of one kind.
            match batch[0]:
                case Pair():
                    yield from self._pairs(batch)  # type: ignore[arg-type]
                case Chat():
                    yield from self._template.sequences(batch)  # type: ignore[arg-type]
                case Labelled():
                    yield from self._labelled(batch)  # type: ignore[arg-type]
                case Document():
                    yield from self._blocks(chain(batch, examples))  # type: ignore[arg-type]

    def _pairs(self, pairs: list[Pair]) -> Iterator[tuple[Sequence, str]]:
        prompts = self.prompts([pair.prompt for pair in pairs])
        completions = self._tokens.ids([pair.completion for pair in pairs])
        for pair, prompt, completion in zip(pairs, prompts, completions, strict=True):
            ids = (*prompt, *completion, self._tokens.end_id)
            yield Sequence(ids, ((len(prompt), len(ids)),)), pair.source

    def _labelled(self, examples: list[Labelled]) -> Iterator[tuple[Sequence, str]]:
        groups = [example.texts if self._separator is None else (self._separator.join(example.texts),) for example in examples]
        ids = iter(self._tokens.ids([text for group in groups for text in group]))
        for example, group in zip(examples, groups, strict=True):
            if self._special:
                yield self._between(list(islice(ids, len(group))), example.label), example.source
            else:
                # Without an end token: transformers takes the last token that is no padding, and pads with the end token.
                yield Sequence((*self._tokens.lead, *next(ids)) or (self._tokens.end_id,), (), example.label), example.source

    def _between(self, texts: list[list[int]], label: float | None) -> Sequence:
        first, *others = self._tokens.around(len(texts))
        tokens, places = [*first], []
        for ids, behind in zip(texts, others, strict=True):
            places.append((len(tokens), len(tokens) + len(ids)))
            tokens += ids + behind
        return Sequence(tuple(tokens), (), label, tuple(places))

    def _blocks(self, documents: Iterator[Document]) -> Iterator[tuple[Sequence, str]]:
        """Documents end to end, an end token after each, in blocks of equal length; the last may be shorter."""
        held: list[int] = []
        sources: list[tuple[int, str]] = []
        """Where in `held` each document begins."""
        for batch in _batches(documents):
            for document, ids in zip(batch, self._running(batch), strict=True):
                if not document.continued:
                    held += [self._tokens.end_id] * bool(sources)
                    ids = self._tokens.lead + ids
                sources.append((len(held), document.source))
                held += ids
            whole = len(held) - len(held) % self._block
            for first in range(0, whole, self._block):
                yield self._block_of(held[first : first + self._block], first, sources)
            held = held[whole:]
            sources = [(place - whole, source) for place, source in sources[_last_before(whole, sources) :]]
        held += [self._tokens.end_id] * bool(sources)
        for first in range(0, len(held), self._block):
            # A token alone has nothing that predicts it.
            if len(held) - first > 1:
                yield self._block_of(held[first : first + self._block], first, sources)

    def _running(self, documents: list[Document]) -> list[list[int]]:
        """Token ids of each. A piece gets a word before it, which is then cut off: at the start of a text some tokenizers add a blank."""
        (word,) = self._tokens.ids([_WORD])
        ids = self._tokens.ids([_WORD * document.continued + document.text for document in documents])
        return [found[len(word) * document.continued :] for found, document in zip(ids, documents, strict=True)]

    def _block_of(self, ids: list[int], first: int, sources: list[tuple[int, str]]) -> tuple[Sequence, str]:
        return Sequence(tuple(ids), ((1, len(ids)),)), sources[_last_before(first, sources)][1]


def _batches(examples: Iterator[AnyExample]) -> Iterator[list[AnyExample]]:
    """So many that the tokenizer is busy and memory is not."""
    batch: list[AnyExample] = []
    size = 0
    for example in examples:
        batch.append(example)
        size += _characters(example)
        if len(batch) == _BATCH or size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(example: Example) -> int:
    match example:
        case Pair(prompt=prompt, completion=completion):
            return len(prompt) + len(completion)
        case Chat(messages=messages):
            return sum(len(message.content) for message in messages)
        case Labelled(texts=texts):
            return sum(map(len, texts))
        case Document(text=text):
            return len(text)


def _last_before(place: int, sources: list[tuple[int, str]]) -> int:
    return max(0, bisect(sources, place, key=lambda found: found[0]) - 1)
