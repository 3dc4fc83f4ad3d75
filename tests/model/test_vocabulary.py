"""Tables of the vocabulary in their shards: the same rows, losses and gradients as torch's own from the whole table, and few bytes sent."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

CPU = torch.device("cpu")
WIDTH = 8
IDS = [[[3, 3, 0], [16, 9, 3]], [[5, 1, 16]], []]
"""Of each rank, a batch of its own."""


def reference(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)


def hidden_of(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)


def labels_of(rank: int, count: int, rows: int) -> torch.Tensor:
    return torch.randint(rows, (count,), generator=torch.Generator().manual_seed(200 + rank))


# On ranks.


def shared(rows: int, dtype: torch.dtype):
    """The reference in shards of whole rows."""
    from pipeline.job.zero import complete
    from pipeline.model.zero3 import Partitioner

    partitioner = Partitioner(complete({"zero_optimization": {"stage": 3}}), dtype)
    flat = reference(rows, dtype).flatten()
    return partitioner.parameter((rows, WIDTH), lambda first, out: out.copy_(flat[first : first + len(out)]), by_rows=True)


def looked_up(ranks, rows: int, scale: float | None):
    from pipeline.model.gathers import watched_gathers
    from pipeline.model.vocabulary import Embedding

    plain = nn.Embedding(1, 1)
    if scale is not None:
        plain.embed_scale = torch.tensor(scale)
    embedding = Embedding(plain)
    embedding.weight = shared(rows, torch.float32)
    ids = torch.tensor(IDS[ranks.rank], dtype=torch.int64)
    with watched_gathers() as counted:
        found = embedding(ids)
    return ids.numpy(), found.numpy(), counted.exchanged_bytes


def scored(ranks, rows: int, dtype: torch.dtype, counts: list[int], smoothing: float, softcap: float | None, added: bool = False):
    """Of this rank's labels: both losses and the gradient of the hidden states, and logits without labels."""
    from pipeline.model.gathers import watched_gathers
    from pipeline.model.head import Head, head_loss

    head = Head(nn.Linear(1, 1, bias=False), softcap)
    head.weight = shared(rows, dtype)
    if added:
        head.added = (torch.tensor([rows, rows + 1]), reference(2, torch.float32).requires_grad_())
    hidden = hidden_of(ranks.rank, counts[ranks.rank], dtype).requires_grad_()
    labels = labels_of(ranks.rank, len(hidden), rows + 2 * added)
    with watched_gathers() as counted:
        loss, nll = head_loss(head, hidden, labels, smoothing)
    sent = counted.exchanged_bytes
    # As after a micro-batch: scaled, and a rank without labels takes part.
    (0.5 * loss).backward()
    with torch.no_grad():
        logits = head(hidden)
        alone, _ = head_loss(head, hidden, labels, smoothing)
    assert torch.equal(alone, loss.detach())
    of_rows = head.added[1].grad.numpy() if added else None
    return float(loss.detach()), float(nll), hidden.grad.float().numpy(), logits.float().numpy(), of_rows, sent


# What torch makes of the whole table.


def expected(rank: int, rows: int, dtype: torch.dtype, count: int, smoothing: float, softcap: float | None):
    hidden = hidden_of(rank, count, dtype).double().requires_grad_()
    logits = hidden @ reference(rows, dtype).double().t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    labels = labels_of(rank, count, rows)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    nll = nn.functional.cross_entropy(logits, labels, reduction="sum")
    (0.5 * loss).backward()
    return float(loss.detach()), float(nll.detach()), hidden.grad.numpy(), logits.detach().numpy()


