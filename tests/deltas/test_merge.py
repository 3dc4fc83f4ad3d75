"""Merging: exact but for one rounding, original layout, small memory, and nothing where something is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.deltas.merge import merge
from pipeline.job.errors import JobError
from pipeline.weights.delta import write_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.manifest import Module
from tests import bases
from tests.training import trained, write_job


@pytest.fixture(scope="module", params=["gpt2_base", "llama_base"])
def run(request, ranks1, tmp_path_factory):
    """(base, run folder) of a short training."""
    base = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("merge")
    trained(ranks1, write_job(folder, base), folder / "run", 'methods.0.targets=["q", "v", "mlp_out"]')
    return base, folder / "run"


def test_the_merged_model_answers_as_base_and_delta(run, tmp_path):
    base, folder = run
    merge(base, folder / "delta", tmp_path / "merged")
    tokens = torch.arange(50)[None] % 300
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "delta")
        np.testing.assert_allclose(merged, model(tokens).logits, atol=1e-5)
        with model.disable_adapter():
            assert (merged - model(tokens).logits).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("Blue").input_ids == AutoTokenizer.from_pretrained(base)("Blue").input_ids


def test_layout_and_unadapted_bytes_stay(run, tmp_path):
    base, folder = run
    certificate = merge(base, folder / "delta", tmp_path / "merged")
    assert {p.name for p in base.iterdir()} | {"merge.json"} == {p.name for p in (tmp_path / "merged").iterdir()}
    changed = set(certificate["tensors"])
    assert len(changed) == (6 if base.name == "gpt2" else 9)
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as old, safe_open(tmp_path / "merged" / file.name, "pt") as new:
            assert old.keys() == new.keys()
            assert old.metadata() == new.metadata()
            for name in sorted(old.keys()):
                assert torch.equal(old.get_tensor(name), new.get_tensor(name)) == (name not in changed), name


def test_the_certificate_tells_the_truth(run, tmp_path):
    base, folder = run
    merge(base, folder / "delta", tmp_path / "merged")
    certificate = json.loads((tmp_path / "merged" / "merge.json").read_text())
    for place, files in ((base, certificate["base"]["files"]), (tmp_path / "merged", certificate["result"]["files"])):
        assert files == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in place.glob("*.safetensors")}
    assert certificate["deltas"][0]["sha256"] == hashlib.sha256((folder / "delta" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype, run, tmp_path):
    base, folder = run
    low = tmp_path / "low"
    shutil.copytree(base, low)
    for file in low.glob("*.safetensors"):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    delta = _rebased(folder / "delta", low, tmp_path / "delta")
    certificate = merge(low, delta, tmp_path / "merged")
    tensors = load_file(delta / "adapter_model.safetensors")
    for module in certificate["deltas"][0]["manifest"]["modules"]:
        a, b = (tensors[f"base_model.model.{module['name']}.lora_{part}.weight"].double() for part in "AB")
        update = (b @ a) * (module["alpha"] / module["rank"])
        old, new = (_tensor(place, module["tensor"]) for place in (low, tmp_path / "merged"))
        exact = old.double() + (update.T if module["transposed"] else update)
        assert new.dtype == dtype
        # One rounding of the exact sum, but for sums so near a tie that fp32 decides it otherwise.
        assert (new == exact.to(dtype)).double().mean() > 0.999
        error = (new.double() - exact).abs().max()
        assert error == pytest.approx(certificate["tensors"][module["tensor"]]["largest_error"], rel=1e-2)


def test_another_base_is_refused_by_digest(run, tmp_path):
    base, folder = run
    other = (bases.make_gpt2 if base.name == "gpt2" else bases.make_llama)(tmp_path / "other", seed=9)
    with pytest.raises(JobError, match="digest"):
        merge(other, folder / "delta", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_damaged_delta_is_refused(run, tmp_path):
    base, folder = run
    shutil.copytree(folder / "delta", tmp_path / "delta")
    file = tmp_path / "delta" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(JobError, match="sha256"):
        merge(base, tmp_path / "delta", tmp_path / "merged")
    file.write_bytes(data[:100])
    with pytest.raises(JobError, match="damaged"):
        merge(base, tmp_path / "delta", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_failure_midway_leaves_nothing(run, tmp_path):
    base, folder = run

    def break_midway(items):
        yield from list(items)[:5]
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="fire"):
        merge(base, folder / "delta", tmp_path / "merged", break_midway)
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_below_three_of_the_largest_tensor(tmp_path):
    rows, columns, layers = 4096, 4096, 6
    base = tmp_path / "base"
    base.mkdir()
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(layers)]
    save_file({name: torch.randn(rows, columns).bfloat16() for name in names}, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text("{}")
    digests = file_digests((base / "model.safetensors",))
    modules = tuple(Module(name.removesuffix(".weight"), name, False, 8, 16.0) for name in names)
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module.name}.lora_A.weight"] = torch.randn(8, columns)
        tensors[f"base_model.model.{module.name}.lora_B.weight"] = torch.randn(rows, 8)
    manifest = {"base": "x", "base_digest": base_digest(digests), "base_files": digests, "job_digest": "", "step": 1}
    write_delta(tmp_path / "delta", tensors, {}, {**manifest, "parameters": 100_000, "modules": modules})
    script = (
        "import resource, sys; from pathlib import Path; import torch; from pipeline.deltas.merge import merge\n"
        "torch.ones(8) @ torch.ones(8)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); merge(*map(Path, sys.argv[1:])); print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(base), str(tmp_path / "delta"), str(tmp_path / "merged")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout)
    assert grown < 3 * rows * columns * 2


def _tensor(folder: Path, name: str) -> torch.Tensor:
    return next(load_file(file)[name] for file in folder.glob("*.safetensors") if name in load_file(file))


def _rebased(delta: Path, base: Path, target: Path) -> Path:
    """The same delta, said to belong to another base."""
    shutil.copytree(delta, target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["base_files"] = file_digests(tuple(base.glob("*.safetensors")))
    manifest["base_digest"] = base_digest(manifest["base_files"])
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target
