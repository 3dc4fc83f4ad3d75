"""`zlora deltas resize` and `combine` against torch's SVD of the whole product, and against what merging makes of the originals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.deltas.combine import combine
from pipeline.deltas.lowrank import blocks_of
from pipeline.deltas.merge import merge
from pipeline.deltas.resize import resize
from pipeline.job.errors import JobError
from pipeline.weights.delta import read_delta
from tests.bases import make_llama
from tests.deltas.conftest import make_delta
from tests.training import trained, write_job

TOKENS = torch.arange(4, 44)[None]


def products(folder) -> dict[str, torch.Tensor]:
    """(alpha / r) B A of every module, in fp64."""
    stored = read_delta(folder)
    return {
        module.name: stored.pairs[module.name][1].double() @ stored.pairs[module.name][0].double() * (module.alpha / module.rank)
        for module in stored.manifest.modules
    }


@pytest.fixture(scope="module")
def fused(gpt2_base, ranks1, tmp_path_factory):
    """Trained deltas of GPT-2's q, v and o: pairs of two parts of a fused map, of different ranks, and one of a whole map."""
    folder = tmp_path_factory.mktemp("fused")
    job = write_job(folder, gpt2_base)
    settings = ('methods.0.targets=["q", "v", "o"]', "methods.0.rank={q = 3, v = 5, o = 4}", "train.learning_rate=0.3")
    for name, seed in (("one", 1), ("two", 2)):
        trained(ranks1, job, folder / name, *settings, f"train.seed={seed}")
    return folder / "one" / "delta", folder / "two" / "delta"


def test_a_smaller_rank_is_the_best_there_is(llama_base, tmp_path):
    delta = make_delta(llama_base, tmp_path / "delta", 1, ("q_proj", "down_proj"))
    big = tmp_path / "big"
    combine([(delta, 1.0), (make_delta(llama_base, tmp_path / "more", 2, ("q_proj", "down_proj")), 0.4)], big)
    report = resize(big, tmp_path / "small", 3, None)
    before, after = products(big), products(tmp_path / "small")
    total = 0.0
    for name, whole in before.items():
        singular = torch.linalg.svdvals(whole)
        error = torch.linalg.matrix_norm(whole - after[name])
        # Eckart and Young: no matrix of rank 3 is nearer.
        torch.testing.assert_close(error, singular[3:].square().sum().sqrt(), rtol=1e-4, atol=1e-6)
        assert report["modules"][name]["error"] == pytest.approx(float(error), rel=1e-4)
        assert report["modules"][name]["rank"] == 3
        total += float(error) ** 2
    assert report["total"]["error"] == pytest.approx(total**0.5, rel=1e-4)
    assert json.loads((tmp_path / "small" / "made.json").read_text())["total"] == report["total"]


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_keeps_as_few_as_it_needs(energy, fused, tmp_path):
    resize(fused[0], tmp_path / "small", None, energy)
    before, stored = products(fused[0]), read_delta(tmp_path / "small")
    for module in stored.manifest.modules:
        ranks = []
        rows = [slice(0, 32), slice(64, 96)] if module.name.endswith("c_attn") else [slice(None)]
        for part in rows:
            squares = torch.linalg.svdvals(before[module.name][part]).square()
            real = int((squares > 1e-10 * squares[0]).sum())
            ranks.append(min(real, int((squares.cumsum(0) < energy * squares.sum() * (1 - 1e-12)).sum()) + 1))
        assert module.rank == sum(ranks)


def test_parts_of_a_fused_map_stay_apart(fused, tmp_path):
    resize(fused[0], tmp_path / "small", 2, None)
    before, after = products(fused[0]), products(tmp_path / "small")
    stored = read_delta(tmp_path / "small")
    for name, whole in before.items():
        if not name.endswith("c_attn"):
            continue
        assert stored.pairs[name][0].shape[0] == 4
        assert not stored.pairs[name][1][32:64].any(), "k was not trained"
        for part in (slice(0, 32), slice(64, 96)):
            u, s, v = torch.linalg.svd(whole[part])
            torch.testing.assert_close(after[name][part], u[:, :2] * s[:2] @ v[:2], atol=1e-5, rtol=1e-4)


def test_parts_that_lie_head_by_head_stay_apart_too(families, ranks1, tmp_path):
    """GPT-NeoX: the rows of each head's q, k and v follow one another."""
    base = families("gpt_neox")
    heads = json.loads((base / "config.json").read_text())["num_attention_heads"]
    settings = ("methods.0.rank=4", "train.learning_rate=0.3")
    trained(ranks1, write_job(tmp_path, base), tmp_path / "run", *settings)
    resize(tmp_path / "run" / "delta", tmp_path / "small", 2, None)
    before, after = products(tmp_path / "run" / "delta"), products(tmp_path / "small")
    assert before
    for name, whole in before.items():
        assert read_delta(tmp_path / "small").pairs[name][0].shape[0] == 4
        rows = torch.arange(whole.shape[0]).view(heads, 3, -1)
        assert not after[name][rows[:, 1].flatten()].any(), "k"
        for part in (0, 2):
            own = whole[rows[:, part].flatten()]
            u, s, v = torch.linalg.svd(own, full_matrices=False)
            torch.testing.assert_close(after[name][rows[:, part].flatten()], u[:, :2] * s[:2] @ v[:2], atol=1e-5, rtol=1e-4)


