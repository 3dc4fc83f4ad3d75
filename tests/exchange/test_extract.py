"""`zlora deltas extract` against torch's SVD of the difference, and against the fine-tuned checkpoint it was made from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2ForSequenceClassification

from pipeline.deltas.lowrank import best_of
from pipeline.deltas.merge import merge
from pipeline.exchange.extracting import extract
from pipeline.job.errors import JobError
from pipeline.weights.delta import read_delta
from tests.families import make_family

TOKENS = torch.arange(4, 44)[None]


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def finetune(base, folder, scale=0.05):
    """Every parameter of a base moved at random, saved by transformers."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * scale
    model.save_pretrained(folder)
    return folder


def test_each_target_is_the_best_of_its_rank_and_the_rest_is_counted(llama_base, tmp_path):
    tuned = finetune(llama_base, tmp_path / "tuned")
    report = extract(str(llama_base), str(tuned), None, 4, tmp_path / "delta", ("q", "mlp_out"))
    json.dumps(report)
    before, after, stored = tensors(llama_base), tensors(tuned), read_delta(tmp_path / "delta")
    assert len(stored.pairs) == 6
    whole = sum(float((after[name] - before[name]).double().square().sum()) for name in before)
    outside = whole
    for name, (a, b) in stored.pairs.items():
        difference = (after[f"{name}.weight"] - before[f"{name}.weight"]).double()
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        torch.testing.assert_close(b.double() @ a.double(), u[:, :4] * s[:4] @ v[:4], atol=1e-6, rtol=1e-5)
        row = report["modules"][f"{name} ({'q' if 'q_proj' in name else 'mlp_out'})"]
        assert row["kept_energy"] == pytest.approx(float(s[:4].square().sum() / s.square().sum()), rel=1e-6)
        assert row["svd"] == "exact, fp64"
        outside -= float(difference.square().sum())
    assert report["total"]["norm"] ** 2 == pytest.approx(whole, rel=1e-6)
    assert report["total"]["left_out"] == pytest.approx(outside / whole, rel=1e-6)
    assert {row["tensor"] for row in report["left_out"]} == set(before) - {f"{name}.weight" for name in stored.pairs}
    assert sum(row["share"] for row in report["left_out"]) == pytest.approx(outside / whole, rel=1e-6)


def test_gpt2s_parts_are_cut_each_by_itself_and_stored_as_training_does(gpt2_base, tmp_path):
    tuned = finetune(gpt2_base, tmp_path / "tuned")
    report = extract(str(gpt2_base), str(tuned), None, 3, tmp_path / "delta", ("q", "v"))
    name = "transformer.h.1.attn.c_attn"
    difference = (tensors(tuned)[f"{name}.weight"] - tensors(gpt2_base)[f"{name}.weight"]).T
    a, b = read_delta(tmp_path / "delta").pairs[name]
    assert (a.shape, b.shape) == ((6, 32), (96, 6))
    for place, rows in enumerate((slice(0, 32), slice(64, 96))):
        u, s, v = torch.linalg.svd(difference[rows].double())
        torch.testing.assert_close((b[rows] @ a).double(), u[:, :3] * s[:3] @ v[:3], atol=1e-6, rtol=1e-5)
        assert not b[rows][:, 3 * (1 - place) : 3 * (2 - place)].any()
    assert not b[32:64].any()
    (left,) = (row for row in report["left_out"] if row["tensor"] == f"{name}.weight (rows of other targets)")
    assert left["norm"] == pytest.approx(float(torch.linalg.matrix_norm(difference[32:64])), rel=1e-5)


