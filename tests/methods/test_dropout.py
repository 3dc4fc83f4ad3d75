"""Dropout that belongs to the example: right rates, no dependence on layout, a new mask for every step, layer, example and seed."""

from __future__ import annotations

import pytest
import torch

from pipeline.methods.dropout import DropoutClock, keyed_dropout
from pipeline.tasks.batch import collate
from tests.tasks.making import learnt_from


def keys(ids, lengths, packed=True):
    return collate([learnt_from(range(n), 1) for n in lengths], ids, packed, torch.device("cpu")).keys


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_rates_along_every_axis(probability):
    clock = DropoutClock(seed=3, step=5, keys=keys(list(range(8)), [64] * 8))
    kept = keyed_dropout(torch.ones(512, 768), probability, clock, layer=2) > 0
    assert kept.float().mean() == pytest.approx(1 - probability, abs=0.004)
    # Along each axis every mean is a binomial draw: its spread must be that of independent bits.
    for axis, count in ((0, 512), (1, 768)):
        spread = kept.float().mean(axis).std()
        assert spread == pytest.approx((probability * (1 - probability) / count) ** 0.5, rel=0.25)


def test_the_scale_keeps_the_mean():
    clock = DropoutClock(seed=3, step=5, keys=keys([1], [512]))
    out = keyed_dropout(torch.full((512, 512), 2.0), 0.2, clock, layer=0)
    assert set(out.unique().tolist()) == {0.0, 2.5}


def test_the_mask_follows_the_example_not_its_place():
    x = torch.ones(1, 64)
    together = DropoutClock(seed=1, step=1, keys=keys([7, 9], [5, 8]))
    alone = DropoutClock(seed=1, step=1, keys=keys([9], [8]))
    padded = DropoutClock(seed=1, step=1, keys=keys([7, 9], [5, 8], packed=False))
    packed_rows = keyed_dropout(x.expand(13, 64), 0.5, together, 0)[5:]
    assert torch.equal(packed_rows, keyed_dropout(x.expand(8, 64), 0.5, alone, 0))
    assert torch.equal(packed_rows, keyed_dropout(x.expand(16, 64), 0.5, padded, 0)[8:])


def test_masks_differ_by_seed_step_layer_example_and_position():
    x = torch.ones(32, 256)
    base = {"seed": 1, "step": 1, "ids": [3], "layer": 4}
    masks = []
    for change in ({}, {"seed": 2}, {"step": 2}, {"layer": 5}, {"ids": [4]}):
        asked = {**base, **change}
        clock = DropoutClock(asked["seed"], asked["step"], keys(asked["ids"], [32]))
        masks.append(keyed_dropout(x, 0.5, clock, asked["layer"]) > 0)
    masks += [mask.roll(1, 0) for mask in masks[:1]]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert (one == other).float().mean() == pytest.approx(0.5, abs=0.03)


def test_evaluation_has_no_dropout():
    x = torch.randn(4, 8)
    assert keyed_dropout(x, 0.5, DropoutClock(seed=1, keys=None), 0) is x
