"""A split of a task as sequences, the same for training and for whoever only looks: encoded, kept in the token cache, in the job's order.

In: the task's section, the base's tokenizer. Out: `Store`, `Stream`. No ranks, no torch.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.job.section import Split
from pipeline.job.task import Conversations, OwnData, PlainText, SingleTask
from pipeline.screen import Screen
from pipeline.tasks.encode import Encoder
from pipeline.tasks.example import Source
from pipeline.tasks.held import kept
from pipeline.tasks.open import content_keys, named_split, open_split, separator_text
from pipeline.tasks.order import Stream
from pipeline.tasks.sequences import Sequences
from pipeline.tasks.store import Store, open_store
from pipeline.tasks.tokens import Tokens
from pipeline.weights.digest import digest_of


def encoder_of(task: SingleTask, tokens: Tokens, vocabulary: int, block_tokens: int, special: bool = False) -> Encoder:
    """How a task's examples become sequences.

    Args:
        vocabulary: rows of the base's embeddings.
        block_tokens: of running text.
        special: the base is an encoder, which has learnt texts between the tokenizer's own tokens.
    """
    block = block_tokens if isinstance(task, PlainText) else 0
    return Encoder(tokens, separator_text(task, tokens.end_text, special), block, vocabulary, isinstance(task, Conversations), special)


def source_of(task: SingleTask, split: Split, encoder: Encoder) -> Source:
    """A split's examples, without those that the job leaves out.

    Raises:
        JobError: the split is not there.
    """
    source = open_split(task, split)
    if split == "valid" and isinstance(task, OwnData) and task.dev_fraction is not None:
        source = kept(source, content_keys(task))
    if isinstance(task, Conversations) and task.bad_rows == "drop":
        return replace(source, read=lambda: encoder.usable(source.read()))
    return source


def split_store(task: SingleTask, split: Split, encoder: Encoder, screen: Screen) -> Store:
    """A split's sequences, from the token cache or written there first.

    Raises:
        JobError: the split is not there, is malformed or empty.
    """
    named, source = named_split(task, split), source_of(task, split, encoder)
    for file in screen.progress(f"reading {named}", source.files):
        digest_of(file)  # remembered
    settings = (content_keys(task), encoder.settings, split)
    return open_store(
        source, settings, encoder.sequences, named, lambda places, total: screen.passing(f"tokenising {named}", places, total)
    )


def stream_of(tasks: tuple[SingleTask, ...], parts: list[Sequences], seed: int) -> Stream:
    """The order in which the sources' sequences are learnt."""
    return Stream(tuple(map(len, parts)), seed, tuple(task.weight for task in tasks))