@pytest.mark.parametrize("base", ["gpt2_base", "llama_base"])
def test_of_full_rank_it_is_the_finetuned_model_but_for_what_is_left_out(base, request, tmp_path):
    folder = request.getfixturevalue(base)
    tuned = finetune(folder, tmp_path / "tuned")
    extract(str(folder), str(tuned), None, 32, tmp_path / "delta")
    merge(folder, tmp_path / "delta", tmp_path / "merged")
    merged, wanted, before = tensors(tmp_path / "merged"), tensors(tuned), tensors(folder)
    moved = {name for name in before if not torch.equal(merged[name], before[name])}
    assert len(moved) == {"gpt2_base": 12, "llama_base": 21}[base], "all linear maps of the layers"
    for name in moved:
        torch.testing.assert_close(merged[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_what_did_not_change_is_no_part_of_it(llama_base, deltas, tmp_path):
    merge(llama_base, deltas["norms"], tmp_path / "tuned")
    report = extract(str(llama_base), str(tmp_path / "tuned"), None, 2, tmp_path / "delta")
    assert set(read_delta(tmp_path / "delta").pairs) == set(read_delta(deltas["norms"]).pairs), "o_proj alone"
    assert {row["tensor"] for row in report["left_out"]} == {"model.norm.weight", "model.layers.0.input_layernorm.weight"}
    assert report["total"]["lost_by_rank"] < 1e-9
    with pytest.raises(JobError, match=r"q, v are the same in it as in"):
        extract(str(llama_base), str(tmp_path / "tuned"), None, 2, tmp_path / "none", ("q", "v"))
    assert not (tmp_path / "none").exists()


def test_a_new_head_is_named(gpt2_base, tmp_path):
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification.from_pretrained(gpt2_base, num_labels=2)
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    report = extract(str(gpt2_base), str(tmp_path / "tuned"), None, 2, tmp_path / "delta")
    assert report["only_in_finetuned"] == ["score.weight"]
    assert list(read_delta(tmp_path / "delta").pairs) == ["transformer.h.0.attn.c_proj"]


def test_an_encoder_and_its_head(tmp_path):
    base = make_family("roberta", tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    with torch.no_grad():
        model.roberta.encoder.layer[1].attention.self.query.weight += torch.randn_like(
            model.roberta.encoder.layer[1].attention.self.query.weight
        )
    model.save_pretrained(tmp_path / "tuned")
    report = extract(str(base), str(tmp_path / "tuned"), None, 2, tmp_path / "delta")
    assert set(report["only_in_finetuned"]) == {
        f"classifier.{part}" for part in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    }
    assert list(read_delta(tmp_path / "delta").pairs) == ["roberta.encoder.layer.1.attention.self.query"]


def test_the_randomised_svd_is_near_and_its_error_true():
    torch.manual_seed(0)
    decaying = torch.randn(200, 60) @ torch.diag(0.8 ** torch.arange(60)) @ torch.randn(60, 300)
    exact, near = best_of(decaying, 6, True), best_of(decaying, 6, False)
    assert near.error == pytest.approx(exact.error, rel=1e-3)
    assert near.error == pytest.approx(float(torch.linalg.matrix_norm(decaying - near.b @ near.a)), rel=1e-3)
    again = best_of(decaying, 6, False)
    assert torch.equal(near.a, again.a)


def test_what_is_not_of_the_base_is_said(gpt2_base, llama_base, tmp_path):
    with pytest.raises(JobError, match=r'"transformer.wpe.weight" is not in it. Name a checkpoint that was trained from this base'):
        extract(str(gpt2_base), str(llama_base), None, 2, tmp_path / "delta")
    shutil.copytree(llama_base, tmp_path / "other")
    for file in (tmp_path / "other").glob("*.safetensors"):
        held = load_file(file)
        if "model.embed_tokens.weight" in held:
            save_file(held | {"model.embed_tokens.weight": torch.zeros(330, 32)}, file)
    with pytest.raises(JobError, match=r"has shape \[330, 32\], in the base \[320, 32\]"):
        extract(str(llama_base), str(tmp_path / "other"), None, 2, tmp_path / "delta")
    with pytest.raises(JobError, match=r'--targets: "z" is not a target of this base. It has q, k, v'):
        extract(str(llama_base), str(llama_base), None, 2, tmp_path / "delta", ("z",))
