"""The plan held to its word: steps on CPU ranks, every tensor storage followed. benchmarks/plan_accuracy.py has a wide grid of them."""

from __future__ import annotations

import json

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from benchmarks.plan_rank import measure, predict

LEAN = {"stage": 3, "stage3_prefetch_bucket_size": 60_000, "stage3_max_live_parameters": 90_000, "stage3_max_reuse_distance": 0}
SMALL = "stage3_param_persistence_threshold"
CONFIGS = {
    "lean": {**LEAN, SMALL: 1000},
    "reused": {**LEAN, "stage3_max_live_parameters": 200_000, "stage3_max_reuse_distance": 90_000, SMALL: 10_000},
    "at_once": {"stage": 3, SMALL: 1000},
}
JOB = """
[base]
model = "{base}"
dtype = "fp32"
[[methods]]
kind = "lora"
[task]
kind = "jsonl"
data = "{data}"
"""
RECOMPUTE, BF16, INT8 = "memory.gradient_checkpointing=true", "base.dtype=bf16", "memory.int8_gathers=true"
ALL = "methods.0.targets=['q','v','o','mlp_in']"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for name, keys in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": keys}))
    GPT2LMHeadModel(
        GPT2Config(vocab_size=700, n_positions=256, n_embd=96, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder / "gpt2")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=900, max_position_embeddings=256, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
        )
    ).save_pretrained(folder / "llama")  # fmt: skip
    RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=700, max_position_embeddings=258, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6
        )
    ).save_pretrained(folder / "roberta")
    for base in ("gpt2", "llama", "roberta"):
        (folder / f"{base}.toml").write_text(JOB.format(base=folder / base, data=folder / "data.jsonl"))
    return folder


@pytest.mark.parametrize(
    ("base", "changes", "lengths", "micro_batches"),
    [
        ("gpt2", (), [200, 200, 200], 1),
        ("gpt2", (BF16, RECOMPUTE), [200, 120, 30], 2),
        ("gpt2", ("lean", ALL), [200, 200], 1),
        ("llama", (BF16,), [200, 120, 30], 1),
        ("llama", ("at_once", BF16, "methods.0.dropout=0.1"), [200, 100], 2),
        ("llama", (RECOMPUTE, "methods.0.rank=16"), [250, 250], 1),
        ("llama", ("at_once", INT8), [200, 100], 2),
        ("gpt2", ("lean", BF16, INT8), [200, 200], 1),
        ("roberta", (), [200, 120, 30], 1),
        ("roberta", (BF16, RECOMPUTE, ALL), [200, 200], 1),
        ("roberta", ("reused", RECOMPUTE), [200, 200], 1),
        ("llama", ("memory.config=zero0.json", ALL), [200, 200], 1),
        ("gpt2", (BF16, "methods.0.kind=full"), [200, 120, 30], 2),
        ("llama", ("lean", RECOMPUTE, "methods.0.kind=full"), [200, 200], 1),
        ("roberta", (BF16, "methods.0.kind=full_top"), [200, 200], 1),
        ("gpt2", ("methods.0.kind=prefix_layer", RECOMPUTE), [200, 120, 30], 1),
        ("roberta", ("methods.0.kind=adapter", "methods.0.placement=drop", "methods.0.first_layer=1"), [200, 120, 30], 1),
    ],
)
def test_memory_is_what_was_said(ranks2, jobs, base, changes, lengths, micro_batches):
    changes = [f"memory.config={jobs / change}.json" if change in CONFIGS else change for change in changes]
    case = {"job": str(jobs / f"{base}.toml"), "set": changes, "tokens": lengths, "label_tokens": 150, "micro_batches": micro_batches}
    case["outputs"] = 3 if base == "roberta" else 0
    said, found = predict(case, 2), ranks2.run(measure, case)[0]
    for name in ("base_shard", "delta", "gradients", "optimizer"):
        assert said[name] == found[name], name
    assert said["gathered_elements"] == pytest.approx(found["gathered_elements"], rel=0.05)
    assert said["kept"] == pytest.approx(found["kept"], rel=0.03)
    assert said["step"] == pytest.approx(found["step"], rel=0.10)
    assert said["save"] == pytest.approx(found["save"], rel=0.10)


def test_memory_of_groups_is_what_was_said(ranks4, jobs):
    (jobs / "pairs.json").write_text(json.dumps({"zero_optimization": {**LEAN, "zero_hpz_partition_size": 2}}))
    changes = [f"memory.config={jobs / 'pairs.json'}"]
    case = {"job": str(jobs / "gpt2.toml"), "set": changes, "tokens": [200, 200], "label_tokens": 150, "micro_batches": 1, "outputs": 0}
    said, found = predict(case, 4), ranks4.run(measure, case)[0]
    assert said["base_shard"] == found["base_shard"]
    assert said["gathered_elements"] == pytest.approx(found["gathered_elements"], rel=0.05)
    assert said["step"] == pytest.approx(found["step"], rel=0.10)
