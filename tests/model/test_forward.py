"""The sharded, packed, frozen model computes what transformers' own model computes, and lets go of what it gathered."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from pipeline.job.zero import deepspeed_config
from pipeline.model import head as head_module
from pipeline.model.causal import Causal, Decode
from pipeline.model.config import read_config
from pipeline.model.head import Head, head_loss
from pipeline.model.linear import BaseLinear
from pipeline.model.load import load_base
from pipeline.model.rows import own_rows
from pipeline.tasks.batch import collate
from pipeline.train.engine import Engine
from tests.bases import VOCABULARY
from tests.tasks.making import learnt_from, start_of

CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"
CPU = torch.device("cpu")
TIGHT = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""A small model fits into every default; with these numbers each module is gathered and released by itself."""


def _sequences():
    rng = np.random.default_rng(1)
    lengths = [(19, 5), (4, 1), (11, 10), (2, 1), (26, 13), (8, 3), (15, 2)]
    return [learnt_from(rng.integers(1, VOCABULARY, length).tolist(), start) for length, start in lengths]


SEQUENCES = _sequences()
PROMPTS = [SEQUENCES[0].tokens, SEQUENCES[3].tokens, SEQUENCES[2].tokens]
NEXT = [7, 99, 200]


@pytest.fixture(params=["gpt2", "llama"])
def folder(request, gpt2_base, llama_base) -> Path:
    return {"gpt2": gpt2_base, "llama": llama_base}[request.param]


@pytest.fixture(scope="module")
def tight(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("zero") / "tight.json"
    file.write_text(json.dumps({"zero_optimization": TIGHT}))
    return file


@pytest.fixture
def zero(request, tight) -> Path:
    return tight if request.param == "tight" else CONFIGS / request.param


WAYS = pytest.mark.parametrize(
    ("zero", "pool"),
    [("zero0.json", None), ("zero3.json", "ranks2"), ("tight", "ranks2"), ("tight", "ranks3")],
    indirect=["zero"],
    ids=["stage 0 alone", "stage 3 on 2", "stage 3 tight on 2", "stage 3 tight on 3"],
)


def on(pool, request, function, *args):
    """Runs a function of ranks on a pool, or right here for one process without a process group."""
    return request.getfixturevalue(pool).run(function, *args) if pool else [function(None, *args)]


# On ranks.


def open_root(folder, zero, train=True):
    """The root and its engine, and the lists to which every pass adds its embeddings and the head's input."""
    config = deepspeed_config(Path(zero))
    base = load_base(Path(folder), read_config(Path(folder)), torch.float32, CPU, config)
    root = Causal(base.model, base.family)
    embedded, hidden = [], []

    def leaf(module, args, output):
        if torch.is_grad_enabled():
            embedded.append(output.requires_grad_())

    base.model.get_submodule(base.family.body).get_input_embeddings().register_forward_hook(leaf)
    base.model.lm_head.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach().clone()))
    return root, Engine(root, config), embedded, hidden


def score(ranks, folder, zero, packed, smoothing):
    """Two passes over this rank's share, so that ZeRO-3's recorded trace is used too: losses, hidden states, gradients by example."""
    root, engine, embedded, hidden = open_root(folder, zero)
    mine = range(ranks.rank if ranks else 0, len(SEQUENCES), ranks.count if ranks else 1)
    answers = []
    for _ in range(2):
        batch = collate([SEQUENCES[i] for i in mine], list(mine), packed, CPU)
        loss, nll = root(batch=batch, smoothing=smoothing)
        loss.backward()
        engine.after_backward()
        lengths = [len(SEQUENCES[i]) for i in mine]
        grad = embedded[-1].grad
        rows = grad[0].split(lengths) if packed else [grad[row, :length] for row, length in enumerate(lengths)]
        states = hidden[-1].split([SEQUENCES[i].targets for i in mine])
        by_example = {i: (state.numpy(), row.numpy()) for i, state, row in zip(mine, states, rows, strict=True)}
        answers.append((float(loss.detach()), float(nll), by_example))
    engine.release()
    return answers


def logits_by_example(ranks, folder, packed):
    """All logits of a stage-0 model, through the head without labels."""
    root, _, _, _ = open_root(folder, CONFIGS / "zero0.json")
    batch = collate(SEQUENCES, list(range(len(SEQUENCES))), packed, CPU)
    body = root.model.get_submodule(root._body)
    seen = []
    root.model.get_submodule(root._body).register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    with torch.no_grad():
        root(batch=batch)
        logits = root.model.lm_head(seen[0])
    assert body is root.model.base_model
    lengths = [len(s) for s in SEQUENCES]
    return list(logits[0].split(lengths)) if packed else [logits[row, :length] for row, length in enumerate(lengths)]


def decode(ranks, folder, zero):
    """Last logits of left-padded prompts, and those after one further token each."""
    root, engine, _, _ = open_root(folder, zero)
    longest = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=root.model.config)
    with torch.no_grad():
        (first,) = root(decode=Decode(tokens, mask, positions, cache))
        mask = torch.cat([mask, mask.new_ones(len(PROMPTS), 1)], 1)
        (second,) = root(decode=Decode(torch.tensor(NEXT)[:, None], mask, positions[:, -1:] + 1, cache))
    engine.release()
    return first.numpy(), second.numpy()


