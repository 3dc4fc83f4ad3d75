"""The certificate's comparison of logits: against PEFT's own unmerged model, and a skip that says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import logits
from pipeline.deltas.merge import merge
from pipeline.logits import PROMPTS, compare_logits
from pipeline.weights.atomic import write_json
from pipeline.weights.manifest import read_manifest


def peft_config(delta: Path) -> None:
    """What PEFT needs to load a delta of the tests."""
    first = read_manifest(delta).modules[0]
    names = [module.name for module in read_manifest(delta).modules]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": first.rank, "lora_alpha": first.alpha, "target_modules": names}
    write_json(delta / "adapter_config.json", config)


@pytest.mark.parametrize(("dtype", "most"), [("fp32", 2e-5), ("bf16", 1.0)])
def test_it_is_what_peft_unmerged_and_the_merged_model_differ_by(dtype, most, llama_base, deltas, tmp_path):
    certificate = merge(llama_base, deltas["mlp"], tmp_path / "merged", dtype=dtype, check=compare_logits)
    peft_config(deltas["mlp"])
    tokenizer = AutoTokenizer.from_pretrained(llama_base)
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_base, dtype=torch.float32), deltas["mlp"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    pairs = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            pairs.append((apart(ids).logits[0], merged(ids).logits[0]))
    found = certificate["logits"]
    assert found == json.loads((tmp_path / "merged" / "merge.json").read_text())["logits"]
    differences = torch.cat([(a - b).abs().flatten() for a, b in pairs])
    assert found["largest_difference"] == pytest.approx(float(differences.max()), abs=1e-5)
    assert found["mean_difference"] == pytest.approx(float(differences.mean()), abs=1e-6)
    assert found["equal_argmax"] == pytest.approx(sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs) / found["positions"])
    assert found["positions"] == sum(len(a) for a, _ in pairs)
    assert 0 < found["largest_difference"] < most
    assert (found["largest_difference"] > 1e-3) == (dtype == "bf16")


@pytest.mark.parametrize(
    "kinds", [[("norms", 1.0)], [("qv", 0.7), ("norms", -0.4)], [("labels", 1.0), ("qv", 0.5)], [("tokens", 1.0)]], ids=str
)
def test_every_form_of_delta_is_put_beside_the_base(kinds, llama_base, deltas, tmp_path):
    given = [(deltas[kind], weight) for kind, weight in kinds]
    certificate = merge(llama_base, given, tmp_path / "merged", check=lambda mixture, folder: compare_logits(mixture, folder, ["<3> Blue"]))
    found = certificate["logits"]
    assert found["prompts"] == 1
    assert found["largest_difference"] < 1e-4
    assert found["equal_argmax"] == 1.0


def test_where_it_cannot_be_done_the_certificate_says_why(llama_base, deltas, tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "_free_bytes", lambda: 1000)
    found = merge(llama_base, deltas["qv"], tmp_path / "merged", check=compare_logits)["logits"]
    assert "a model in fp32 takes 0.2 MiB of memory, and 0.0 MiB are free" in found["skipped"]
    assert merge(llama_base, deltas["qv"], tmp_path / "unasked")["logits"] is None
