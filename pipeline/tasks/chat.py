"""Conversations in the base's chat template: which tokens are the assistant's.

A template that marks them itself (`{% generation %}`) is taken at its word. With any other, a turn of the assistant's is what the template
adds when the turn is there, after the text with which it asks for one. The token ids are those of the template's text as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from jinja2 import TemplateError

from pipeline.job.errors import JobError
from pipeline.tasks.example import ASSISTANT, Chat, Message, Pair, Sequence
from pipeline.tasks.tokens import Tokens

Span = tuple[int, int]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Template:
    """A base's chat template."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._tokenizer = tokens.tokenizer

    def sequences(self, chats: list[Chat]) -> Iterator[tuple[Sequence, str]]:
        """Raises:
        JobError: the base has no template, or it cannot render a conversation so that the assistant's turns are known."""
        self.require()
        marked = _MARKS.search(str(self._tokenizer.get_chat_template()))
        for chat, sequence in zip(chats, map(self._marked, chats) if marked else self._found(chats), strict=True):
            yield sequence, chat.source

    def last_turn(self, chat: Chat) -> Pair:
        """The assistant's last turn as what is to be generated, and all before it, rendered, as its prompt."""
        self.require()
        place = _last_answer(chat)
        return Pair(self._render(chat, place, ask=True), chat.messages[place].content, chat.source)

    def asked(self, text: str) -> str:
        """A user's only turn, rendered, ready to be answered."""
        self.require()
        return self._render(Chat((Message("user", text),), "the prompt"), 1, ask=True)

    def require(self) -> None:
        """Raises:
        JobError: the base has no template that can be used."""
        if self._tokenizer.chat_template is None:
            raise JobError(
                f'{self._tokens.folder}: the base has no chat template, which task.kind = "chat" needs. '
                "Use an instruct base, or put a chat_template.jinja into the folder."
            )
        try:
            self._tokenizer.get_chat_template()
        except ValueError:
            raise JobError(f'{self._tokens.folder}: the base has several chat templates, none called "default". Keep one.') from None
        if not self._tokenizer.is_fast:
            raise JobError(f"{self._tokens.folder}: its tokenizer has no fast form (tokenizer.json), which conversations need. Convert it.")

    def _marked(self, chat: Chat) -> Sequence:
        if not _last_answer(chat):
            raise _nothing_asks(chat)
        output = self._apply(chat, len(chat.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, learnt = output["input_ids"], output["assistant_masks"]
        return _sequence(ids, [place for place, mark in enumerate(learnt) if mark], chat)

    def _found(self, chats: list[Chat]) -> Iterator[Sequence]:
        texts = [self._render(chat, len(chat.messages)) for chat in chats]
        output = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for chat, text, ids, offsets in zip(chats, texts, output["input_ids"], output["offset_mapping"], strict=True):
            spans = [self._turn(chat, place, text) for place, message in enumerate(chat.messages) if message.role == ASSISTANT]
            inside = [any(begin <= first < last <= end for begin, end in spans) for first, last in offsets]
            yield _sequence(ids, [place for place, mark in enumerate(inside) if mark], chat)

    def _turn(self, chat: Chat, place: int, text: str) -> Span:
        """Characters of a turn, with what the template ends it with; white space behind that is the next turn's."""
        before, whole = self._render(chat, place, ask=True), self._render(chat, place + 1)
        if not whole.startswith(before) or not text.startswith(whole.rstrip()):
            raise JobError(
                f"{chat.source}: the base's chat template renders turn {place + 1} differently when others follow, so it is not known "
                "what the assistant would have written. Use a template with {% generation %}, or conversations with one answer, at the end."
            )
        ended = whole.rstrip()
        only_content = ended.endswith(chat.messages[place].content.rstrip())
        return len(before), len(whole) if only_content and text.startswith(whole) else len(ended)

    def _render(self, chat: Chat, turns: int, ask: bool = False) -> str:
        if not turns:
            raise _nothing_asks(chat)
        return str(self._apply(chat, turns, tokenize=False, add_generation_prompt=ask))

    def _apply(self, chat: Chat, turns: int, **options: Any) -> Any:
        messages = [{"role": message.role, "content": message.content} for message in chat.messages[:turns]]
        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise JobError(f"{chat.source}: the base's chat template refuses this conversation ({reason}). Mend or remove it.") from None


def _last_answer(chat: Chat) -> int:
    """Which turn is the assistant's last."""
    return max(place for place, message in enumerate(chat.messages) if message.role == ASSISTANT)


def _nothing_asks(chat: Chat) -> JobError:
    return JobError(f"{chat.source}: the first turn is the assistant's: nothing asks for it. Put a turn before it.")


def _sequence(ids: list[int], learnt: list[int], chat: Chat) -> Sequence:
    """Runs of neighbouring tokens as spans."""
    runs = [[place for _, place in group] for _, group in groupby(enumerate(learnt), key=lambda numbered: numbered[1] - numbered[0])]
    spans = tuple((max(1, run[0]), run[-1] + 1) for run in runs if run[-1] >= 1)
    if not spans:
        raise JobError(f"{chat.source}: no token of an assistant's turn is in the rendered conversation. Mend or remove it.")
    return Sequence(tuple(ids), spans)
