"""A base, with a delta or without, on these ranks: prompts in, texts out. No job and no run folder.

The model sees a prompt exactly as in training: the delta's manifest says what stands between prompt and completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from pipeline.evaluate.gather import choose
from pipeline.evaluate.generate import generate
from pipeline.job.errors import JobError
from pipeline.job.spec import Decoding, Dtype
from pipeline.job.zero import deepspeed_config
from pipeline.methods.files import refuse_other_base
from pipeline.methods.stored import attach_stored, methods_of
from pipeline.model.build import TORCH_DTYPES, require_dtype
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.families import refuse_encoder
from pipeline.model.load import load_base
from pipeline.screen import Screen
from pipeline.tasks.encode import Encoder
from pipeline.tasks.prompts import Asked
from pipeline.tasks.specials import Specials, specials_of
from pipeline.tasks.tokens import Tokens, vocabulary_with
from pipeline.train.engine import Engine, Ranks, one_rank_first
from pipeline.weights.delta import read_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.hub import local_base
from pipeline.weights.index import Checkpoint, open_checkpoint
from pipeline.weights.manifest import Manifest, delta_folder

TooLong = Literal["refuse", "truncate"]


@dataclass(frozen=True)
class Source:
    """Which model is meant."""

    base: str
    """Folder or hub id."""
    revision: str | None
    delta: Path | None
    """A delta folder, or the run folder that holds it."""
    separator: str | None
    """Between prompt and completion; None: the delta's own, or none."""
    dtype: Dtype | None
    """None: what the delta was trained with, or what the base is stored in."""
    memory: Path
    """The DeepSpeed file."""


@dataclass(frozen=True)
class Generator:
    ranks: Ranks
    screen: Screen
    source: Source
    dtype: Dtype
    manifest: Manifest | None
    """Of the delta."""
    separator: str
    tokens: Tokens
    encoder: Encoder
    vocabulary: int
    """Ids that the model knows."""
    specials: Specials | None
    """What stands around every prompt, by the delta's methods."""
    root: Causal
    engine: Engine
    decoding: Decoding
    too_long: TooLong

    @contextmanager
    def ready(self) -> Iterator[Ready]:
        """Gathers the sharded base for as long as the block runs, where it fits."""
        self.root.eval()
        self.engine.release()
        gathering = choose(self.root, self.decoding, self.ranks)
        with gathering.held(self.root):
            yield Ready(self, gathering.each_pass)

    def prompt_tokens(self, asked: list[Asked]) -> list[list[int]]:
        """Raises:
        JobError: a prompt that leaves no room for an answer, by its line; a token that the model has not."""
        context, room = self.root.context - len(self.specials or ()), self.decoding.max_new_tokens
        found = []
        for one, ids in zip(asked, self.encoder.typed([one.prompt for one in asked]), strict=True):
            if max(ids) >= self.vocabulary:
                raise JobError(
                    f"{one.source}: token {max(ids)} is not among the model's {self.vocabulary} embeddings. "
                    "Use the tokenizer of this base.",
                    everywhere=True,
                )
            if len(ids) >= context and self.too_long == "refuse":
                raise JobError(
                    f"{one.source}: {len(ids)} tokens with the separator, which leaves no room for an answer in the base's {context}. "
                    'Shorten it, or use "--too-long truncate", which cuts its left.',
                    everywhere=True,
                )
            # As evaluation does: what fits stays whole, even where an answer of full length does not.
            fitted = ids[-max(1, context - room) :] if len(ids) >= context else ids
            found.append(self.specials.prompt(fitted) if self.specials else fitted)
        return found


