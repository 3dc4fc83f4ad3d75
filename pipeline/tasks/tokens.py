"""Text -> token ids and where the loss begins: prompt, separator | completion, end token.

Prompt and completion are tokenised apart, so that the boundary of the loss is a token boundary, and at generation the model
sees exactly the prompt tokens it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.job.errors import JobError
from pipeline.tasks.example import Example, Sequence

_BATCH = 1024
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Of which a tokenizer has at least one: the fast form, SentencePiece, BPE, WordPiece, T5's, Mistral's."""


class Tokens:
    """A base's tokenizer with the task's separator.

    Args:
        folder: the base's local folder.
        separator: given the end token's text, the text between prompt and completion.

    Raises:
        JobError: the folder has no tokenizer, or one without an end token.
    """

    def __init__(self, folder: Path, separator: Callable[[str], str]) -> None:
        # transformers makes up an empty tokenizer for a folder that has none.
        if not any((folder / name).is_file() for name in _FILES):
            raise JobError(f"{folder}: no tokenizer is here ({', '.join(_FILES)}). Add the files of the base's own.")
        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a damaged file sets off: the libraries' failures have no common type
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise JobError(f"{folder}: no tokenizer can be loaded from here ({reason}). Fetch its files again.") from None
        if self._tokenizer.eos_token_id is None:
            raise JobError(f"{folder}: the tokenizer has no end token. Set eos_token in tokenizer_config.json.")
        self.end_id: int = self._tokenizer.eos_token_id
        self.end_text: str = self._tokenizer.eos_token
        self._separator = separator(self.end_text)
        special = self._tokenizer("")["input_ids"]
        self._lead: list[int] = [i for i in special[:1] if i == self._tokenizer.bos_token_id and i != self.end_id]

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of prompts with the separator, ready to be continued; an empty one becomes the end token, GPT-2's start."""
        return [self._lead + ids or [self.end_id] for ids in self._ids([text + self._separator for text in texts])]

    def sequences(self, examples: list[Example], progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> list[Sequence]:
        """Examples as token sequences, in the same order.

        Args:
            progress: wraps the iteration over batches of texts, for a progress bar.
        """
        sequences: list[Sequence] = []
        for begin in progress(range(0, len(examples), _BATCH)):
            batch = examples[begin : begin + _BATCH]
            prompts = self.prompts([example.prompt for example in batch])
            completions = self._ids([example.completion for example in batch])
            for prompt, completion in zip(prompts, completions, strict=True):
                sequences.append(Sequence((*prompt, *completion, self.end_id), len(prompt)))
        return sequences

    def text(self, ids: list[int], end_ids: tuple[int, ...]) -> str:
        """Generated ids as text, up to the first end token."""
        kept = ids[: next((place for place, token in enumerate(ids) if token in end_ids), len(ids))]
        return self._tokenizer.decode(kept, skip_special_tokens=True).strip()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def fit(
    examples: list[Example],
    sequences: list[Sequence],
    max_tokens: int,
    too_long: Literal["refuse", "truncate", "drop"],
) -> tuple[list[Example], list[Sequence], int]:
    """Applies the job's rule to sequences longer than `max_tokens`.

    Returns:
        The examples that remain, their sequences, and how many were too long.

    Raises:
        JobError: `too_long` is "refuse" and there are some, or nothing remains.
    """
    over = [index for index, sequence in enumerate(sequences) if len(sequence) > max_tokens]
    if not over:
        return examples, sequences, 0
    if too_long == "refuse":
        worst = max(over, key=lambda index: len(sequences[index]))
        raise JobError(
            f"{examples[over[0]].source}: {len(sequences[over[0]])} tokens, more than the {max_tokens} that fit; {len(over)} of "
            f"{len(sequences)} examples are too long, the longest {len(sequences[worst])} ({examples[worst].source}). "
            'Set task.too_long = "truncate" or "drop", or shorten them.'
        )
    if too_long == "truncate":
        return examples, [_truncate(sequence, max_tokens) for sequence in sequences], len(over)
    kept = [pair for pair in zip(examples, sequences, strict=True) if len(pair[1]) <= max_tokens]
    if not kept:
        raise JobError(f"{examples[0].source}: every example is longer than the {max_tokens} tokens that fit. Shorten them.")
    return [example for example, _ in kept], [sequence for _, sequence in kept], len(over)


def _truncate(sequence: Sequence, max_tokens: int) -> Sequence:
    """The prompt loses its left, so that its end and the whole completion stay; then the completion loses its end.

    At least one prompt token stays: the first target token is predicted from it.
    """
    cut = max(0, min(len(sequence) - max_tokens, sequence.target_start - 1))
    return Sequence(sequence.tokens[cut:][:max_tokens], sequence.target_start - cut)
