"""Before the first step the longest examples are gone through once: what does not fit is said before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import RankError
from tests.training import delta_bytes, rows, trained, write_job


@pytest.fixture(scope="module")
def job(tmp_path_factory, gpt2_base) -> Path:
    return write_job(tmp_path_factory.mktemp("rehearsal"), gpt2_base)


def watched(ranks, job: str, run: str, room: int | None):
    """Trains where no micro-batch of more than so many tokens fits; tokens of every micro-batch that was tried, the rehearsed one first."""
    from pipeline.model.causal import Causal
    from tests.training import train_here

    kept, seen = Causal.forward, []

    def forward(self, batch=None, **others):
        seen.append(batch.tokens.numel())
        if room is not None and batch.tokens.numel() > room:
            raise torch.OutOfMemoryError("no room")
        return kept(self, batch=batch, **others)

    Causal.forward = forward
    try:
        train_here(ranks, job, run, ("train.micro_batch_tokens=80",))
    finally:
        Causal.forward = kept
    return seen


def test_it_is_of_the_longest_examples(job, ranks2, tmp_path):
    for rehearsed, *steps in ranks2.run(watched, str(job), str(tmp_path / "run"), None):
        assert 60 < max(steps) <= rehearsed <= 80


def test_what_does_not_fit_is_said_before_anything_is_written(job, ranks1, tmp_path):
    with pytest.raises(RankError, match=r"micro_batch_tokens = 80: \d+ tokens of the longest examples do not fit .* Set it to 62, or"):
        ranks1.run(watched, str(job), str(tmp_path / "run"), 60)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "state").exists()


def unrehearsed(ranks, job: str, run: str, overrides: tuple[str, ...]):
    import pipeline.run
    from tests.training import train_here

    kept, pipeline.run.rehearse = pipeline.run.rehearse, lambda *_: None
    try:
        train_here(ranks, job, run, overrides)
    finally:
        pipeline.run.rehearse = kept


@pytest.mark.parametrize(
    "overrides",
    [("methods.0.dropout=0.2",), ('methods=[{kind = "full"}]',), ("base.dtype=bf16", "train.packing=false")],
    ids=lambda o: o[0],
)
def test_it_changes_no_bit(overrides, job, ranks2, tmp_path):
    trained(ranks2, job, tmp_path / "with", *overrides)
    ranks2.run(unrehearsed, str(job), str(tmp_path / "without"), overrides)
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    assert delta_bytes(tmp_path / "with") == delta_bytes(tmp_path / "without")
