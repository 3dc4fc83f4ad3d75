"""A step means the same whatever the hardware: ranks, micro-batches, packing and ZeRO stage change nothing but rounding."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.training import trained, write_job

HARD = ("methods.0.dropout=0.2", "train.label_smoothing=0.1", "train.weight_decay=0.1", "train.clip_norm=0.5")
"""Everything that could depend on how a step is cut up."""

TIGHT = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""The bases here fit into every default of ZeRO-3; with these numbers each module is gathered and released at every use."""

WAYS = [
    pytest.param("ranks1", ("train.micro_batch_tokens=64",), id="1 rank x many micro-batches"),
    pytest.param("ranks2", (), id="2 ranks x 1"),
    pytest.param("ranks2", ("train.micro_batch_tokens=64",), id="2 ranks x several"),
    pytest.param("ranks2", ("train.packing=false",), id="2 ranks padded"),
    pytest.param("ranks1", ("train.packing=false", "train.micro_batch_tokens=128"), id="1 rank padded, several"),
    pytest.param("ranks1", ("memory.config=zero0.json",), id="1 rank, stage 0"),
    pytest.param("ranks2", ("memory.config=zero0.json", "train.packing=false"), id="2 ranks, stage 0, padded"),
    pytest.param("ranks2", ("memory.gradient_checkpointing=true",), id="2 ranks, gradient checkpointing"),
    pytest.param("ranks2", ("memory.config={tight}", "train.micro_batch_tokens=64"), id="2 ranks, gathered at every use"),
    pytest.param("ranks2", ("memory.config={tight}", "memory.gradient_checkpointing=true"), id="2 ranks, gathered, checkpointing"),
]


@pytest.fixture(scope="module", params=["gpt2_base", "llama_base"])
def job(request, tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("step"), request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def reference(job, ranks1, tmp_path_factory):
    return trained(ranks1, job, tmp_path_factory.mktemp("reference") / "run", *HARD)


@pytest.mark.parametrize(("pool", "changes"), WAYS)
def test_losses_and_weights_are_the_same(pool, changes, job, reference, request, tmp_path):
    tight = tmp_path / "tight.json"
    tight.write_text(json.dumps({"zero_optimization": TIGHT}))
    changes = tuple(change.format(tight=tight) for change in changes)
    other = trained(request.getfixturevalue(pool), job, tmp_path / "run", *HARD, *changes)
    np.testing.assert_allclose(other.losses, reference.losses, rtol=2e-6)
    assert other.tensors.keys() == reference.tensors.keys()
    for name, tensor in reference.tensors.items():
        np.testing.assert_allclose(other.tensors[name], tensor, atol=2e-5, err_msg=name)


def test_dropout_and_smoothing_do_something(job, reference, ranks1, tmp_path):
    plain = trained(ranks1, job, tmp_path / "run")
    assert abs(plain.losses[1] - reference.losses[1]) > 1e-3


def test_nothing_needs_to_divide(job, ranks1, ranks3, tmp_path):
    alone = trained(ranks1, job, tmp_path / "alone", "train.batch_examples=20", "train.steps=3")
    three = trained(ranks3, job, tmp_path / "three", "train.batch_examples=20", "train.steps=3")
    np.testing.assert_allclose(three.losses, alone.losses, rtol=2e-6)
    assert [row["examples"] for row in three.steps] == [20, 20, 20]


def test_a_rank_with_nothing_to_do_takes_part(job, ranks1, ranks3, tmp_path):
    alone = trained(ranks1, job, tmp_path / "alone", "train.batch_examples=2")
    three = trained(ranks3, job, tmp_path / "three", "train.batch_examples=2")
    np.testing.assert_allclose(three.losses, alone.losses, rtol=2e-6)
    for name, tensor in alone.tensors.items():
        np.testing.assert_allclose(three.tensors[name], tensor, atol=2e-5, err_msg=name)


def test_the_bases_own_dropout_is_reproducible_on_the_same_ranks(job, ranks2, tmp_path):
    noisy = [trained(ranks2, job, tmp_path / name, "train.dropout=0.3") for name in ("one", "two")]
    quiet = trained(ranks2, job, tmp_path / "quiet")
    assert noisy[0].losses == noisy[1].losses
    for name, tensor in noisy[0].tensors.items():
        assert np.array_equal(tensor, noisy[1].tensors[name]), name
    assert all(abs(a - b) > 1e-3 for a, b in zip(noisy[0].losses, quiet.losses, strict=True))


def test_the_same_run_twice_is_the_same_to_the_bit_and_another_seed_is_not(job, ranks2, tmp_path):
    one, two, other = (trained(ranks2, job, tmp_path / str(n), *HARD, f"train.seed={seed}") for n, seed in enumerate((1, 1, 2)))
    assert one.losses == two.losses
    assert all(np.array_equal(tensor, two.tensors[name]) for name, tensor in one.tensors.items())
    assert one.losses[0] != other.losses[0], "another order of examples"
