"""A micro-batch: packed and padded carry the same labels, and they are transformers' usual shifted ones."""

from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from pipeline.tasks.batch import collate
from pipeline.tasks.example import Sequence
from tests.tasks.making import learnt_from

CPU = torch.device("cpu")
SEQUENCES = [
    learnt_from((5, 6, 7, 8), 2),
    learnt_from((9, 10), 1),
    # Two answers of one conversation.
    Sequence((11, 12, 13, 14, 15, 16), ((2, 3), (5, 6))),
    learnt_from((17, 18, 19), 1),
]
IDS = [40, 3, 17, 8]
VOCABULARY = 32


def shifted(sequences):
    """(token, its position, the token to predict) by the definition: target token t is predicted from token t - 1."""
    return sorted((s.tokens[t - 1], t - 1, s.tokens[t]) for s in sequences for first, end in s.spans for t in range(first, end))


@pytest.mark.parametrize("packed", [True, False])
def test_labels_are_the_targets_after_the_tokens_that_predict_them(packed):
    batch = collate(SEQUENCES, IDS, packed, CPU)
    tokens, positions = batch.tokens.flatten()[batch.label_index], batch.positions.flatten()[batch.label_index]
    assert sorted(zip(tokens.tolist(), positions.tolist(), batch.labels.tolist(), strict=True)) == shifted(SEQUENCES)
    assert len(batch.labels) == sum(s.targets for s in SEQUENCES)


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_over_the_labels_is_transformers_own(packed):
    longest = max(map(len, SEQUENCES))
    logits = torch.randn(len(SEQUENCES), longest, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    usual = torch.full((len(SEQUENCES), longest), -100)
    for row, s in enumerate(SEQUENCES):
        for first, end in s.spans:
            usual[row, first:end] = torch.tensor(s.tokens[first:end])
    expected = ForCausalLMLoss(logits, usual, VOCABULARY, num_items_in_batch=torch.tensor(1))
    batch = collate(SEQUENCES, IDS, packed, CPU)
    flat = torch.cat([logits[row, : len(s)] for row, s in enumerate(SEQUENCES)]) if packed else logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(flat[batch.label_index], batch.labels, reduction="sum")
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-6, atol=0.0)


def test_packed_has_no_padding_and_its_layout_leads_to_padded_views_and_back():
    packed, padded = collate(SEQUENCES, IDS, True, CPU), collate(SEQUENCES, IDS, False, CPU)
    assert packed.tokens.tolist() == [[token for s in SEQUENCES for token in s.tokens]]
    assert packed.positions.tolist() == [[place for s in SEQUENCES for place in range(len(s))]]
    views = [packed.tokens[0][index] for index in packed.layout.to_padded]
    assert torch.equal(torch.cat([view.flatten() for view in views])[packed.layout.to_flat], packed.tokens[0])
    rows = [row for view in views for row in view.tolist()]
    for s in SEQUENCES:
        assert any(row[: len(s)] == list(s.tokens) for row in rows)
    assert padded.layout is None


def test_one_long_example_does_not_pad_the_short_ones():
    lengths = [1000, 7, 6, 5, 9, 300, 290, 4, 8]
    layout = collate([learnt_from(range(n), 1) for n in lengths], list(range(9)), True, CPU).layout
    assert sum(view.numel() for view in layout.to_padded) < 2 * sum(lengths)
    assert sorted(view.shape[0] for view in layout.to_padded) == [1, 1, 2, 5]


def test_a_token_has_the_same_key_wherever_its_example_is_computed():
    packed, padded = collate(SEQUENCES, IDS, True, CPU), collate(SEQUENCES, IDS, False, CPU)
    alone = torch.cat([collate([s], [i], True, CPU).keys for s, i in zip(SEQUENCES, IDS, strict=True)])
    assert torch.equal(packed.keys, alone)
    real = padded.keys.view(len(SEQUENCES), -1)
    assert torch.equal(torch.cat([real[row, : len(s)] for row, s in enumerate(SEQUENCES)]), alone)


def test_keys_tell_examples_and_positions_apart():
    sequences = [learnt_from(range(64), 1)] * 64
    keys = collate(sequences, list(range(64)), True, CPU).keys
    assert len(set(keys.tolist())) == 64 * 64


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_micro_batch_has_a_token_to_compute_and_no_label(packed):
    batch = collate([], [], packed, CPU)
    assert batch.tokens.shape == (1, 1)
    assert len(batch.labels) == len(batch.label_index) == 0
