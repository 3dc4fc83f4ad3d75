"""fp32, bf16 and fp16; the loss scale; divergence."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ranks import RankError
from tests.training import train_here, trained, write_job


@pytest.fixture(scope="module")
def job(gpt2_base, tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("precision"), gpt2_base)


@pytest.fixture(scope="module")
def exact(job, ranks2, tmp_path_factory):
    return trained(ranks2, job, tmp_path_factory.mktemp("exact") / "run", "train.steps=8")


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.03), ("fp16", 0.005)])
def test_low_precision_follows_fp32(dtype, tolerance, job, exact, ranks2, tmp_path):
    low = trained(ranks2, job, tmp_path / "run", "train.steps=8", f'base.dtype="{dtype}"')
    np.testing.assert_allclose(low.losses, exact.losses, rtol=tolerance)
    assert low.losses != exact.losses
    assert {tensor.dtype for tensor in low.tensors.values()} == {np.dtype("float32")}


def test_fp16_scales_the_loss_and_nothing_else_does(job, exact, ranks2, tmp_path):
    low = trained(ranks2, job, tmp_path / "run", 'base.dtype="fp16"')
    assert {row["loss_scale"] for row in low.steps} == {65536.0}
    assert {row["loss_scale"] for row in exact.steps} == {1.0}
    assert low.steps[-1]["skipped_steps"] == 0


def train_from_scale(ranks, job, run, overrides, scale):
    from pipeline.train import step

    before, step._FIRST_SCALE = step._FIRST_SCALE, scale
    try:
        train_here(ranks, job, run, overrides)
    finally:
        step._FIRST_SCALE = before


def test_steps_out_of_range_are_skipped_counted_and_harmless(job, ranks2, tmp_path):
    import json

    overrides = ('base.dtype="fp16"', "train.steps=12", 'train.schedule="constant"')
    ranks2.run(train_from_scale, str(job), str(tmp_path / "run"), overrides, 2.0**28)
    rows = [
        row
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "loss" in row and "split" not in row
    ]
    skipped = [row["skipped_steps"] for row in rows]
    scales = [row["loss_scale"] for row in rows]
    assert 1 <= skipped[-1] < 12
    assert skipped == sorted(skipped)
    assert scales[skipped[-1]] == 2.0**28 / 2 ** skipped[-1]
    assert len(set(scales[skipped[-1] :])) == 1
    # The first step that is not skipped starts from the untouched delta: its loss is what fp32 has for those examples.
    first = rows[skipped[-1]]
    untouched = trained(ranks2, job, tmp_path / "fp32", "train.steps=12", "train.learning_rate=1e-12")
    assert first["loss"] == pytest.approx(untouched.losses[skipped[-1]], rel=0.005)


def test_divergence_stops_the_run_and_says_what_to_do(job, ranks2, tmp_path):
    said = r"Diverged: step \d+: the loss is nan; so it was first in step 2 \(.*train.jsonl:\d+.* lower train.learning_rate"
    with pytest.raises(RankError, match=said):
        trained(ranks2, job, tmp_path / "run", "train.learning_rate=1e30", "train.clip_norm=0")


def test_bf16_is_refused_by_name_on_a_gpu_without_it(monkeypatch):
    import torch

    from pipeline.job.errors import JobError
    from pipeline.model.build import require_dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    with pytest.raises(JobError, match=r'bf16.*Tesla V100.*Use "fp16"'):
        require_dtype("bf16", torch.device("cuda", 0))
    assert require_dtype("fp16", torch.device("cuda", 0)) == torch.float16
    assert require_dtype("bf16", torch.device("cpu")) == torch.bfloat16
