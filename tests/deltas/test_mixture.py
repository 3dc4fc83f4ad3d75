"""Several deltas with weights, another dtype, what vanishes: against the formula in double precision; and what cannot be added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.deltas.merge import merge
from pipeline.deltas.mixture import mix, parse_share
from pipeline.job.errors import JobError
from pipeline.weights.delta import read_delta
from tests.deltas.conftest import make_delta, weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def exact(base: Path, given: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """W + sum w (W_i - W + (alpha / R) B A), in double precision."""
    old = {name: tensor.double() for name, tensor in tensors(base).items()}
    new = {name: tensor.clone() for name, tensor in old.items()}
    for folder, weight in given:
        stored = read_delta(folder)
        for module in stored.manifest.modules:
            a, b = (half.double() for half in stored.pairs[module.name])
            new[module.tensor] += weight * module.alpha / module.rank * (b @ a)
        for one in stored.manifest.replaced:
            for name in one.tensors:
                new[name] += weight * (stored.replaced[one.name].double() - old[name])
    return new


MIXES = [
    [("qv", 1.0)],
    [("qv", 0.7), ("mlp", 0.3)],
    [("qv", 1.0), ("mlp", -1.0), ("norms", 0.25)],
    [("norms", 0.5), ("norms2", 0.5)],
    [("norms", 0.2), ("norms2", 0.3)],
]


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("kinds", MIXES, ids=str)
def test_a_mixture_is_the_sum_rounded_once(kinds, dtype, llama_base, deltas, tmp_path):
    given = [(deltas[kind], weight) for kind, weight in kinds]
    certificate = merge(llama_base, given, tmp_path / "merged", dtype=dtype)
    assert [delta["weight"] for delta in certificate["deltas"]] == [weight for _, weight in kinds]
    wanted, found, old = exact(llama_base, given), tensors(tmp_path / "merged"), tensors(llama_base)
    for name, tensor in found.items():
        assert tensor.dtype == DTYPES[dtype or "fp32"]
        # One rounding, but for fp32's own before it.
        assert (tensor == wanted[name].to(tensor.dtype)).double().mean() > (0.99 if dtype in ("bf16", "fp16") else 0.5), name
        torch.testing.assert_close(tensor.double(), wanted[name], atol=1e-6, rtol=torch.finfo(tensor.dtype).eps)
        row = certificate["tensors"].get(name) or certificate["converted"].get(name)
        if row is None:
            assert dtype is None or dtype == "fp32"
            assert torch.equal(tensor, old[name])
            continue
        assert row["largest_error"] == pytest.approx((tensor.double() - wanted[name]).abs().max().item(), rel=0.02, abs=1e-6)
        assert (name in certificate["tensors"]) == (row["changed_elements"] > 0)
    assert set(found) == set(old)


def test_what_vanishes_is_counted(llama_base, tmp_path):
    """A delta so small that most of it is lost in bf16, and none of it in fp32."""
    delta = make_delta(llama_base, tmp_path / "delta", scale=0.02)
    merge(llama_base, [], tmp_path / "low", dtype="bf16")
    for dtype, some in (("bf16", True), ("fp32", False)):
        certificate = merge(llama_base, delta, tmp_path / dtype, dtype=dtype)
        old, new = tensors(llama_base), tensors(tmp_path / dtype)
        for name, row in certificate["tensors"].items():
            assert row["changed_elements"] == old[name].numel()
            assert row["vanished_elements"] == int((new[name] == old[name].to(new[name].dtype)).sum())
            assert (row["vanished_elements"] > 0.2 * old[name].numel()) == some


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype_is_announced_and_the_index_is_true(dtype, llama_base, deltas, tmp_path):
    merge(llama_base, deltas["qv"], tmp_path / "merged", dtype=dtype)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")
    assert "torch_dtype" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
    index, old = (json.loads((place / "model.safetensors.index.json").read_text()) for place in (tmp_path / "merged", llama_base))
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors(tmp_path / "merged").values())
    assert index["metadata"]["total_parameters"] == old["metadata"]["total_parameters"]
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    theirs = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text()) if dtype == "fp32" else index
    assert index["metadata"] == theirs["metadata"]


def test_what_does_not_fit_the_dtype_is_refused(llama_base, tmp_path):
    delta = make_delta(llama_base, tmp_path / "delta", scale=300.0)
    with pytest.raises(JobError, match=r"is not finite after the merge in torch.float16"):
        merge(llama_base, delta, tmp_path / "merged", dtype="fp16")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([("labels", 1.0), ("labels", 1.0)], "each brings a head of its own"),
        ([("tokens", 1.0), ("tokens", 1.0)], "each brings added tokens of its own"),
        ([("labels", 0.5)], "brings a head, which the base has no share of.*Give it weight 1"),
        ([("tokens", -1.0)], "brings added tokens"),
        (
            [("norms", 1.0), ("norms2", 1.0)],
            r'each has a trained copy of "\S+", .* weights are 1 and 1\. Give positive weights that sum to 1',
        ),
        ([("norms", 1.5), ("norms2", -0.5)], "weights are 1.5 and -0.5"),
    ],
)
def test_what_cannot_be_added_is_refused_in_words(kinds, message, llama_base, deltas, tmp_path):
    with pytest.raises(JobError, match=message):
        merge(llama_base, [(deltas[kind], weight) for kind, weight in kinds], tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_heads_and_tokens_go_with_others(llama_base, deltas, tmp_path):
    merge(llama_base, [(deltas["labels"], 1.0), (deltas["tokens"], 1.0), (deltas["mlp"], 0.5)], tmp_path / "merged", workers=1)
    found = tensors(tmp_path / "merged")
    assert found["score.weight"].shape == (3, 32)
    assert found["model.embed_tokens.weight"].shape[0] == 325


def test_a_folder_whose_name_has_a_colon(deltas, llama_base, tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    for name in ("a", "a:0.5", "b:c"):
        shutil.copytree(deltas["qv"], name)
    assert parse_share("a") == (Path("a"), 1.0)
    assert parse_share("a:0.5") == (Path("a:0.5"), 1.0), "the folder of that name"
    assert parse_share("a:0.25") == (Path("a"), 0.25)
    assert parse_share("b:c") == (Path("b:c"), 1.0)
    assert parse_share("b:c:-0.5") == (Path("b:c"), -0.5)
    assert parse_share("nowhere:x") == (Path("nowhere:x"), 1.0)
    for weight in ("0", "nan", "inf"):
        with pytest.raises(JobError, match="Give a finite number that is not 0"):
            parse_share(f"a:{weight}")
    assert len(mix(llama_base, [parse_share("b:c:0.5"), parse_share("a:0.5")]).shares) == 2


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_workers_change_no_byte(workers, llama_base, deltas, tmp_path):
    merge(llama_base, deltas["mlp"], tmp_path / "default")
    merge(llama_base, deltas["mlp"], tmp_path / "other", workers=workers)
    assert weights(tmp_path / "default") == weights(tmp_path / "other")