@pytest.mark.parametrize("rows", [17, 18, 20])
@pytest.mark.parametrize("scale", [None, 4.0])
def test_rows_are_looked_up_wherever_they_are(rows, scale, ranks3):
    table = reference(rows, torch.float32).numpy() * (scale or 1.0)
    for (ids, found, received), wanted in zip(ranks3.run(looked_up, rows, scale), IDS, strict=True):
        assert ids.tolist() == wanted
        assert np.array_equal(found, table[ids])
        # Each of another's rows once, whole; and numbers and ids of 8 bytes, at most as many as anybody asks for.
        each = -(-rows // 3)
        theirs = {i for i in ids.flatten().tolist() if i // each != IDS.index(wanted)}
        assert 0 <= received - len(theirs) * WIDTH * 4 <= 8 * (2 * 3 + 9)


CASES = {
    "even": (300, [5, 5, 5], 0.0, None),
    "uneven": (301, [9, 2, 4], 0.1, None),
    "one has none": (301, [6, 0, 3], 0.1, None),
    "bent": (302, [4, 3, 2], 0.1, 5.0),
    "more labels than rows": (50, [40, 3, 20], 0.1, None),
    "a rank without rows": (4, [1, 0, 1], 0.1, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_whole_table(case, dtype, ranks3):
    rows, counts, smoothing, softcap = CASES[case]
    near = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for rank, found in enumerate(ranks3.run(scored, rows, dtype, counts, smoothing, softcap)):
        wanted = expected(rank, rows, dtype, counts[rank], smoothing, softcap)
        for mine, theirs in zip(found, wanted, strict=False):
            np.testing.assert_allclose(mine, theirs, **near)


def test_added_tokens_stand_beside_a_shared_table(ranks3):
    rows, counts = 300, [6, 2, 3]
    for rank, (loss, nll, gradient, logits, of_rows, _) in enumerate(ranks3.run(scored, rows, torch.float32, counts, 0.1, None, True)):
        hidden = hidden_of(rank, counts[rank], torch.float32).double().requires_grad_()
        more = reference(2, torch.float32).double().requires_grad_()
        wanted = hidden @ torch.cat([reference(rows, torch.float32).double(), more]).t()
        labels = labels_of(rank, counts[rank], rows + 2)
        smooth = nn.functional.cross_entropy(wanted, labels, reduction="sum", label_smoothing=0.1)
        (0.5 * smooth).backward()
        assert loss == pytest.approx(float(smooth.detach()), rel=1e-5)
        assert nll == pytest.approx(float(nn.functional.cross_entropy(wanted.detach(), labels, reduction="sum")), rel=1e-5)
        for mine, theirs in ((gradient, hidden.grad), (logits, wanted), (of_rows, more.grad)):
            np.testing.assert_allclose(mine, theirs.detach(), rtol=2e-5, atol=2e-5)


def test_the_cheaper_way_is_sent(ranks3, tmp_path):
    """Hidden states and gradients of a few labels, or the table where it is smaller; as the plan counts them."""
    from pipeline.plan.families import read_shape
    from pipeline.plan.tables import loss_of

    for rows, count in ((3000, 4), (30, 40)):
        config = {"model_type": "gpt2", "vocab_size": rows, "n_embd": WIDTH, "n_head": 2, "n_layer": 1, "n_positions": 8}
        (tmp_path / "config.json").write_text(json.dumps(config))
        plan = loss_of(read_shape(tmp_path), count, 3, added=False)
        for *_, received in ranks3.run(scored, rows, torch.float32, [count] * 3, 0.0, None):
            # Gradients come back as hidden states go; then counts and labels of 8 bytes, and four sums of 4 bytes for each label.
            sent = (2 * plan.states + plan.table * 2 // 3) * 4
            few = 2 * 8 + (2 * count * 8 + 2 * 3 * count * 16 if plan.states else 0)
            assert received == sent + few
            assert received < 2 * rows * WIDTH * 4


def test_training_with_shared_tables_takes_the_same_course(gpt2_base, ranks2, tmp_path):
    """To rounding, as sums are in another order; and no module of the vocabulary is in DeepSpeed's trace."""
    from tests.training import trained, write_job

    job = write_job(tmp_path, gpt2_base)
    runs = {}
    for name, persistence in (("kept", 10**9), ("shared", 0)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persistence}}))
        runs[name] = trained(ranks2, job, tmp_path / name, f"memory.config={file}")
    assert runs["shared"].losses == pytest.approx(runs["kept"].losses, rel=1e-5)
    for name, tensor in runs["kept"].tensors.items():
        np.testing.assert_allclose(runs["shared"].tensors[name], tensor, rtol=1e-3, atol=1e-5)
