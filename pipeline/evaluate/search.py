"""Choosing the next token of many texts at once: greedy, beams, sampling; transformers' rules, a text at a time.

A text's choice never depends on the texts beside it. In: logits of the rows. Out: which rows go on, from which earlier row each
comes, and with which token. B texts, K beams, R = B K rows in text order, V vocabulary, C candidates of a text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from pipeline.job.spec import Decoding

_NEVER = -1.0e9
"""A score that loses to every real one, and stays a number."""


@dataclass(frozen=True)
class Choice:
    """Of one step."""

    rows: torch.Tensor
    """[R'] the earlier row that each row goes on from."""
    tokens: torch.Tensor
    """[R'] what it goes on with."""


@dataclass
class Text:
    """What one prompt has become."""

    prompt: list[int]
    room: int
    """New tokens it may have."""
    index: int
    """Of the prompt among all prompts: with the seed, all that sampling depends on."""
    rows: list[list[int]]
    """New tokens of each running beam."""
    scores: torch.Tensor
    """[K] log-probabilities of the running beams."""
    finished: list[tuple[float, list[int]]]
    """Best first, K at most: score under the length penalty, and new tokens."""
    done: bool = False


class Search:
    """The state of a batch of texts."""

    def __init__(
        self, decoding: Decoding, end_ids: tuple[int, ...], prompts: list[list[int]], rooms: list[int], indices: list[int]
    ) -> None:
        self._decoding, self._ends, self._k = decoding, frozenset(end_ids), decoding.beams
        first = torch.full((self._k,), _NEVER)
        first[0] = 0.0
        self._texts = [
            Text(prompt, room, index, [[] for _ in range(self._k)], first.clone(), [], room == 0)
            for prompt, room, index in zip(prompts, rooms, indices, strict=True)
        ]
        self.open = [text for text in self._texts if not text.done]

    def results(self) -> list[list[int]]:
        """The new tokens of each text, its end token included where there is one."""
        return [text.finished[0][1] if text.finished else text.rows[0] for text in self._texts]

    def advance(self, logits: torch.Tensor) -> Choice:
        """Takes a step with all open texts; those that are done leave the batch.

        Args:
            logits: [R, V] of the open texts' rows.
        """
        scores = logits.float()
        if self._k > 1:
            scores = scores.log_softmax(-1)
        self._ban_repeats(scores)
        choice = self._beams(scores) if self._k > 1 else self._single(scores)
        self.open = [text for text in self.open if not text.done]
        return choice

    def _single(self, scores: torch.Tensor) -> Choice:
        chosen = (self._sample(scores) if self._decoding.temperature else scores.argmax(-1)).tolist()
        rows, tokens = [], []
        for row, (text, token) in enumerate(zip(self.open, chosen, strict=True)):
            text.rows[0].append(token)
            text.done = token in self._ends or len(text.rows[0]) == text.room
            if not text.done:
                rows.append(row)
                tokens.append(token)
        return _choice(rows, tokens, scores.device)

    def _beams(self, scores: torch.Tensor) -> Choice:
        """One step of transformers' `_beam_search` for each text."""
        k, vocabulary = self._k, scores.shape[-1]
        running = torch.stack([text.scores for text in self.open]).to(scores.device)
        totals = scores.view(len(self.open), k, vocabulary) + running[:, :, None]
        # With as many candidates, k of them go on even if all others end.
        best, places = totals.flatten(1).topk(max(2, 1 + len(self._ends)) * k)
        best, places = best.cpu(), places.cpu()
        rows, tokens = [], []
        for number, text in enumerate(self.open):
            going = self._step_of(text, best[number], places[number], vocabulary)
            if not text.done:
                rows += [number * k + beam for beam, _ in going]
                tokens += [token for _, token in going]
        return _choice(rows, tokens, scores.device)

    def _step_of(self, text: Text, best: torch.Tensor, places: torch.Tensor, vocabulary: int) -> list[tuple[int, int]]:
        """Sorts a text's candidates [C] into finished and running ones. Returns (earlier beam, token) of those running."""
        k, decoding = self._k, self._decoding
        length = len(text.rows[0]) + 1
        candidates = [divmod(place, vocabulary) for place in places.tolist()]
        ends = torch.tensor([token in self._ends or length == text.room for _, token in candidates])
        full = decoding.early_stopping and len(text.finished) == k
        for place in range(k):
            if ends[place] and not full:
                beam, token = candidates[place]
                text.finished.append((float(best[place] / length**decoding.length_penalty), [*text.rows[beam], token]))
        text.finished = sorted(text.finished, key=lambda pair: -pair[0])[:k]
        scores, chosen = (best + ends * _NEVER).topk(k)
        going = [candidates[place] for place in chosen.tolist()]
        text.rows, text.scores = [[*text.rows[beam], token] for beam, token in going], scores
        # Can the best running beam, as long as it is, still beat the worst finished one?
        hopeless = len(text.finished) == k and float(scores[0] / length**decoding.length_penalty) <= text.finished[-1][0]
        text.done = bool(ends.all()) or hopeless or (decoding.early_stopping and len(text.finished) == k)
        return going

    def _ban_repeats(self, scores: torch.Tensor) -> None:
        """No n-gram of a row's text comes twice: tokens that would complete one get no chance."""
        size = self._decoding.no_repeat_ngram
        if not size:
            return
        for text_number, text in enumerate(self.open):
            before = text.prompt if self._decoding.ngram_scope == "all" else []
            for beam, new in enumerate(text.rows):
                tokens = [*before, *new]
                last = tokens[len(tokens) - size + 1 :] if size > 1 else []
                if len(tokens) + 1 < size:
                    continue
                banned = [tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == last]
                # Special tokens of a prompt have ids behind the vocabulary, and no logit.
                banned = [token for token in banned if token < scores.shape[-1]]
                scores[text_number * self._k + beam, banned] = -torch.inf

    def _sample(self, scores: torch.Tensor) -> torch.Tensor:
        """[R] tokens drawn after temperature, top-k and top-p, each row from its own stream of random numbers."""
        scores = scores / self._decoding.temperature
        ordered, order = scores.sort(-1, descending=True)
        if self._decoding.top_k:
            ordered[:, self._decoding.top_k :] = -torch.inf
        shares = ordered.softmax(-1)
        # The smallest set that has top_p together: a token stays while those before it have less.
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= self._decoding.top_p, 0.0)
        draws = torch.tensor([_uniform(self._decoding.seed, text.index, len(text.rows[0])) for text in self.open], device=scores.device)
        reached = shares.cumsum(-1)
        places = (reached < (draws * reached[:, -1])[:, None]).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        return order.gather(-1, places)[:, 0]


def _choice(rows: list[int], tokens: list[int], device: torch.device) -> Choice:
    return Choice(torch.tensor(rows, dtype=torch.long, device=device), torch.tensor(tokens, dtype=torch.long, device=device))


def _uniform(seed: int, index: int, position: int) -> float:
    """In [0, 1), a pure function: a text's draws do not depend on ranks or batches."""
    digest = hashlib.sha256(f"{seed}:{index}:{position}".encode()).digest()
    return int.from_bytes(digest[:4], "little") / 2**32
