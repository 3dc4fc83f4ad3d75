"""A base's tokenizer: text -> token ids, and generated ids -> text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.job.errors import JobError
from pipeline.weights.digest import sha256_of

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model", "tekken.json")
"""Of which a tokenizer has at least one: the fast form, SentencePiece, BPE, WordPiece, T5's, DeBERTa's, Mistral's."""
_MORE_FILES = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@dataclass(frozen=True)
class NewTokens:
    """Tokens beside a tokenizer's own."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    """Ascending."""


def vocabulary_with(embeddings: int, new: NewTokens | None) -> int:
    """Ids that a model with so many embeddings knows, new tokens included: they may be among its rows, or come behind them."""
    return max(embeddings, new.ids[-1] + 1) if new else embeddings


class Tokens:
    """A base's tokenizer.

    Args:
        folder: the base's local folder.
        added: tokens beside its own.

    Raises:
        JobError: the folder has no tokenizer, or it has one of the added tokens already.
    """

    def __init__(self, folder: Path, added: tuple[str, ...] = ()) -> None:
        # transformers makes up an empty tokenizer for a folder that has none.
        if not any((folder / name).is_file() for name in _FILES):
            raise JobError(f"{folder}: no tokenizer is here ({', '.join(_FILES)}). Add the files of the base's own.")
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a damaged file sets off: the libraries' failures have no common type
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise JobError(f"{folder}: no tokenizer can be loaded from here ({reason}). Fetch its files again.") from None
        self.folder = folder
        known = self.tokenizer.get_vocab() if added else {}
        if again := next((token for place, token in enumerate(added) if token in known or token in added[:place]), None):
            raise JobError(f'base.added_tokens: "{again}" is a token already. Leave it out.', everywhere=True)
        self.tokenizer.add_tokens(list(added))
        self.new = NewTokens(added, tuple(self.tokenizer.convert_tokens_to_ids(list(added)))) if added else None
        special = self.tokenizer("")["input_ids"]
        self.lead: list[int] = [i for i in special[:1] if i == self.tokenizer.bos_token_id and i != self.tokenizer.eos_token_id]
        """What every text begins with: the tokenizer's start token, or nothing."""

    @property
    def end_id(self) -> int:
        """What ends a text.

        Raises:
            JobError: see `require_end`.
        """
        self.require_end()
        return int(self.tokenizer.eos_token_id)

    def require_end(self) -> None:
        """Raises:
        JobError: the tokenizer has no end token. Those of encoders need none."""
        if self.tokenizer.eos_token_id is None:
            raise JobError(f"{self.folder}: the tokenizer has no end token. Set eos_token in tokenizer_config.json.")

    @property
    def end_text(self) -> str:
        return str(self.tokenizer.eos_token)

    @cache  # noqa: B019  (as long-lived as the program)
    def around(self, texts: int) -> list[list[int]]:
        """The tokenizer's own tokens of one text or two: before the first, between, behind the last.

        Raises:
            JobError: it does not keep the texts apart.
        """
        word = self.ids(["a"])[0]
        left, runs = list(self.tokenizer(*["a"] * texts)["input_ids"]), []
        for _ in range(texts):
            place = next((place for place in range(len(left)) if left[place : place + len(word)] == word), None)
            if place is None:
                raise JobError(f"{self.folder}: the tokenizer joins texts in a way that is not known. Set task.separator.")
            runs.append(left[:place])
            left = left[place + len(word) :]
        return [*runs, left]

    @cached_property
    def digest(self) -> str:
        """Of all that decides which ids a text becomes."""
        files = [(name, sha256_of(self.folder / name)) for name in (*_FILES, *_MORE_FILES) if (self.folder / name).is_file()]
        about = (type(self.tokenizer).__name__, transformers.__version__, tokenizers.__version__, files, self.new)
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Of each text, with no special tokens added."""
        if not self.tokenizer.is_fast:
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        fast = self.tokenizer.backend_tokenizer
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = self.tokenizer.split_special_tokens
        # transformers' own call works out where each token stands in the text, too.
        return [found.ids for found in fast.encode_batch_fast(texts, add_special_tokens=False)]

    def pieces(self, ids: list[int]) -> list[str]:
        """The text that each token adds, special tokens included; bytes of one character come with the last of its tokens."""
        found: list[str] = []
        before = start = 0
        for place in range(1, len(ids) + 1):
            # With the tokens before it: many tokenizers drop a space where a text begins.
            known, now = self._exactly(ids[before:start]), self._exactly(ids[before:place])
            if now.endswith("\ufffd") and place < len(ids):
                found.append("")
                continue
            found.append(now[len(known) :])
            before, start = start, place
        return found

    def _exactly(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: start, end, roles of a conversation."""
        marked = (token for token, about in self.tokenizer.added_tokens_decoder.items() if about.special)
        return frozenset((*self.tokenizer.all_special_ids, *marked))

    def text(self, ids: list[int], end_ids: tuple[int, ...]) -> str:
        """Generated ids as text, up to the first end token."""
        kept = ids[: next((place for place, token in enumerate(ids) if token in end_ids), len(ids))]
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()