def held(root):
    """Parameters that are whole now, by their ZeRO-3 status and by their data."""
    status = [name for name, p in root.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"]
    data = [name for name, p in root.named_parameters() if p.numel()]
    return status, data


def gathered_storages(root):
    """A list that every forward pass fills with weak references to the storages of the matrices that modules then see."""
    storages = []

    def note(module, args):
        for parameter in module.parameters(recurse=False):
            if own_rows(parameter):
                # A table of the vocabulary, which nobody gathers.
                continue
            assert parameter.numel() == parameter.ds_numel, "a module runs before its weights are gathered"
            if parameter.dim() == 2:
                storages.append(StorageWeakRef(parameter.data.untyped_storage()))

    for module in root.modules():
        module.register_forward_pre_hook(note)
    return storages


def alive(storages):
    # DeepSpeed's handle of the newest gather may hold its buffer in a cycle until the next collection, and gloo's thread
    # lets go of a finished gather a moment after whoever waited for it goes on.
    deadline = time.monotonic() + 2.0
    while True:
        gc.collect()
        count = sum(not storage.expired() for storage in storages)
        if not count or time.monotonic() > deadline:
            return count
        time.sleep(0.01)


def released(ranks, folder, zero, native):
    """What is whole after the forward and after the backward pass, of two passes: ZeRO-3 records its trace in the first.

    Args:
        native: linear maps as torch's own do them, as a control.
    """
    root, engine, embedded, _ = open_root(folder, zero)
    storages = gathered_storages(root)
    kept = BaseLinear.forward
    if native:
        BaseLinear.forward = native_forward
    passes = []
    try:
        for _ in range(2):
            storages.clear()
            loss, _ = root(batch=collate(SEQUENCES[:3], [0, 1, 2], True, CPU))
            forward = (*held(root), alive(storages))
            loss.backward()
            engine.after_backward()
            backward = (*held(root), alive(storages))
            passes.append((len(storages), forward, backward, float(embedded[-1].grad.abs().max())))
    finally:
        BaseLinear.forward = kept
    return passes


def native_forward(self, x):
    return nn.functional.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)


def release_after_evaluation(ranks, folder, zero):
    """What is whole after an evaluation of two passes, and after the release that follows; then the loss once more."""
    root, engine, _, _ = open_root(folder, zero)
    storages = gathered_storages(root)
    batch = collate(SEQUENCES[:3], [0, 1, 2], True, CPU)
    with torch.no_grad():
        losses = [float(root(batch=batch)[0]) for _ in range(2)]
        before = (*held(root), alive(storages))
        engine.release()
        after = (*held(root), alive(storages))
        losses.append(float(root(batch=batch)[0]))
    return before, after, losses


# Against transformers.


def smoothed(log_p, labels, smoothing):
    """(1 - e) (-log p_y) + e mean_v(-log p_v), summed."""
    nll = -log_p.gather(1, labels[:, None]).sum()
    return (1 - smoothing) * nll - smoothing * log_p.mean(1).sum(), nll


def transformers_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval().requires_grad_(False)


def reference(folder, smoothing):
    """Per example, one at a time, by transformers: loss, plain loss, last hidden states at the labels, gradient of the embeddings."""
    model = transformers_model(folder)
    answers = []
    for sequence in SEQUENCES:
        tokens = torch.tensor(sequence.tokens)
        embedded = model.get_input_embeddings()(tokens[None]).requires_grad_()
        output = model(inputs_embeds=embedded, output_hidden_states=True)
        places = slice(start_of(sequence) - 1, len(sequence) - 1)
        loss, nll = smoothed(output.logits[0, places].log_softmax(-1), tokens[start_of(sequence) :], smoothing)
        loss.backward()
        answers.append(
            (float(loss.detach()), float(nll.detach()), output.hidden_states[-1][0, places].detach().numpy(), embedded.grad[0].numpy())
        )
    return answers


@WAYS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_loss_and_gradient_equal_transformers(folder, packed, smoothing, zero, pool, request):
    expected = reference(folder, smoothing)
    total, plain = sum(e[0] for e in expected), sum(e[1] for e in expected)
    answers = on(pool, request, score, folder, zero, packed, smoothing)
    for turn in range(2):
        passes = [answer[turn] for answer in answers]
        np.testing.assert_allclose(sum(p[0] for p in passes), total, rtol=1e-5)
        np.testing.assert_allclose(sum(p[1] for p in passes), plain, rtol=1e-5)
        together = {i: values for p in passes for i, values in p[2].items()}
        assert sorted(together) == list(range(len(SEQUENCES)))
        for i, (hidden, gradient) in together.items():
            np.testing.assert_allclose(hidden, expected[i][2], atol=1e-5, rtol=1e-5)
            scale = np.abs(expected[i][3]).max()
            assert scale > 1e-3
            np.testing.assert_allclose(gradient, expected[i][3], atol=1e-5 * max(1.0, scale))
    assert (abs(total - plain) > 0.1) == (smoothing > 0)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_logits_equal_transformers(folder, packed):
    model = transformers_model(folder)
    ours = logits_by_example(None, folder, packed)
    assert len(ours) == len(SEQUENCES)
    for sequence, logits in zip(SEQUENCES, ours, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor(sequence.tokens)[None]).logits[0]
        assert expected.abs().max() > 0.5
        np.testing.assert_allclose(logits.numpy(), expected.numpy(), atol=1e-5, rtol=1e-5)


