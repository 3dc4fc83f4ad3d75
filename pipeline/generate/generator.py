"""A base, with deltas or without, on these ranks: prompts in, texts out. No job and no run folder.

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
from pipeline.generate.served import Found, Served, dtype_of, read_deltas, serve
from pipeline.job.errors import JobError
from pipeline.job.spec import Decoding, Dtype
from pipeline.job.zero import deepspeed_config
from pipeline.methods.files import refuse_other_base
from pipeline.methods.mixed import attach_many
from pipeline.methods.stored import attach_stored, methods_of
from pipeline.model.build import require_dtype
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.families import refuse_encoder
from pipeline.model.load import LoadedBase, load_base
from pipeline.model.routing import Routing
from pipeline.screen import Screen
from pipeline.tasks.prompts import Asked
from pipeline.tasks.specials import Specials, specials_of
from pipeline.tasks.tokens import Tokens, vocabulary_with
from pipeline.train.engine import Engine, Ranks, one_rank_first
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.hub import local_base
from pipeline.weights.index import open_checkpoint

TooLong = Literal["refuse", "truncate"]


@dataclass(frozen=True)
class Source:
    """Which model is meant."""

    base: str
    """Folder or hub id."""
    revision: str | None
    deltas: dict[str | None, Path]
    """By name, delta folders or the run folders that hold them; under None the only one, which then has no name."""
    separator: str | None
    """Between prompt and completion; None: each delta's own, or none."""
    dtype: Dtype | None
    """None: what the deltas were trained with, or what the base is stored in."""
    memory: Path
    """The DeepSpeed file."""


@dataclass(frozen=True)
class Generator:
    ranks: Ranks
    screen: Screen
    source: Source
    dtype: Dtype
    served: dict[str | None, Served]
    """By what a prompt asks for."""
    tokens: Tokens
    vocabulary: int
    """Ids that the model knows."""
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
        ids: dict[int, list[int]] = {}
        for name, served in self.served.items():
            places = [place for place, one in enumerate(asked) if one.delta == name]
            ids |= zip(places, served.encoder.typed([asked[place].prompt for place in places]), strict=True)
        return [self._fitted(one, ids[place], self.served[one.delta].specials) for place, one in enumerate(asked)]

    def _fitted(self, one: Asked, ids: list[int], specials: Specials | None) -> list[int]:
        context, room = self.root.context - len(specials or ()), self.decoding.max_new_tokens
        if max(ids) >= self.vocabulary:
            raise JobError(
                f"{one.source}: token {max(ids)} is not among the model's {self.vocabulary} embeddings. Use the tokenizer of this base.",
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
        return specials.prompt(fitted) if specials else fitted


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
        owners = [own.served[one.delta].number for one in asked]
        ids = generate(own.root, prompts, own.ranks, decoding, ends, context, self.each_pass, progress, told, place, owners)
        return [tokens.text(new, ends) for new in ids]


def open_generator(source: Source, decoding: Decoding, too_long: TooLong, ranks: Ranks, screen: Screen) -> Generator:
    """Loads the base onto these ranks and puts the deltas on.

    Raises:
        JobError: no such base or delta, a delta of another base, one whose separator is not known, one that does not mix with others.
    """
    zero = deepspeed_config(source.memory)
    folder = one_rank_first(ranks, lambda: local_base(source.base, source.revision))
    config, checkpoint = read_config(folder), open_checkpoint(folder)
    refuse_encoder(config, "generating")
    deltas = read_deltas(source.deltas, source.separator)
    alone = deltas.get(None)
    added = alone.stored.manifest.added if alone else None
    tokens = Tokens(folder, added.tokens if added else ())
    vocabulary = vocabulary_with(config.vocab_size, tokens.new)
    tokens.require_end()
    dtype = source.dtype or dtype_of(deltas, checkpoint, ranks.device)
    # Beside loading; remembered for the next time.
    digests = ThreadPoolExecutor(1).submit(file_digests, checkpoint.files) if deltas and ranks.first else None
    loading = "loading the base"
    torch_dtype = require_dtype(dtype, ranks.device)
    base = load_base(
        folder, config, torch_dtype, ranks.device, zero, progress=lambda names: ranks.watch.over(loading, screen.progress(loading, names))
    )
    if deltas:
        digest = [base_digest(digests.result()) if digests else ""]
        dist.broadcast_object_list(digest)
        for one in deltas.values():
            refuse_other_base(one.stored.manifest, one.folder, digest[0])
    routing, specials = _attach(base, deltas, vocabulary, ranks.device)
    served = serve(source.deltas, deltas, specials, tokens, vocabulary, source.separator)
    root = Causal(base.model, base.family, routing=routing)
    return Generator(ranks, screen, source, dtype, served, tokens, vocabulary, root, Engine(root, zero), decoding, too_long)


def _attach(
    base: LoadedBase, deltas: dict[str | None, Found], vocabulary: int, device: torch.device
) -> tuple[Routing | None, dict[str | None, Specials | None]]:
    """What says whose the rows of a batch are, where deltas are mixed; and what stands around the prompts of each."""
    if alone := deltas.get(None):
        attach_stored(base, alone.stored, alone.folder, device)
        return None, {None: specials_of(methods_of(alone.stored.manifest, alone.folder), vocabulary)}
    routing, specials = attach_many(base, [(one.folder, one.stored) for one in deltas.values()], device)
    return routing, dict(zip(deltas, specials, strict=True))