def test_a_rank_that_is_there_already_changes_no_bit(fused, tmp_path):
    report = resize(fused[0], tmp_path / "same", 5, None)
    assert report["total"]["error"] == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (fused[0], tmp_path / "same"))
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_peft_loads_what_is_made_and_merging_agrees(fused, gpt2_base, tmp_path):
    combine([(fused[0], 0.7), (fused[1], -0.3)], tmp_path / "both")
    merge(gpt2_base, [(fused[0], 0.7), (fused[1], -0.3)], tmp_path / "merged")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(TOKENS).logits
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2_base), tmp_path / "both").eval()
        torch.testing.assert_close(model(TOKENS).logits, merged, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert (model(TOKENS).logits - merged).abs().max() > 1e-2


def test_a_sum_is_exact_and_cut_it_is_the_best(fused, tmp_path):
    combine([(fused[0], 0.7), (fused[1], -0.3)], tmp_path / "both")
    wanted = {name: 0.7 * one - 0.3 * products(fused[1])[name] for name, one in products(fused[0]).items()}
    for name, found in products(tmp_path / "both").items():
        torch.testing.assert_close(found, wanted[name], atol=1e-7, rtol=1e-6)
    stored = read_delta(tmp_path / "both")
    assert {module.rank for module in stored.manifest.modules} == {16, 8}
    pair = stored.pairs["transformer.h.0.attn.c_attn"][1]
    assert [block.columns for block in blocks_of(pair)] == [tuple(range(6)), tuple(range(6, 16))], "parts lie side by side"
    combine([(fused[0], 0.7), (fused[1], -0.3)], tmp_path / "cut", rank=2)
    for name, found in products(tmp_path / "cut").items():
        for part in [slice(0, 32), slice(64, 96)] if name.endswith("c_attn") else [slice(None)]:
            u, s, v = torch.linalg.svd(wanted[name][part], full_matrices=False)
            torch.testing.assert_close(found[part], u[:, :2] * s[:2] @ v[:2], atol=1e-5, rtol=1e-4)


def test_a_job_begins_from_a_resized_delta(fused, gpt2_base, ranks1, tmp_path):
    resize(fused[0], tmp_path / "small", 2, None)
    settings = ('methods.0.targets=["q", "v", "o"]', "methods.0.rank=2", f'methods.0.start="{tmp_path / "small"}"')
    trained(ranks1, write_job(tmp_path, gpt2_base), tmp_path / "run", *settings, "train.steps=1", "train.learning_rate=1e-9")
    before, after = products(tmp_path / "small"), products(tmp_path / "run" / "delta")
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=1e-5)


def test_a_head_stays_and_equal_heads_combine(llama_base, deltas, tmp_path):
    resize(deltas["labels"], tmp_path / "small", 1, None)
    combine([(deltas["labels"], 0.5), (tmp_path / "small", 0.5)], tmp_path / "both")
    for folder in (tmp_path / "small", tmp_path / "both"):
        assert torch.equal(read_delta(folder).head["score.weight"], read_delta(deltas["labels"]).head["score.weight"])
        assert read_delta(folder).manifest.head.labels == ("no", "yes", "perhaps")


def test_what_does_not_combine_is_said(deltas, llama_base, tmp_path):
    other = make_delta(make_llama(tmp_path / "base", seed=1), tmp_path / "foreign", 3)
    heads = make_delta(llama_base, tmp_path / "heads", 9, labels=("no", "yes", "perhaps"))
    for second, said in (
        (other, "is of a base with digest"),
        (deltas["norms"], "has trained parameters of the base, and only LoRA adds up"),
        (deltas["tokens"], "has added tokens"),
        (deltas["labels"], "its head is not that of"),
    ):
        with pytest.raises(JobError, match=said):
            combine([(deltas["qv"], 1.0), (second, 1.0)], tmp_path / "out")
    with pytest.raises(JobError, match="its head is not that of"):
        combine([(deltas["labels"], 1.0), (heads, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_resize_is_said(deltas, tmp_path):
    for rank, energy, said in ((None, None, "needs --rank or --energy"), (2, 0.5, "one of them"), (None, 1.5, "--energy 1.5")):
        with pytest.raises(JobError, match=said):
            resize(deltas["qv"], tmp_path / "out", rank, energy)
    with pytest.raises(JobError, match="has no LoRA"):
        resize(deltas["norms2"], tmp_path / "out", 1, None)
    shutil.copytree(deltas["qv"], tmp_path / "out")
    with pytest.raises(JobError, match="not empty"):
        resize(deltas["qv"], tmp_path / "out", 1, None)