@WAYS
def test_decoding_equals_transformers(folder, zero, pool, request):
    model = transformers_model(folder)
    with torch.no_grad():
        first = [model(torch.tensor([p])).logits[0, -1].numpy() for p in PROMPTS]
        second = [model(torch.tensor([[*p, token]])).logits[0, -1].numpy() for p, token in zip(PROMPTS, NEXT, strict=True)]
    for ours in on(pool, request, decode, folder, zero):
        np.testing.assert_allclose(ours[0], np.stack(first), atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(ours[1], np.stack(second), atol=1e-5, rtol=1e-5)


# The two modules of our own, alone.


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "Conv1D"])
def test_frozen_linear_is_the_ordinary_one(kind, shape):
    torch.manual_seed(0)
    original = Conv1D(4, 6) if kind == "Conv1D" else nn.Linear(6, 4, bias=kind == "linear")
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    original.double().requires_grad_(False)
    frozen = BaseLinear(original)
    assert [name for name, _ in frozen.named_parameters()] == [name for name, _ in original.named_parameters()]
    x, slope = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 4, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = frozen(ours), original(theirs)
    output.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 0.1
    assert torch.autograd.gradcheck(frozen, x.clone().requires_grad_())
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert not frozen(x).requires_grad


@pytest.mark.parametrize("rows", [1, 3, 100], ids=lambda rows: f"{rows} rows at a time")
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_head_is_linear_and_cross_entropy(bias, smoothing, rows, monkeypatch):
    torch.manual_seed(0)
    original = nn.Linear(8, 23, bias=bias).requires_grad_(False)
    monkeypatch.setattr(head_module, "chunk_logits", lambda device: rows * 23)
    x, labels = torch.randn(10, 8), torch.randint(23, (10,))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, nll = head_loss(Head(original), ours, labels, smoothing)
    (3 * loss).backward()
    logits = original(theirs)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nll, nn.functional.cross_entropy(logits, labels, reduction="sum"))
    torch.testing.assert_close(loss.detach(), smoothed(logits.detach().log_softmax(-1), labels, smoothing)[0])
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 0.01
    assert not nll.requires_grad
    torch.testing.assert_close(Head(original)(x), logits.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sums_in_fp32(dtype):
    torch.manual_seed(0)
    original = nn.Linear(8, 23, bias=False).requires_grad_(False).to(dtype)
    x, labels = torch.randn(3000, 8).to(dtype), torch.randint(23, (3000,))
    ours = x.clone().requires_grad_()
    loss, nll = head_loss(Head(original), ours, labels, 0.1)
    loss.backward()
    log_p = original(x).double().log_softmax(-1)
    expected, plain = smoothed(log_p, labels, 0.1)
    assert loss.dtype == nll.dtype == torch.float32
    np.testing.assert_allclose([float(loss.detach()), float(nll)], [float(expected), float(plain)], rtol=1e-6)
    assert ours.grad.dtype == dtype


def test_head_without_labels_has_no_loss():
    original = nn.Linear(8, 23).requires_grad_(False)
    x = torch.randn(0, 8, requires_grad=True)
    loss, nll = head_loss(Head(original), x, torch.empty(0, dtype=torch.long), 0.1)
    loss.backward()
    assert (float(loss.detach()), float(nll), x.grad.shape) == (0.0, 0.0, (0, 8))


# What is gathered is let go.


def test_weights_are_released_between_forward_and_backward(folder, tight, ranks2):
    for passes in ranks2.run(released, folder, tight, False):
        assert len(passes) == 2
        for count, forward, backward, gradient in passes:
            assert count >= 12
            assert forward == ([], [], 0)
            assert backward == ([], [], 0)
            assert gradient > 0


def test_an_ordinary_linear_map_would_pin_them(llama_base, tight, ranks2):
    """A control of the test above: without BaseLinear the status says released while autograd holds the memory."""
    for passes in ranks2.run(released, llama_base, tight, True):
        for count, forward, backward, _ in passes:
            assert forward[:2] == ([], [])
            assert forward[2] >= count // 2
            assert backward == ([], [], 0)


def test_release_after_evaluation(folder, ranks2):
    for before, after, losses in ranks2.run(release_after_evaluation, folder, CONFIGS / "zero3.json"):
        assert len(before[0]) > 20, "nothing was left to release"
        assert before[2] >= 12
        assert after == ([], [], 0)
        assert losses[0] > 0
        assert losses == [losses[0]] * 3