@dataclass(frozen=True)
class Ready:
    generator: Generator
    each_pass: bool

    def answers(
        self,
        asked: list[Asked],
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
        seen: Callable[[str], None] | None = None,
        place: int = 0,
    ) -> list[str]:
        """One text a prompt, on every rank.

        Args:
            progress: wraps the iteration over batches, for a progress bar.
            seen: with one prompt and one beam, is handed the text so far after each token, on the first rank.
            place: of the first prompt among all, which sampling depends on.

        Raises:
            StopAgreed: a rank was asked to stop.
        """
        own = self.generator
        tokens, decoding, context = own.tokens, own.decoding, own.root.context
        ends = (tokens.end_id, *decoding.eos_tokens)
        told = None if seen is None or decoding.beams > 1 else lambda texts: seen(tokens.text(texts[0], ends))
        prompts = own.prompt_tokens(asked)
        ids = generate(own.root, prompts, own.ranks, decoding, ends, context, self.each_pass, progress, told, place)
        return [tokens.text(new, ends) for new in ids]


def open_generator(source: Source, decoding: Decoding, too_long: TooLong, ranks: Ranks, screen: Screen) -> Generator:
    """Loads the base onto these ranks and puts the delta on.

    Raises:
        JobError: no such base or delta, a delta of another base, a delta whose separator is not known.
    """
    zero = deepspeed_config(source.memory)
    folder = one_rank_first(ranks, lambda: local_base(source.base, source.revision))
    config, checkpoint = read_config(folder), open_checkpoint(folder)
    refuse_encoder(config, "generating")
    delta = delta_folder(source.delta) if source.delta else None
    stored = read_delta(delta) if delta else None
    manifest = stored.manifest if stored else None
    if manifest and manifest.head:
        raise JobError(f"{delta}: has a head for labels and generates no text. Score it with zlora evaluate.", everywhere=True)
    separator = _separator(source.separator, manifest, delta)
    tokens = Tokens(folder, manifest.added.tokens if manifest and manifest.added else ())
    vocabulary = vocabulary_with(config.vocab_size, tokens.new)
    tokens.require_end()
    encoder = Encoder(tokens, separator, 0, vocabulary, chat=manifest is not None and manifest.chat)
    dtype = source.dtype or _default_dtype(manifest, checkpoint, ranks.device)
    # Beside loading; remembered for the next time.
    digests = ThreadPoolExecutor(1).submit(file_digests, checkpoint.files) if manifest and ranks.first else None
    loading = "loading the base"
    torch_dtype = require_dtype(dtype, ranks.device)
    base = load_base(
        folder, config, torch_dtype, ranks.device, zero, progress=lambda names: ranks.watch.over(loading, screen.progress(loading, names))
    )
    if stored and delta:
        digest = [base_digest(digests.result()) if digests else ""]
        dist.broadcast_object_list(digest)
        refuse_other_base(stored.manifest, delta, digest[0])
        attach_stored(base, stored, delta, ranks.device)
    root = Causal(base.model, base.family)
    specials = specials_of(methods_of(stored.manifest, delta), vocabulary) if stored and delta else None
    engine = Engine(root, zero)
    return Generator(
        ranks, screen, source, dtype, manifest, separator, tokens, encoder, vocabulary, specials, root, engine, decoding, too_long
    )


def _separator(asked: str | None, manifest: Manifest | None, delta: Path | None) -> str:
    if asked is not None or manifest is None:
        return asked or ""
    if manifest.separator is None:
        raise JobError(
            f"{delta}: was trained on several kinds of prompts, so it is not known what ends one. Give it: "
            "--separator '<|endoftext|>' for E2E, WebNLG and DART with GPT-2, --separator '' for none."
        )
    return manifest.separator


def _default_dtype(manifest: Manifest | None, checkpoint: Checkpoint, device: torch.device) -> Dtype:
    names: dict[str, Dtype] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
    stored: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        stored[entry.dtype] = stored.get(entry.dtype, 0) + entry.bytes
    most = max(stored, key=lambda dtype: stored[dtype])
    found = next((name for name, dtype in TORCH_DTYPES.items() if dtype == most), "fp32")
    if manifest and manifest.dtype in names:
        found = manifest.dtype
    if device.type == "cpu":
        return names["fp32" if found == "fp16" else found]
    return names["fp16" if found == "bf16" and torch.cuda.get_device_capability(device) < (8, 0) else found]
